"""OPT with a width of its own for every decoder block."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, OPTModel
from transformers.models.opt.modeling_opt import OPTAttention

from .narrowing import Narrowed, narrow_layer


class SnpOPTConfig(OPTConfig):  # type: ignore[misc]
    """OPT with `block_widths`, a dict of what is left of each block: `heads`, `head_dim` and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_opt"
    block_widths = None


def narrow_opt_block(block: Any, heads: int, head_dim: int, neurons: int) -> None:
    """Narrow an `OPTDecoderLayer` in place: q, k, v to `heads * head_dim` rows, the MLP to `neurons`.

    `scaling` stays that of the dense head_dim.
    """
    attention = block.self_attn
    width = heads * head_dim
    if type(attention) is not OPTAttention and head_dim < attention.head_dim:
        # Before transformers 4.52 fast kernels had classes of their own, which scale by the width that they see.
        attention.q_proj.register_forward_hook(partial(_scale, (head_dim / attention.head_dim) ** 0.5))
        attention.scaling = head_dim**-0.5
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        narrow_layer(projection, rows=width)
    narrow_layer(attention.out_proj, columns=width)
    if neurons:
        narrow_layer(block.fc1, rows=neurons)
        narrow_layer(block.fc2, columns=neurons)
    else:  # there is no module that has both of them, see `Narrowed.narrow`
        block.fc1 = nn.Identity()
    attention.num_heads, attention.head_dim = heads, head_dim
    attention.embed_dim = width  # transformers 4 reshapes the attention output to embed_dim


def _scale(factor: float, layer: Any, args: Any, output: Tensor) -> Tensor:
    """A forward hook."""
    return output * factor


class SnpOPTModel(Narrowed, OPTModel):  # type: ignore[misc]
    """`OPTModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpOPTConfig
    blocks_path = "decoder.layers"
    cut = staticmethod(narrow_opt_block)
    consumers = ("self_attn.out_proj", "fc2")


class SnpOPTForCausalLM(Narrowed, OPTForCausalLM):  # type: ignore[misc]
    """`OPTForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpOPTConfig
    base_class = SnpOPTModel
    blocks_path = "model.decoder.layers"
    cut = staticmethod(narrow_opt_block)
    consumers = ("self_attn.out_proj", "fc2")
