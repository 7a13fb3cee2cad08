"""Mixtures of experts: blocks with several MLPs, of which a router picks some for each token."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .attention import Shape
from .sites import EXPERTS, MLP, SHARED, Rows, Site

# Where the experts of a block are. In transformers 5 they are one tensor for each layer, of all experts; while pruning
# each has layers of its own (`dense.experts`), as in the files of a checkpoint.
HOLDER = "mlp.experts"
ROUTER = "mlp.gate"
OF_EXPERT = re.compile(rf"(.*\.{re.escape(HOLDER)})\.(\d+)(\..*)")


@dataclass(frozen=True)
class Mixture:
    """The fields of a config that say how large a mixture is, and how it routes.

    neurons  of an expert; experts: how many there are; picked: how many of them work on a token
    shared   neurons of the MLP beside the experts, for all tokens; None: there is none
    dense    neurons of the MLP of blocks without experts; None: all have some
    divided  whether the weights of those that are picked are divided by their sum; None: they always are
    """

    neurons: str = "intermediate_size"
    experts: str = "num_experts"
    picked: str = "num_experts_per_tok"
    shared: str | None = None
    dense: str | None = None
    divided: str | None = None

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
        neurons, experts, picked = (getattr(config, name) for name in (self.neurons, self.experts, self.picked))
        return replace(of, neurons=neurons, experts=experts, picked=picked, shared=shared)

    def divides(self, config: Any) -> bool:
        """Whether the routing weights of a token sum to one."""
        return self.divided is None or bool(getattr(config, self.divided))

    @property
    def stock(self) -> dict[str, Callable[[Any, int, int | None], dict[str, int]]]:
        """For `Family.stock`: one field counts the neurons of blocks with experts, another those of blocks without."""
        counted = {"neurons": self._neurons, EXPERTS: self._experts}
        return counted | ({} if self.shared is None else {SHARED: self._shared})

    def _neurons(self, config: Any, count: int, index: int | None) -> dict[str, int]:
        dense = None if self.sparse(config, index) else self.dense
        return {dense or self.neurons: count}

    def _experts(self, config: Any, count: int, index: int | None) -> dict[str, int]:
        # Under the name that its config has in a file.
        return {getattr(config, "attribute_map", {}).get(self.experts, self.experts): count}

    def _shared(self, config: Any, count: int, index: int | None) -> dict[str, int]:
        assert self.shared is not None
        return {self.shared: count}


def expert_of(name: str) -> tuple[int, str] | None:
    """Of a tensor of one expert, which it is, and the name without that, as of one tensor of all experts."""
    found = OF_EXPERT.fullmatch(name)
    return None if found is None else (int(found[2]), f"{found[1]}{found[3]}")


def mlps(shape: Shape, stream: str | None) -> tuple[Site, ...]:
    """The gated MLP of a block, or that beside its experts, and its experts: with Llama's names."""
    if not shape.experts:
        return (_gated(MLP, "neurons", shape.neurons, "mlp", stream),)
    experts = _gated(MLP, "neurons", shape.neurons, f"{HOLDER}.0", stream)
    experts = replace(experts, holder=HOLDER, experts=shape.experts, picked=shape.picked, router=ROUTER)
    # What the shared MLP gives is scaled by a gate, token by token, before it joins the stream.
    return (*([_gated(SHARED, SHARED, shape.shared, "mlp.shared_expert", None)] if shape.shared else []), experts)


def _gated(name: str, unit: str, units: int, mlp: str, stream: str | None) -> Site:
    rows = (Rows(f"{mlp}.gate_proj"), Rows(f"{mlp}.up_proj"))
    return Site(name, unit, units, 1, rows, f"{mlp}.down_proj", stream)
