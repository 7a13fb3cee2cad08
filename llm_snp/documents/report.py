"""report.json: everything a later reader needs."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import resource
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..core.allocation import SiteCurve
from ..dense.card import card_metadata
from ..dense.checkpoint import Checkpoint
from ..dense.data import Windows
from ..evaluation.perplexity import Perplexity
from ..families import EXPERTS, SCORES, SHARED, dropped
from ..pruning.executor import BlockLoss
from ..pruning.job import Job
from ..pruning.order import TOKENS_PER_NEURON
from ..pruning.plan import Plan
from ..system.device import device_facts, dtype_name
from ..system.manifest import FILES
from ..system.private import public_name
from ..version import __version__
from .lineage import dense_base, parents
from .shareable import command_line

FORMAT = 1
CURVE_POINTS = 33
LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "datasets", "tokenizers")

# Columns that a quantised tensor of llama.cpp has in a group, at least; k-quants have 256.
PACKED = 32
# Experts at most that a note names.
SHOWN = 8


class Report:
    """Collects `data`, a JSON-ready dict, while a run goes on."""

    def __init__(
        self,
        job: Job,
        checkpoint: Checkpoint,
        calibration: Windows,
        dtype: torch.dtype,
        stored: torch.dtype,
        processes: int = 1,
        before: dict[str, Any] | None = None,
    ):
        """before: the report of the run that made the model, if one did."""
        self.options = options = job.options
        self.job, self.before = job, before
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "versions": versions(),
            "command": command_line(dataclasses.asdict(options), processes, nodes()),
            "options": dataclasses.asdict(options),
            "seed": options.seed,
            "model": {
                "name": options.model if job.from_hub else public_name(job.directory.resolve()),
                "hub": job.from_hub,
                "type": job.family.model_type,
                "dtype": dtype_name(stored),
                "bytes": sum(file.stat().st_size for file in checkpoint.files),
                "card": card_metadata(job.directory),
            },
            "device": device_facts(job.device, dtype) | {"processes": processes, "nodes": nodes()},
            "calibration": {
                **_text(calibration),
                "texts": [_text(part) for part in calibration.parts or (calibration,)],
                "sequence_length": job.length,
                "sequence_length_asked": options.sequence_length,
            },
            "blocks": [],
            "evaluation": {},
            "notes": [],
            FILES: {},
        }
        self.again = before is not None or job.whole is not job.config
        if self.again:
            self.data["parents"] = [] if before is None else parents(before)
        blocks = range(job.config.num_hidden_layers)
        sites = [site for index in blocks for site in job.sites(index)]
        widest = max(site.columns for site in sites)
        if calibration.tokens.numel() < widest:
            self.note(
                f"{calibration.tokens.numel()} calibration tokens for layers of up to {widest} inputs: the repair "
                "rests on the damping; give more --samples"
            )
        if options.target == "residual" and any(site.stream is None and site.name != SHARED for site in sites):
            self.note(
                "a norm lies between the pruned layers and the residual stream: they were refitted to their own output "
                "in the dense model"
            )
        if job.length < options.sequence_length:
            self.note(f"windows have {job.length} tokens: the model has no more positions")

    def note(self, text: str) -> None:
        """Something a reader should know: a rescue, a limit, a rounding."""
        self.data["notes"].append(text)

    def planned(self, plan: Plan, parameters: int, custom_code: bool) -> list[str]:
        """The plan; parameters: of the whole model before; custom_code: whether the result has a class of its own.

        Returns what was noted of it.
        """
        options, model, before = self.options, self.data["model"], len(self.data["notes"])
        model["custom_code"] = custom_code
        model["parameters"] = parameters
        model["parameters_pruned"] = parameters - plan.gone
        self.data["sparsity"] = {
            "asked": options.sparsity,
            "achieved": plan.achieved,
            "of_all_parameters": plan.gone / parameters,
            "block_parameters": plan.base,
            "block_parameters_removed": plan.removed,
        }
        if self.again:
            whole = dense_base(self.job.family, self.job.whole, self.before, plan.base)
            left = (plan.base - plan.removed) / whole
            self.data["sparsity"] |= {"dense_block_parameters": whole, "of_dense": 1 - left}
        self.data["plan"] = {
            "allocation": plan.made_by,
            "why": plan.why,
            "kept": list(plan.kept),
            "curves": [_curve(curve) for curve in plan.curves],
        }
        if plan.steps:
            self.data["steps"] = [dataclasses.asdict(step) for step in plan.steps]
        if options.round_to > 1 and abs(plan.removed - plan.asked) > min(c.cost for c in plan.curves):
            self.note(
                f"--round-to {options.round_to} allows {plan.achieved:.2%} of the block parameters to go, "
                f"{options.sparsity:.2%} was asked"
            )
        if options.attention == "both" and plan.whole_heads and options.one_kind:  # as was asked for
            self.note(
                "whole heads go, judged on one kind of text: on other kinds results have lost more by that than with "
                "--attention dims; calibrate on several (--calibration A --calibration B), or give --attention dims"
            )
        if options.format == "blockwise" and any(kept.get("neurons", 0) % PACKED for kept in plan.kept):
            self.note(
                f"not every block has a multiple of {PACKED} neurons: llama.cpp leaves such layers in 16 bits when it "
                f"quantises; --round-to {PACKED} makes them fit, and --round-to 256 for k-quants"
            )
        return list(self.data["notes"][before:])

    def block(self, index: int, losses: BlockLoss) -> None:
        """What pruning block `index` did.

        What query and key lose is part of the attention's error, and what experts lose of the MLP's: no `lost` there.
        """
        curves = {c["site"]: c for c in self.data["plan"]["curves"] if c["block"] == index}
        kept = self.data["plan"]["kept"][index]
        entry: dict[str, Any] = {"block": index}
        for site, curve in curves.items():
            gone = dropped(kept)  # without a look at what it gave
            result, whole = losses.get(site), None if site in (SCORES, EXPERTS) or gone else 0.0
            entry[site] = {
                "unit": curve["unit"],
                "units": curve["units"],
                "kept": kept[curve["unit"]],
                "lost": result.lost if result else whole,
                "total": result.total if result else None,
                "damping": result.damping if result else None,
            }
            if result and result.scarce:
                self.note(_scarce(index, result.scarce))
            asked = self.options.damping
            raised = result and result.damping not in result.scarce.values()
            if result and raised and not isinstance(asked, str) and result.damping > asked:
                self.note(
                    f"block {index} {site}: moments were singular, or weights too large for their type; damping raised "
                    f"from {asked:g} to {result.damping:g}"
                )
        self.data["blocks"].append(entry)

    def evaluated(self, source: str, which: str, result: Perplexity) -> None:
        self.data["evaluation"].setdefault(source, {})[which] = dataclasses.asdict(result)

    def overfit(self, dense: Perplexity, pruned: Perplexity) -> None:
        """What is lost, in nats per token, on windows that were calibrated on, and then on others of the same text."""
        loss = pruned.nll / pruned.tokens - dense.nll / dense.tokens
        self.data.setdefault("overfit", []).append({"source": dense.source, "windows": dense.windows, "loss": loss})

    def finished(self, output: Path, weight_bytes: int, seconds: dict[str, float]) -> None:
        self.data["model"]["bytes_pruned"] = weight_bytes
        self.data["output"] = str(output)
        self.data["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
        self.data["peak_memory"] = {
            "host_bytes": peak_host_bytes(),
            "device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        }


def peak_host_bytes() -> int:
    """The largest resident size of this process so far.

    On Linux the program's own (VmHWM): `ru_maxrss` begins with that of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def versions() -> dict[str, str]:
    """Of llm_snp, Python and the libraries that matter."""
    return {"llm_snp": __version__, "python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def nodes() -> int:
    """On how many machines torchrun has started the processes of this run."""
    known = [os.environ.get(name, "") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    processes, here = (int(text) if text.isdecimal() else 0 for text in known)
    return max(1, processes // here) if here else 1


def _text(windows: Windows) -> dict[str, Any]:
    return {
        "source": windows.source,
        "sha256": windows.sha256,
        "windows": windows.tokens.shape[0],
        "windows_available": windows.available,
        "text_tokens": windows.text_tokens,
    }


def _curve(curve: SiteCurve) -> dict[str, Any]:
    """A site and its curves at up to `CURVE_POINTS` kept counts."""
    at = sorted({round(j * curve.units / (CURVE_POINTS - 1)) for j in range(CURVE_POINTS)})
    entry: dict[str, Any] = {
        "block": curve.block,
        "site": curve.site,
        "unit": curve.unit,
        "units": curve.units,
        "parameters_per_unit": curve.cost,
    }
    for name, values in (("variance", curve.variance), ("loss", curve.loss)):
        if values is not None:
            entry["at_kept"] = at
            entry[name] = [values[k].item() for k in at]
    return entry


def _scarce(index: int, dampings: Mapping[str, float]) -> str:
    """Which experts of a block saw too few tokens, those that saw least first."""
    experts = sorted(dampings, key=lambda expert: -dampings[expert])
    shown = ", ".join(f"{expert} ({dampings[expert]:.2g})" for expert in experts[:SHOWN])
    more = f" and {len(experts) - SHOWN} more" if len(experts) > SHOWN else ""
    few = "1 expert" if len(experts) == 1 else f"{len(experts)} experts"
    return (
        f"block {index} mlp: {few} saw fewer than {TOKENS_PER_NEURON} tokens per neuron, for which the damping was "
        f"raised: {shown}{more}; give more --samples"
    )
