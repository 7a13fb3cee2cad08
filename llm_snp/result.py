"""The result as a Hugging Face checkpoint: what is not a block, and opening it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import modeling_snp
from .checkpoint import Checkpoint
from .hub import load_config
from .job import Job
from .plan import Plan
from .skeleton import Skeleton
from .writer import TOKENIZER_FILES, Writer


def write_rest(writer: Writer, job: Job, skeleton: Skeleton, plan: Plan, tokenizer: Any) -> None:
    """Everything but the blocks: outer weights, config, tokenizer, modelling file; the index last."""
    family, config, checkpoint = job.family, job.config, skeleton.checkpoint
    writer.shard(len(skeleton), {name: checkpoint.tensor(name) for name in skeleton.outer})
    widths = [family.widths(config, kept) for kept in plan.kept]
    stock = family.stock_fields(config, widths)
    own = ("model_type", "architectures", "auto_map")  # what the result has of its own, or does not have
    fields = {key: value for key, value in config.to_dict().items() if key not in own}
    # Without it AutoTokenizer would look for the tokenizer of a model type that stock transformers does not know.
    # (TokenizersBackend is what transformers 5 calls PreTrainedTokenizerFast, which both major versions know.)
    fields["tokenizer_class"] = type(tokenizer).__name__.replace("TokenizersBackend", "PreTrainedTokenizerFast")
    if stock is not None:
        result = type(config)(**(fields | stock))
        result.architectures = config.architectures
    else:
        result = family.pruned_config(**fields, block_widths=widths)
        result.architectures = [family.pruned_class.__name__]
        module = Path(modeling_snp.__file__).stem
        result.auto_map = {
            "AutoConfig": f"{module}.{family.pruned_config.__name__}",
            "AutoModelForCausalLM": f"{module}.{family.pruned_class.__name__}",
        }
        writer.copy(Path(modeling_snp.__file__))
    writer.text("config.json", result.to_json_string())
    writer.copy(job.directory, TOKENIZER_FILES)
    writer.index()


def open_result(directory: Path, job: Job, dtype: torch.dtype) -> Skeleton:
    """The written model as anyone would find it: its own config, its own weights."""
    return Skeleton(load_config(directory), job.family.blocks, Checkpoint(directory), job.device, dtype)
