"""What the predictions lose without a layer, by branches through the blocks, against the whole model without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BLOCKS, load, logits
from test_sensitivity import session_of
from tiny_models import save_tiny
from torch import nn

from llm_snp.errors import NumericalError
from llm_snp.pruning import left_out
from llm_snp.pruning.left_out import losses_without


def divergence(model: Any, without: torch.Tensor, tokens: torch.Tensor) -> float:
    """KL in nats per token, float64."""
    expected = logits(model, tokens).log_softmax(-1)
    return (expected.exp() * (expected - without.log_softmax(-1))).sum(-1).mean().item()


def without(model: Any, module: nn.Module, tokens: torch.Tensor, how: Any) -> torch.Tensor:
    hook = module.register_forward_hook(how)
    found = logits(model, tokens)
    hook.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("whole_blocks", [False, True])
def test_every_layer_once(name: str, whole_blocks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(4, 2048, (5, 24), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(left_out, "LEFT_OUT_TOKENS", 3 * 24)
    directory = save_tiny(name, tmp_path / "dense")
    options = {"structures": "layers", "method": "best"} | ({"format": "stock"} if whole_blocks else {})
    session = session_of(directory, tokens, tmp_path, **options)
    found = losses_without(session)
    model, sample = load(directory).double(), tokens[:3]
    blocks = model.get_submodule(session.family.blocks)
    sites = session.sites(0)
    expected = {}
    for i in range(BLOCKS):
        if whole_blocks and i:
            swapped = without(model, blocks[i], sample, lambda module, args, output: args[0])
            expected |= {(i, site.name): divergence(model, swapped, sample) / 2 for site in sites}
        for site in sites if not whole_blocks else ():
            if (i, site.name) == (0, "attention"):
                continue
            layer = blocks[i].get_submodule(site.consumer)
            mean = layer.bias is not None
            gone = without(
                model,
                layer,
                sample,
                lambda module, args, output, mean=mean: (
                    output.flatten(0, -2).mean(0).expand_as(output) if mean else torch.zeros_like(output)
                ),
            )
            expected[i, site.name] = divergence(model, gone, sample)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    monkeypatch.setattr(left_out, "_divergence", None)  # what is in the journal is not measured again
    assert losses_without(session) == found


@pytest.mark.parametrize("options", [{}, {"format": "stock"}])
def test_what_overflows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]) -> None:
    """An infinite loss says nothing of which layers to take."""
    found = torch.tensor([1.0, torch.nan, 2.0, torch.inf, 0.0], dtype=torch.float64)
    monkeypatch.setattr(left_out, "_divergence", lambda stream, branches: found[: len(branches)])
    tokens = torch.randint(4, 2048, (2, 16), generator=torch.Generator().manual_seed(3))
    session = session_of(save_tiny("llama", tmp_path / "dense"), tokens, tmp_path, structures="layers", **options)
    named = "block 2" if options else "the attention of block 1"
    with pytest.raises(NumericalError, match=f"^without {named} the model's logits overflow the type they are"):
        losses_without(session)
