"""A tiny model of every family, with random weights, in the variants that pruning has to tell apart."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import POSITIONS, VOCABULARY, copy_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llm_snp.dense.experts import one_by_one
from llm_snp.families import FAMILIES

BLOCKS, HIDDEN, NEURONS = 3, 32, 48
GROUPED = {
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": BLOCKS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
WIDE = GROUPED | {"head_dim": 8}  # heads that are wider together than the model
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 8.0]}  # of heads of 4
FALCON = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 8,
    "num_hidden_layers": BLOCKS,
    "ffn_hidden_size": NEURONS,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "alibi": False,
}
NEOX = {
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_attention_heads": 4,
    "num_hidden_layers": BLOCKS,
    "max_position_embeddings": POSITIONS,
    "rotary_pct": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 2}
# name -> model_type and config fields
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": (
        "opt",
        {
            "hidden_size": HIDDEN,
            "ffn_dim": NEURONS,
            "num_attention_heads": 4,
            "num_hidden_layers": BLOCKS,
            "word_embed_proj_dim": HIDDEN,
            "max_position_embeddings": POSITIONS,
            "dropout": 0.0,
        },
    ),
    "llama": ("llama", GROUPED),
    "llama-one-query-each": ("llama", GROUPED | {"num_key_value_heads": 8, "attention_bias": True, "mlp_bias": True}),
    "llama-one-key": ("llama", GROUPED | {"num_key_value_heads": 1}),
    "llama-tied": ("llama", WIDE | {"tie_word_embeddings": True}),
    "llama-3.1": ("llama", GROUPED | {"rope_scaling": LLAMA_3, "num_key_value_heads": 2}),
    "mistral": ("mistral", WIDE | {"sliding_window": 16}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2-partly-sliding": (
        "qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", WIDE),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", WIDE | {"query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3": ("gemma3_text", WIDE | {"query_pre_attn_scalar": 8, "sliding_window": 16, "sliding_window_pattern": 2}),
    "phi": ("phi", GROUPED),
    "phi-normed": ("phi", GROUPED | {"qk_layernorm": True}),
    "phi3": ("phi3", GROUPED),
    "phi3-turned-in-part": ("phi3", WIDE | {"partial_rotary_factor": 0.5}),
    "phi3-long": ("phi3", GROUPED | {"rope_scaling": LONG, "original_max_position_embeddings": 32}),
    "gpt2": (
        "gpt2",
        {"n_embd": HIDDEN, "n_head": 4, "n_layer": BLOCKS, "n_inner": NEURONS, "n_positions": POSITIONS} | NO_DROPOUT,
    ),
    "gpt2-default-width": (
        "gpt2",
        {"n_embd": 16, "n_head": 4, "n_layer": BLOCKS, "n_positions": POSITIONS} | NO_DROPOUT,
    ),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-in-a-row": ("gpt_neox", NEOX | {"use_parallel_residual": False}),
    "falcon-one-key": ("falcon", FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon-in-a-row": ("falcon", FALCON | {"multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon-new": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 4}),
    "olmo": ("olmo", GROUPED),
    "olmo2": ("olmo2", GROUPED),
    "olmo3": ("olmo3", GROUPED | {"sliding_window": 16}),
    "olmo-clipped": ("olmo", GROUPED | {"clip_qkv": 4.0}),
}
# Many neurons, because experts keep multiples of 8.
MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 2 * NEURONS, "norm_topk_prob": True}
MODELS |= {
    "mixtral": (
        "mixtral",
        GROUPED | {"intermediate_size": 2 * NEURONS, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        GROUPED | MIXED | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1], "intermediate_size": 72},
    ),
    "qwen3_moe": ("qwen3_moe", WIDE | MIXED | {"norm_topk_prob": False}),
    "olmoe": ("olmoe", GROUPED | {"intermediate_size": 2 * NEURONS, "num_experts": 4, "num_experts_per_tok": 2}),
}
# Families that the installed transformers does not have are left out.
KNOWN = [name for name, (model_type, _) in MODELS.items() if model_type in FAMILIES]


def tiny_config(name: str, **fields: Any) -> Any:
    """With other fields than those of `MODELS`, where there are some."""
    model_type, usual = MODELS[name]
    return AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **(usual | fields))


def tiny_model(name: str, seed: int = 0, **fields: Any) -> Any:
    """In float32, with biases and norms that are not what they are initialised to."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **fields)).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_tiny(name: str, directory: Path, seed: int = 0, **fields: Any) -> Path:
    tiny_model(name, seed, **fields).save_pretrained(directory)
    copy_tokenizer(directory)
    return directory


def in_float64(name: str) -> Any:
    """The same; the kernels of torch do not take experts in it."""
    model = tiny_model(name).double()
    if FAMILIES[model.config.model_type].mixture is not None:
        model.set_experts_implementation("eager")
    return model


def by_expert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model of transformers with a tensor for each layer of each expert, as they lie in files."""
    found = {}
    for name, tensor in state.items():
        if name.endswith(".experts.gate_up_proj"):
            for i, (gate, up) in enumerate(part.chunk(2) for part in tensor):
                found[name.replace("gate_up_proj", f"{i}.gate_proj.weight")] = gate.clone()
                found[name.replace("gate_up_proj", f"{i}.up_proj.weight")] = up.clone()
        elif name.endswith(".experts.down_proj"):
            found |= {name.replace("down_proj", f"{i}.down_proj.weight"): part.clone() for i, part in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round."""
    found, of_experts = {}, {}
    for name, tensor in state.items():
        part = re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+)\.weight", name)
        if part is None:
            found[name] = tensor
        else:
            of_experts.setdefault(part[1], {}).setdefault(part[3], {})[int(part[2])] = tensor
    for prefix, layers in of_experts.items():
        gate, up, down = (
            torch.stack([layers[layer][i] for i in range(len(layers[layer]))])
            for layer in ("gate_proj", "up_proj", "down_proj")
        )
        found |= {f"{prefix}gate_up_proj": torch.cat([gate, up], 1), f"{prefix}down_proj": down}
    return found


def unfused(model: Any) -> Any:
    """A copy whose experts have layers of their own, as a model has while it is pruned."""
    state, model = by_expert(model.state_dict()), copy.deepcopy(model)
    one_by_one(model)
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    model.tie_weights()
    return model
