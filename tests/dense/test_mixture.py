"""Several texts in one calibration: each gives its share at every point, and none is asked for too little."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LENGTH, paragraphs
from transformers import AutoTokenizer

from llm_snp.config import PruneConfig, shares
from llm_snp.dense.data import UNSEEN, as_windows, calibration_windows
from llm_snp.dense.hub import load_config
from llm_snp.dense.mixture import fitted_and_unseen, mix, turns
from llm_snp.dense.text import Text
from llm_snp.errors import CorpusError, OptionError


@pytest.mark.parametrize("seed", range(30))
def test_every_beginning_holds_the_shares(seed: int) -> None:
    draw = random.Random(seed)
    weights = [draw.uniform(0.05, 20.0) for _ in range(draw.randint(1, 5))]
    samples = len(weights) + draw.randint(0, 200)
    order = turns(weights, samples)
    assert len(order) == samples
    assert set(order) == set(range(len(weights)))
    if min(weights) / sum(weights) * samples >= 1:  # nobody had to be served out of turn
        for i in range(1, samples + 1):
            for text, weight in enumerate(weights):
                due = i * weight / sum(weights)
                assert abs(order[:i].count(text) - due) < len(weights)


def test_equal_shares_go_round() -> None:
    assert turns([1.0, 1.0, 1.0], 7) == [0, 1, 2, 0, 1, 2, 0]
    assert turns([2.0, 1.0], 6).count(0) == 4
    assert turns([1000.0, 1.0], 3) == [0, 0, 1]


def test_windows_are_taken_by_turns_and_none_twice() -> None:
    parts = [as_windows(torch.arange(8).view(4, 2) + 100 * k, f"text {k}", 9, 40) for k in range(2)]
    parts[1] = as_windows(parts[1].tokens[:2], "text 1", 5, 20)
    mixed = mix(parts, turns([2.0, 1.0], 6))
    assert sorted(mixed.tokens.flatten().tolist()) == [*range(8), *range(100, 104)]
    assert mixed.tokens[mixed.tokens[:, 0] < 100].flatten().tolist() == list(range(8))
    assert (mixed.source, mixed.available, mixed.text_tokens) == ("text 0 and text 1", 14, 60)
    assert mixed.parts == tuple(parts)
    assert mix(parts[:1], [0] * 4) is parts[0]


def test_shares_stand_behind_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shares(("wikitext2", "c4:2", "self:0.5")) == {"wikitext2": 1.0, "c4": 2.0, "self": 0.5}
    assert shares(("a:b",)) == {"a:b": 1.0}
    assert shares((":3",)) == {":3": 1.0}
    monkeypatch.chdir(tmp_path)
    Path("notes:2").write_text("a text whose name ends like a share")
    assert shares(("notes:2", "other:2")) == {"notes:2": 1.0, "other": 2.0}
    for bad in ("c4:0", "c4:-1", "c4:nan", "c4:inf", "c4:1e308"):
        with pytest.raises(OptionError, match="must be above 0"):
            shares((bad,))
    with pytest.raises(OptionError, match=r"c4 is given twice; give it once, as c4:2"):
        shares(("c4", "wikitext2", "c4:3"))


def test_a_text_is_the_same_under_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a text")
    Path("b.txt").write_text("a text")
    Path("link.txt").symlink_to("a.txt")
    for other in ("./a.txt", str(tmp_path / "a.txt"), "link.txt:3"):
        name = other.removesuffix(":3")
        with pytest.raises(
            OptionError, match=f"^--calibration {name} is a.txt, which is given, too; give it once, as a"
        ):
            shares(("a.txt", "c4", other))
    assert list(shares(("a.txt", "b.txt", "c.txt", "c4"))) == ["a.txt", "b.txt", "c.txt", "c4"]


def test_one_text_or_several() -> None:
    assert PruneConfig(calibration="c4").texts == ("c4",)
    assert PruneConfig(calibration=("c4", "self")).texts == ("c4", "self")
    assert PruneConfig("a model").resolved().calibration == ("wikitext2", "c4")
    assert PruneConfig().resolved().calibration == ("self",)
    with pytest.raises(OptionError, match="--samples is 1, but there are 2 calibration texts"):
        PruneConfig(calibration=("c4", "self"), samples=1).validate()


def test_a_run_sees_all_its_texts(dense: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(dense)
    files = []
    for seed in range(2):
        files.append(tmp_path / f"{seed}.txt")
        files[-1].write_text("\n\n".join(paragraphs(40, seed=seed)))
    text = Text(dense, tokenizer, load_config(dense), LENGTH, torch.float32, torch.device("cpu"))
    mixed = text.calibration(PruneConfig(calibration=(str(files[0]), f"{files[1]}:2"), samples=6, seed=3))
    assert [len(part.tokens) for part in mixed.parts] == [2, 4]
    for path, part in zip(files, mixed.parts, strict=True):
        alone = calibration_windows(str(path), tokenizer, len(part.tokens), LENGTH, seed=3)
        assert torch.equal(part.tokens, alone.tokens)
    assert len({tuple(window) for window in mixed.tokens.tolist()}) == 6
    with pytest.raises(CorpusError, match="neither a file nor a known corpus"):
        text.calibration(PruneConfig(calibration=(str(files[0]), "wiki"), samples=2))
    pair = fitted_and_unseen(mixed)
    assert pair is not None
    fitted, unseen = (windows.tokens.tolist() for windows in pair)
    assert len(fitted) == len(unseen) == 2 + UNSEEN // 2
    calibrated = mixed.tokens.tolist()
    assert all(window in calibrated for window in fitted)
    assert not any(window in calibrated for window in unseen)


def test_a_text_that_is_used_up_says_nothing_of_over_fitting(dense: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(dense)
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(paragraphs(20, seed=0)))
    available = calibration_windows(str(file), tokenizer, 1, LENGTH, seed=0).available
    assert fitted_and_unseen(calibration_windows(str(file), tokenizer, available, LENGTH, seed=0)) is None
    pair = fitted_and_unseen(calibration_windows(str(file), tokenizer, available - 1, LENGTH, seed=0))
    assert pair is not None
    assert [len(windows.tokens) for windows in pair] == [1, 1]
