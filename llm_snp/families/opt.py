"""OPT (Zhang et al., arXiv 2205.01068): facebook/opt-125m to opt-66b and models of the same architecture."""

from __future__ import annotations

from typing import Any

from transformers.activations import ACT2FN

from ..errors import UnsupportedModelError
from ..modeling_snp import SnpOPTConfig, SnpOPTForCausalLM, narrow_opt_block
from .base import Attention, Family, Site


def _sites(config: Any) -> tuple[Site, ...]:
    # Before its first layer norm (opt-350m puts it after) the residual stream is what the attention itself reads.
    before = config.do_layer_norm_before
    return (
        Site(
            name="attention",
            unit="heads",
            units=config.num_attention_heads,
            group=config.hidden_size // config.num_attention_heads,
            producers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            consumer="self_attn.out_proj",
            stream="self_attn_layer_norm" if before else "self_attn.q_proj",
        ),
        Site(
            name="mlp",
            unit="neurons",
            units=config.ffn_dim,
            group=1,
            producers=("fc1",),
            consumer="fc2",
            stream="final_layer_norm" if before else "fc1",
            nonnegative=config.activation_function == "relu",
        ),
    )


def _attention(config: Any) -> Attention:
    heads = config.num_attention_heads
    return Attention(
        site="attention",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        heads=heads,
        head_dim=config.hidden_size // heads,
    )


def _widths(config: Any, kept: dict[str, int]) -> dict[str, int]:
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    return {
        "heads": kept.get("heads", heads),
        "head_dim": kept.get("dims", head_dim),
        "neurons": kept.get("neurons", config.ffn_dim),
    }


def _stock_fields(config: Any, widths: list[dict[str, int]]) -> dict[str, Any] | None:
    dense = _widths(config, {})
    neurons = {width["neurons"] for width in widths}
    whole = all(width["heads"] == dense["heads"] and width["head_dim"] == dense["head_dim"] for width in widths)
    return {"ffn_dim": neurons.pop()} if whole and len(neurons) == 1 else None


SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "ffn_dim", "vocab_size", "max_position_embeddings")


def _check(config: Any) -> None:
    for name in SIZES:
        if getattr(config, name) < 1:
            raise UnsupportedModelError(f"{name} is {getattr(config, name)} in config.json; it must be at least 1")
    if config.activation_function not in ACT2FN:
        raise UnsupportedModelError(
            f"activation_function {config.activation_function!r} in config.json is none that transformers has"
        )
    if config.hidden_size % config.num_attention_heads:
        raise UnsupportedModelError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
        )


OPT = Family(
    model_type="opt",
    pruned_model_type=SnpOPTConfig.model_type,
    blocks="model.decoder.layers",
    sites=_sites,
    attention=_attention,
    widths=_widths,
    narrow=narrow_opt_block,
    pruned_config=SnpOPTConfig,
    pruned_class=SnpOPTForCausalLM,
    stock_fields=_stock_fields,
    # Several facebook/opt-*.bin were saved from the base model, without "model."; older conversions named the final
    # layer norm after fairseq.
    renames=((r"^decoder\.", "model.decoder."), (r"^model\.decoder\.layer_norm\.", "model.decoder.final_layer_norm.")),
    check=_check,
)
