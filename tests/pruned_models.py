"""Tiny pruned models of every family with random weights and any widths, as if a result had been trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import copy_tokenizer
from tiny_models import tiny_config

from llm_snp.families import FAMILIES


def save_pruned(name: str, kept: Sequence[dict[str, int]], directory: Path, **fields: Any) -> Any:
    """A model of `tiny_models.MODELS`, with other config `fields`, whose blocks have what is `kept`; returns it."""
    dense = tiny_config(name)
    dense = type(dense)(**(dense.to_dict() | fields))
    family = FAMILIES[dense.model_type]
    widths = [family.widths(dense, block, index) for index, block in enumerate(kept)]
    own = {key: value for key, value in dense.to_dict().items() if key not in ("model_type", "architectures")}
    torch.manual_seed(0)
    model = family.pruned_class(family.pruned_class.config_class(**own, block_widths=widths)).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() == 1 else 0.15
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise if parameter.dim() == 1 else noise)
    model.save_pretrained(directory)
    copy_tokenizer(directory)
    return model
