"""What a step of `--method everything` chose between, and what it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """A model with fewer parameters than its parent.

    parameters         how many linear ones fewer
    to_parent          linear CKA of its hidden states with the parent's, on held-out windows; to_dense: with the dense
                       model's
    block, site, loss  the layer that it is without, and what the parent's predictions lose without that: KL divergence
                       in nats per token
    """

    parameters: int
    to_parent: float
    to_dense: float
    block: int | None = None
    site: str | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Step:
    """Without a layer, or with fewer units; None: there was no such candidate. Which was `taken`: `layer`, `units`."""

    layer: Candidate | None
    units: Candidate | None
    taken: str

    @property
    def choice(self) -> Candidate:
        found = self.layer if self.taken == "layer" else self.units
        assert found is not None
        return found

    @classmethod
    def of(cls, layer: Candidate | None = None, units: Candidate | None = None) -> Step:
        """The candidate whose hidden states are more like its parent's is taken; of two alike the one without a layer,
        which is faster.
        """
        by_layer = layer is not None and (units is None or layer.to_parent >= units.to_parent)
        return cls(layer, units, "layer" if by_layer else "units")

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Step:
        """From what `dataclasses.asdict` gives."""
        made = {name: None if (found := entry[name]) is None else Candidate(**found) for name in ("layer", "units")}
        return cls(**made, taken=entry["taken"])


def why_steps(steps: Sequence[Step]) -> str:
    """What the steps took, in one sentence."""
    layers = Counter(step.choice.site for step in steps if step.taken == "layer")
    taken = [f"{count} {site}" for site, count in sorted(layers.items(), key=str)]
    units = sum(step.taken == "units" for step in steps)
    return (
        f"in {len(steps)} steps, each without a layer or without as many parameters of units, whichever left the "
        f"hidden states more like those before it: {', '.join([*taken, f'{units} times units'])}"
    )
