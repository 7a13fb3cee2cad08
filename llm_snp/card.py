"""The model card (README.md of the result), from report.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def model_card(report: dict[str, Any]) -> str:
    """Markdown with the Hub's metadata in front."""
    model, sparsity, options = report["model"], report["sparsity"], report["options"]
    name, calibration = Path(report["output"]).name, report["calibration"]
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if not Path(model["name"]).exists() and "/" in model["name"]:
        metadata["base_model"] = model["name"]
    metadata["tags"] = ["llm_snp", "pruned", "structured-pruning"]
    rows = "\n".join(
        f"| {Path(source).name} | {result['dense']['perplexity']:.2f} | {result['pruned']['perplexity']:.2f} "
        f"| {result['pruned']['tokens']:,} | {result['pruned']['sequence_length']} |"
        for source, result in report["evaluation"].items()
    )
    perplexity = (
        f"""
| text | dense | pruned | predicted tokens | window |
|---|---|---|---|---|
{rows}

Consecutive non-overlapping windows, mean over all predicted tokens.
"""
        if rows
        else "\nNot measured in this run.\n"
    )
    sites = [[(k, v) for k, v in block.items() if k != "block"] for block in report["blocks"]]
    blocks = "\n".join(
        f"| {i} | " + " | ".join(f"{s['kept']} of {s['units']} {s['unit']}" for _, s in entry) + " |"
        for i, entry in enumerate(sites)
    )
    heads = " | ".join(site for site, _ in sites[0])
    notes = "".join(f"\n- {note}" for note in report["notes"])
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {name}

`{Path(model["name"]).name if "base_model" not in metadata else model["name"]}` with {sparsity["achieved"]:.2%} of its \
decoder blocks' linear parameters removed in one shot ({sparsity["of_all_parameters"]:.2%} of all: \
{model["parameters"]:,} to {model["parameters_pruned"]:,}), by llm_snp {report["versions"]["llm_snp"]}. \
No training followed.

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

`trust_remote_code` is needed where `modeling_snp.py` lies beside the weights, unless `llm_snp` is imported.

## Perplexity
{perplexity}
## What was removed

| block | {heads} |
|---|{"---|" * len(sites[0])}
{blocks}

Order `{options["order"]}`, allocation `{report["plan"]["allocation"]}`, repair target `{options["target"]}`,
attention `{options["attention"]}`; calibrated on {calibration["windows"]} windows of
{calibration["sequence_length"]} tokens of {Path(calibration["source"]).name}, seed {report["seed"]}.
The plan: {report["plan"]["why"]}. Per block and layer errors, versions and times are in `report.json`.{notes}

```
{report["command"]}
```

The method is that of *Subspace Node Pruning* (arXiv 2405.17506) and, where the options above say so, the extensions
of llm_snp. A pruned model has the biases of the dense one, and what it says should be checked for the use at hand.
"""
