"""The block-by-block backward pass against autograd through the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import load, save, tiny_opt

from llm_snp.checkpoint import Checkpoint
from llm_snp.errors import NumericalError
from llm_snp.families import family_of
from llm_snp.hub import load_config
from llm_snp.sensitivity import FISHER_RIDGE, gradient_windows, measure_sensitivity
from llm_snp.skeleton import Skeleton


def skeleton_of(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Skeleton, Any]:
    config = load_config(directory)
    family = family_of(config)
    return Skeleton(config, family.blocks, Checkpoint(directory), torch.device("cpu"), dtype), family.sites(config)


def gradients_of_whole_model(directory: Path, tokens: torch.Tensor, consumers: list[str]) -> dict[tuple[int, str], Any]:
    """Sum of g gᵀ (d, d) per block and consumer, float64, one backward pass through everything."""
    model = load(directory).double()
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    for i, block in enumerate(model.model.decoder.layers):
        for name in consumers:

            def keep(module: Any, args: Any, output: torch.Tensor, key: tuple[int, str] = (i, name)) -> None:
                output.retain_grad()
                outputs[key] = output

            block.get_submodule(name).register_forward_hook(keep)
    logits = model(input_ids=tokens).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    flat = {key: output.grad.flatten(0, -2) for key, output in outputs.items()}
    return {key: g.mT @ g for key, g in flat.items()}


@pytest.mark.parametrize("before", [True, False])
def test_fisher_and_scalar_equal_autograd(tmp_path: Path, before: bool) -> None:
    directory = save(tiny_opt(do_layer_norm_before=before), tmp_path)
    tokens = torch.randint(4, 2048, (5, 24), generator=torch.Generator().manual_seed(0))
    skeleton, sites = skeleton_of(directory)
    expected = gradients_of_whole_model(directory, tokens, [site.consumer for site in sites])
    fisher = measure_sensitivity(skeleton, tokens, sites, True, lambda: None)
    scalar = measure_sensitivity(skeleton, tokens, sites, False, lambda: None)
    assert len(fisher) == len(skeleton) * len(sites)
    for i in range(len(skeleton)):
        for site in sites:
            g = expected[i, site.consumer] / tokens.numel()
            d = g.shape[0]
            ridge = FISHER_RIDGE * g.diagonal().mean() * torch.eye(d, dtype=g.dtype)
            torch.testing.assert_close(fisher[i, site.name], g + ridge, rtol=1e-3, atol=1e-5 * g.abs().max().item())
            torch.testing.assert_close(
                scalar[i, site.name], torch.eye(d, dtype=g.dtype) * g.trace() / d, rtol=1e-3, atol=0
            )


def test_stored_inputs_never_exceed_the_hidden_states() -> None:
    for samples, blocks in ((128, 24), (128, 4), (7, 3)):
        assert gradient_windows(samples, blocks) * blocks <= samples
    assert gradient_windows(2, 24) == 1


def test_overflow_is_named(tmp_path: Path) -> None:
    model = tiny_opt()
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight *= 1e18
    directory = save(model, tmp_path)
    skeleton, sites = skeleton_of(directory)
    skeleton.model.lm_head.weight.data.mul_(1e18)
    tokens = torch.randint(4, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(NumericalError, match=r"loss gradient at .* of block"):
        measure_sensitivity(skeleton, tokens, sites, True, lambda: None)
