"""How much of its correction towards the dense residual stream a repair makes: the less, the more inputs per token."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import load

from llm_snp.config import PruneConfig
from llm_snp.dense.checkpoint import Checkpoint
from llm_snp.dense.hub import load_config
from llm_snp.dense.skeleton import Skeleton
from llm_snp.dense.storage import Storage
from llm_snp.families import family_of, linear
from llm_snp.pruning.session import CHANCE, Session
from llm_snp.system.journal import Journal
from llm_snp.system.processes import Processes
from llm_snp.system.progress import Progress


@pytest.fixture
def session(dense: Path, tmp_path: Path) -> Session:
    config = load_config(dense)
    family = family_of(config)
    checkpoint = Checkpoint(dense, family.renames)
    skeleton = Skeleton(config, family.blocks, checkpoint, torch.device("cpu"), torch.float32)
    processes, options = Processes(), PruneConfig(method="best").resolved()
    journal, tokens = Journal(tmp_path, processes), torch.zeros(8, 32, dtype=torch.long)
    return Session(skeleton, family, config, options, tokens, processes, Storage(), journal, Progress(quiet=True))


def test_share_follows_the_inputs_of_all_repairs(session: Session, dense: Path) -> None:
    blocks = load(dense).model.decoder.layers
    inputs = sum(
        linear(block, site.consumer).in_features for i, block in enumerate(blocks) for site in session.sites(i)
    )
    expected = 1 / (1 + CHANCE * inputs / (8 * 32))
    assert [session.share(site) for site in session.sites(0)] == pytest.approx([expected] * len(session.sites(0)))


def test_share_grows_to_all_with_the_text(session: Session) -> None:
    site = session.sites(0)[0]
    shares = [
        dataclasses.replace(session, tokens=torch.zeros(n, 32, dtype=torch.long)).share(site) for n in (1, 8, 10**6)
    ]
    assert shares == sorted(shares)
    assert shares[0] < shares[1] < 1
    assert shares[2] == pytest.approx(1, abs=1e-3)


def test_targets_that_do_not_add_up_are_fitted_whole(session: Session) -> None:
    site = session.sites(0)[0]
    for target in ("self", "dense"):
        other = dataclasses.replace(session, options=dataclasses.replace(session.options, target=target))
        assert other.share(site) == 1.0
    assert session.share(dataclasses.replace(site, stream=None)) == 1.0
