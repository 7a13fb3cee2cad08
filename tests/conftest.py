"""Tiny OPT checkpoints with random weights, generated text, and short hands; nothing is downloaded."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import huggingface_hub.utils
import pytest
import torch
from hub_server import WRITE, HubServer
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from llm_snp.cli import main
from llm_snp.config import PruneConfig
from llm_snp.dense.hub import EMBEDDED
from llm_snp.running.run import run
from llm_snp.system.remembering import recall, remember

HIDDEN, HEADS, BLOCKS, NEURONS, POSITIONS, VOCABULARY = 32, 4, 3, 64, 64, 2048
LENGTH = 32  # tokens per window
SAMPLES = 12


# What `prune` and `shell` compute on: --device, but the CPU in modules that are marked `cpu`.
AUTO = "cuda" if torch.cuda.is_available() else "cpu"
chosen = {"device": AUTO}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default=AUTO, help=f"what the tests compute on where it is free (default: {AUTO})")


@pytest.fixture(autouse=True, scope="module")
def device(request: pytest.FixtureRequest) -> str:
    """What is computed on in this module."""
    marked = any(mark.name == "cpu" for mark in request.node.iter_markers())
    chosen["device"] = "cpu" if marked else request.config.getoption("--device")
    return chosen["device"]


@pytest.fixture(autouse=True, scope="session")
def fast() -> None:
    """One thread is fastest for models this small; and what was imported is not garbage."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def documents(request: pytest.FixtureRequest) -> Iterator[None]:
    """Plots and page take longer than pruning a tiny model: only modules marked `documents` have them made."""
    marked = any(mark.name == "documents" for mark in request.node.iter_markers())
    with pytest.MonkeyPatch.context() as patch:
        if not marked:
            for place in ("documents.writing", "result.publish"):
                patch.setattr(f"llm_snp.{place}.plot_images", lambda report: {})
                patch.setattr(f"llm_snp.{place}.html_page", lambda report: "")
            patch.setattr("llm_snp.running.rehearsal.html_page", lambda report: "")
        yield


def words(count: int, seed: int) -> list[str]:
    """Random words, some of them frequent."""
    source = random.Random(seed)
    syllables = ("ba", "den", "ki", "lo", "mar", "nu", "per", "sa", "ti", "ver", "wo", "zu")
    known = ["".join(source.choices(syllables, k=source.randint(1, 4))) for _ in range(200)]
    return source.choices(known, weights=[1 / (i + 1) for i in range(200)], k=count)


def paragraphs(count: int, seed: int) -> list[str]:
    """Documents of about 30 words each."""
    source, stock = random.Random(seed), words(60 * count, seed)
    return [" ".join(source.choices(stock, k=source.randint(20, 40))).capitalize() + "." for _ in range(count)]


def copy_tokenizer(directory: Path) -> None:
    """The tokenizer of the embedded OPT, under a class name that every transformers knows."""
    shutil.copy(EMBEDDED / "tokenizer.json", directory)
    fields = json.loads((EMBEDDED / "tokenizer_config.json").read_text())
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))


def tiny_opt(seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> OPTForCausalLM:
    """An OPT with random weights, biases and norms, large enough that its logits depend on the text."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": BLOCKS,
        "ffn_dim": NEURONS,
        "max_position_embeddings": POSITIONS,
        "word_embed_proj_dim": HIDDEN,
        "dropout": 0.0,
        "init_std": 0.15,
    }
    torch.manual_seed(seed)
    model = OPTForCausalLM(OPTConfig(**(sizes | fields)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "layer_norm" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def save(model: OPTForCausalLM, directory: Path) -> Path:
    """A checkpoint directory with weights, config and tokenizer."""
    model.save_pretrained(directory)
    copy_tokenizer(directory)
    return directory


def load(directory: str | Path) -> Any:
    """A whole model in float32, for reference values."""
    return AutoModelForCausalLM.from_pretrained(directory).float().eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def weight_files(directory: Path) -> dict[str, bytes]:
    """Bytes of all weight files, and of the config, by name."""
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.suffix == ".safetensors" or path.name in ("config.json", "model.safetensors.index.json")
    }


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text, about 90 windows."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n\n".join(paragraphs(60, seed=1)))
    return path


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluation text."""
    path = tmp_path_factory.mktemp("text") / "evaluation.txt"
    path.write_text("\n\n".join(paragraphs(20, seed=2)))
    return path


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint most tests prune."""
    return save(tiny_opt(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """A batch of token ids (3, 40)."""
    return torch.randint(4, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(7))


def raising(error: BaseException) -> Callable[..., Any]:
    """In place of a function that meets such a fault."""

    def function(*arguments: Any, **options: Any) -> Any:
        raise error

    return function


def copied(result: Path, to: Path) -> Path:
    """A copy of a result that knows what the result knows of this machine."""
    shutil.copytree(result, to)
    remember(to, recall(result))
    return to


Prune = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def prune(text: Path) -> Prune:
    """`run` with short windows, the session's text and no evaluation unless asked."""

    def prune(model: Path, output: Path, sparsity: float = 0.3, **options: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "calibration": str(text),
            "samples": SAMPLES,
            "sequence_length": LENGTH,
            "evaluate": (),
            "device": chosen["device"],
            "quiet": True,
        }
        return run(PruneConfig(str(model), sparsity, str(output), **(defaults | options)))

    return prune


class Shell:
    """The command line in a directory of its own: exit code, what it printed, and what it left."""

    def __init__(self, capsys: pytest.CaptureFixture[str], directory: Path, text: Path):
        self.capsys, self.directory, self.text = capsys, directory, text
        self.output = directory / "out"

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Exit code, standard output, standard error of `python -m llm_snp ...`."""
        self.capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def prune(self, *arguments: str | Path) -> tuple[int, str, str]:
        """The same with short windows, the session's text, and `out` for output; later flags win."""
        short = ("--samples", str(SAMPLES), "--sequence-length", str(LENGTH))
        text = () if "--calibration" in arguments else ("--calibration", self.text)  # or it would be one more
        rest: tuple[str | Path, ...] = ("--output", self.output, "--no-evaluate", "--quiet")
        if chosen["device"] != AUTO:
            rest = (*rest, "--device", chosen["device"])
        return self.run(*short, *text, *rest, *arguments)

    def refused(self, *arguments: str | Path) -> str:
        """Run `prune`, and check that it fails as bad input must: one sentence, exit code 2, nothing written."""
        before = sorted(self.directory.rglob("*"))
        code, out, err = self.prune(*arguments)
        assert code == 2, err
        assert not out
        assert err.count("\n") == 1, err
        assert err.startswith("llm_snp: "), err
        assert "Traceback" not in err
        assert sorted(self.directory.rglob("*")) == before
        return err.removeprefix("llm_snp: ").strip()


@pytest.fixture
def shell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys, tmp_path, text)


def new_connections() -> None:
    """Before huggingface_hub 1 a connection stays offline, or online, as it was made."""
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub of its own for one test, which the client finds instead of the real one."""
    monkeypatch.setenv("HF_TOKEN", WRITE)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        address = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        new_connections()
        yield server
    new_connections()
