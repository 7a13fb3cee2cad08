"""`llm_snp.prune` from a program: it takes what programs have, and neither minds nor changes what they have set."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LENGTH, SAMPLES, Prune, save, tiny_opt, weight_files
from hub_server import USER, HubServer
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging

import llm_snp
from llm_snp.config import PruneConfig
from llm_snp.errors import OptionError


def test_paths_numbers_and_devices_as_programs_have_them(dense: Path, text: Path, tmp_path: Path) -> None:
    report = llm_snp.prune(
        dense,
        np.float32(0.25),
        output=tmp_path / "out",
        calibration=text,
        samples=np.int64(SAMPLES),
        sequence_length=torch.tensor(LENGTH),
        seed=np.uint8(3),
        round_to=np.int16(2),
        damping=Decimal("0.001"),
        device=torch.device("cpu", 0),
        dtype=torch.float32,
        evaluate=[text],
        offload=tmp_path,
        measure_speed=np.bool_(False),
        quiet=1,
    )
    options = report["options"]
    assert options["model"] == str(dense)
    assert (options["sparsity"], options["samples"], options["sequence_length"]) == (0.25, SAMPLES, LENGTH)
    assert (options["device"], options["dtype"], options["damping"]) == ("cpu:0", "float32", 0.001)
    assert options["quiet"] is True
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    places = {"model": "tiny", "output": "out", "offload": None, "calibration": [text.name]}
    assert written["options"] == options | places | {"evaluate": [text.name]}
    assert set(written["evaluation"]) == {text.name}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model", 3),
        ("model", b"opt"),
        ("model", torch.nn.Linear(1, 1)),
        ("sparsity", "0.3"),
        ("sparsity", None),
        ("sparsity", True),
        ("sparsity", 1j),
        ("sparsity", [0.3]),
        ("sparsity", torch.zeros(2)),
        ("sparsity", torch.zeros((), device="meta")),
        ("output", 1),
        ("output", "a\0b"),
        ("output", "caf\udce9"),
        ("calibration", 7),
        ("samples", 128.5),
        ("samples", "128"),
        ("samples", np.ones(2, dtype=int)),
        ("sequence_length", None),
        ("seed", True),
        ("method", None),
        ("order", ["zca"]),
        ("sensitive_order", "no"),
        ("sensitive_order", 2),
        ("round_to", np.float64(8)),
        ("damping", [1e-3]),
        ("damping", None),
        ("device", 0),
        ("dtype", np.float16),
        ("evaluate", "wikitext2"),
        ("evaluate", Path("text.txt")),
        ("evaluate", 5),
        ("evaluate", {"wikitext2": 1}),
        ("evaluate", ["wikitext2", 5]),
        ("overwrite", np.ones(2)),
        ("quiet", None),
        ("push_to_hub", 1),
    ],
)
def test_a_wrong_type_is_an_error_that_names_the_option(option: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        llm_snp.prune(**{option: value})
    assert str(caught.value).startswith(f"--{option.replace('_', '-')} is "), caught.value
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_types_are_named_with_or_without_torch() -> None:
    names = {PruneConfig(dtype=given).dtype for given in ("float16", "torch.float16", torch.float16)}
    assert names == {"float16"}


@pytest.mark.parametrize(
    "state",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["inference_mode", "no_grad", "autocast", "device"],
)
def test_within_what_a_program_has_set(prune: Prune, dense: Path, tmp_path: Path, state: Callable[[], Any]) -> None:
    prune(dense, tmp_path / "plain")
    with state():
        prune(dense, tmp_path / "within")
    assert weight_files(tmp_path / "within") == weight_files(tmp_path / "plain")


def test_torch_is_left_as_it_was(prune: Prune, dense: Path, tmp_path: Path) -> None:
    def state() -> tuple[Any, ...]:
        generator = torch.random.get_rng_state().tolist()
        return torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device(), generator

    before = state()
    prune(dense, tmp_path / "out", calibration="self", evaluate=("self",))
    assert state() == before


def test_quiet_is_quiet_and_leaves_the_libraries_as_they_were(
    prune: Prune,
    dense: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights are loaded as a whole, and sent."""
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "progress_bar_states", {"mine": False})

    def state() -> tuple[Any, ...]:
        bars = are_progress_bars_disabled(), are_progress_bars_disabled("mine")
        return logging.is_progress_bar_enabled(), logging.get_verbosity(), *bars

    before = state()
    prune(dense, tmp_path / "out", measure_speed=True, push_to_hub=f"{USER}/quiet")
    assert capfd.readouterr().err == ""
    assert state() == before


def test_two_threads_at_once(prune: Prune, tmp_path: Path) -> None:
    """Each makes what it makes alone, and a third, which builds models of its own, has them whole.

    (One that draws random numbers changes what a model writes itself: torch has one sequence of them for all threads.)
    """
    models = [
        save(tiny_opt(seed, dtype), tmp_path / f"model-{seed}")
        for seed, dtype in enumerate((torch.float32, torch.bfloat16))
    ]

    def run(model: Path, where: str) -> dict[str, bytes]:
        prune(model, tmp_path / where / model.name, calibration="self")
        return weight_files(tmp_path / where / model.name)

    alone = [run(model, "alone") for model in models]
    wrong: list[str] = []
    done = threading.Event()

    def build() -> None:
        while not done.is_set():
            wrong.extend(name for name, p in torch.nn.LayerNorm(2).named_parameters() if p.is_meta)

    with ThreadPoolExecutor(3) as threads:
        builder = threads.submit(build)
        together = list(threads.map(run, models, ["together"] * 2))
        done.set()
        builder.result()
    assert together == alone
    assert not wrong
    assert torch.get_default_dtype() == torch.float32
