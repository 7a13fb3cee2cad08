"""The metadata in front of a model card: what the Hub reads of it."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .shareable import CORPORA, hub_id, texts_of

TAGS = ("llm_snp", "pruned", "structured-pruning")
CARRIED = ("license", "license_name", "license_link", "language")  # from the dense model's card, as they are
TASK = "text-generation"


def metadata_of(report: dict[str, Any], title: str) -> ModelCardData:
    """Whence the model is, under which terms, and what was measured of it. report: as it may be shared."""
    card = report["model"].get("card") or {}
    sources = [one["source"] for one in texts_of(report["calibration"])]
    known = [CORPORA[source][0] for source in sources if source in CORPORA]
    datasets = dict.fromkeys([*as_list(card.get("datasets")), *known])
    results = _results(report) or None
    made_of = [report["model"], *reversed(report.get("parents", []))]  # the nearest that is there
    return ModelCardData(
        base_model=next(filter(None, map(hub_id, made_of)), None),
        library_name="transformers",
        pipeline_tag=TASK,
        tags=list(dict.fromkeys([*as_list(card.get("tags")), *TAGS])),
        datasets=list(datasets) or None,
        model_name=title if results else None,
        eval_results=results,
        **{key: card[key] for key in CARRIED if card.get(key)},
    )


def _results(report: dict[str, Any]) -> list[EvalResult]:
    """What was measured of the pruned model, as the Hub's `model-index` has it."""
    results = []
    for source, measured in report["evaluation"].items():
        dataset, config, split = CORPORA.get(source, (_dataset_type(source), None, None))
        length = measured["pruned"]["sequence_length"]
        results.append(
            EvalResult(
                task_type=TASK,
                dataset_type=dataset,
                dataset_name=source,
                dataset_config=config,
                dataset_split=split,
                metric_type="perplexity",
                metric_name=f"perplexity, windows of {length} tokens",
                metric_value=measured["pruned"]["perplexity"],
            )
        )
    for task, found in report.get("harness", {}).items():
        args = None if found["num_fewshot"] is None else {"num_few_shot": found["num_fewshot"]}
        for metric, values in found["metrics"].items():
            kind = _dataset_type(task)
            results.append(EvalResult(TASK, kind, task, metric, values["pruned"]["value"], dataset_args=args))
    return results


def _dataset_type(name: str) -> str:
    """A text or task of one's own as the Hub takes it for the id of a dataset, or refuses the whole card."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-") or "text"


def as_list(value: Any) -> list[str]:
    """What a card may give as one string or as a list."""
    return [value] if isinstance(value, str) else list(value or ())
