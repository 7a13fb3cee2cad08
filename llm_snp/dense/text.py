"""Calibration and evaluation windows of a run; loads the whole model only if it has to write the text itself."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..config import PruneConfig, shares
from ..errors import CheckpointError
from ..system.libraries import ONE_AT_A_TIME, explained
from .data import Windows, calibration_windows, check_known, evaluation_windows, self_written
from .mixture import mix, turns
from .whole import whole_model

# Text that the model writes itself: calibration and evaluation must not be the same.
EVALUATION_SEED = 1
SELF_EVALUATION_WINDOWS = 64


def written_last(sources: Iterable[str]) -> list[str]:
    """Sources of text, those first that are only read: what is wrong with them is told before the model writes any."""
    return sorted(sources, key=lambda source: source == "self")


class Text:
    """Calibration and evaluation windows; loads the whole model only if it has to write the text itself."""

    def __init__(
        self, directory: Path, tokenizer: Any, config: Any, length: int, dtype: torch.dtype, device: torch.device
    ):
        self.directory, self.tokenizer, self.length = directory, tokenizer, length
        self.config, self.dtype, self.device, self.vocabulary = config, dtype, device, config.vocab_size
        self.start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
        self._model: Any = None

    def _write(self, samples: int, seed: int) -> Windows:
        if not isinstance(self.start, int):
            raise CheckpointError(
                f"neither tokenizer nor config in {self.directory} has a token that begins a text, so that the model "
                "cannot write one itself; give a text"
            )
        if self._model is None:
            model = whole_model(self.directory, self.config, None, self._no_model)
            self._model = model.to(self.device, self.dtype).eval()
        with explained(self._no_text, computing=True), ONE_AT_A_TIME:
            return self_written(self._model, samples, self.length, seed, self.start)

    def _no_text(self, cause: str) -> CheckpointError:
        return CheckpointError(f"the model in {self.directory} cannot write a text itself ({cause}); give one")

    def _no_model(self, cause: str) -> CheckpointError:
        return CheckpointError(f"{self.directory} is no model that transformers can load ({cause})")

    def calibration(self, options: PruneConfig) -> Windows:
        """Windows (N, T) to calibrate on, those of several texts by turns."""
        given = shares(options.texts)
        order = turns(list(given.values()), options.samples)
        counts = {text: order.count(i) for i, text in enumerate(given)}
        parts = {text: self._part(text, counts[text], options.seed) for text in written_last(given)}
        return mix([parts[text] for text in given], order)

    def _part(self, source: str, samples: int, seed: int) -> Windows:
        if source == "self":
            return self._write(samples, 2 * seed)
        return self._known(calibration_windows(source, self.tokenizer, samples, self.length, seed))

    def evaluation(self, source: str, seed: int) -> Windows:
        """Windows to measure perplexity on."""
        if source == "self":
            return self._write(SELF_EVALUATION_WINDOWS, 2 * seed + EVALUATION_SEED)
        return self._known(evaluation_windows(source, self.tokenizer, self.length))

    def _known(self, windows: Windows) -> Windows:
        """`windows`, whose tokens the model all knows; `CheckpointError` otherwise."""
        check_known(windows.tokens, self.vocabulary, self.directory)
        return windows

    def close(self) -> None:
        """Let go of the whole model, if it was loaded."""
        if self._model is not None:
            self._model = None
            gc.collect()
