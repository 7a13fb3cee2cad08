"""Mixtures of experts: blocks with several MLPs, of which a router picks some for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .attention import Shape
from .sites import MLP, SHARED, Rows, Site

# Where the experts of a block are. In transformers 5 they are one tensor for each layer, of all experts; while pruning
# each has layers of its own (`dense.experts`), as in the files of a checkpoint.
EXPERTS = "mlp.experts"


@dataclass(frozen=True)
class Mixture:
    """The fields of a config that say how large a mixture is.

    neurons  of an expert; experts: how many there are; picked: how many of them work on a token
    shared   neurons of the MLP beside the experts, for all tokens; None: there is none
    dense    neurons of the MLP of blocks without experts; None: all have some
    """

    neurons: str = "intermediate_size"
    experts: str = "num_experts"
    picked: str = "num_experts_per_tok"
    shared: str | None = None
    dense: str | None = None

    def sparse(self, config: Any, index: int | None) -> bool:
        """Whether a block has experts; None: whether any can have some."""
        if self.dense is None or index is None:
            return True
        return index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0

    def shape(self, config: Any, of: Shape, index: int | None) -> Shape:
        """The dense model's block `index`, or one with experts; of: the same without a look at them."""
        if not self.sparse(config, index):
            assert self.dense is not None
            return replace(of, neurons=getattr(config, self.dense))
        shared = getattr(config, self.shared) if self.shared else 0
        return replace(of, neurons=getattr(config, self.neurons), experts=getattr(config, self.experts), shared=shared)

    @property
    def stock(self) -> dict[str, Callable[[Any, int, int | None], dict[str, int]]]:
        """For `Family.stock`: one field counts the neurons of blocks with experts, another those of blocks without."""
        return {"neurons": self._neurons} | ({} if self.shared is None else {SHARED: self._shared})

    def _neurons(self, config: Any, count: int, index: int | None) -> dict[str, int]:
        dense = None if self.sparse(config, index) else self.dense
        return {dense or self.neurons: count}

    def _shared(self, config: Any, count: int, index: int | None) -> dict[str, int]:
        assert self.shared is not None
        return {self.shared: count}


def mlps(shape: Shape, stream: str | None) -> tuple[Site, ...]:
    """The gated MLP of a block, or that beside its experts, and its experts: with Llama's names."""
    if not shape.experts:
        return (_gated(MLP, "neurons", shape.neurons, "mlp", stream),)
    experts = _gated(MLP, "neurons", shape.neurons, f"{EXPERTS}.0", stream)
    experts = replace(experts, holder=EXPERTS, experts=shape.experts)
    # What the shared MLP gives is scaled by a gate, token by token, before it joins the stream.
    return (*([_gated(SHARED, SHARED, shape.shared, "mlp.shared_expert", None)] if shape.shared else []), experts)


def _gated(name: str, unit: str, units: int, mlp: str, stream: str | None) -> Site:
    rows = (Rows(f"{mlp}.gate_proj"), Rows(f"{mlp}.up_proj"))
    return Site(name, unit, units, 1, rows, f"{mlp}.down_proj", stream)
