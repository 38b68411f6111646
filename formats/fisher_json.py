"""The ledger of a Fisher folder, `fisher.json`: tasks, merging and the digest of every tensor."""

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from formats.conversion import at, converted, json_bytes, strict_json
from formats.digest import TensorRecord, json_digest, set_digest
from formats.errors import InputError, NonFiniteError
from formats.fields import Count, Hex, Natural, NotNegative, Number, Share, Text, whole
from formats.wording import shown

FORMAT = "consolidate-fisher"
VERSIONS = (1, 2)
MAX_LEDGER_BYTES = 128 * 2**20
MAX_TASKS = 4096  # the tables and figures of a chain grow with the square of its tasks
ESTIMATORS = ("exact", "mc", "empirical", "batched")
FISHER_DTYPES = ("F32", "BF16")
PARAMETER_DTYPES = ("BF16", "F16", "F32", "F64")
SAME_AS = "the same tensor as "
"""Start of the reason given for a tensor that the weights file stores under a second name."""

UNKNOWN = "unknown"
"""The penalty of a task that another program trained."""

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SETS = ("weights", "fisher", "anchor", "factors", "factor_anchor")
_SECOND = (
    "factors",
    "blocks",
    "factor_anchor",
    "factor_offset",
    "loss_on",
    "max_length",
    "weight_by",
    "generated",
    "texts",
    "interpolation",
    "replayed",
    "budget",
    "benchmarks",
    "description",
)
_ABSENT = ("penalty_on", "parent", "made_from", "base", *_SECOND)
"""Fields that are left out of a file where they are None; all others are always present."""


def _one_of(*choices: str) -> Meta:
    return whole("|".join(choices), " or ".join(choices))


TaskName = Annotated[
    str,
    whole(
        _TASK_NAME.pattern,
        "a task name of 1 to 64 letters A-Z a-z, digits, '.', '_' and '-' that begins with a "
        "letter or a digit",
    ),
]
When = Annotated[
    str, whole("before|after|(epoch|step) [1-9][0-9]{0,17}", "before, step N, epoch N or after")
]
DataName = Annotated[
    str,
    whole(
        r"(?!\.\.(/|\Z))([^/]*|[^/]+/(?!\.\.\Z)[^/]+)",
        "the base name of a file or folder, or a Hub id owner/name, but no path",
    ),
]


@dataclass
class LayerRecord:
    """One task's Fisher of one parameter: its trace, and its overlap with the earlier tasks."""

    trace: NotNegative
    overlap: Share | None = None


@dataclass
class Generated:
    """How a task's data were generated, where the model generated them."""

    sequences: Count
    max_length: Count
    temperature: NotNegative
    top_p: Annotated[float, Meta(gt=0, le=1)]
    seed: Natural
    prompts: Hex | None
    label_draws: Count | None
    batch_size: Count
    halvings: Natural
    texts: Hex | None = None


@dataclass
class CurvePoint:
    """The score on each task at one α."""

    alpha: Share
    scores: dict[Text, Number]


@dataclass
class Interpolation:
    """How far the weights go from the start of training to its end, and what α was chosen from."""

    alpha: Share
    method: Annotated[str, _one_of("plain", "fisher")]
    curve: list[CurvePoint]  # empty where α was given


@dataclass
class Replayed:
    """Rows of earlier tasks that a task was trained on too."""

    data: DataName
    data_digest: Hex | None
    share: Annotated[float, Meta(gt=0, lt=1)]  # of the rows trained on


@dataclass
class Budget:
    """How many nats of loss the earlier tasks could gain, and what each gained on held-out rows."""

    nats: Annotated[float, Meta(gt=0, le=sys.float_info.max)]
    lost: Annotated[dict[Text, Number], Meta(min_length=1)]  # by task, of the weights as stored


@dataclass
class BenchmarkRecord:
    """A benchmark that a task's training was evaluated on, and which metric is its score."""

    harness: Text  # the version of lm-eval
    task: Text
    version: Text | None
    metric: Text
    examples: Count
    limit: Count | None
    digest: Hex | None  # of a local task file with its functions and data


@dataclass
class TaskRecord:
    """One task of the ledger; `docs/reference/format.md` gives every field's meaning and range."""

    name: TaskName
    objective: Text
    likelihood: Text
    labels: list[str] | None
    unit: Annotated[str, _one_of("example", "token")]
    examples: Count | None  # None, as the next two, for a task that was trained and not measured
    units: Count | None
    estimator: Annotated[str, _one_of(*ESTIMATORS)] | None
    mc_samples: Count | None
    seed: Natural
    loss_on: Annotated[str, _one_of("assistant", "completion", "all")] | None = None
    max_length: Count | None = None
    weight: NotNegative = 1.0
    weight_by: Annotated[str, _one_of("units", "trace")] | None = None  # until it is measured
    data: DataName = ""
    data_digest: Hex | None = None
    generated: Generated | None = None
    ewc_lambda: NotNegative | None = None
    penalty: Text | None = None
    penalty_on: Annotated[str, _one_of("adapter", "merged")] | None = None
    parent: Hex | None = None
    interpolation: Interpolation | None = None
    replayed: Replayed | None = None
    budget: Budget | None = None
    made_from: Hex | None = None
    description: dict[str, Any] | None = None
    metrics: dict[When, dict[Text, dict[Text, Number]]] = field(default_factory=dict)
    benchmarks: dict[Text, BenchmarkRecord] | None = None  # by name in metrics
    layers: dict[Text, LayerRecord] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Whether the task has a Fisher in Λ."""
        return self.estimator is not None


class Block(Struct, frozen=True, forbid_unknown_fields=True):
    """A square matrix of the factor files: its kind, its parameters and their dimensions."""

    matrix: Annotated[str, _one_of("A", "R", "G")]
    dims: Annotated[tuple[Natural, ...], Meta(min_length=1)]
    parameters: Annotated[tuple[Text, ...], Meta(min_length=1)]


@dataclass
class Ledger:
    """The whole ledger; `weights`, `fisher` and so on record every tensor beside it."""

    tasks: Annotated[list[TaskRecord], Meta(min_length=1, max_length=MAX_TASKS)]
    merge_rule: Annotated[str, _one_of("online", "separate")] = "online"
    gamma: Share = 1.0
    penalty_offset: NotNegative = 0.0
    unprotected: dict[Text, Text] = field(default_factory=dict)
    weights: dict[str, TensorRecord] = field(default_factory=dict)
    fisher: dict[str, TensorRecord] = field(default_factory=dict)
    anchor: dict[str, TensorRecord] | None = None
    factors: dict[str, TensorRecord] | None = None
    blocks: dict[Text, Block] | None = None
    factor_anchor: dict[str, TensorRecord] | None = None  # None: the weights, as for the anchor
    factor_offset: NotNegative | None = None  # None: the penalty offset
    heads: dict[Text, dict[str, TensorRecord]] = field(default_factory=dict)
    versions: dict[Text, Text] = field(default_factory=dict)
    base: Hex | None = None
    made_from: Hex | None = None
    description: dict[str, Any] | None = None


class _TensorSet(Struct, forbid_unknown_fields=True):
    digest: Hex
    tensors: dict[Text, TensorRecord]


def check_task_name(name: str) -> None:
    """Refuse an invalid task name with an InputError that shows it."""
    if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
        raise InputError(
            f"{shown(name)} is not a task name: expected 1 to 64 letters A-Z a-z, digits, '.', '_' "
            "and '-', beginning with a letter or a digit"
        )


def copies(ledger: Ledger) -> dict[str, str]:
    """Map each second name of a tensor in the weights file to its first name."""
    return {
        name: first
        for name, why in ledger.unprotected.items()
        if why.startswith(SAME_AS) and (first := why.removeprefix(SAME_AS)) in ledger.weights
    }


def covered(blocks: Mapping[str, Block]) -> set[str]:
    """Name the parameters that matrices cover."""
    return {name for block in blocks.values() for name in block.parameters}


def benchmarks_of(ledger: Ledger) -> dict[str, BenchmarkRecord]:
    """Give the benchmarks of all tasks by name, as they were last."""
    return {name: found for task in ledger.tasks for name, found in (task.benchmarks or {}).items()}


def needed_version(ledger: Ledger) -> int:
    """Return the format version that a ledger is written in: 1 unless it needs a field of 2."""
    records = (ledger, *ledger.tasks)
    given = any(getattr(record, name, None) is not None for record in records for name in _SECOND)
    return 2 if given or any(not task.measured for task in ledger.tasks) else 1


def ledger_bytes(ledger: Ledger, source: str = "fisher.json") -> bytes:
    """Serialize a ledger: UTF-8 JSON, two spaces of indent, a newline at the end, no timestamps.

    The same content gives the same bytes; a ledger that could not be read back is refused.
    """
    try:
        checked = _to_ledger(_to_json(ledger), source)
        data = json_bytes(_to_json(checked)) + b"\n"
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} cannot be written: {error}") from None
    _check_size(data, source)
    return data


def parse_ledger(data: bytes, source: str = "fisher.json") -> Ledger:
    """Read a ledger from bytes, strictly; a number that overflows is a NonFiniteError."""
    _check_size(data, source)
    try:
        return _to_ledger(strict_json(data), source)
    except RecursionError:
        found = "the JSON is nested too deeply"
    except ValueError as error:
        found = str(error)
    raise InputError(
        f"{source} is not a ledger: {found}; fetch it again, or measure the Fisher again with "
        "`consolidate fisher`"
    )


def read_ledger(path: Path) -> Ledger:
    """Read the ledger in a file, as `parse_ledger` does."""
    try:
        if not path.is_file():
            raise InputError(
                f"{path}: expected the ledger, found no regular file; measure the Fisher with "
                "`consolidate fisher`, or fetch it again"
            )
        with path.open("rb") as file:
            data = file.read(MAX_LEDGER_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return parse_ledger(data, str(path))


def _check_size(data: bytes, source: str) -> None:
    if len(data) > MAX_LEDGER_BYTES:
        most = MAX_LEDGER_BYTES // 2**20
        raise InputError(f"{source} is too large: expected a ledger of at most {most} MiB")


def _to_json(ledger: Ledger) -> dict[str, Any]:
    content: dict[str, Any] = msgspec.to_builtins(ledger, enc_hook=_plain)
    for name in _SETS:
        if (records := getattr(ledger, name)) is not None:
            content[name] = _set_to_json(records, content[name])
    for name, head in content["heads"].items():
        content["heads"][name] = _set_to_json(ledger.heads[name], head)
    for name in ("unprotected", "heads", "versions", "blocks"):
        if content.get(name) is not None:
            content[name] = dict(sorted(content[name].items()))
    generated = [task["generated"] for task in content["tasks"] if task.get("generated")]
    for record in (content, *content["tasks"], *generated):
        for name in _ABSENT:
            if record.get(name, ...) is None:
                del record[name]
        if "description" in record:
            # at every depth, by code points
            record["description"] = msgspec.to_builtins(
                record["description"], order="deterministic"
            )
    front = {"format": FORMAT, "version": needed_version(ledger)}
    front |= {name: content.pop(name) for name in ("merge_rule", "gamma", "penalty_offset")}
    return front | content


def _plain(value: Any) -> Any:
    """Convert a subclass of str, float or tuple, as numpy and torch have, to its base type."""
    kinds: tuple[type[Any], ...] = (str, float, tuple)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    raise ValueError(f"expected only types of JSON, found {type(value).__name__}")


def _set_to_json(records: Mapping[str, TensorRecord], content: dict[str, Any]) -> dict[str, Any]:
    return {"digest": set_digest(records), "tensors": dict(sorted(content.items()))}


def _to_ledger(content: Any, source: str) -> Ledger:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f'{source} is not a ledger of consolidate: expected "format": "{FORMAT}"')
    version = content.get("version")
    if type(version) is not int or version not in VERSIONS:
        raise InputError(
            f"{source}: expected format version {VERSIONS[0]} or {VERSIONS[1]}, found "
            f"{shown(version)}; try a newer release of consolidate"
        )
    content = {name: value for name, value in content.items() if name not in ("format", "version")}
    _check_fields(content, Ledger, version, source, "$")
    sets = {name: content.pop(name, None) for name in _SETS}
    heads = converted(content.pop("heads"), dict[Text, Any], source, "$.heads")
    ledger = converted(content, Ledger, source)
    for i, task in enumerate(content["tasks"]):
        for place, record, kind in _records_of(task, f"$.tasks[{i}]"):
            _check_fields(record, kind, version, source, place)
    found: dict[str, Any] = {
        name: _to_set(value, source, f"$.{name}")
        for name, value in sets.items()
        if value is not None or name in ("weights", "fisher")
    }
    found["heads"] = {
        name: _to_set(head, source, f"$.heads[{shown(name)}]") for name, head in heads.items()
    }
    ledger = replace(ledger, **found)
    try:
        _refuse(_faults(ledger), source)
    except ValueError:  # json_digest's
        raise NonFiniteError(f"{source}: a number in a description is not finite") from None
    if version != (needed := needed_version(ledger)):
        raise InputError(
            f"{source}, $.version: expected {needed}, found {version}: "
            + ("no field of the ledger needs it" if needed == 1 else "a task was not measured")
        )
    return ledger


def _records_of(task: dict[str, Any], place: str) -> Iterator[tuple[str, Any, type[Any]]]:
    """Yield a task's record and then those in it: the place of each, its content, its type."""
    yield place, task, TaskRecord
    for kind in (Generated, Interpolation, Replayed, Budget):
        if (name := kind.__name__.lower()) in task:
            yield f"{place}.{name}", task[name], kind
    for j, point in enumerate(task.get("interpolation", {}).get("curve", ())):
        yield f"{place}.interpolation.curve[{j}]", point, CurvePoint
    for name, benchmark in task.get("benchmarks", {}).items():
        yield f"{place}.benchmarks[{shown(name)}]", benchmark, BenchmarkRecord
    for name, layer in task["layers"].items():
        yield f"{place}.layers[{shown(name)}]", layer, LayerRecord


def _check_fields(
    content: Mapping[str, Any], kind: type[Any], version: int, source: str, place: str
) -> None:
    """Refuse fields that are unknown or missing, which msgspec accepts in a dataclass."""
    names = kind.__dataclass_fields__
    for name in names:
        if name not in content and name not in _ABSENT:
            raise InputError(f"{at(source, place)}: the field {shown(name)} is missing")
    for name, value in content.items():
        if name not in names or (version == 1 and name in _SECOND):
            raise InputError(
                f"{at(source, place)}: format version {version} has no field {shown(name)}"
            )
        if value is None and name in _ABSENT:
            raise InputError(
                f"{source}, {place}.{name}: expected a value or no such field, found null"
            )


def _to_set(content: Any, source: str, place: str) -> dict[str, TensorRecord]:
    found = converted(content, _TensorSet, source, place)
    if "__metadata__" in found.tensors:
        raise InputError(
            f"{source}, {place}.tensors: found a tensor named '__metadata__', a reserved name"
        )
    if found.digest != set_digest(found.tensors):
        raise InputError(
            f"{source}, {place}.digest: expected {set_digest(found.tensors)}, the digest of the "
            f"tensors listed under it, found {found.digest}: the ledger was edited or damaged"
        )
    return found.tensors


def check_names(ledger: Ledger, source: str) -> None:
    """Refuse a ledger with a weight that has neither a Fisher nor a reason for having none."""
    _refuse(_faults_of_names(ledger), source)


def _refuse(faults: Iterable[str], source: str) -> None:
    for fault in faults:
        raise InputError(f"{source}, {fault}" if fault.startswith("$") else f"{source}: {fault}")


def _faults(ledger: Ledger) -> Iterator[str]:
    """Yield contradictions between well-formed fields; each may assume that the last is absent."""
    seen: set[str] = set()
    for i, task in enumerate(ledger.tasks):
        if task.name in seen:
            yield f"$.tasks[{i}].name: the task {task.name!r} is listed twice"
        seen.add(task.name)
        yield from _faults_of_task(task, f"$.tasks[{i}]")
    yield from _faults_of_description(ledger, "$.description")
    for name, head in ledger.heads.items():
        if name not in seen:
            yield f"$.heads: {shown(name)} is not a task of this ledger"
        for tensor, record in head.items():
            if record.dtype not in PARAMETER_DTYPES:
                dtypes = ", ".join(PARAMETER_DTYPES)
                where = f"$.heads, {name}, the tensor {shown(tensor)}"
                yield f"{where}: expected {dtypes}, found {record.dtype}"
    of_adapter = [task.name for task in ledger.tasks if task.penalty_on == "adapter"]
    if ledger.base is None and of_adapter:
        yield (
            f"the task {of_adapter[0]!r} has an adapter's Fisher, but the weights are not an "
            "adapter's: there is no base"
        )
    if ledger.merge_rule == "separate" and ledger.gamma != 1.0:
        yield f"$.gamma: expected 1.0 with the merge rule separate, found {ledger.gamma}"
    if not ledger.fisher:
        yield "$.fisher: expected at least one tensor, found none"
    yield from _faults_of_names(ledger)
    if len({record.dtype for record in ledger.fisher.values()}) > 1:
        yield "$.fisher: expected one dtype for all tensors, found F32 and BF16"
    if ledger.anchor is not None:
        yield from _faults_of_set(ledger, ledger.anchor, "anchor", ("F32",))
        yield from _faults_of_pair(ledger.fisher, ledger.anchor, "fisher and anchor")
    yield from _faults_of_blocks(ledger)
    yield from _faults_of_factor_penalty(ledger)


def _faults_of_task(task: TaskRecord, place: str) -> Iterator[str]:
    counted = (task.estimator, task.examples, task.units)
    measured = not any(field is None for field in counted)
    if not measured and any((*counted, task.mc_samples, task.layers, task.penalty is None)):
        yield (
            f"{place}: expected null for all of estimator, examples and units or for none;"
            " a task without them has a penalty, no mc_samples and no layers"
        )
    if measured and task.weight_by is not None:
        yield f"{place}.weight_by: the task was measured, so its weight is a number"
    for name in ("interpolation", "replayed"):
        if getattr(task, name) is not None and task.penalty is None:
            yield f"{place}.{name}: the task was only measured, there is no training"
    if task.budget is not None and task.penalty in (None, UNKNOWN, "none"):
        yield f"{place}.budget: expected it with a penalty that it sets the λ of"
    if task.loss_on is not None and task.unit != "token":
        yield f"{place}.loss_on: expected it with the unit token only"
    measured_on = {name for found in task.metrics.values() for name in found}
    for name in task.benchmarks or ():
        if name not in measured_on:
            yield f"{place}.benchmarks: {shown(name)} is not in metrics"
    yield from _faults_of_description(task, f"{place}.description")


def _faults_of_names(ledger: Ledger) -> Iterator[str]:
    yield from _faults_of_set(ledger, ledger.fisher, "fisher", FISHER_DTYPES)
    for name in ledger.unprotected:
        if name not in ledger.weights:
            yield f"$.unprotected: {shown(name)} is not among the weights"
        if name in ledger.fisher:
            yield f"$.unprotected: {shown(name)} has a Fisher too: expected one or the other"
    for name in ledger.weights:
        if name not in ledger.fisher and name not in ledger.unprotected:
            yield (f"$.weights: {shown(name)} has neither a Fisher nor a reason under unprotected")


def _faults_of_set(
    ledger: Ledger, records: Mapping[str, TensorRecord], which: str, dtypes: tuple[str, ...]
) -> Iterator[str]:
    for name, record in records.items():
        weight = ledger.weights.get(name)
        where = f"$.{which}, the tensor {shown(name)}"
        if record.dtype not in dtypes:
            yield f"{where}: expected {' or '.join(dtypes)}, found {record.dtype}"
        if weight is None:
            yield f"{where} is not among the weights"
        elif weight.dtype not in PARAMETER_DTYPES:
            yield f"{where}: its weight is {weight.dtype}, a dtype without gradients"
        elif record.shape != weight.shape:
            shape = list(weight.shape)
            yield f"{where}: expected the weight's shape {shape}, found {list(record.shape)}"


def _faults_of_pair(one: Iterable[str], other: Iterable[str], both: str) -> Iterator[str]:
    for name in sorted({*one} ^ {*other}):
        yield (
            f"the tensor {shown(name)} is in only one of {both}: expected the same names in both"
        )


def _faults_of_description(record: Ledger | TaskRecord, place: str) -> Iterator[str]:
    if record.description is not None:
        digest = json_digest(record.description)
        if digest != record.made_from:
            yield f"{place}: expected made_from to be its digest {digest}, found {record.made_from}"


def _faults_of_blocks(ledger: Ledger) -> Iterator[str]:
    """Yield factors without a block, and blocks that do not fit their parameters."""
    factors, blocks = ledger.factors or {}, ledger.blocks or {}
    if (ledger.factors is None) != (ledger.blocks is None) or factors.keys() != blocks.keys():
        yield "expected the same names in factors and blocks"
    if ledger.factors is not None and len({record.dtype for record in factors.values()}) != 1:
        yield "$.factors: expected at least one tensor, and one dtype for all"
    seen: set[tuple[str, str]] = set()
    for name, block in blocks.items():
        where, record = f"$.blocks[{shown(name)}]", factors[name]
        if list(block.dims) != sorted(set(block.dims)):
            yield f"{where}.dims: expected ascending numbers, found {list(block.dims)}"
        if record.dtype not in FISHER_DTYPES:
            yield f"{where}: expected F32 or BF16, found {record.dtype}"
        for parameter in block.parameters:
            if parameter not in ledger.fisher:
                yield f"{where}.parameters: {shown(parameter)} has no Fisher"
            if (block.matrix, parameter) in seen:
                yield f"{where}: {shown(parameter)} has two matrices {block.matrix}"
            seen.add((block.matrix, parameter))
        shapes = [ledger.fisher[parameter].shape for parameter in block.parameters]
        for bias in _misfits(block, shapes):
            yield f"{where}.parameters: expected a bias of the outputs, found shape {list(bias)}"
        sizes = _block_sizes(block, shapes)
        if not sizes:
            yield f"{where}: expected a parameter with the dimensions {list(block.dims)}"
        for size in sizes:
            if record.shape != (size, size):
                yield f"{where}: expected the shape {[size, size]}, found {list(record.shape)}"


def _faults_of_factor_penalty(ledger: Ledger) -> Iterator[str]:
    """Yield an anchor or an offset that no factor needs, and an anchor of other parameters."""
    if ledger.blocks is None:
        for name in ("factor_anchor", "factor_offset"):
            if getattr(ledger, name) is not None:
                yield f"$.{name}: expected it only where there are factors"
    elif ledger.factor_anchor is not None:
        both = "factor_anchor and the parameters of blocks"
        yield from _faults_of_set(ledger, ledger.factor_anchor, "factor_anchor", ("F32",))
        yield from _faults_of_pair(covered(ledger.blocks), ledger.factor_anchor, both)


def _misfits(block: Block, shapes: list[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of biases that are not one number for each output of a weight."""
    outputs = {
        math.prod(size for d, size in enumerate(shape) if d not in block.dims)
        for shape in shapes
        if len(shape) > 1
    }
    for shape in shapes if outputs else ():
        if not shape or (len(shape) == 1 and block.matrix != "G" and shape[0] not in outputs):
            yield shape


def _block_sizes(block: Block, shapes: list[tuple[int, ...]]) -> set[int]:
    """Return the sizes that the parameters imply; a bias adds one input, which is 1."""
    weights = [shape for shape in shapes if len(shape) > 1]
    biases = [shape for shape in shapes if len(shape) < 2]
    if not weights or any(block.dims[-1] >= len(shape) for shape in weights):
        return set()
    sizes = {math.prod(shape[d] for d in block.dims) for shape in weights}
    if block.matrix == "G":
        return sizes | {math.prod(shape) for shape in biases}
    return {size + 1 for size in sizes} if biases else sizes
