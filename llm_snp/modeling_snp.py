"""Hugging Face classes for pruned models: a width of its own for every decoder block.

A copy of this file lies beside the weights of each pruned checkpoint, so that

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

works where llm_snp is not installed. Hence it imports torch and transformers only. The forward pass is the stock
one: the stock model is built and its linear layers are narrowed.
"""

from __future__ import annotations

from torch import nn
from transformers import OPTConfig, OPTForCausalLM
from transformers.models.opt.modeling_opt import OPTDecoderLayer


class SnpOPTConfig(OPTConfig):  # type: ignore[misc]
    """OPT with `block_widths`: for each block a dict of `heads`, `head_dim` and `neurons` that are left.

    All other fields describe the dense model; in particular the softmax scale is that of the dense head_dim.
    """

    model_type = "snp_opt"
    block_widths = None


class SnpOPTForCausalLM(OPTForCausalLM):  # type: ignore[misc]
    """`OPTForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpOPTConfig

    def __init__(self, config: SnpOPTConfig):
        super().__init__(config)
        blocks = self.model.decoder.layers
        widths = config.block_widths
        if widths is None or len(widths) != len(blocks):
            found = "none" if widths is None else str(len(widths))
            raise ValueError(f"config.block_widths has {found} entries, expected one for each of {len(blocks)} blocks")
        for block, width in zip(blocks, widths, strict=True):
            narrow_opt_block(block, **width)


def narrow_opt_block(block: OPTDecoderLayer, heads: int, head_dim: int, neurons: int) -> None:
    """Narrow an `OPTDecoderLayer` in place: q, k, v to `heads * head_dim` rows, the MLP to `neurons`.

    Leading rows and columns stay: the caller loads the weights afterwards, and a freshly built model keeps its
    initialisation. `scaling` stays that of the dense head_dim.
    """
    attention = block.self_attn
    width = heads * head_dim
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        _narrow(projection, rows=width)
    _narrow(attention.out_proj, columns=width)
    _narrow(block.fc1, rows=neurons)
    _narrow(block.fc2, columns=neurons)
    attention.num_heads, attention.head_dim = heads, head_dim
    attention.embed_dim = width  # transformers 4 reshapes the attention output to embed_dim


def _narrow(linear: nn.Linear, rows: int | None = None, columns: int | None = None) -> None:
    """Keep the first `rows` outputs and `columns` inputs of `linear`, in place."""
    rows = linear.out_features if rows is None else rows
    columns = linear.in_features if columns is None else columns
    if rows > linear.out_features or columns > linear.in_features:
        raise ValueError(f"cannot narrow {tuple(linear.weight.shape)} to {(rows, columns)}")
    linear.weight = nn.Parameter(linear.weight.detach()[:rows, :columns].clone(), linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:rows].clone(), linear.bias.requires_grad)
    linear.out_features, linear.in_features = rows, columns
