"""What a report.json must have for every reader of it, as types; what else stands in one is left alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..system.manifest import HASH, is_inside
from .shareable import FURTHEST

LARGEST = 2**63 - 1
DEEPEST = 32  # levels of lists and objects, of which a report of ours has seven

MOST = 100  # entries of what has a line each in a plot: phases, sites of a block, healings

Count = Annotated[int, Field(ge=0, le=LARGEST)]
Some = Annotated[int, Field(ge=1, le=LARGEST)]
Number = Annotated[float, Field(ge=-FURTHEST, le=FURTHEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=FURTHEST)]
Length = Annotated[int, Field(ge=2, le=LARGEST)]  # tokens of a window, of which all but the first are predicted
NotNegative = Annotated[float, Field(ge=0, le=FURTHEST)]
Name = Annotated[str, Field(min_length=1)]
Word = Annotated[str, Field(pattern=r"^\w[\w +-]*$", max_length=60)]  # of a run's own vocabulary: no address, no markup
Range = Annotated[list[NotNegative], Field(min_length=2, max_length=2)]
Scalar = str | bool | int | float | None
MISSING: Any = None  # the default of what may be missing, but not null


class _Part(BaseModel):
    """Nothing is converted, and no field that is there may be null unless its type says so."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow", protected_namespaces=())


class Model(_Part):
    name: Name
    hub: bool = False
    type: str
    dtype: str
    bytes: Count
    bytes_pruned: Count
    parameters: Some
    parameters_pruned: Count
    custom_code: bool = True
    card: dict[str, str | list[str]] | None = None


class Sparsity(_Part):
    asked: Share
    achieved: Share
    of_all_parameters: Share
    of_dense: Share = MISSING  # where the model had been pruned before


class Parent(_Part):
    name: Name
    hub: bool
    removed: Share
    healed: Count = 0  # tokens that it was trained for since


class Options(_Part):
    """Others as well, each a scalar or a list of texts."""

    __pydantic_extra__: dict[str, Scalar | list[str]]
    order: str
    target: str
    attention: str
    model: str | None = None
    revision: str | None = None


class Device(_Part):
    name: str
    type: str
    dtype: str
    threads: Count
    processes: Some = 1
    nodes: Some = 1


class Text(_Part):
    source: Name
    windows: Count


class Calibration(Text):
    sha256: str
    windows_available: Count
    sequence_length: Length
    texts: list[Text] = []  # of which each has its share


class Overfit(_Part):
    source: Name
    windows: Some
    loss: Number


class Site(_Part):
    unit: Word
    units: Some
    kept: Count
    lost: NotNegative | None
    total: NotNegative | None
    damping: NotNegative | None


class Block(_Part):
    """A site by its name."""

    __pydantic_extra__: dict[Word, Site]
    block: Count


class Curve(_Part):
    block: Count
    site: Word
    unit: Word
    units: Some
    at_kept: list[Count] = []
    variance: list[Number] = []
    loss: list[Number] = []


class Plan(_Part):
    allocation: Word
    why: str
    kept: Annotated[list[dict[Word, Count]], Field(min_length=1)]
    curves: list[Curve]

    @model_validator(mode="after")
    def fits(self) -> Plan:
        """A curve is that of something that was decided on, and has a value at what stays of it."""
        for curve in self.curves:
            kept = self.kept[curve.block].get(curve.unit) if curve.block < len(self.kept) else None
            if kept is None:
                raise ValueError(f"the curve of {curve.unit} in block {curve.block} is of nothing that the plan has")
            at, ends = curve.at_kept, (curve.at_kept[0], curve.at_kept[-1]) if curve.at_kept else (0, curve.units)
            if sorted(set(at)) != at or not ends[0] <= kept <= ends[1] <= curve.units:
                raise ValueError(f"the curve of {curve.unit} in block {curve.block} does not reach what is kept")
            if any(values and len(values) != len(at) for values in (curve.variance, curve.loss)):
                raise ValueError(f"the curve of {curve.unit} in block {curve.block} has other values than counts")
        return self


class Perplexity(_Part):
    perplexity: Positive
    tokens: Count
    windows: Count
    sequence_length: Length
    sha256: str = ""  # of the windows; reports of earlier versions do not say


class Perplexities(_Part):
    dense: Perplexity
    pruned: Perplexity


class Measured(_Part):
    value: Number
    stderr: NotNegative | None


class Metric(_Part):
    dense: Measured = Measured(value=0.0, stderr=None)
    pruned: Measured
    higher_is_better: bool | None


class Task(_Part):
    metrics: dict[str, Metric]
    version: Scalar
    samples: Count
    num_fewshot: Count | None
    subtasks: list[str] = []


class Side(_Part):
    prefill_seconds: Positive
    prefill_range: Range
    decode_seconds_per_token: Positive
    decode_range: Range
    tokens_per_second: Positive
    kv_cache_bytes: Some
    weight_bytes: Some
    peak_bytes: Some | None


class Speed(_Part):
    device: Device
    batch: Some
    prompt: Some
    new: Some
    runs: Some
    dense: Side = MISSING  # where only the pruned model was timed
    pruned: Side
    notes: list[str]


class Candidate(_Part):
    parameters: int
    to_parent: Share
    to_dense: Share
    block: Count | None
    site: Word | None
    loss: Number | None


class Step(_Part):
    layer: Candidate | None
    units: Candidate | None
    taken: Literal["layer", "units"]

    @model_validator(mode="after")
    def fits(self) -> Step:
        """What was taken is there."""
        if (self.layer if self.taken == "layer" else self.units) is None:
            raise ValueError(f"of a step {self.taken!r} was taken, which was no candidate")
        return self


class HeldOut(_Part):
    step: Count
    loss: Number
    kl: Number
    nll: Number
    perplexity: Positive


class BeforeAndAfter(_Part):
    before: HeldOut
    after: HeldOut
    teacher_perplexity: Positive


class Teacher(_Part):
    name: Name
    hub: bool


class HealingText(_Part):
    source: Name
    windows: Some
    held_out: Some
    sequence_length: Length
    passes: Positive


class Healing(_Part):
    command: str
    teacher: Teacher
    text: HealingText
    lora: Some | None
    trained: Some
    device: Device
    tokens: Some
    steps: Some
    steps_planned: Some
    seconds: NotNegative
    held_out: BeforeAndAfter
    curve: Annotated[list[HeldOut], Field(min_length=1)]
    evaluation: dict[str, dict[Literal["teacher", "before", "after"], Positive]]

    @model_validator(mode="after")
    def fits(self) -> Healing:
        """Each text was measured three times."""
        if short := [name for name, found in self.evaluation.items() if len(found) < 3]:
            raise ValueError(f"{short[0]!r} was not measured for the teacher, before and after")
        return self


Hashes = dict[str, Annotated[str, Field(pattern=f"^{HASH}$")]]


class PeakMemory(_Part):
    host_bytes: Count
    device_bytes: Count


class Document(_Part):
    """The report as a whole."""

    format: Some
    versions: dict[str, str]
    options: Options
    seed: Count
    model: Model
    device: Device
    calibration: Calibration
    blocks: Annotated[list[Block], Field(min_length=1)]
    evaluation: dict[str, Perplexities]
    notes: list[str]
    sparsity: Sparsity
    plan: Plan
    output: Name
    seconds: Annotated[dict[str, NotNegative], Field(max_length=MOST)]
    peak_memory: PeakMemory
    parents: list[Parent] = MISSING  # of a model that had been pruned before, as far as they are known
    overfit: list[Overfit] = []  # on windows that were calibrated on, and on others
    steps: list[Step] = []  # of --method everything
    harness: dict[str, Task] = {}
    healing: Annotated[list[Healing], Field(max_length=MOST)] = []  # each of what the one before it has made
    speed: Speed = MISSING
    files: Hashes
    replacing: Hashes = {}  # documents whose replacement was interrupted
    edited: bool = False  # published with a card that a person had edited

    @model_validator(mode="after")
    def fits(self) -> Document:
        """There is a plan for every block, parents are of what was pruned before, and no file lies elsewhere."""
        if (self.parents is MISSING) != (self.sparsity.of_dense is MISSING):
            raise ValueError("parents and sparsity.of_dense are there together or not at all")
        if any(len(block.__pydantic_extra__) > MOST for block in self.blocks):
            raise ValueError(f"it has over {MOST} sites in a block")
        if len(self.blocks) != len(self.plan.kept):
            raise ValueError(f"it has {len(self.blocks)} blocks and a plan for {len(self.plan.kept)}")
        if outside := [name for name in (*self.files, *self.replacing) if not is_inside(name)]:
            raise ValueError(f"it lists {outside[0]!r}, which is no file below its directory")
        return self


def fault(report: Any) -> str:
    """What is wrong with a parsed report, on one line; empty if nothing is."""
    level = [report]
    for _ in range(DEEPEST):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        ]
    if level:
        return f"it is nested more than {DEEPEST} levels deep"
    try:
        Document.model_validate(report)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        reason = first["msg"].removeprefix("Value error, ")
        return (f"{where}: " if where else "") + reason[0].lower() + reason[1:] + more
    return ""
