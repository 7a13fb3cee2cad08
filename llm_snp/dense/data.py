"""Text to calibrate and to evaluate on, as token windows: from the Hub, a local file, or written by the model itself.

The evaluation protocol is the usual one: WikiText-2 raw test as `"\\n\\n".join(rows)`, tokenised once with the
model's own tokenizer, consecutive non-overlapping windows.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import CorpusError, HubError, first_line

# Tokenising hundreds of megabytes to draw a few windows helps nobody: calibration reads this much of a file.
CALIBRATION_CHARACTERS = 32_000_000
HUB_C4_DOCUMENTS = {"calibration": 4000, "evaluation": 1100}
COMPRESSED: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]


@dataclass(frozen=True)
class Windows:
    """Token windows with their origin.

    tokens (N, T) long; source: what the user named; sha256 of the token ids; available: windows to choose from;
    text_tokens: tokens of the whole text that was read; parts: where they are of several texts, those of each.
    """

    tokens: Tensor
    source: str
    sha256: str
    available: int
    text_tokens: int
    parts: tuple[Windows, ...] = ()


def as_windows(
    tokens: Tensor, source: str, available: int, text_tokens: int, parts: tuple[Windows, ...] = ()
) -> Windows:
    """Windows with their hash."""
    digest = hashlib.sha256(tokens.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()
    return Windows(tokens, source, digest, available, text_tokens, parts)


def calibration_windows(source: str, tokenizer: Any, samples: int, length: int, seed: int) -> Windows:
    """`samples` of the non-overlapping windows of `length` tokens of a corpus, drawn with `seed`.

    Raises `CorpusError` if there are too few, saying how many there are.
    """
    ids = tokenize(tokenizer, _join(documents(source, "calibration"), CALIBRATION_CHARACTERS), source)
    available = ids.numel() // length
    if available < samples:
        raise CorpusError(
            f"calibration text {source} has {ids.numel()} tokens, which is {available} windows of {length}; "
            f"--samples asks for {samples}: lower --samples or --sequence-length, or give more text"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    return as_windows(ids[: available * length].view(available, length)[order], source, available, ids.numel())


def evaluation_windows(source: str, tokenizer: Any, length: int) -> Windows:
    """All consecutive non-overlapping windows of `length` tokens of a corpus; the rest at its end is dropped.

    Raises `CorpusError` if there is not one.
    """
    ids = tokenize(tokenizer, _join(documents(source, "evaluation")), source)
    available = ids.numel() // length
    if not available:
        raise CorpusError(
            f"evaluation text {source} has {ids.numel()} tokens, less than one window of {length}: "
            "lower --sequence-length or give more text"
        )
    return as_windows(ids[: available * length].view(available, length), source, available, ids.numel())


def tokenize(tokenizer: Any, text: str, source: str) -> Tensor:
    """The whole text as one stream of token ids (n,), with the special tokens the tokenizer itself adds."""
    if not text.strip():
        raise CorpusError(f"{source} has no text")
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def self_written(model: Any, samples: int, length: int, seed: int, start: int, batch: int = 128) -> Windows:
    """Windows that the model samples from itself, each beginning with token `start`; `model` is whole and loaded."""
    parts = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for first in range(0, samples, batch):
            prompt = torch.full((min(batch, samples - first), 1), start, device=model.device)
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
            )
            parts.append(written.cpu())
    return as_windows(torch.cat(parts), f"self (seed {seed})", samples, samples * length)


def _join(texts: Iterable[str], most: int | None = None) -> str:
    """Texts joined by a blank line, until `most` characters are reached."""
    parts, size = [], 0
    for text in texts:
        parts.append(text)
        size += len(text) + 2
        if most is not None and size >= most:
            break
    joined = "\n\n".join(parts)
    return joined if most is None else joined[:most]


def documents(source: str, purpose: str) -> Iterator[str]:
    """The texts of a corpus, to be joined by blank lines. `purpose` (calibration, evaluation) selects the split."""
    if source in HUB_CORPORA:
        return HUB_CORPORA[source](purpose)
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return _dataset_directory(path)
    if not os.path.exists(path):
        raise CorpusError(
            f"{source} is neither a file nor a known corpus ({', '.join(HUB_CORPORA)}, self); check the path"
        )
    compressed = path.suffix in COMPRESSED
    ending = Path(path.stem if compressed else path.name).suffix
    if ending not in READERS or (compressed and ending == ".parquet"):
        raise CorpusError(
            f"{source} has an unknown ending; expected one of {', '.join(READERS)}, all but .parquet also with "
            f"{' or '.join(COMPRESSED)}"
        )
    if path.stat().st_size == 0:
        raise CorpusError(f"{source} is empty")
    return READERS[ending](path)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file that may be compressed; raises `CorpusError` if it is not text."""
    number = 0
    try:
        with COMPRESSED.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise CorpusError(f"{path} is not text: line {number} has a zero byte")
                yield line
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: {error.reason} after line {number}") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = str(error) or "it ends too early"
        raise CorpusError(f"{path} cannot be read, it may be damaged or truncated: {reason}") from error


def _plain(path: Path) -> Iterator[str]:
    """One text, in pieces of whole lines that joined by blank lines give the file again."""
    # A file's own line breaks must survive, so paragraphs (which a blank line separates) are the pieces.
    paragraph: list[str] = []
    for line in _lines(path):
        if line == "\n" and paragraph and paragraph[-1].endswith("\n"):
            yield "".join(paragraph)[:-1]
            paragraph = []
        else:
            paragraph.append(line)
    yield "".join(paragraph)


def _wikitext_rows(path: Path) -> Iterator[str]:
    """wiki.*.raw as the Hub's rows: a line is a row with its line break, a blank line an empty row."""
    for line in _lines(path):
        yield line if line.strip() else ""


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CorpusError(f'{path}, line {number}: expected a JSON object with a key "text"') from error
        yield _string(text, f"{path}, line {number}")


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise CorpusError(f'{path} has columns {file.schema_arrow.names}, expected one named "text"')
        row = 0
        for batch in file.iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield _string(text, f"{path}, row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path} is not a parquet file: {error}") from error


def _string(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise CorpusError(f'{where}: "text" is {"null" if text is None else type(text).__name__}, expected a string')
    return text


def _dataset_directory(path: Path) -> Iterator[str]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # arrow's, datasets' and the system's own errors
        raise CorpusError(
            f"{path} is a directory, but not one saved by datasets' save_to_disk ({first_line(error)})"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        raise CorpusError(f"{path} has the splits {', '.join(loaded)}; name the directory of one of them")
    if "text" not in loaded.column_names:
        raise CorpusError(f'{path} has columns {loaded.column_names}, expected one named "text"')
    return (_string(text, f"{path}, row {row}") for row, text in enumerate(loaded["text"], 1))


def _hub_rows(repository: str, **options: Any) -> Iterator[str]:
    """Column `text` of a Hub dataset; `HubError` if it cannot be had."""
    import datasets

    try:
        for row in datasets.load_dataset(repository, **options):
            yield row["text"]
    except Exception as error:
        # Which library's errors datasets lets through (requests, httpx, aiohttp, ...) changes with its version.
        raise HubError(
            f"dataset {repository} could not be had from the Hugging Face Hub ({first_line(error)}); "
            "check the network, or give a local file instead"
        ) from error


def _wikitext2(purpose: str) -> Iterator[str]:
    split = "train" if purpose == "calibration" else "test"
    return _hub_rows("Salesforce/wikitext", name="wikitext-2-raw-v1", split=split)


def _c4(purpose: str) -> Iterator[str]:
    """The first documents of one shard, streamed: the whole of C4 is 300 GB."""
    shard = (
        "en/c4-train.00000-of-01024.json.gz" if purpose == "calibration" else "en/c4-validation.00000-of-00008.json.gz"
    )
    rows = _hub_rows("allenai/c4", data_files={"rows": shard}, split="rows", streaming=True)
    return islice(rows, HUB_C4_DOCUMENTS[purpose])


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _plain,
    ".raw": _wikitext_rows,
    ".jsonl": _jsonl,
    ".json": _jsonl,  # the shards of C4 have this ending
    ".parquet": _parquet,
}
HUB_CORPORA: dict[str, Callable[[str], Iterator[str]]] = {"wikitext2": _wikitext2, "c4": _c4}
