"""What travels with a result is data: no stranger's code is named in it, and nothing of someone's machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
from conftest import BLOCKS, HIDDEN, NEURONS, Prune, Shell, weight_files
from safetensors.torch import save_file
from tiny_models import save_tiny
from transformers import AutoTokenizer

import llm_snp
from llm_snp.dense.card import card_metadata
from llm_snp.dense.tokenizer import load_tokenizer
from llm_snp.errors import CheckpointError
from llm_snp.evaluation.speed import load_model
from llm_snp.result.carried import TEMPLATES, Carried, check_tokenizer_class, travels
from llm_snp.result.settings import CODE, without_code

EVIL = "import pathlib\npathlib.Path(r'{mark}').touch()\n"
CLASSES = """
from transformers import PreTrainedTokenizerFast, TextGenerationPipeline
class Evil(PreTrainedTokenizerFast): pass
class EvilPipeline(TextGenerationPipeline): pass
def generate(model, **_): raise SystemExit("evil")
"""
LOCAL = "/home/ann/secret/place"


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | fields))


def fields_of(content: Any) -> set[str]:
    """All names of fields in parsed JSON, at any depth."""
    if isinstance(content, dict):
        return set(content).union(*(fields_of(value) for value in content.values()))
    return set().union(*(fields_of(value) for value in content)) if isinstance(content, list) else set()


@pytest.fixture
def stranger(dense: Path, tmp_path: Path) -> Path:
    """A model whose every file names code, or a place on a machine; importing the code makes `mark`."""
    directory = Path(shutil.copytree(dense, tmp_path / "stranger"))
    code = EVIL.format(mark=tmp_path / "mark") + CLASSES
    (directory / "evil.py").write_text(code)
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(code)
    reference = "evil.Evil"
    pipelines = {"text-generation": {"impl": "evil.EvilPipeline", "pt": ["AutoModelForCausalLM"]}}
    change(
        directory / "config.json",
        auto_map={"AutoTokenizer": [None, reference], "AutoModelForCausalLM": reference, "AutoProcessor": reference},
        custom_pipelines=pipelines,
        task_specific_params={"text-generation": {"custom_generate": str(directory), "deeper": [{"auto_map": "x"}]}},
        transformers_weights="other.safetensors",
        kernel_config={"RMSNorm": "stranger/kernel"},
        _name_or_path=LOCAL,
        dataset_path=LOCAL,
    )
    change(
        directory / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, reference]},
        name_or_path=LOCAL,
        special_tokens_map_file=f"{LOCAL}/special_tokens_map.json",
        tokenizer_file=f"{LOCAL}/tokenizer.json",
    )
    change(
        directory / "generation_config.json",
        auto_map={"GenerationConfig": reference},
        custom_generate=str(directory),
        trust_remote_code=True,
        do_sample=False,
    )
    for name in ("processor_config.json", "preprocessor_config.json", "adapter_config.json"):
        change(directory / name, auto_map={"AutoProcessor": reference}, base_model_name_or_path=LOCAL)
    return directory


LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline
path = sys.argv[1]
pipe = pipeline("text-generation", model=path, tokenizer=path, trust_remote_code=True)
print(type(pipe).__name__, type(pipe.tokenizer).__name__)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
AutoProcessor.from_pretrained(path, trust_remote_code=True)
model.generate(**tokenizer("den lo", return_tensors="pt"), max_new_tokens=2, trust_remote_code=True)
"""


@pytest.mark.parametrize("options", [{}, {"format": "stock"}], ids=["own class", "stock"])
def test_no_code_but_ours_reaches_the_user_of_a_result(
    prune: Prune, stranger: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    output = tmp_path / "out"
    prune(stranger, output, **options)
    own = set() if options else {"modeling_snp.py"}
    assert {path.name for path in output.rglob("*.py")} == own
    for path in output.rglob("*.json"):
        content = json.loads(path.read_text())
        if path.name == "config.json" and own:
            assert all(one.startswith("modeling_snp.") for one in content.pop("auto_map").values())
        if path.name not in ("report.json", "tokenizer.json"):
            assert not fields_of(content) & CODE, path
        assert LOCAL not in path.read_text(), path
    assert json.loads((output / "generation_config.json").read_text())["do_sample"] is False
    assert AutoTokenizer.from_pretrained(output)("den lo")["input_ids"]
    (tmp_path / "load.py").write_text(LOAD)
    done = elsewhere.run(tmp_path / "load.py", output, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Evil" not in done.stdout
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("begin", ["", pytest.param(os.pathsep, marks=pytest.mark.slow)])
def test_modules_of_the_working_directory_are_not_imported(dense: Path, tmp_path: Path, begin: str) -> None:
    """One works in the directory of a stranger's model, where modules have the names of those that are needed."""
    directory = Path(shutil.copytree(dense, tmp_path / "stranger"))
    own = ("difflib", "numpy", "yaml", "tqdm", "torchao", "kernels", "transformers", "peft")
    # Python itself imports the first, for an installation that leads to the sources, before anything of llm_snp runs.
    for name in own if begin else ("__future__", *own):
        (directory / f"{name}.py").write_text(EVIL.format(mark=tmp_path / "mark"))
    (directory / "matplotlibrc").write_bytes(b"\xff no settings")
    short = ["--samples", "3", "--sequence-length", "8", "--no-evaluate", "--device", "cpu", "--quiet"]
    more = ["--calibration", "self", "--measure-speed"]
    words = [sys.executable, "-m", "llm_snp", ".", "--output", str(tmp_path / "out"), *short, *more]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    sources = f"{begin}{Path(llm_snp.__file__).parent.parent}"  # an empty entry stands for the working directory, too
    environment |= {"PYTHONPATH": sources, "MPLBACKEND": "none of matplotlib's"}
    done = subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "matplotlib" not in done.stderr
    assert not (tmp_path / "mark").exists()


def test_modules_of_the_working_directory_are_not_imported_by_the_installed_command(tmp_path: Path) -> None:
    """With an empty entry of PYTHONPATH they would be."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "llm-snp"
    command.write_text("import sys\nfrom llm_snp.cli import main\nsys.exit(main())\n")
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "difflib.py").write_text(EVIL.format(mark=tmp_path / "mark"))
    sources = str(Path(llm_snp.__file__).parent.parent)
    for path in (f"{os.pathsep}{sources}", f"{sources}{os.pathsep}"):
        words = [sys.executable, str(command), "--version"]
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(words, cwd=tmp_path / "stranger", env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "mark").exists()


ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 64, "target_modules": ["fc1"], "megatron_config": {"a": 1}}


@pytest.mark.parametrize("measure", ["self", "speed"])
def test_a_whole_model_is_that_of_the_weights_alone(
    prune: Prune, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measure: str
) -> None:
    """An adapter beside the weights would be added to them, and names a module that is imported."""
    directory = Path(shutil.copytree(dense, tmp_path / "stranger"))
    (directory / "evil_module.py").write_text(EVIL.format(mark=tmp_path / "mark"))
    monkeypatch.syspath_prepend(str(directory))
    adapter = ADAPTER | {"megatron_core": "evil_module", "base_model_name_or_path": str(tmp_path / "nowhere")}
    change(directory / "adapter_config.json", **adapter)
    pairs = {
        f"base_model.model.model.decoder.layers.{i}.fc1.lora_{part}.weight": torch.ones(shape)
        for i in range(BLOCKS)
        for part, shape in (("A", (2, HIDDEN)), ("B", (NEURONS, 2)))
    }
    save_file(pairs, directory / "adapter_model.safetensors")
    packed = {"quant_method": "gptq", "bits": 4}  # what a copy in plain weights may have left
    change(directory / "config.json", transformers_weights="adapter_model.safetensors", fusion_config={"x": 1})
    change(directory / "config.json", quantization_config=packed, compression_config=packed)
    if measure == "self":
        for name, model in (("out", directory), ("plain", dense)):
            prune(model, tmp_path / name, calibration="self", samples=2)
        found, expected = (weight_files(tmp_path / name) for name in ("out", "plain"))
        assert {name for name in expected if found[name] != expected[name]} <= {"config.json"}
    else:
        tensors = load_model(directory, torch.device("cpu"), torch.float32).state_dict()
        same = load_model(dense, torch.device("cpu"), torch.float32).state_dict()
        assert tensors.keys() == same.keys()
        assert all(torch.equal(tensors[name], same[name]) for name in same)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_that_is_code_is_refused(shell: Shell, stranger: Path, where: str) -> None:
    change(stranger / "tokenizer_config.json", tokenizer_class="Evil")
    if where == "config.json":
        fields = json.loads((stranger / "tokenizer_config.json").read_text())
        (stranger / "tokenizer_config.json").write_text(
            json.dumps({k: v for k, v in fields.items() if k != "auto_map"})
        )
    message = shell.refused(stranger)
    assert message.startswith(f"the tokenizer of {stranger} is Evil, a class of its own code (evil.Evil), ")
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in message
    assert shell.refused(stranger, "--dry-run") == message
    assert not (shell.directory / "mark").exists()


@pytest.mark.parametrize(
    "auto_map", [["evil.Evil", None], {"AutoTokenizer": "evil.Evil"}, {"AutoTokenizer": ["", "a.B"]}]
)
def test_all_spellings_of_a_tokenizers_code(stranger: Path, auto_map: Any) -> None:
    change(stranger / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=None)
    with pytest.raises(CheckpointError, match="a class of its own code"):
        check_tokenizer_class(stranger)
    change(stranger / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    check_tokenizer_class(stranger)


def test_a_result_s_tokenizer_is_the_dense_model_s_whatever_its_type(prune: Prune, tmp_path: Path) -> None:
    """transformers chooses the class by the type of model, too, where the settings name another, as of Llama."""
    directory = save_tiny("qwen2", tmp_path / "dense")
    settings = json.loads((directory / "tokenizer.json").read_text())
    digits = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": False}
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, settings["pre_tokenizer"]]}
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    change(directory / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast", legacy=True)
    dense = load_tokenizer(directory)
    for output, options in (("own", {}), ("stock", {"format": "stock"})):
        prune(directory, tmp_path / output, target="none", **options)
        found = load_tokenizer(tmp_path / output)
        for text in ("in 2023 and 1999x", "the</s>river", " lead"):
            assert found(text)["input_ids"] == dense(text)["input_ids"], (output, text)


def test_a_tokenizer_is_the_same_for_texts_that_no_probe_has(prune: Prune, tmp_path: Path) -> None:
    """As Phi-4 and OLMo 2 name GPT-2's class beside a splitting of their own; a small vocabulary hides it."""
    directory = save_tiny("phi3", tmp_path / "dense")
    settings = json.loads((directory / "tokenizer.json").read_text())
    pattern = {"Regex": "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s+"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_of]}
    settings["model"]["merges"] = settings["model"]["merges"][:1]
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    change(directory / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    prune(directory, tmp_path / "out", target="none")
    dense, found = load_tokenizer(directory), load_tokenizer(tmp_path / "out")
    stages = [json.loads(one.backend_tokenizer.to_str())["pre_tokenizer"] for one in (dense, found)]
    assert stages[0] == stages[1]


def test_a_tokenizer_need_not_know_every_word(dense: Path, tmp_path: Path) -> None:
    """Texts of its words are all that it is for; `PROBE` has others."""
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    settings = json.loads((directory / "tokenizer.json").read_text())
    words = {word: number for number, word in enumerate(("the", "city", "of"))}
    settings |= {"model": {"type": "WordLevel", "vocab": words, "unk_token": "none"}, "added_tokens": []}
    settings |= {"pre_tokenizer": {"type": "Whitespace"}, "normalizer": None, "post_processor": None, "decoder": None}
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    change(directory / "tokenizer_config.json", bos_token=None, eos_token=None, unk_token=None, pad_token=None)
    Carried(directory).check(load_tokenizer(directory))


@pytest.mark.parametrize("name", ["special_tokens_map.json", "vocab.txt", "anything"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_in_a_model_s_directory_is_refused(
    name: str, kind: str, shell: Shell, dense: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    (directory / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(directory / name)
    else:
        (directory / name).symlink_to("/dev/zero")
    assert f"{directory / name} is a pipe or a device, and no file that ends; remove it" in shell.refused(directory)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_odd_texts_and_depths_in_settings_are_no_traceback(
    name: str, shell: Shell, dense: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    change(directory / name, name_or_path="x", foo="\ud800")
    content = Carried(directory).files[name]
    assert json.loads(content)["foo"] == "\ud800"
    assert "name_or_path" not in json.loads(content)
    deep: Any = 1
    for _ in range(600):
        deep = {"a": deep}
    change(directory / name, foo=deep)
    assert "nested too deeply" in shell.refused(directory)


@pytest.mark.parametrize("class_name", ["BertTokenizer", "T5Tokenizer"])
def test_special_tokens_alone_are_no_vocabulary(class_name: str, shell: Shell, dense: Path, tmp_path: Path) -> None:
    """Some classes make up theirs where the file is forgotten, and every text would be of unknown words."""
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
    assert "has no tokenizer" in shell.refused(directory)


def test_a_tokenizer_that_makes_its_library_panic_is_a_sentence(shell: Shell, dense: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    change(directory / "tokenizer.json", pre_tokenizer={"type": "FixedLength", "length": 0})
    assert "has no tokenizer that loads (chunk size must be non-zero)" in shell.refused(directory)


def test_a_token_whose_name_is_that_of_a_secret_is_not_dropped_silently(
    shell: Shell, dense: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    change(directory / "tokenizer_config.json", extra_special_tokens={"a": "<x1>", "access_token": "<x2>"})
    message = shell.refused(directory)
    assert "is another one without what its settings name outside of the directory, or keep secret; save" in message


def test_a_tokenizer_that_needs_another_file_is_refused(
    shell: Shell, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_snp.result.carried.TOKENIZER_FILES", ("tokenizer_config.json",))
    message = shell.refused(dense)
    assert message.startswith(f"the tokenizer of {dense} needs more than the files that travel with a result (token")


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, "\xff"])
def test_settings_that_are_none_are_refused(shell: Shell, dense: Path, tmp_path: Path, name: str, content: str) -> None:
    broken = Path(shutil.copytree(dense, tmp_path / "broken"))
    (broken / name).write_bytes(content.encode("latin-1"))
    assert shell.refused(broken).startswith(f"{broken / name} is no")


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "additional_chat_templates/x.jinja"])
def test_a_link_out_of_the_directory_does_not_travel(shell: Shell, dense: Path, tmp_path: Path, name: str) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "linked"))
    (tmp_path / "secret").write_text("{}")
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(tmp_path / "secret")
    message = shell.refused(directory)
    assert message.startswith(f"{directory / name} is a link out of the model's directory")


@pytest.mark.parametrize("name", [b"caf\xe9.jinja", b"a\nb.jinja", b"\x1b[2J.jinja"])
def test_a_template_with_a_name_that_the_hub_cannot_take_is_refused(
    shell: Shell, dense: Path, tmp_path: Path, name: bytes
) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / os.fsdecode(name)).write_text("{{ messages }}")
    message = shell.refused(directory)
    assert message.endswith("would travel with the result, and the Hub takes no file of such a name; rename it")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "settings", [{"sudachi_kwargs": {"sudachi_config_path": "x/sudachi.json"}}, {"init_inputs": ["vocab.txt"]}]
)
def test_a_tokenizer_that_hands_its_settings_on_is_refused(
    shell: Shell, dense: Path, tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    """SudachiPy loads a library that its settings name, and transformers never asks about it."""
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    fields = json.loads((directory / name).read_text()) if (directory / name).exists() else {}
    (directory / name).write_text(json.dumps(fields | settings))
    message = shell.refused(directory)
    assert message.startswith(f"{directory / name} has '{next(iter(settings))}', settings for another package, which ")
    with pytest.raises(CheckpointError, match="settings for another package"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokenizer_class": "T5Tokenizer", "extra_ids": 10**12}, "extra_ids is 1000000000000 in "),
        ({"tokenizer_class": "PegasusTokenizer", "offset": 10**400}, "offset is a number of 1329 bits in "),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}, "has a token of number '999999"),
        ({"added_tokens_decoder": {"4194304": {"content": "x"}}}, "has a token of number '4194304'; numbers must be"),
    ],
)
def test_a_tokenizer_that_makes_up_more_tokens_than_there_can_be_is_refused(
    shell: Shell, dense: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    change(directory / "tokenizer_config.json", **settings)
    assert said in shell.refused(directory)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_made_of_others_is_refused_before_they_are_loaded(
    shell: Shell, dense: Path, tmp_path: Path, where: str
) -> None:
    """RAG's loads tokenizers of sub-folders, whose settings nobody has looked at."""
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    change(directory / "config.json", question_encoder=None, generator=None)
    change(directory / where, tokenizer_class="RagTokenizer")
    for part in ("question_encoder_tokenizer", "generator_tokenizer"):
        (directory / part).mkdir()
        (directory / part / "tokenizer_config.json").write_text('{"sudachi_kwargs": {"sudachi_config_path": "x.json"}}')
    with pytest.raises(CheckpointError, match="is a RagTokenizer, which is made of other tokenizers"):
        load_tokenizer(directory)
    assert "made of other tokenizers" in shell.refused(directory)


def test_a_type_of_model_whose_tokenizer_is_made_of_others_is_refused(dense: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    change(directory / "tokenizer_config.json", tokenizer_class=None)
    encoder = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps({"model_type": "rag", "question_encoder": encoder, "generator": encoder})
    )
    with pytest.raises(CheckpointError, match="is a RagTokenizer, which is made of other tokenizers"):
        load_tokenizer(directory)


def test_settings_for_sentencepiece_and_empty_ones_are_read(dense: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    change(
        directory / "tokenizer_config.json", sp_model_kwargs={"enable_sampling": False}, init_inputs=[], mecab_kwargs={}
    )
    load_tokenizer(directory)


def test_a_pipe_among_the_templates_is_not_waited_for(dense: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    (model / "additional_chat_templates").mkdir()
    os.mkfifo(model / "additional_chat_templates" / "endless.jinja")
    assert Carried(model).files == Carried(dense).files


def test_links_of_the_hubs_cache_are_followed(dense: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in dense.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    assert Carried(snapshot).files == Carried(dense).files


TERMS = ("LICENSE", "LICENCE.md", "Notice", "NOTICE.txt", "USE_POLICY.md", "COPYING", "LICENSE-2.0", "Terms of Use.pdf")
TERMS += ("MODEL_LICENSE", "EULA.md", "Gemma_Terms_of_Use.txt", "UNLICENSE", "Community License for Gemma 2.pdf")
TERMS += ("Qwen LICENSE AGREEMENT", "LICENSE-MODEL", "LICENSE_zh.md", "THIRD_PARTY_NOTICES.txt", "COPYING.LESSER")
TERMS += (
    "Llama-3.1_LICENSE.txt",
    "LICENSE-CC-BY-NC-4.0.md",
    "acceptable_use_policy.md",
    "licenses.txt",
)


TERMS += (
    "ThirdPartyNotices.txt",
    "TermsOfUse.txt",
    "LicenseAgreement.pdf",
    "AcceptableUsePolicy.md",
    "ModelLicense.txt",
)
# With words in their names that are nobody's business to list.
TOLD_BY_WORDS = (
    "LICENSE_FALCON.txt",
    "Community License for Baichuan2 Model.txt",
    "LICENSE-3RD-PARTY",
    "LICENSE_NVIDIA.md",
)


def test_terms_and_templates_travel(prune: Prune, dense: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    (directory / "additional_chat_templates").mkdir()
    templates = {name: f"{{{{ messages }}}} {name}" for name in ("tool_use", "rag")}
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    for name, text in templates.items():
        (directory / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    for name in TERMS:
        (directory / name).write_text(f"as in {name}")
    for name in TOLD_BY_WORDS:
        (directory / name).write_text(f"as in {name}: all warranties and any LIABILITY are excluded; Copyright" * 10)
    others = {"license.py", "LICENSE.sh", "notes.txt", "policy.safetensors", "license_key.txt", "LICENSE.docx"}
    others |= {
        "pay terms.txt",
        "neulation.txt",
        "license_server.txt",
        "notice-of-termination-bob.txt",
        "driver-license-ann.pdf",
    }
    others |= {"policy_gradient_notes.md", "unlicensed_books.txt", "thirdparty_customers.txt", "noticeboard.txt"}
    others |= {"terms_with_client_acme.pdf", "policyholders.txt", "license_plates.txt", "copying_script.txt"}
    for name in others:
        (directory / name).write_text("no terms")
    (directory / "LICENSES").mkdir()
    with (directory / "LICENSE-data.txt").open("wb") as file:
        file.truncate(10_000_001)
    output = tmp_path / "out"
    notes = prune(directory, output)["notes"]
    for name in ("LICENSE.docx", "LICENSES", "LICENSE-data.txt"):
        assert f"{name} of the dense model, which is more than text, is not in the result; its terms hold" in notes
    assert {name: (output / name).read_text() for name in TERMS} == {name: f"as in {name}" for name in TERMS}
    assert all((output / name).read_text().startswith(f"as in {name}: ") for name in TOLD_BY_WORDS)
    assert not any("license_server" in note for note in notes)  # only the person who runs it is told
    assert not (others | {"LICENSES", "LICENSE-data.txt"}) & {path.name for path in output.iterdir()}
    dense_templates = AutoTokenizer.from_pretrained(directory).chat_template
    assert set(dense_templates) == {"default", *templates}
    assert AutoTokenizer.from_pretrained(output).chat_template == dense_templates
    before = Carried(directory).digest
    (directory / "additional_chat_templates" / "rag.jinja").write_text("other")
    assert Carried(directory).digest != before


def test_what_says_nothing_of_code_is_carried_to_the_byte(dense: Path) -> None:
    found = Carried(dense).files
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(found)
    assert all(content == (dense / name).read_bytes() for name, content in found.items())


def test_fields_without_code() -> None:
    kept = {
        "a": [1, {"b": None}],
        "think": "/no_think",
        "url": "https://a/b",
    }
    named = {
        "auto_map": 1,
        "vocab_file": "x",
        "c": {"custom_pipelines": {}},
        "d": LOCAL,
        "e": "C:\\Users\\ann",
        "f": [LOCAL],
    }
    assert without_code(kept) == kept
    assert without_code(kept | named) == kept | {"c": {}, "f": []}


TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "WANDB_API_KEY", "password", "hub_token", "client_secret", "use_auth_token"),
        *("clientSecret", "secretAccessKey", "dbPassword", "X-API-Key", "Authorization", "api-key", "AWSSecretKey"),
        *("token", "hubToken", "Set-Cookie", "api_keys", "secrets", "passwords", "oauthToken", "accessKeyId"),
        *("private_token", "connection_string"),
    ],
)
def test_what_is_called_a_secret_does_not_travel(name: str) -> None:
    assert without_code({name: "7f3", "b": {name: {"key": "7f3"}}}) == {"b": {}}


def test_who_ran_what_and_where_does_not_travel() -> None:
    """As a script writes its arguments into a config; a tokenizer may have words by such names."""
    fields = {"hostname": "gpu01", "user": "ann", "launchedBy": "ann@gpu01", "e_mail": "ann@example.org"}
    fields |= dict.fromkeys(("slurm_user", "runUser", "login", "ssh_host", "hostnames", "trained_by", "madeBy"), "x")
    fields |= dict.fromkeys(("LOGNAME", "ran_by", "built_by", "nodename", "userId", "uploader", "owner"), "x")
    fields |= {
        "contact": "Ann Smith <ann.smith@corp.example>",
        "ann@corp.example": 1,
        "authors": ["ann@corp.example"],
        "users": ["ann"],
        "email_address": "x",
    }
    kept = {"users": 3, "user_cost": 1, "contact": "the authors", "normalize_by": "x", "use_cache": True}
    assert without_code(fields) == without_code(fields, "generation_config.json") == {"authors": []}
    assert without_code(kept) == kept
    words = {"user": "<|user|>", "chat_template": "{{ 'write to ann@corp.example' }}"}
    assert without_code(words | {"created_by": "ann", "contact": "ann@corp.example"}, "tokenizer_config.json") == words


def test_what_a_model_reads_is_no_secret() -> None:
    fields = {"bos_token": "a", "pad_token_id": 1, "num_key_value_heads": 2, "key_dim": 3, "eos_token": "</s>"}
    fields |= {"eosToken": "</s>", "keyDim": 3, "tokenizer_class": "X", "cookie_monster": 1, "numKeyValueHeads": 2}
    assert without_code(fields) == fields


@pytest.mark.parametrize(
    "text",
    [
        "/home/ann lee/my models/x",
        "C:\\Users\\ann lee\\x",
        "~ann/x",
        "../ann/models",
        "./runs/ann",
        "file:///home/ann/a b",
        "s3://ann/texts",
        "https://ann.blob.core.windows.net/models/x?sv=2026&sig=aB3",
        "\\\\server\\ann lee",
        "//server/ann lee",
        "trained on //server/ann",
        "saved at /home/ann",
        "run by \\Users\\ann",
        "https://ann:password@host/x",
        "nfs://server/ann",
        "az://bucket/ann",
        "gpu17.corp.example.com:/export/ann",
        "ann@gpu17:/export/ann",
        "$HOME/x",
        "${SCRATCH}/ann",
        "%USERPROFILE%\\x",
        "ghp_" + "aB3" * 12,
        "glpat-" + "aB3" * 7,
        "sk-proj-" + "aB3" * 7,
        "AKIA" + "ABC3" * 4,
        f"token={TOKEN}",
        TOKEN,
        "AIza" + "aB3-" * 9,
        "ASIA" + "ABC3" * 4,
        "npm_" + "aB3" * 12,
        "Bearer " + "aB3" * 12,
        "https://hooks.slack.com/services/T0/B0/X",
        "eyJ" + "aB3" * 8 + ".eyJ" + "aB3" * 8 + ".x",
        "-----BEGIN RSA PRIVATE KEY-----",
        "x" * 400 + " /home/ann",
    ],
)
def test_places_people_and_tokens_do_not_travel(text: str, dense: Path, tmp_path: Path) -> None:
    """As a setting, in a list, as its name, and in the card's metadata; a vocabulary may have all of it."""
    assert without_code({"a": text, "b": [text], "c": {text: 1}}) == {"b": [], "c": {}}
    words = {"content": text, "template": text}
    assert without_code(words, "tokenizer_config.json") == words
    assert without_code(words) == without_code(words, "generation_config.json") == {}
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    card = {"license": "other", "license_link": text, "tags": [text, "ann@corp.example", "good"], "datasets": text}
    (directory / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    assert card_metadata(directory) == {"license": "other", "tags": ["good"]}


@pytest.mark.parametrize(
    "part", ["a://:", "a://" + ":" * 9, "eyJ-", "/a", "/a ", "a:/", "~/", "hf_", "- ", "//", ".", "x@"]
)
def test_long_texts_are_looked_at_in_no_time(part: str) -> None:
    began = time.process_time()
    without_code({"a": part * 200_000, "b": part + ":" * 200_000})
    assert time.process_time() - began < 5


def test_folders_of_who_runs_this_do_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "ann")
    fields = {"a": "runs/ann/out", "b": "ann/model", "c": "runs/anna/out", "key_dim": 1}
    secrets = dict.fromkeys(("WANDB_KEY", "d_key", "HF_TOKEN", "GITHUB_TOKEN", "AWS_SESSION_TOKEN", "DB_PASS"), "x")
    secrets |= {"passphrase": "x", "training_command": "torchrun --x " * 60 + "--data /mnt/nfs/ann/x"}
    kept = {"b": "ann/model", "c": "runs/anna/out", "key_dim": 1}
    kept["link"] = "https://huggingface.co/ann/model/blob/main/LICENSE"  # most people are called there as at home
    assert without_code(fields | secrets | kept) == kept


@pytest.mark.parametrize(
    "text",
    [
        "/think /no_think",
        "/ a / b",
        "</s>",
        "a/b",
        "https://a.b/c:d@e",
        "see https://a.b/c/d",
        "https://a.b/c?lang=en&signal=x",
        "a // b",
        "hf_short",
        "gpt2-sk-wikipedia-finetuned",
        "sk-news-of-the-last-year",
        "npm_package-of-many-words",
        "a:b",
        "a task-specific-instruction-model",
    ],
)
def test_what_only_looks_like_a_place_travels(text: str) -> None:
    assert without_code({"a": text}) == {"a": text}


def test_a_card_that_is_a_link_out_of_the_directory_is_not_read(dense: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    (tmp_path / "mine.md").write_text("---\ntags: [secret]\n---\n")
    (directory / "README.md").symlink_to("../mine.md")
    assert card_metadata(directory) == {}


def test_where_a_tokenizer_was_trained_does_not_travel(dense: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    trained = b"\x0a\x10/home/ann/a.text" + b"\x18\x02"  # input, and the type of model
    (directory / "tokenizer.model").write_bytes(b"\x12" + bytes([len(trained)]) + trained)
    assert Carried(directory).files["tokenizer.model"] == b"\x12\x02\x18\x02"


@pytest.mark.parametrize(
    "place",
    [
        "torchrun train.py --data /scratch/ann/secret --out x",
        "see /mnt/ann/runs",
        "merge of (/scratch/ann/a)",
        "x,/scratch/ann/x",
        "x:y:/scratch/ann/x",
        "from C:\\data\\ann\\x",
        "see ssh://ann@host/x",
        "in ~/runs/ann",
    ],
)
def test_a_place_inside_of_a_setting_does_not_travel(place: str) -> None:
    assert without_code({"a": {"dir": place}}) == {"a": {}}


@pytest.mark.parametrize(
    "text",
    ["and/or, 1 / 2, </s> / x", "see https://huggingface.co/a/b/c?d=e", "a/b/c", "<s>/</s>", "12:30, 3/4/5", "C: x"],
)
def test_what_only_looks_a_little_like_a_place_travels(text: str) -> None:
    assert without_code({"a": text}) == {"a": text}


def test_tags_of_an_adapter_are_not_those_of_the_pruned_model(tmp_path: Path) -> None:
    """peft writes the place of the base model into one, and the Hub reads what such a tag says."""
    tags = ["base_model:adapter:/scratch/ann/base", "base_model:adapter:facebook/opt-125m", "lora", "en"]
    (tmp_path / "README.md").write_text("---\ntags:\n" + "".join(f"- {tag}\n" for tag in tags) + "---\n")
    assert card_metadata(tmp_path) == {"tags": ["en"]}


def test_named_templates_are_texts_whatever_they_speak_of() -> None:
    templates = {"chat_template": [{"name": "default", "template": "{{ '/home/ann/x' }}"}]}
    for text in ("{% if a %}/x/y{% endif %}", "{{ '/home/ann/x' }} and ~/x"):
        assert without_code({"chat_template": text}, "tokenizer_config.json") == {"chat_template": text}
    assert without_code(templates, "tokenizer_config.json") == templates
    # A template is no place.
    assert without_code({"chat_template": "/home/ann/x.jinja"}, "tokenizer_config.json") == {}


def test_what_json_says_twice_does_not_travel(dense: Path, tmp_path: Path) -> None:
    """All readers see the last of them, and a person who looks at the file the first."""
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    path = directory / "tokenizer_config.json"
    path.write_text('{"note": "/home/ann/run7", ' + path.read_text().strip()[1:-1] + ', "note": "fine"}')
    content = Carried(directory).files[path.name]
    assert b"ann" not in content
    assert json.loads(content)["note"] == "fine"


def test_a_config_that_is_a_link_out_of_the_directory_is_refused(shell: Shell, dense: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    (directory / "config.json").rename(tmp_path / "private.json")
    (directory / "config.json").symlink_to(tmp_path / "private.json")
    assert "config.json is a link to" in shell.refused(directory)


@pytest.mark.parametrize(
    "fields",
    [
        {"compile_config": {"fullgraph": True}},
        {"repetition_penalty": 2},
        {"no_repeat_ngram_size": 2.5},
        {"eos_token_id": "x"},
        {"eos_token_id": [[1, 2], 3]},
    ],
)
def test_what_generate_begins_with_is_read_before_anything_is_pruned(
    fields: dict[str, Any], shell: Shell, dense: Path, tmp_path: Path
) -> None:
    """transformers would not load the result, or not write with it, which only tasks would have noticed, at the end."""
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    (directory / "generation_config.json").write_text(json.dumps(fields))
    message = shell.refused(directory)
    assert message.startswith(f"{directory / 'generation_config.json'} is refused by transformers (")
    assert message.endswith("; mend or remove it")


def test_what_travels_is_what_push_takes(dense: Path, tmp_path: Path) -> None:
    """A file of templates without a name would travel, and could not be published."""
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    (directory / TEMPLATES).mkdir()
    for name in (".jinja", "tool.jinja"):
        (directory / TEMPLATES / name).write_text("{{ messages }}")
    files = Carried(directory).files
    assert all(map(travels, files))
    assert f"{TEMPLATES}/tool.jinja" in files


def test_what_generate_takes_travels(dense: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    fields = {"repetition_penalty": 1, "no_repeat_ngram_size": 0, "eos_token_id": [1, 2], "pad_token_id": None}
    (directory / "generation_config.json").write_text(json.dumps(fields))
    assert json.loads(Carried(directory).files["generation_config.json"]) == fields


def test_a_product_s_licence_is_told_by_what_it_says(dense: Path, tmp_path: Path) -> None:
    """By its name alone it is the key of something else that lies there; a maker's licence of the model has words."""
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    (directory / "gurobi_license.txt").write_text("LICENSEID=123\nHOSTNAME=gpu01\n")
    (directory / "access_policy.txt").write_text("allow user ann on gpu01\n")
    (directory / "ACME_LICENSE.txt").write_text("Copyright ACME. Permission is hereby granted ...\n" * 20)
    (directory / "Llama-2_LICENSE.txt").write_text("see the web\n")
    (directory / "USE_POLICY.md").write_text("be good\n")
    (directory / "BAICHUAN-LICENSE.txt").write_text("模型社区许可协议 授权 ...\n" * 50, encoding="utf-8")
    (directory / "license_ann.txt").write_text("许可证密钥 AAAA 授权给 Ann Lee\n", encoding="utf-8")
    (directory / "license_server.txt").write_text("License key AAAA-BBBB, licensee Ann Lee, licensor ACME\n")
    carried = Carried(directory)
    assert {"ACME_LICENSE.txt", "BAICHUAN-LICENSE.txt", "Llama-2_LICENSE.txt", "USE_POLICY.md"} <= set(carried.files)
    products = ["access_policy.txt", "gurobi_license.txt", "license_ann.txt", "license_server.txt"]
    assert sorted(carried.unclear) == products


def test_a_page_of_terms_stays_where_it_is_and_the_report_says_so(prune: Prune, dense: Path, tmp_path: Path) -> None:
    """A browser runs what is in it, and `push` would publish it beside our own page."""
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    for name in ("LICENSE.html", "usage-policy.HTM", "LICENSE"):
        (directory / name).write_text("<script>alert(1)</script>")
    report = prune(directory, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").exists()
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix.lower() in (".html", ".htm")][1:]
    assert sum("which is more than text, is not in the result" in note for note in report["notes"]) == 2


def test_what_may_be_terms_and_stays_is_counted_in_the_report(prune: Prune, dense: Path, tmp_path: Path) -> None:
    """By its name, which may be somebody's own, it is known on this machine only."""
    directory = Path(shutil.copytree(dense, tmp_path / "model"))
    (directory / "gurobi_license.txt").write_text("LICENSEID=123\n")
    prune(directory, tmp_path / "out")
    content = (tmp_path / "out" / "report.json").read_text()
    assert "a file of the dense model that may be terms of use stayed there" in content
    assert "gurobi" not in content
