"""The block-by-block backward pass against autograd through the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import load, logits, save, tiny_opt

from llm_snp.config import PruneConfig
from llm_snp.dense.checkpoint import Checkpoint
from llm_snp.dense.hub import load_config
from llm_snp.dense.skeleton import Skeleton
from llm_snp.dense.storage import Storage
from llm_snp.errors import NumericalError
from llm_snp.families import family_of
from llm_snp.pruning.sensitivity import (
    FISHER_RIDGE,
    gradient_windows,
    inputs_kept,
    measure_sensitivity,
    read_sensitivity,
)
from llm_snp.pruning.session import Session
from llm_snp.system.journal import Journal
from llm_snp.system.processes import Processes
from llm_snp.system.progress import Progress


def session_of(directory: Path, tokens: torch.Tensor, folder: Path, **options: Any) -> Session:
    config = load_config(directory)
    family, processes = family_of(config), Processes()
    skeleton = Skeleton(config, family.blocks, Checkpoint(directory), torch.device("cpu"), torch.float32)
    journal, progress = Journal(folder, processes), Progress(quiet=True)
    chosen = PruneConfig(**options).resolved()
    return Session(skeleton, family, config, chosen, tokens, processes, Storage(), journal, progress)


def drawn_labels(model: Any, tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """A label (N, T - 1) for each position from the model's own predictions, one generator per window."""
    labels = []
    for row, ids in enumerate(tokens):
        generator = torch.Generator().manual_seed(1_000_003 * seed + row)
        chances = logits(model, ids[None])[0, :-1].softmax(-1)
        draw = torch.rand(len(ids) - 1, 1, generator=generator)
        labels.append((chances.cumsum(-1) < draw).sum(-1))
    return torch.stack(labels)


def gradients_of_whole_model(
    directory: Path, tokens: torch.Tensor, labels: torch.Tensor, consumers: list[str]
) -> dict[tuple[int, str], Any]:
    """Sum of g gᵀ (d, d) per block and consumer, float64, one backward pass through everything."""
    model = load(directory).double()
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    for i, block in enumerate(model.model.decoder.layers):
        for name in consumers:

            def keep(module: Any, args: Any, output: torch.Tensor, key: tuple[int, str] = (i, name)) -> None:
                output.retain_grad()
                outputs[key] = output

            block.get_submodule(name).register_forward_hook(keep)
    predictions = model(input_ids=tokens).logits
    F.cross_entropy(predictions[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum").backward()
    flat = {key: output.grad.flatten(0, -2) for key, output in outputs.items()}
    return {key: g.mT @ g for key, g in flat.items()}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("part", [512, 7])
def test_fisher_and_scalar_equal_autograd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, part: int
) -> None:
    directory = save(tiny_opt(do_layer_norm_before=before), tmp_path)
    tokens = torch.randint(4, 2048, (15, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("llm_snp.pruning.sensitivity.HEAD_TOKENS", part)
    first = tokens[: gradient_windows(15, 3)]
    found = {}
    for kind in ("fisher", "scalar"):
        (tmp_path / kind).mkdir()
        session = session_of(directory, tokens, tmp_path / kind, sensitivity=kind, seed=7)
        measure_sensitivity(session)
        found[kind] = [read_sensitivity(session, i) for i in range(len(session.skeleton))]
    sites = session.family.sites(session.config)
    labels = drawn_labels(load(directory), first, seed=7)
    expected = gradients_of_whole_model(directory, first, labels, [site.consumer for site in sites])
    assert len(expected) == len(session.skeleton) * len(sites)
    for (i, consumer), g in expected.items():
        g = g / first.numel()
        site = next(site for site in sites if site.consumer == consumer)
        eye = torch.eye(g.shape[0], dtype=g.dtype)
        fisher, scalar = (found[kind][i][site.name] for kind in ("fisher", "scalar"))
        ridge = FISHER_RIDGE * g.diagonal().mean() * eye
        torch.testing.assert_close(fisher, g + ridge, rtol=1e-3, atol=1e-5 * g.abs().max().item())
        torch.testing.assert_close(scalar, eye * g.trace() / len(g), rtol=1e-3, atol=0)


def test_what_is_not_needed_is_not_read(tmp_path: Path, dense: Path) -> None:
    session = session_of(dense, torch.zeros(2, 8, dtype=torch.long), tmp_path, sensitivity="relative")
    assert read_sensitivity(session, 0) == {}


def test_stored_inputs_never_exceed_the_hidden_states() -> None:
    for samples, blocks in ((128, 24), (128, 4), (7, 3), (5, 1)):
        assert gradient_windows(samples, blocks) * inputs_kept(blocks) <= samples
    assert [inputs_kept(blocks) for blocks in (1, 2, 3, 4, 24, 30, 40)] == [1, 2, 3, 3, 9, 10, 12]
    assert gradient_windows(2, 24) == 1


def test_overflow_is_named(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_snp.pruning.sensitivity._loss_gradient", lambda s, ids, hidden, g: hidden * 1e38)
    tokens = torch.randint(4, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(NumericalError, match=r"loss gradient at .* of block"):
        measure_sensitivity(session_of(dense, tokens, tmp_path))
