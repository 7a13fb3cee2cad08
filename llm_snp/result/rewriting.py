"""A result whose weights are others than before: in the same shards, with the same widths, and with code of llm_snp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..dense.checkpoint import weight_files
from .carried import Carried
from .own_code import MODELING, own_code
from .settings import content_of
from .writer import Writer


class Rewriting:
    """What stays of a result when its weights become others, read once: nobody has to leave the directory alone.

    Settings and tokenizer travel as they do from a dense model: what names code is taken out, and the one file of code
    is llm_snp's own, whatever `source` has under its name. Raises `CheckpointError` for what cannot be read.
    """

    def __init__(self, source: Path):
        self.carried = Carried(source)
        self.settings = content_of(source / "config.json")
        self._own = own_code(self.carried.config)
        self._files = sorted(weight_files(source).items())

    def write(self, directory: Path, tensors: Mapping[str, Tensor]) -> Writer:
        """Write what the result consists of, but for its documents, into `directory`."""
        shards = [
            [name for name in (tensors if names is None else names) if name in tensors] for _, names in self._files
        ]
        named = {name for shard in shards for name in shard}
        shards[-1] += [name for name in tensors if name not in named]  # what the files spell otherwise than the class
        shards = [shard for shard in shards if shard]
        writer = Writer(directory, len(shards))
        files, fields = dict(self.carried.files), dict(self.carried.config)
        if self._own:
            fields["auto_map"], files[MODELING] = self._own
        files["config.json"] = (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
        for number, names in enumerate(shards):
            writer.shard(number, {name: tensors[name] for name in names})
        writer.bytes(files)
        writer.index()
        return writer
