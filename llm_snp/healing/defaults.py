"""What a healing takes from the pruning where nothing was said: the texts, and the number of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from ..config import shares
from ..dense.readers import HUB_CORPORA, digests
from ..errors import CorpusError, OptionError
from ..evaluation.harness_tasks import texts_of
from .options import SELF, HealConfig
from .pair import Pair


def completed(options: HealConfig, pair: Pair) -> HealConfig:
    """`options` with the texts that the result was calibrated on, and as many tokens, where none were given.

    Raises `OptionError` if the result, or this machine, does not have what that takes.
    """
    text = options.text or _calibration(options.directory, pair.memory)
    tokens = options.tokens
    if tokens is None:
        calibration = pair.report["calibration"]
        step = options.batch * options.accumulate * pair.length(options.sequence_length)
        tokens = max(calibration["windows"] * calibration["sequence_length"], step)
    return dataclasses.replace(options, text=text, tokens=tokens)


def _calibration(directory: str, memory: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts that the pruning was calibrated on, with their shares."""
    given = memory.get("options", {}).get("calibration") or ()
    given = (given,) if isinstance(given, str) else tuple(given)
    texts = shares(given)
    advice = "give --text TEXT to train on: a file, a datasets directory, wikitext2 or c4"
    if not texts:
        raise OptionError(f"{directory} does not know here what text it was calibrated on, as it is a copy; {advice}")
    if SELF in texts:
        raise OptionError(
            f"{directory} was calibrated on text that the model wrote itself, which is too little to train on; {advice}"
        )
    here = unchanged(texts, memory)
    if missing := [source for source in texts if source not in here]:
        raise OptionError(
            f"{missing[0]}, which {directory} was calibrated on, is not here, or is not as it was then; {advice}"
        )
    return given


def evaluated_before(memory: Mapping[str, Any]) -> list[str]:
    """The texts that the pruning was measured on, where they are found with what they had."""
    return unchanged(texts_of(memory.get("options", {}).get("evaluate") or ()), memory)


def unchanged(texts: Iterable[str], memory: Mapping[str, Any]) -> list[str]:
    """Those of `texts` that are found with what they had when the pruning read them.

    Whoever has made up a memory, and where it lies, can name files of this machine, but hardly knows what is in them.
    """
    found = []
    for source in texts:
        with suppress(CorpusError):
            here = digests([source])
            if source in HUB_CORPORA or (here and here.items() <= memory.get("read", {}).items()):
                found.append(source)
    return found
