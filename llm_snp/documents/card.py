"""The model card (README.md of the result), from report.json alone."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from .card_metadata import as_list, metadata_of
from .healing import after_pruning, healing_rows, healing_sentences
from .markdown import as_text, change, code, listed, table_of
from .shareable import before, hub_id, shareable, texts_of
from .steps import HEAD, steps_rows, steps_sentences

# Model types whose attention vLLM cannot run where blocks have widths of their own; those of which llama.cpp takes
# other heads and neurons in every block; and those of which vLLM's own class reads no width of a head.
NOT_IN_VLLM = ("falcon", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
BLOCKWISE_IN_GGUF, NO_HEAD_WIDTH = ("llama", "mistral", "qwen2"), ("qwen2",)
CODE_SPAN = frozenset("`|<[")  # with these a command in a table would end, or be more than a command
PLOT = re.compile(r"^!\[(.*)\]\((plots/[^)]+)\)$", re.MULTILINE)


def model_card(
    report: dict[str, Any], name: str | None = None, plots: Sequence[tuple[str, str]] = (), own_code: bool = True
) -> str:
    """Markdown with the Hub's metadata in front, without paths of the machine it was made on.

    name: what `from_pretrained` gets, a directory (default: that of the result) or a Hub id; plots: title, and path
    relative to the card, of images to show; own_code: whether the code that lies beside the weights is this version's.
    """
    report = shareable(report)
    name = name or report["output"]
    title = name.rsplit("/", 1)[-1]
    metadata = metadata_of(report, title)
    command, healings = report["command"], [step["command"] for step in report.get("healing", [])]
    report = as_text(report)
    sections = [
        f"# {as_text(title)}",
        _summary(report),
        _how_to_load(report, name, own_code),
        _how_to_serve(report, name, own_code),
        _perplexity(report),
        _healing(report, healings),
        _harness(report),
        _speed(report),
        _removed(report),
        _steps(report),
        "\n\n".join(f"![{title}]({path})" for title, path in plots),
        _how_it_was_made(report, command),
        _limits(report, metadata),
    ]
    return "\n\n".join([f"---\n{metadata.to_yaml()}\n---", *filter(None, sections)]) + "\n"


def plots_of(card: str) -> list[tuple[str, str]]:
    """The plots a card from `model_card` shows: title and path of each."""
    return PLOT.findall(card)


def _summary(report: dict[str, Any]) -> str:
    model, sparsity = report["model"], report["sparsity"]
    rows = [
        ("parameters", *change(model["parameters"], model["parameters_pruned"], "{:,}")),
        ("weights, MB", *change(model["bytes"] / 1e6, model["bytes_pruned"] / 1e6, "{:,.1f}")),
    ]
    return (
        f"`{model['name']}` with {sparsity['achieved']:.2%} of its decoder blocks' linear parameters removed in one "
        f"shot ({sparsity['of_all_parameters']:.2%} of all), by llm_snp {report['versions']['llm_snp']}. "
        f"{after_pruning(report)}{_lineage(report)}\n\n{table_of(('', before(report), 'pruned', 'change'), rows)}"
    )


def _lineage(report: dict[str, Any]) -> str:
    """Of a model that had been pruned before."""
    if "parents" not in report:
        return ""
    chain = []
    for one in report["parents"]:
        trained = f", then trained for {one['healed']:,} tokens" if one.get("healed") else ""
        chain.append(f"`{one['name']}` ({one['removed']:.2%} removed{trained})")
    made_of = f", made of {', then '.join(chain)}" if chain else ""
    gone = f"{report['sparsity']['of_dense']:.2%} of the dense model's blocks are gone in all"
    return f" It had been pruned before{made_of}: {gone}."


def _how_to_load(report: dict[str, Any], name: str, own_code: bool) -> str:
    trust, first = "", ""
    why = "It is a checkpoint of the stock class: no code of its own is needed."
    if report["model"].get("custom_code", True) and not own_code:
        first, why = (
            "import llm_snp  # its classes load it: there is code in this folder that is not what it writes\n",
            "There is no need to run what lies here: `trust_remote_code` would.",
        )
    elif report["model"].get("custom_code", True):
        trust, why = (
            ", trust_remote_code=True",
            (
                "`trust_remote_code` lets transformers read `modeling_snp.py`, which lies beside the weights and gives "
                "each block its width; it is not needed where `llm_snp` is imported."
            ),
        )
    place = json.dumps(name, ensure_ascii=False)  # a name ends no string of Python's that is written so
    return f"""## Load it

```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({place}{trust})
tokenizer = AutoTokenizer.from_pretrained({place}{trust})
```

{why}"""


def _how_to_serve(report: dict[str, Any], name: str, own_code: bool) -> str:
    """The engines that can load it, with what to type."""
    kind, own = report["model"]["type"], report["model"].get("custom_code", True)
    sites = [site for block in report["blocks"] for site in block.values() if isinstance(site, dict)]
    fewer = {site["unit"] for site in sites if site["kept"] < site["units"]}
    backend = own or (kind in NO_HEAD_WIDTH and "heads" in fewer)
    name = name if CODE_SPAN.isdisjoint(name) else "DIR"
    quoted, file = shlex.quote(name), shlex.quote(name.rstrip("/").rsplit("/", 1)[-1] + ".gguf")
    rows = []
    if not (own and (not own_code or kind in NOT_IN_VLLM or any(site["kept"] == 0 for site in sites))):
        flags = " --trust-remote-code" * own + " --model-impl transformers" * backend
        rows.append(("vLLM", f"`vllm serve {quoted}{flags}`"))
    if kind in BLOCKWISE_IN_GGUF and fewer <= {"heads", "neurons"}:
        fetch = ""
        if "/" in name and hub_id({"name": name, "hub": True}):
            quoted, whole = shlex.quote(name.rpartition("/")[2]), quoted
            fetch = f"`hf download {whole} --local-dir {quoted}`, "
        export = f"{fetch}`python -m llm_snp export {quoted} --gguf {file}`"
        rows.append(("llama.cpp", f"{export}, then `llama-server -m {file}`"))
    if not rows:
        return ""
    sizes = " vLLM needs heads of a size that its attention kernels have: multiples of 8 on GPUs." if own else ""
    table = table_of(("engine", "command"), rows)
    return f"## Serve it\n\n{table}\n\nThat follows from its shapes; this run started none of them.{sizes}"


def _perplexity(report: dict[str, Any]) -> str:
    if not report["evaluation"]:
        return "## Perplexity\n\nNot measured in this run."
    rows = []
    for source, result in report["evaluation"].items():
        dense, pruned = result["dense"], result["pruned"]
        figures = change(dense["perplexity"], pruned["perplexity"], "{:.2f}")
        rows.append((source, *figures, f"{pruned['tokens']:,}", str(pruned["sequence_length"])))
    head = ("text", before(report), "pruned", "change", "predicted tokens", "window")
    return (
        f"## Perplexity\n\n{table_of(head, rows)}\n\n"
        "Consecutive non-overlapping windows, mean over all predicted tokens; lower is better."
    )


def _healing(report: dict[str, Any], commands: Sequence[str]) -> str:
    parts = [
        f"{code(command)}\n\n{healing_sentences(step)}\n\n"
        + table_of(("perplexity", "teacher", "before", "after"), healing_rows(step))
        for command, step in zip(commands, report.get("healing", []), strict=True)
    ]
    return "\n\n".join(["## Healing", *parts]) if parts else ""


def _harness(report: dict[str, Any]) -> str:
    rows = []
    for task, found in report.get("harness", {}).items():
        facts = ["" if found[key] is None else str(found[key]) for key in ("num_fewshot", "samples", "version")]
        for metric, values in found["metrics"].items():
            figures = (with_error(values[which]) if which in values else "" for which in ("dense", "pruned"))
            rows.append((task, metric, *figures, *facts))
    head = ("task", "metric", before(report), "pruned", "examples shown", "samples", "version")
    about = "Measured with the lm-evaluation-harness; ± is one standard error."
    return f"## Tasks\n\n{table_of(head, rows)}\n\n{about}" if rows else ""


def with_error(result: Mapping[str, Any]) -> str:
    """A metric of the harness with its standard error, where there is one."""
    return f"{result['value']:.4f}" + ("" if result["stderr"] is None else f" ± {result['stderr']:.4f}")


def _speed(report: dict[str, Any]) -> str:
    if not (speed := report.get("speed")):
        return ""
    pruned, dense = speed["pruned"], speed.get("dense")
    lines = (
        ("prefill, ms", "prefill_seconds", 1e3, "{:,.1f}"),
        ("decode, tokens/s", "tokens_per_second", 1, "{:,.1f}"),
        ("KV cache, MB", "kv_cache_bytes", 1e-6, "{:,.2f}"),
        ("weights, MB", "weight_bytes", 1e-6, "{:,.1f}"),
        ("peak memory, MB", "peak_bytes", 1e-6, "{:,.1f}"),
    )
    rows = []
    for name, key, scale, style in lines:
        if pruned[key] is None:
            continue
        row = [name, style.format(pruned[key] * scale)]
        if dense:
            known = dense[key] is not None
            row.insert(1, style.format(dense[key] * scale) if known else "")
            row.append(f"{pruned[key] / dense[key]:.2f}" if known and dense[key] else "")
        rows.append(row)
    first = before(report)
    head = ("", first, "pruned", f"pruned / {first}") if dense else ("", "pruned")
    device = speed["device"]
    threads = f", threads: {device['threads']}" if device["type"] == "cpu" else ""
    return (
        f"## Speed\n\n{table_of(head, rows)}\n\nMeasured on {device['name']}, {device['dtype']}{threads}, "
        f"batch {speed['batch']}, {speed['prompt']} prompt tokens, {speed['new']} new ones, {speed['runs']} runs."
        + listed(speed["notes"])
    )


def _removed(report: dict[str, Any]) -> str:
    fullest_first = sorted(report["blocks"], key=len, reverse=True)  # not every block has all sites
    sites = list(dict.fromkeys(site for block in fullest_first for site in block if site != "block"))
    rows = []
    for block in report["blocks"]:
        kept = (f"{s['kept']} of {s['units']} {s['unit']}" if (s := block.get(site)) else "" for site in sites)
        rows.append((str(block["block"]), *kept))
    return f"## What is left of each block\n\n{table_of(('block', *sites), rows)}"


def _steps(report: dict[str, Any]) -> str:
    rows = steps_rows(report)
    return f"## What each step took\n\n{table_of(HEAD, rows)}\n\n{steps_sentences(report)}" if rows else ""


def _how_it_was_made(report: dict[str, Any], command: str) -> str:
    options, calibration = report["options"], report["calibration"]
    named = ["order", "target", "attention"] + ["experts"] * (options.get("experts") not in (None, "neurons"))
    choices = ", ".join(f"{name} `{options[name]}`" for name in named)
    made = (
        f"With {choices}, allocation `{report['plan']['allocation']}`; calibrated on {calibration['windows']} windows "
        f"of {calibration['sequence_length']} tokens of {_named(calibration)}, seed {report['seed']}. The plan: "
        f"{report['plan']['why']}. Errors of each layer, versions and times are in `report.json`. The method is that "
        "of *Subspace Node Pruning* (arXiv 2405.17506) and, where the options above say so, the extensions of llm_snp."
    )
    return f"## How it was made\n\n{code(command)}\n\n{made}{listed(report['notes'])}"


def _named(calibration: dict[str, Any]) -> str:
    """`wikitext2`, or `wikitext2 (64 windows) and c4 (64 windows)`."""
    texts = texts_of(calibration)
    return " and ".join(one["source"] + (f" ({one['windows']:,} windows)" if len(texts) > 1 else "") for one in texts)


def _limits(report: dict[str, Any], metadata: ModelCardData) -> str:
    model = report["model"]
    licence = as_text(", ".join(as_list(metadata.license_name or metadata.license)))
    terms = f"its licence ({licence})" if licence else "its licence"
    if report.get("healing"):
        how = "Trained after pruning, on little text: what that text has nothing of may not have come back."
    elif report["options"]["target"] == "none" or not report["sparsity"]["achieved"]:
        how = "Pruned in one shot: the remaining weights are as they were, not refitted, and nothing was trained."
    else:
        how = (
            "Pruned in one shot: the remaining weights were refitted by least squares, and nothing was trained "
            "afterwards."
        )
    limits = [
        how,
        f"Calibrated on {report['calibration']['source']}: on text that is unlike it (other languages, code, "
        "conversations) more may have been lost than the figures here show.",
        f"It is derived from `{model['name']}`: {terms} applies, and it has its biases. What it says should be "
        "checked for the use at hand.",
    ]
    if model.get("custom_code", True):
        limits.insert(
            1, "It has code of its own (`modeling_snp.py`): tools that know stock models only cannot load it as it is."
        )
    return f"## Limits{listed(limits)}"
