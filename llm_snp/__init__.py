"""llm_snp: prune a language model in one shot, and get a smaller model back.

    import llm_snp
    report = llm_snp.prune(model="facebook/opt-1.3b", sparsity=0.3)

Where llm_snp is imported, before transformers or after it, transformers' Auto classes know the pruned models, so that
they load without `trust_remote_code`. By itself it is a light import: torch and transformers come when they are needed.
"""

# isort: off
# The first, before even `__future__`: from here on nothing is imported from the directory of a stranger's model.
from . import search_path  # noqa: F401

# isort: on
from importlib import import_module
from typing import Any

from .version import __version__

__all__ = ["SnpError", "__version__", "prune"]

from .errors import SnpError
from .system.imports import when_imported


def _register() -> None:
    import_module(".families", __name__)  # registers them, at its end also where it is what has begun this


when_imported("transformers", _register)


def prune(model: str | None = None, sparsity: float = 0.3, **options: Any) -> dict[str, Any]:
    """Prune a model and write the smaller one; options as in `llm_snp.config.PruneConfig`.

    model: Hub id or local directory, None for the embedded small OPT. sparsity: share of the decoder blocks' linear
    parameters to remove. Returns the report, the same as `report.json` in the output directory. Raises `SnpError`.
    """
    from .config import PruneConfig
    from .running.run import run

    return run(PruneConfig(model=model, sparsity=sparsity, **options))
