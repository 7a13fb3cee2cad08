"""The code that a result brings along: this version's, and no other that its settings may lead to."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..families import FAMILIES, Family
from .bundle import bundle
from .settings import CODE, SETTINGS, content_of, read_object, taken_out

# What a result brings along that needs a class of its own: its family's file of `llm_snp.modeling`, with what that
# imports, under this name.
MODELING = "modeling_snp.py"
CONFIG, AUTO_MAP = "config.json", "auto_map"
GENERATE = "custom_generate"  # a folder in which transformers looks for code, whatever the settings say


def modeling_file(family: Family) -> bytes:
    """What a result of a family has as `modeling_snp.py`: of this version, as long as nobody installs another one."""
    return bundle(Path(inspect.getfile(family.pruned_class))).encode()


def auto_map(family: Family) -> dict[str, str]:
    """Where transformers' Auto classes find those of a result in the file that it brings along."""
    module, pruned = MODELING.removesuffix(".py"), family.pruned_class
    classes = {
        "AutoConfig": pruned.config_class,
        "AutoModel": pruned.base_class,
        "AutoModelForCausalLM": pruned,
    }
    return {auto: f"{module}.{found.__name__}" for auto, found in classes.items()}


def own_code(fields: Mapping[str, Any]) -> tuple[dict[str, str], bytes] | None:
    """`auto_map` and `modeling_snp.py` of this version, for a result with config `fields`; None if it is stock."""
    for family in FAMILIES.values():
        if family.pruned_model_type == fields.get("model_type"):
            return auto_map(family), modeling_file(family)
    return None


def foreign(directory: Path, files: Iterable[str], own: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Of the settings among `files` of a result, the fields that lead to other code than its own, or say of a
    machine or a person what does not travel: their names, by that of the file, where there are some.

    own: the `auto_map` that it has, None for a stock one.

    Raises `CheckpointError` for settings that cannot be read.
    """
    found = {}
    for name in sorted({CONFIG, *SETTINGS}.intersection(files)):
        fields = read_object(directory / name, content_of(directory / name))
        ours = name == CONFIG and own is not None
        led = fields.pop(AUTO_MAP, None) if ours else None
        strange = taken_out(fields, name) + ([AUTO_MAP] if ours and led != own else [])
        if strange:
            found[name] = strange
    return found


def has_own_code(directory: Path) -> bool:
    """Whether a result has the code that this version writes, and would have by its config, and leads to no other."""
    with suppress(CheckpointError):
        own, code = own_code(read_object(directory / CONFIG, content_of(directory / CONFIG))), directory / MODELING
        there = [name for name in (CONFIG, *SETTINGS) if (directory / name).exists()]
        if own is None or not code.is_file() or content_of(code) != own[1] or (directory / GENERATE).exists():
            return False
        return CODE.isdisjoint(name for names in foreign(directory, there, own[0]).values() for name in names)
    return False
