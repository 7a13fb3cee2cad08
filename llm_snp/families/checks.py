"""Checks of a config that the descriptions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.activations import ACT2FN

from ..errors import UnsupportedModelError


def check_config(config: Any, *sizes: str) -> None:
    """Raise `UnsupportedModelError` if one of the fields `sizes` is no size, or the activation none that is known."""
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", *sizes):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(f"{name} is {value!r} in config.json; it must be a whole number of at least 1")
    for name in ("activation_function", "hidden_act", "hidden_activation", "activation"):
        function = getattr(config, name, None)
        if function is not None and function not in ACT2FN:
            raise UnsupportedModelError(f"{name} {function!r} in config.json is none that transformers has")


def whole_heads(*sizes: str) -> Callable[[Any], None]:
    """For `Family.check`: heads that share the model's width, and the fields `sizes`."""

    def check(config: Any) -> None:
        check_config(config, "num_attention_heads", *sizes)
        check_multiple(config, "hidden_size", "num_attention_heads")

    return check


def check_multiple(config: Any, whole: str, part: str) -> None:
    """Raise `UnsupportedModelError` unless one field is a multiple of another."""
    if getattr(config, whole) % getattr(config, part):
        raise UnsupportedModelError(
            f"{whole} {getattr(config, whole)} is not a multiple of {part} {getattr(config, part)}"
        )
