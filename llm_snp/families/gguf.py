"""What llama.cpp's architectures can express of each family, as data: a row per architecture.

The names of tensors are those of the `gguf` package (`gguf.get_tensor_name_map`); what it cannot know stands here:
which rows are in another order, what the engine's graph takes for granted, what of a config becomes metadata.
Read in llama.cpp of 2026-10, and each row loaded by it in `tests/result/test_gguf.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SILU = {"hidden_act": ("silu", "swish")}
TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
RMS = {"layer_norm_rms_eps": "rms_norm_eps"}
# llama.cpp's GELU is the approximation by tanh everywhere; of the exact one log-probabilities differ by some 1e-3.
GELU = {"hidden_act": ("gelu", *TANH)}


@dataclass(frozen=True)
class Gguf:
    """An architecture of llama.cpp, and how a family's tensors and config become its own.

    name         as in `general.architecture`
    blockwise    whether every block may have a number of heads, key/value heads and neurons of its own
    heads        whether the heads may be fewer than the model's width has room for
    grouped      whether key/value heads may be fewer than query heads
    rotary       what of a head positions turn: all of it, a part, or nothing
    interleaved  whether rotary pairs are rows 2i and 2i + 1, not i and i + w/2: rows of query and key change places
    fused        how query, key and value lie in a fused layer of the checkpoint, which the engine wants one after the
                 other: head by head ("heads"), or key/value heads with their query heads ("groups"). "parts": they are
                 layers of their own, which the engine wants as one
    transposed   whether weights of blocks are stored (inputs, outputs)
    norm_offset  what is added to the weights of all norms
    output       whether the engine wants a head of its own also where it is tied to the embedding
    takes        field of the config -> values with which the engine's graph is right; None stands for a field that is
                 not there
    fields       `GGUFWriter.add_...` -> field of the config
    constants    the same -> value
    scalings     rope types that it can do
    period       every so many blocks one sees all positions, the others a window; None: the engine knows no windows
    scale        the field that has the width by whose root the scores are divided: what the engine does by itself in
                 models of other than `large` blocks is the width of a head, in those the model's by the heads
    tokens       those by which a vocabulary is one whose special tokens take the spaces behind them along: the engine
                 tells such a model by its name, and does not load one of that name without them
    """

    name: str
    blockwise: bool = False
    heads: bool = True
    grouped: bool = True
    rotary: Literal["whole", "part", "none"] = "whole"
    interleaved: bool = False
    fused: Literal["heads", "groups", "parts"] | None = None
    transposed: bool = False
    norm_offset: float = 0.0
    output: bool = False
    takes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    period: int | None = None
    scale: str | None = None
    large: int = 0
    tokens: tuple[str, ...] = ()


LLAMA_ROPE = ("default", "linear", "yarn", "llama3")
GEMMA: dict[str, Any] = {"norm_offset": 1.0, "fields": RMS}
GEMMA_ACT = {
    "hidden_activation": (*TANH, None),
    "hidden_act": (*TANH, "gelu", None),  # the first Gemma's; what it means by "gelu" is the approximation
    "tie_word_embeddings": (True,),
    "attention_bias": (False, None),
}
NOT_DIVIDED = {"norm_topk_prob": (False,)}
NO_BIAS = {"attention_bias": (False, None), "mlp_bias": (False, None)}

DECI = Gguf("deci", blockwise=True, interleaved=True, takes=SILU, fields=RMS, scalings=LLAMA_ROPE)
LLAMA = Gguf("llama", interleaved=True, takes=SILU, fields=RMS, scalings=LLAMA_ROPE)
# Model type -> its architectures, the first that can express a result is taken.
GGUF: dict[str, tuple[Gguf, ...]] = {
    "llama": (LLAMA, DECI),
    "mistral": (LLAMA, DECI),
    "qwen2": (Gguf("qwen2", heads=False, takes=SILU, fields=RMS), DECI),
    "qwen3": (
        Gguf("qwen3", takes=SILU | NO_BIAS, fields=RMS),
        # Norms of queries and keys, and widths of their own: OpenELM. Its head is the embedding.
        Gguf(
            "openelm",
            blockwise=True,
            fused="parts",
            takes=SILU | NO_BIAS | {"tie_word_embeddings": (True,)},
            fields=RMS,
        ),
    ),
    "gemma": (Gguf("gemma", takes=GEMMA_ACT, **GEMMA),),
    "gemma2": (
        Gguf(
            "gemma2",
            takes=GEMMA_ACT,
            norm_offset=1.0,
            fields=RMS
            | {
                "attn_logit_softcapping": "attn_logit_softcapping",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            period=2,
            scale="query_pre_attn_scalar",
            large=46,
        ),
    ),
    "gemma3_text": (
        Gguf(
            "gemma3",
            takes=GEMMA_ACT | {"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
            scalings=("default", "linear"),
            period=6,
            scale="query_pre_attn_scalar",
            large=62,
            **GEMMA,
        ),
    ),
    "phi": (
        Gguf(
            "phi2",
            heads=False,
            rotary="part",
            takes={"hidden_act": TANH, "qk_layernorm": (False, None)},
            fields={"layer_norm_eps": "layer_norm_eps"},
            output=True,
        ),
    ),
    "phi3": (
        Gguf(
            "phi3",
            heads=False,
            rotary="part",
            takes=SILU,
            fields=RMS,
            tokens=("<unk>", "<s>", "</s>", "<|endoftext|>"),
        ),
    ),
    "gpt2": (
        Gguf(
            "gpt2",
            heads=False,
            rotary="none",
            transposed=True,
            takes={
                "activation_function": TANH,
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
            },
            fields={"layer_norm_eps": "layer_norm_epsilon"},
        ),
    ),
    "gpt_neox": (
        Gguf(
            "gptneox",
            heads=False,
            rotary="part",
            fused="heads",
            takes=GELU | {"attention_bias": (True, None)},
            fields={"layer_norm_eps": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
            output=True,
        ),
    ),
    "falcon": (
        Gguf(
            "falcon",
            heads=False,
            fused="groups",
            takes={"activation": ("gelu", *TANH), "alibi": (False,), "bias": (False,), "parallel_attn": (True,)},
            fields={"layer_norm_eps": "layer_norm_epsilon"},
        ),
    ),
    "olmo": (
        Gguf(
            "olmo",
            heads=False,
            interleaved=True,
            takes=SILU | NO_BIAS,
            fields={"clamp_kqv": "clip_qkv"},
            constants={"layer_norm_eps": 1e-5},  # of the class; no field of its config
        ),
    ),
    "olmo2": (Gguf("olmo2", heads=False, takes=SILU | NO_BIAS, fields=RMS, output=True),),
    "olmo3": (Gguf("olmo2", heads=False, takes=SILU | NO_BIAS, fields=RMS, output=True, period=4),),
    # Mixtures of experts, which all four have in every block, each as many of as many neurons. Whether the weights of a
    # token are divided by their sum is part of the graph, whatever the file says; that of `llama` divides them.
    "mixtral": (LLAMA,),
    "qwen2_moe": (Gguf("qwen2moe", heads=False, takes=SILU | NOT_DIVIDED, fields=RMS, output=True),),
    "qwen3_moe": (Gguf("qwen3moe", takes=SILU | NO_BIAS | {"norm_topk_prob": (True,)}, fields=RMS),),
    "olmoe": (
        Gguf(
            "olmoe",
            heads=False,
            grouped=False,
            takes=SILU | NO_BIAS | NOT_DIVIDED | {"clip_qkv": (None,)},
            fields=RMS,
            output=True,
        ),
    ),
}


@dataclass(frozen=True)
class Positions:
    """How positions enter, as in a config of any transformers.

    context   tokens for which the model is made
    base      of the rotary angles, in blocks that see all positions; local: in those that see a window
    share     of a head's dimensions that are turned
    scaling   type and parameters of what stretches the angles of blocks that see all positions
    window    how many tokens such blocks see; None: there are none
    slides    of each block, whether it sees a window only
    """

    context: int
    base: float
    local: float
    share: float
    scaling: Mapping[str, Any]
    window: int | None
    slides: tuple[bool, ...]


def positions_of(config: Any) -> Positions:
    found = getattr(config, "rope_parameters", None) or {}  # from transformers 5 on
    everywhere, local = found.get("full_attention", found), found.get("sliding_attention", found)
    scaling = dict(everywhere if found else getattr(config, "rope_scaling", None) or {})
    scaling.pop("rope_theta", None)
    base = everywhere.get("rope_theta") or getattr(config, "rope_theta", None)
    base = base or getattr(config, "rotary_emb_base", None) or 10000.0
    share = scaling.pop("partial_rotary_factor", None) or getattr(config, "partial_rotary_factor", None)
    share = share or getattr(config, "rotary_pct", None) or 1.0
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    slides = tuple(window is not None and kind == "sliding_attention" for kind in kinds)
    return Positions(
        context=config.max_position_embeddings,
        base=float(base),
        local=float(local.get("rope_theta") or getattr(config, "rope_local_base_freq", None) or base),
        share=float(share),
        scaling={"rope_type": scaling.pop("type", "default")} | scaling,
        window=window if any(slides) else None,
        slides=slides,
    )
