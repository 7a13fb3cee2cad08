"""Training of a student beside its teacher, by transformers' `Trainer`; LoRA by peft."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import CONFIG_NAME

from ..core.linalg import strips
from ..errors import NumericalError, OptionError
from ..system.processes import Processes
from .loss import Divergence, divergence
from .options import HealConfig

EVALUATIONS = 8  # of the held-out windows, spread over the run; after each the state is kept for --resume
PATIENCE = 2  # evaluations in a row without a new best, after which the run ends
WARM_UP = 0.05  # of the steps
BETA2 = 0.95  # AdamW's second: the usual 0.999 remembers more steps than such a run has
AS_IN_FILES = "save_original_format"  # of transformers 5: whether tensors get the names that older files have
NAMES = ("loss", "kl", "nll")


@dataclass(frozen=True)
class Schedule:
    """steps, each of `windows` windows of all processes together."""

    steps: int
    windows: int

    @property
    def every(self) -> int:
        """Steps between two evaluations."""
        return -(-self.steps // EVALUATIONS)


def schedule_of(options: HealConfig, length: int, processes: int) -> Schedule:
    """For windows of `length` tokens. Raises `OptionError` for fewer tokens than one step takes."""
    windows = options.batch * options.accumulate * processes
    assert options.tokens is not None, "completed"
    if options.tokens < windows * length:
        raise OptionError(
            f"--tokens is {options.tokens}, but one step takes {windows * length} ({windows} windows of {length}); "
            "give more, or a smaller --batch, --accumulate or --sequence-length"
        )
    return Schedule(options.tokens // (windows * length), windows)


def adapted(student: Any, rank: int) -> Any:
    """The student with LoRA matrices of a rank on every linear layer but the head (Hu et al., arXiv 2106.09685).

    They are all that is trained, and are float32.
    """
    from peft import LoraConfig, get_peft_model

    student.name_or_path = student.config._name_or_path = ""  # or peft would look for its config on the Hub
    return get_peft_model(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", bias="none"))


def computing(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU that has it, else the type of the weights."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def _checkpointing() -> dict[str, Any]:
    """The Trainer's options for it, under the name that they have in this version of transformers."""
    known = TrainingArguments.__dataclass_fields__
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


class Watch(TrainerCallback):  # type: ignore[misc]
    """Knows the curve of the held-out windows, tells how far the run is, and ends it when the loss rises.

    saved: called with the step and the folder of a state that is on disk as a whole, and the folder of the best one.
    """

    def __init__(self, saved: Callable[[int, Path, Path | None], None]):
        self.saved = saved
        self.curve: list[dict[str, float]] = []  # step and NAMES, from step 0 on
        self.step: Callable[[], None] = lambda: None
        self.tell: Callable[[dict[str, float]], None] = lambda entry: None
        self.broken = ""  # why the training ended before its time, if it could not go on
        self._earlier = 0.0  # seconds of the run that is gone on with
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of the training so far, with what an interrupted run has done of it."""
        return self._earlier + time.perf_counter() - self._began

    @property
    def best(self) -> dict[str, float]:
        """The entry of the curve after step 0 with the lowest loss, the first of several."""
        return min(self.curve[1:], key=lambda entry: entry["loss"])

    @property
    def rising(self) -> bool:
        """Whether the last evaluations have brought nothing better.

        At a high learning rate the loss is above that of step 0 for a while: that is no reason to stop.
        """
        return len(self.curve) > 1 and len([one for one in self.curve if one["step"] > self.best["step"]]) >= PATIENCE

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """What an interrupted run has seen; its folder may have been moved since."""
        known = [entry for entry in state.log_history if "eval_loss" in entry]
        self.curve += [_entry(entry) for entry in known]
        self._earlier = known[-1]["seconds"] if known else 0.0
        self._began = time.perf_counter()
        if state.best_model_checkpoint:
            state.best_model_checkpoint = str(Path(args.output_dir, Path(state.best_model_checkpoint).name))
        control.should_training_stop = self.rising

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """The last step is evaluated whatever the schedule says."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        if not control.should_evaluate:
            self.step()

    def on_evaluate(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.curve.append(_entry(state.log_history[-1]))
        self.tell(self.curve[-1])
        self.step()
        if self.rising:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        best, folder = state.best_model_checkpoint, Path(args.output_dir, f"checkpoint-{state.global_step}")
        (folder / CONFIG_NAME).unlink(missing_ok=True)  # nobody needs it, and another transformers may not read it
        self.saved(state.global_step, folder, best and Path(best))


def _entry(logged: dict[str, float]) -> dict[str, float]:
    """What the Trainer's history has of an evaluation, as an entry of the curve."""
    return {"step": logged["step"]} | {name: logged[f"eval_{name}"] for name in NAMES}


class Heal(Trainer):  # type: ignore[misc]
    """`Trainer` with the teacher's loss, on windows (N, T) that come in their order; evaluated on held-out ones."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        train: Tensor,
        held_out: Tensor,
        options: HealConfig,
        schedule: Schedule,
        folder: Path,
        processes: Processes,
        watch: Watch,
    ):
        self.teacher, self.held_out, self.text_loss, self.watch = teacher, held_out, options.text_loss, watch
        self.processes = processes
        arguments = TrainingArguments(
            str(folder),
            max_steps=schedule.steps,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=options.rate(student.config.get_text_config().hidden_size),
            lr_scheduler_type="cosine",
            warmup_steps=max(1, round(WARM_UP * schedule.steps)),
            optim="adamw_torch",
            adam_beta2=BETA2,
            **(_checkpointing() if options.checkpointing else {}),
            eval_strategy="steps",
            eval_steps=schedule.every,
            save_strategy="steps",
            save_steps=schedule.every,
            save_total_limit=None,  # it would remove earlier states before this one is noted
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            logging_strategy="no",
            report_to=[],
            log_level="error",
            log_level_replica="error",
            disable_tqdm=True,
            label_names=[],
            remove_unused_columns=False,
            use_cpu=next(teacher.parameters()).device.type == "cpu",
            dataloader_pin_memory=torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            seed=options.seed,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process is one GPU, also where it sees several
        windows = [{"input_ids": ids} for ids in train]
        super().__init__(student, arguments, train_dataset=windows, eval_dataset=windows[:1], callbacks=[watch])
        self.model_accepts_loss_kwargs = False  # the loss is a mean over one batch, of which a step may have several
        self.remove_callback(PrinterCallback)
        if AS_IN_FILES in signature(student.save_pretrained).parameters:
            # States are loaded by the model's own names, and those in other ones passed over without a word.
            student.save_pretrained = partial(student.save_pretrained, **{AS_IN_FILES: False})

    def _get_train_sampler(self, *arguments: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *arguments: Any, **options: Any) -> Tensor:
        """Of a batch of windows; `Trainer` calls it."""
        return self.compare(model, inputs["input_ids"]).loss

    def compare(self, model: Any, ids: Tensor) -> Divergence:
        """The student's predictions beside the teacher's, over windows (B, T)."""
        with computing(ids.device):
            with torch.no_grad():
                wanted = self.teacher(input_ids=ids, use_cache=False).logits
            found = model(input_ids=ids, use_cache=False).logits
        return divergence(found, wanted, ids, self.text_loss)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Of the held-out windows, in nats: the loss, KL per position, NLL per predicted token, the teacher's NLL.

        Raises `NumericalError` if that is not finite.
        """
        model = self.model.eval()
        device = next(model.parameters()).device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        share = self.processes.share(len(self.held_out))
        for part in strips(len(share), self.args.per_device_train_batch_size):
            sums += self.compare(model, self.held_out[share.start : share.stop][part].to(device)).sums
        self.processes.sum(sums)
        count, length = self.held_out.shape
        kl, nll, teacher = (sums.cpu() / torch.tensor([length, length - 1, length - 1]) / count).tolist()
        if not math.isfinite(kl) or not math.isfinite(nll):
            step = self.state.global_step
            raise NumericalError(
                f"the loss is not finite after {step} steps; "
                + ("give a smaller --learning-rate" if step else "one of the models is damaged")
            )
        loss = (1 - self.text_loss) * kl + self.text_loss * nll
        return {"loss": loss, "kl": kl, "nll": nll, "teacher_nll": teacher}

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """`Trainer` calls it where the schedule says so, and keeps the state with the lowest `eval_loss`.

        Where that is not finite any more, it ends the training.
        """
        try:
            found = self.measure()
        except NumericalError as error:
            if len(self.watch.curve) < 2:  # nothing to keep
                raise
            # Where steps overflow there is nothing to go on with, and earlier ones may have been good.
            self.watch.broken = f"the training ended early, with what was best until then: {error}"
            self.control.should_training_stop = True
            self.control.should_evaluate = self.control.should_save = False
            return {f"eval_{name}": math.inf for name in NAMES}
        metrics = {f"eval_{name}": found[name] for name in NAMES}
        self.log(metrics | {"seconds": self.watch.seconds})
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
