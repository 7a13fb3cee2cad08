"""A result whose weights are others than before: in the same shards, with the same widths, and with code of llm_snp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..dense.checkpoint import weight_files
from .assembly import MODELING, own_code
from .carried import Carried, read_object, without_code
from .writer import Writer


def rewrite(source: Path, writer: Writer, carried: Carried, tensors: Mapping[str, Tensor]) -> None:
    """Write what a result at `source` consists of, but for its documents, with other weights.

    Settings and tokenizer travel as they do from a dense model: what names code is taken out, and the one file of code
    is llm_snp's own, whatever `source` has under its name.
    """
    files = dict(carried.files)
    fields = without_code(read_object(source / "config.json", (source / "config.json").read_bytes()))
    if own := own_code(fields):
        fields["auto_map"], files[MODELING] = own
    files["config.json"] = (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
    for number, names in enumerate(shards(source, tensors)):
        writer.shard(number, {name: tensors[name] for name in names})
    writer.bytes(files)
    writer.index()


def shards(source: Path, tensors: Mapping[str, Any]) -> list[list[str]]:
    """The names of the tensors in each weight file of a checkpoint, in the order of the files' names."""
    return [
        list(tensors) if names is None else [name for name in names if name in tensors]
        for _, names in sorted(weight_files(source).items())
    ]
