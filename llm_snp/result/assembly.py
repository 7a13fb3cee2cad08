"""The result as a Hugging Face checkpoint: its blocks, what is not a block, and opening it again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..dense.checkpoint import Checkpoint, respelled
from ..dense.hub import load_config
from ..dense.rotary import older_fields
from ..dense.skeleton import Skeleton
from ..documents.report import Report
from ..documents.summary import block_line
from ..families import EXPERTS, OF_PRUNED, Family, dropped, fewer_blocks
from ..pruning.executor import BlockLoss, SiteLoss
from ..pruning.job import Job
from ..pruning.plan import Plan
from ..pruning.weights import State
from ..system.journal import DIGEST, Journal
from ..system.progress import Progress
from .carried import Carried, class_of
from .own_code import MODELING, auto_map
from .settings import as_file, without_code
from .writer import Writer

KEPT = "kept"
TYPE = "torch_dtype"  # as versions before 5 call it


class PrunedBlocks:
    """The blocks of the result, each a shard that is finished once its hash is in the journal.

    skeleton: of the dense model, whose layout the result has.
    """

    def __init__(self, writer: Writer, journal: Journal, skeleton: Skeleton, report: Report, progress: Progress):
        self.writer, self.journal, self.skeleton = writer, journal, skeleton
        self.report, self.progress = report, progress

    def finished(self, index: int) -> tuple[State, BlockLoss] | None:
        """A block that an interrupted run has finished, or None if it has not, or its file is not what it was."""
        record = self.journal.read(_name(index))
        if record is None:
            return None
        file = self.writer.path(self._place(index)).name
        if record[KEPT] != self._kept[index]:  # curves that were measured again on another device are not the same
            self.journal.rescue(f"{file} was pruned by another plan")
            return None
        processes = self.journal.processes
        tensors = processes.on_main(lambda: self.writer.adopt(self._place(index), record[DIGEST]))
        if not processes.from_main(lambda: tensors is not None):
            self.journal.rescue(f"{file} was gone or damaged")
            return None
        state = processes.tensors_from_main(tensors, self.skeleton.device)
        losses = {site: SiteLoss(**loss) for site, loss in record["losses"].items()}
        self._tell(index, losses, " (finished before)")
        prefix, renames = self._prefix(index), self.report.job.family.renames
        found = {respelled(name, renames).removeprefix(prefix): tensor for name, tensor in state.items()}
        return self.skeleton.turn(found), losses

    def save(self, index: int, state: State | None, losses: BlockLoss) -> None:
        """Write a block that has just been pruned; of one that went as a whole only tell.

        Later blocks were fitted to what an interrupted run had here: if this is not it, they are made again as well.
        """
        if state is None:
            self._tell(index, losses)
            return
        before = self.journal.read(_name(index))

        def write() -> None:
            place, family = self._place(index), self.report.job.family
            found = self.writer.shard(place, stored_block(family, self.skeleton, place, state))
            if before is None or before[DIGEST] != found:
                self.journal.forget(_name(later) for later in range(index + 1, len(self._kept)))
            record = {
                DIGEST: found,
                KEPT: self._kept[index],
                "losses": {site: dataclasses.asdict(loss) for site, loss in losses.items()},
            }
            self.journal.write(_name(index), record)

        self.journal.processes.on_main(write)
        self._tell(index, losses)

    def _tell(self, index: int, losses: BlockLoss, remark: str = "") -> None:
        self.report.block(index, losses)
        self.progress.finished(block_line(self.report.data) + remark)

    @property
    def _kept(self) -> list[dict[str, int]]:
        """The plan: how much of each block stays."""
        return self.report.data["plan"]["kept"]  # type: ignore[no-any-return]

    def _prefix(self, index: int) -> str:
        return f"{self.skeleton.blocks_path}.{self._place(index)}."

    def _place(self, index: int) -> int:
        """Which block of the result it is: those before it that went as a whole do not count."""
        return sum(not dropped(kept) for kept in self._kept[:index])


def stored_block(family: Family, skeleton: Skeleton, place: int, state: State) -> State:
    """A block's tensors as a file has them, as block `place` of the result."""
    prefix, stored = f"{skeleton.blocks_path}.{place}.", skeleton.turn(state)
    return {respelled(prefix + name, family.stored): tensor for name, tensor in stored.items()}


def _name(index: int) -> str:
    return f"block-{index:05d}"


def stock_fields(job: Job, plan: Plan) -> dict[str, Any] | None:
    """The config fields with which the stock class is the pruned model, or None if it needs a class of its own."""
    return job.family.stock_fields(job.config, plan.kept)


def result_config(job: Job, kept: Sequence[dict[str, int]], tokenizer: Any) -> tuple[Any, bool]:
    """The result's config, and whether it needs a class of its own. kept: of each block, what stays."""
    family, config = job.family, job.config
    stock = family.stock_fields(config, kept)
    fields = {key: value for key, value in without_code(job.whole.to_dict()).items() if key not in OF_PRUNED}
    # Without it AutoTokenizer would look for the tokenizer of a model type that stock transformers does not know.
    fields["tokenizer_class"] = class_of(tokenizer)
    left = [index for index, block in enumerate(kept) if not dropped(block)]
    fields |= fewer_blocks(job.whole, left)
    if stock is not None:
        result = type(job.whole)(**(fields | stock))
        result.architectures = job.whole.architectures
        return result, False
    config_class = family.pruned_class.config_class
    # Beside `block_widths`, in the fields that other tools read (vLLM, caches of transformers from 5.14): each block's
    # own, and the dense model's where one number is asked for.
    fields["per_layer_config"] = {str(i): family.layer_fields(config, kept[of], of) for i, of in enumerate(left)}
    fields["allow_global_per_layer_attribute_access"] = True
    if any(family.widths(config, kept[of], of).get(EXPERTS) != family.whole(config, of).get(EXPERTS) for of in left):
        fields["output_router_logits"] = False  # with them comes a loss over the dense model's number of experts
    result = config_class(**fields, block_widths=[family.widths(config, kept[of], of) for of in left])
    result.architectures = [family.pruned_class.__name__]
    result.auto_map = auto_map(family)
    return result, True


def write_rest(
    writer: Writer, job: Job, skeleton: Skeleton, plan: Plan, tokenizer: Any, carried: Carried, modeling: bytes
) -> None:
    """Everything but the blocks: outer weights, config, tokenizer, modelling file; the index last."""
    outer = {respelled(name, job.family.stored): found for name, found in skeleton.checkpoint.tensors(skeleton.outer)}
    writer.shard(len(plan.left), outer)
    files = dict(carried.files)
    config, needs_code = result_config(job, plan.kept, tokenizer)
    if needs_code:
        files[MODELING] = modeling
    fields = json.loads(config.to_json_string())
    files["config.json"] = as_file(dict(sorted((_older_fields(carried.config) | fields).items())))
    writer.bytes(files)
    writer.index()


def _older_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the dense model's config what older versions and engines look for.

    transformers 5 writes `rope_parameters` alone, in which transformers 4, say, sees nothing, and takes its defaults.
    """
    return older_fields(config) | ({TYPE: config[TYPE]} if TYPE in config else {})


def open_result(directory: Path, job: Job, dtype: torch.dtype) -> Skeleton:
    """The written model as anyone would find it: its own config, its own weights."""
    checkpoint = Checkpoint(directory, job.family.renames)
    return Skeleton(load_config(directory), job.family.blocks, checkpoint, job.device, dtype)
