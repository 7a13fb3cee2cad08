"""Texts from where they are: files of several kinds, directories of datasets, corpora on the Hub.

Whatever a file holds, it is read in bounded pieces, and what is wrong with it is a `CorpusError`.
"""

from __future__ import annotations

import gzip
import lzma
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

from ..errors import CorpusError, HubError
from ..system.files import digest
from ..system.libraries import explained, parse_json
from ..system.plain import encodable
from ..system.private import within
from .claims import is_beside

# A line is read in pieces of so many characters at most, and of JSON it may have so many in all.
PIECE, LONGEST_LINE = 1 << 20, 1 << 28
# Of a text to learn from a paragraph ends after so many characters, or a file without blank lines would be one and be
# read as a whole; more than calibration reads (`data.CALIBRATION_CHARACTERS`).
LONGEST_PARAGRAPH = 1 << 25
# Text shrinks to a third or a quarter. What unpacks to more characters than this, and than so many times its bytes, is
# made to fill memories.
UNPACKED, UNPACKED_TIMES = 1 << 24, 100
ROWS = 64  # of a table that are read at a time: some have texts of megabytes
HUB_C4_DOCUMENTS = {"calibration": 4000, "evaluation": 1100}
COMPRESSED: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]


def documents(source: str, purpose: str) -> Iterator[str]:
    """The texts of a corpus, to be joined by blank lines. `purpose` (calibration, evaluation) selects the split; what
    is read for calibration has its parts in bounded sizes.
    """
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
    if not os.path.isfile(path):
        raise CorpusError(f"{source} is no file that ends, but a pipe or a device; write the text into a file")
    if path.stat().st_size == 0:
        raise CorpusError(f"{source} is empty")
    if READERS[ending] is _plain and purpose == "calibration":
        return _plain(path, LONGEST_PARAGRAPH)
    return READERS[ending](path)


def check_sources(sources: Iterable[str]) -> None:
    """Raise `CorpusError` for a text that is not there, or of a kind that is not read, before anything is done."""
    for source in sources:
        if source != "self":
            documents(source, "evaluation")  # nothing of it is read yet


def digests(sources: Iterable[str]) -> dict[str, str]:
    """Hashes of those texts that are here as files or directories, each under what to call it in an error.

    Raises `CorpusError` for one that cannot be read.
    """
    found = {}
    for source in sources:
        path = Path(os.path.expanduser(source))
        if source in (*HUB_CORPORA, "self") or not os.path.exists(path):  # whatever has that name here
            continue
        try:
            found[f"the hash of {source}"] = digest(*files_of(path))
        except OSError as error:
            raise CorpusError(f"{error.filename} cannot be read: {error.strerror}") from error
    return found


def files_of(path: Path) -> list[Path]:
    """The files of a text: itself, or those of a directory, in order."""
    return [file for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]


def _pieces(path: Path) -> Iterator[str]:
    """Lines of a text file that may be compressed, long ones in pieces; raises `CorpusError` if it is not text."""
    number, size, compressed = 1, 0, path.suffix in COMPRESSED
    try:
        most = max(UNPACKED, UNPACKED_TIMES * path.stat().st_size)
        with COMPRESSED.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as file:
            while piece := file.readline(PIECE):
                size += len(piece)
                if "\0" in piece:
                    raise CorpusError(f"{path} is not text: line {number} has a zero byte")
                if compressed and size > most:
                    raise CorpusError(
                        f"{path} unpacks to over {UNPACKED_TIMES} times its size, as no text does; unpack it first"
                    )
                yield piece
                number += piece.endswith("\n")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: {error.reason} after line {number - 1}") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        cause = str(error) or "it ends too early"
        raise CorpusError(f"{path} cannot be read, it may be damaged or truncated: {cause}") from error


def _lines(path: Path) -> Iterator[str]:
    """The same as whole lines, which must not be endless."""
    line: list[str] = []
    for piece in _pieces(path):
        line.append(piece)
        if piece.endswith("\n"):
            yield "".join(line)
            line = []
        elif len(line) * PIECE > LONGEST_LINE:
            raise CorpusError(
                f"{path} has a line of over {LONGEST_LINE} characters, too long for one text; break it up"
            )
    if line:
        yield "".join(line)


def _plain(path: Path, longest: float = math.inf) -> Iterator[str]:
    """One text, in parts that joined by blank lines give the file again, if no paragraph is longer than `longest`."""
    # A file's own line breaks must survive, so paragraphs (which a blank line separates) are the parts.
    paragraph: list[str] = []
    size = 0
    for piece in _pieces(path):
        blank = piece == "\n" and bool(paragraph) and paragraph[-1].endswith("\n")
        if not blank:
            paragraph.append(piece)
            size += len(piece)
        if blank or size >= longest:
            yield "".join(paragraph).removesuffix("\n")
            paragraph, size = [], 0
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
            text = parse_json(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(f'{path}, line {number}: expected a JSON object with a key "text"') from error
        yield _string(text, f"{path}, line {number}")


def _parquet(path: Path) -> Iterator[str]:
    from pyarrow import parquet

    # Damaged values fail one by one, with Python's errors.
    with explained(lambda cause: CorpusError(f"{path} is not a parquet file: {cause}")):
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise CorpusError(f'{path} has columns {file.schema_arrow.names}, expected one named "text"')
    with explained(lambda cause: CorpusError(f"{path} is damaged: {cause}")):
        # A text that many rows have is kept once, as the file may have it.
        shared = {"read_dictionary": ["text"]} if _is_text(file.schema_arrow.field("text").type) else {}
        file = parquet.ParquetFile(path, **shared)
    yield from _rows((batch.column(0) for batch in file.iter_batches(columns=["text"], batch_size=ROWS)), path)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def _rows(columns: Iterator[Any], path: Path) -> Iterator[str]:
    """The texts of columns, one at a time; `CorpusError` for what cannot be read, is none, or is far too much."""

    def values() -> Iterator[Any]:
        for column in columns:
            for value in column:
                yield value.as_py()

    left, size = values(), 0
    most = max(UNPACKED, UNPACKED_TIMES * sum(file.stat().st_size for file in files_of(path)))
    for row in count(1):
        with explained(lambda cause: CorpusError(f"{path} is damaged: {cause}")):
            found = next(left, left)
        if found is left:
            return
        yield (text := _string(found, f"{path}, row {row}"))
        size += len(text)
        if size > most:
            raise CorpusError(
                f"{path} has over {UNPACKED_TIMES} times as much text as its size; write it as a plain file"
            )


def _string(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise CorpusError(f'{where}: "text" is {"null" if text is None else type(text).__name__}, expected a string')
    if not encodable(text):
        raise CorpusError(f'{where}: "text" has half of a surrogate pair, which is no character; write the text anew')
    return text


def _dataset_directory(path: Path) -> Iterator[str]:
    import datasets

    _check_data_files(path)
    # arrow's, datasets' and the system's own errors
    with explained(
        lambda cause: CorpusError(f"{path} is a directory, but not one saved by datasets' save_to_disk ({cause})")
    ):
        loaded = datasets.load_from_disk(str(path))
    if "text" not in loaded.column_names:
        raise CorpusError(f'{path} has columns {loaded.column_names}, expected one named "text"')
    feature = loaded.features["text"]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise CorpusError(f'{path} has {type(feature).__name__} in its column "text", expected strings')
    # As arrow has them: columns that datasets decodes name files and addresses of a stranger's choice, which it opens,
    # and with older versions of fsspec even the templates in such a name are run.
    with explained(lambda cause: CorpusError(f"{path} is damaged: {cause}")):
        plain = loaded.with_format("arrow", columns=["text"])
    yield from _rows((plain[first : first + ROWS]["text"] for first in range(0, len(loaded), ROWS)), path)


def _check_data_files(path: Path) -> None:
    """Raise `CorpusError` if a saved dataset names files that are not beside its state, which datasets would read.

    They would be of the choice of whoever made it, and so would be what a link in it leads to. A pipe, or a link to a
    device, does not end. Nor is a dataset of several splits, which lie where it says, more than their names.
    """
    for place in (path, *path.rglob("*")):
        if not (place.is_file() or place.is_dir()):
            raise CorpusError(f"{place} is no file that ends, but a pipe, a device or a broken link; remove it")
        if not within(place, path):
            raise CorpusError(
                f"{place} is a link to {place.resolve()}, outside of the dataset; copy it there, or give the directory "
                "that has it"
            )
    if (path / "dataset_dict.json").is_file():
        names = sorted(place.name for place in path.iterdir() if place.is_dir())
        raise CorpusError(f"{path} has the splits {', '.join(names)}; name the directory of one of them")
    state = path / "state.json"
    try:
        fields = parse_json(state.read_bytes())
    except (OSError, ValueError):
        return  # datasets says what is wrong
    if isinstance(fields, dict) and fields.get("_data_files") == []:  # to datasets that is an index out of range
        raise CorpusError(f"{path} has no text")
    lists = [value for value in fields.values() if isinstance(value, list)] if isinstance(fields, dict) else []
    for entry in (entry for found in lists for entry in found if isinstance(entry, dict)):
        name = entry.get("filename")
        if isinstance(name, str) and not is_beside(name):
            raise CorpusError(f"{state} names {name!r} as a file of the dataset; only files beside it are read")


def _hub_rows(repository: str, **options: Any) -> Iterator[str]:
    """Column `text` of a Hub dataset; `HubError` if it cannot be had.

    Raises `CorpusError` where the working directory, which may be a stranger's, has something of that name: datasets
    would read that instead, and its versions before 4 run a script in it.
    """
    if os.path.lexists(repository):
        raise CorpusError(
            f"{os.path.abspath(repository)} is in the way of the Hub's dataset {repository}, for which datasets would "
            "take it; start in another directory, or move it"
        )
    import datasets

    # Which library's errors datasets lets through (requests, httpx, aiohttp, ...) changes with its version.
    def refusal(cause: str) -> HubError:
        return HubError(
            f"dataset {repository} could not be had from the Hugging Face Hub ({cause}); check the network, or give a "
            "local file instead"
        )

    with explained(refusal):
        for row in datasets.load_dataset(repository, **options):
            yield row["text"]


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
