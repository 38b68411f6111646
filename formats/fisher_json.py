"""The ledger of a Fisher folder, `fisher.json`: what was measured and merged, and every digest."""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from formats.digest import TensorRecord, set_digest
from formats.errors import InputError, NonFiniteError

FORMAT = "consolidate-fisher"
VERSION = 1
MAX_LEDGER_BYTES = 128 * 2**20
MAX_TASKS = 4096  # what is drawn of them grows with their square
ESTIMATORS = ("exact", "mc", "empirical", "batched")
MERGE_RULES = ("online", "separate")
PENALTY_ON = ("adapter", "merged")
UNITS = ("example", "token")
FISHER_DTYPES = ("F32", "BF16")
PARAMETER_DTYPES = ("BF16", "F16", "F32", "F64")
SAME_AS = "the same tensor as "
"""How the reason begins of a tensor that the weights file stores again under a second name."""

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WHEN = re.compile(r"before|after|(epoch|step) [1-9][0-9]{0,17}")
_HEX = re.compile(r"[0-9a-f]{64}")
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,15}")
_LIMIT = 2**63 - 1

T = TypeVar("T")


@dataclass
class LayerRecord:
    """One task's Fisher of one parameter: its trace, and its overlap with what came before."""

    trace: float
    overlap: float | None = None


@dataclass
class TaskRecord:
    """One task of the ledger; `docs/format.md` gives every field's meaning and range."""

    name: str
    objective: str
    likelihood: str
    labels: list[str] | None
    unit: str
    examples: int
    units: int
    estimator: str
    mc_samples: int | None
    seed: int
    weight: float = 1.0
    data: str = ""
    data_digest: str | None = None
    ewc_lambda: float | None = None
    penalty: str | None = None
    penalty_on: str | None = None
    parent: str | None = None
    made_from: str | None = None
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    layers: dict[str, LayerRecord] = field(default_factory=dict)


@dataclass
class Ledger:
    """The whole ledger; `weights`, `fisher`, `anchor` and `heads` record every tensor beside it."""

    tasks: list[TaskRecord]
    merge_rule: str = "online"
    gamma: float = 1.0
    penalty_offset: float = 0.0
    unprotected: dict[str, str] = field(default_factory=dict)
    weights: dict[str, TensorRecord] = field(default_factory=dict)
    fisher: dict[str, TensorRecord] = field(default_factory=dict)
    anchor: dict[str, TensorRecord] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    heads: dict[str, dict[str, TensorRecord]] = field(default_factory=dict)
    base: str | None = None
    made_from: str | None = None


def check_task_name(name: str) -> None:
    """Refuse a task name that does not match `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.

    Raises:
        InputError: The name does not match; the message shows it.
    """
    if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
        raise InputError(
            f"{_shown(name)} cannot name a task: a name is 1 to 64 of the letters A-Z a-z, digits, "
            "'.', '_' and '-', and begins with a letter or a digit"
        )


def copies(ledger: Ledger) -> dict[str, str]:
    """Name the tensors that the weights file stores again, as it may tied parameters.

    Args:
        ledger: The ledger.

    Returns:
        From each second name to the name that stands for both.
    """
    named = {name: why.removeprefix(SAME_AS) for name, why in ledger.unprotected.items()}
    return {
        name: first
        for name, first in named.items()
        if first != ledger.unprotected[name] and first in ledger.weights
    }


def ledger_bytes(ledger: Ledger, source: str = "fisher.json") -> bytes:
    """Serialize a ledger: UTF-8 JSON, two spaces of indent, a newline at the end, no timestamps.

    Args:
        ledger: The ledger; the same content gives the same bytes.
        source: What a message calls the file.

    Raises:
        InputError: The ledger breaks a rule of the format (it could not be read back).
        NonFiniteError: A number is NaN or infinite.
    """
    content = _to_json(ledger)
    _to_ledger(_Value(content, source))
    data = (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
    if len(data) > MAX_LEDGER_BYTES:
        raise InputError(_too_large(source))
    return data


def parse_ledger(data: bytes, source: str = "fisher.json") -> Ledger:
    """Read a ledger from bytes, strictly.

    Args:
        data: The contents of `fisher.json`.
        source: What a message calls the file.

    Raises:
        InputError: Too large, not JSON, another format or version, or a field that is missing,
            unknown, mistyped, out of range or at odds with another; the message names the field.
        NonFiniteError: A number overflows to infinity.
    """
    if len(data) > MAX_LEDGER_BYTES:
        raise InputError(_too_large(source))

    def no_constant(token: str) -> None:
        raise ValueError(f"{token} is not a JSON number")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for name, value in pairs:
            if name in members:
                raise ValueError(f"the key {_shown(name)} stands twice in one object")
            members[name] = value
        return members

    try:
        content = json.loads(
            data.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=no_duplicates
        )
    except RecursionError:
        raise InputError(f"{source} is not a ledger: its JSON is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{source} is not a ledger: {error}") from None
    return _to_ledger(_Value(content, source))


def read_ledger(path: Path) -> Ledger:
    """Read the ledger in a file.

    Raises:
        InputError: The file is missing or unreadable, or `parse_ledger` refuses it.
        NonFiniteError: A number overflows to infinity.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path} is not there, or is no plain file: it should be the ledger")
        with path.open("rb") as file:
            data = file.read(MAX_LEDGER_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return parse_ledger(data, str(path))


def _too_large(source: str) -> str:
    return f"{source} is larger than the {MAX_LEDGER_BYTES // 2**20} MiB a ledger may have"


def _shown(value: object, limit: int = 80) -> str:
    """Show a value from a file on one line: control characters escaped, long ones cut."""
    if isinstance(value, Mapping):
        return f"an object of {len(value)} members"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and abs(value) > 10**limit:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str) and len(value) > limit:
        return repr(value[:limit]) + "…"
    return repr(value)


@dataclass(frozen=True)
class _Value:
    """A JSON value and the place it stands at, which every refusal names."""

    value: Any
    source: str
    place: str = ""

    def refuse(self, expected: str) -> InputError:
        return InputError(f"{self._at()}: expected {expected}, found {_shown(self.value)}")

    def _at(self) -> str:
        return f"{self.source}, {self.place}" if self.place else self.source

    def fields(self, names: Collection[str], may_lack: Collection[str] = ()) -> dict[str, "_Value"]:
        """Give the members of an object that has exactly these, null for those it may lack."""
        if not isinstance(self.value, dict):
            raise self.refuse("an object")
        prefix = f"{self.place}." if self.place else ""
        if missing := [name for name in names if name not in self.value and name not in may_lack]:
            raise InputError(f"{self._at()}: the field {_shown(missing[0])} is missing")
        if unknown := [name for name in self.value if name not in names]:
            raise InputError(
                f"{self._at()}: version {VERSION} of the format has no field {_shown(unknown[0])}"
            )
        return {name: _Value(self.value.get(name), self.source, prefix + name) for name in names}

    def items(self) -> dict[str, "_Value"]:
        """Give the members of an object keyed by names."""
        if not isinstance(self.value, dict):
            raise self.refuse("an object")
        for name in self.value:
            _Value(name, self.source, f"{self.place}, the name").text()
        return {
            name: _Value(value, self.source, f"{self.place}[{_shown(name)}]")
            for name, value in self.value.items()
        }

    def elements(self) -> list["_Value"]:
        if not isinstance(self.value, list):
            raise self.refuse("a list")
        return [
            _Value(value, self.source, f"{self.place}[{i}]") for i, value in enumerate(self.value)
        ]

    def optional(self, read: Callable[["_Value"], T]) -> T | None:
        return None if self.value is None else read(self)

    def string(self) -> str:
        if not isinstance(self.value, str):
            raise self.refuse("a string")
        if any("\ud800" <= character <= "\udfff" for character in self.value):
            raise self.refuse("valid Unicode (no lone surrogate)")
        return self.value

    def text(self) -> str:
        if not self.string():
            raise self.refuse("a string that is not empty")
        return self.value

    def matching(self, pattern: re.Pattern[str], expected: str) -> str:
        if not isinstance(self.value, str) or not pattern.fullmatch(self.value):
            raise self.refuse(expected)
        return self.value

    def one_of(self, choices: tuple[str, ...]) -> str:
        if not isinstance(self.value, str) or self.value not in choices:
            raise self.refuse(" or ".join(choices))
        return self.value

    def integer(self, low: int, high: int = _LIMIT) -> int:
        if type(self.value) is not int or not low <= self.value <= high:
            raise self.refuse(f"an integer from {low}" + (f" to {high}" if high != _LIMIT else ""))
        return self.value

    def number(self, low: float = -math.inf, high: float = math.inf) -> float:
        if type(self.value) not in (int, float):
            raise self.refuse("a number")
        try:
            number = float(self.value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise NonFiniteError(
                f"{self._at()}: expected a finite number, found {_shown(self.value)}"
            )
        if not low <= number <= high:
            raise self.refuse(
                f"a number from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
            )
        return number

    def digest(self) -> str:
        return self.matching(_HEX, "a SHA-256 of 64 lower-case hexadecimal digits")


def _to_json(ledger: Ledger) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "merge_rule": ledger.merge_rule,
        "gamma": _float(ledger.gamma),
        "penalty_offset": _float(ledger.penalty_offset),
        "tasks": [_task_to_json(task) for task in ledger.tasks],
        "unprotected": _sorted(ledger.unprotected),
        "weights": _set_to_json(ledger.weights),
        "fisher": _set_to_json(ledger.fisher),
        "anchor": None if ledger.anchor is None else _set_to_json(ledger.anchor),
        "heads": {task: _set_to_json(head) for task, head in _sorted(ledger.heads).items()},
        "versions": _sorted(ledger.versions),
        **({} if ledger.base is None else {"base": ledger.base}),
        **({} if ledger.made_from is None else {"made_from": ledger.made_from}),
    }


def _task_to_json(task: TaskRecord) -> dict[str, Any]:
    return {
        "name": task.name,
        "objective": task.objective,
        "likelihood": task.likelihood,
        "labels": task.labels,
        "unit": task.unit,
        "examples": task.examples,
        "units": task.units,
        "estimator": task.estimator,
        "mc_samples": task.mc_samples,
        "seed": task.seed,
        "weight": _float(task.weight),
        "data": task.data,
        "data_digest": task.data_digest,
        "ewc_lambda": _float(task.ewc_lambda),
        "penalty": task.penalty,
        **({} if task.penalty_on is None else {"penalty_on": task.penalty_on}),
        **({} if task.parent is None else {"parent": task.parent}),
        **({} if task.made_from is None else {"made_from": task.made_from}),
        "metrics": {
            when: {
                evaluated: {metric: _float(value) for metric, value in values.items()}
                for evaluated, values in tasks.items()
            }
            for when, tasks in task.metrics.items()
        },
        "layers": {
            name: {"trace": _float(layer.trace), "overlap": _float(layer.overlap)}
            for name, layer in task.layers.items()
        },
    }


def _float(value: Any) -> Any:
    """Write 1 as 1.0, so that equal ledgers are equal bytes; what is no number is refused later."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000:
        return float(value)
    return value


def _sorted(mapping: Mapping[str, T]) -> dict[str, T]:
    return dict(sorted(mapping.items()))


def _set_to_json(records: Mapping[str, TensorRecord]) -> dict[str, Any]:
    return {
        "digest": set_digest(records),
        "tensors": {
            name: {"dtype": record.dtype, "shape": list(record.shape), "sha256": record.sha256}
            for name, record in _sorted(records).items()
        },
    }


def _to_ledger(root: _Value) -> Ledger:
    if not isinstance(root.value, dict) or root.value.get("format") != FORMAT:
        raise InputError(
            f'{root.source} is not a ledger of this tool: it should hold "format": "{FORMAT}".'
        )
    version = root.value.get("version")
    if type(version) is not int or version != VERSION:
        raise InputError(
            f"{root.source} has version {_shown(version)} of the format, and this program reads "
            f"version {VERSION}: a newer release may read it"
        )
    at = root.fields(
        (
            "format",
            "version",
            "merge_rule",
            "gamma",
            "penalty_offset",
            "tasks",
            "unprotected",
            "weights",
            "fisher",
            "anchor",
            "heads",
            "versions",
            "base",
            "made_from",
        ),
        may_lack=("base", "made_from"),
    )
    tasks = at["tasks"].elements()
    if len(tasks) > MAX_TASKS:
        raise at["tasks"].refuse(f"at most {MAX_TASKS:,} tasks")
    ledger = Ledger(
        tasks=[_to_task(task) for task in tasks],
        merge_rule=at["merge_rule"].one_of(MERGE_RULES),
        gamma=at["gamma"].number(0.0, 1.0),
        penalty_offset=at["penalty_offset"].number(0.0),
        unprotected={name: why.text() for name, why in at["unprotected"].items().items()},
        weights=_to_set(at["weights"]),
        fisher=_to_set(at["fisher"]),
        anchor=at["anchor"].optional(_to_set),
        versions={name: version.text() for name, version in at["versions"].items().items()},
        heads={task: _to_set(head) for task, head in at["heads"].items().items()},
        base=at["base"].digest() if "base" in root.value else None,
        made_from=at["made_from"].digest() if "made_from" in root.value else None,
    )
    _check_ledger(ledger, root.source)
    return ledger


def _to_task(task: _Value) -> TaskRecord:
    at = task.fields(
        [field.name for field in fields(TaskRecord)], may_lack=("penalty_on", "parent", "made_from")
    )
    return TaskRecord(
        name=at["name"].matching(_TASK_NAME, "a task name, [A-Za-z0-9][A-Za-z0-9._-]{0,63}"),
        objective=at["objective"].text(),
        likelihood=at["likelihood"].text(),
        labels=at["labels"].optional(
            lambda labels: [label.string() for label in labels.elements()]
        ),
        unit=at["unit"].one_of(UNITS),
        examples=at["examples"].integer(1),
        units=at["units"].integer(1),
        estimator=at["estimator"].one_of(ESTIMATORS),
        mc_samples=at["mc_samples"].optional(lambda samples: samples.integer(1)),
        seed=at["seed"].integer(0),
        weight=at["weight"].number(0.0),
        data=_to_data_name(at["data"]),
        data_digest=at["data_digest"].optional(_Value.digest),
        ewc_lambda=at["ewc_lambda"].optional(lambda ewc_lambda: ewc_lambda.number(0.0)),
        penalty=at["penalty"].optional(_Value.text),
        penalty_on=at["penalty_on"].one_of(PENALTY_ON) if "penalty_on" in task.value else None,
        parent=at["parent"].digest() if "parent" in task.value else None,
        made_from=at["made_from"].digest() if "made_from" in task.value else None,
        metrics=_to_metrics(at["metrics"]),
        layers={name: _to_layer(layer) for name, layer in at["layers"].items().items()},
    )


def _to_data_name(data: _Value) -> str:
    parts = data.string().split("/")
    if len(parts) > 2 or ".." in parts or (len(parts) == 2 and not all(parts)):
        raise data.refuse("the base name of a file or folder, or a Hub id owner/name, but no path")
    return data.value


def _to_metrics(metrics: _Value) -> dict[str, dict[str, dict[str, float]]]:
    read = {}
    for when, tasks in metrics.items().items():
        if not _WHEN.fullmatch(when):
            raise InputError(
                f"{metrics.source}, {metrics.place}: expected before, step N, epoch N or after, "
                f"found {_shown(when)}"
            )
        read[when] = {
            task: {metric: value.number() for metric, value in values.items().items()}
            for task, values in tasks.items().items()
        }
    return read


def _to_layer(layer: _Value) -> LayerRecord:
    at = layer.fields(("trace", "overlap"))
    return LayerRecord(
        trace=at["trace"].number(0.0),
        overlap=at["overlap"].optional(lambda overlap: overlap.number(0.0, 1.0)),
    )


def _to_set(tensors: _Value) -> dict[str, TensorRecord]:
    digest, members = tensors.fields(("digest", "tensors")).values()
    records = {}
    for name, member in members.items().items():
        if name == "__metadata__":
            raise InputError(f"{members.source}, {members.place}: no tensor may be named {name!r}")
        at = member.fields(("dtype", "shape", "sha256"))
        records[name] = TensorRecord(
            dtype=at["dtype"].matching(_DTYPE, "a safetensors dtype such as F32"),
            shape=tuple(size.integer(0) for size in at["shape"].elements()),
            sha256=at["sha256"].digest(),
        )
    if digest.digest() != set_digest(records):
        raise InputError(
            f"{digest.source}, {digest.place}: {digest.value} is not the digest of the tensors "
            "listed under it: the ledger was edited or damaged"
        )
    return records


def _check_ledger(ledger: Ledger, source: str) -> None:
    """Refuse what is well-formed field by field and still contradicts itself."""
    names = [task.name for task in ledger.tasks]
    if not names:
        raise InputError(f"{source}, tasks: expected at least one task, found none")
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name in seen:
            raise InputError(f"{source}, tasks[{i}].name: the task {name!r} is there twice")
        seen.add(name)
    for name in ledger.heads:
        if name not in seen:
            raise InputError(f"{source}, heads: {_shown(name)} is no task of this ledger")
        for tensor, record in ledger.heads[name].items():
            if record.dtype not in PARAMETER_DTYPES:
                raise InputError(
                    f"{source}, heads, {name}, the tensor {_shown(tensor)}: expected "
                    f"{', '.join(PARAMETER_DTYPES)}, found {record.dtype}"
                )
    if ledger.base is None and (
        of_adapter := [task.name for task in ledger.tasks if task.penalty_on == "adapter"]
    ):
        raise InputError(
            f"{source}: the task {of_adapter[0]!r} was held by an adapter's Fisher, but the "
            "weights are no adapter's: there is no base"
        )
    if ledger.merge_rule == "separate" and ledger.gamma != 1.0:
        raise InputError(
            f"{source}, gamma: expected 1.0 with the merge rule separate, found {ledger.gamma}"
        )
    if not ledger.fisher:
        raise InputError(f"{source}, fisher: expected at least one tensor, found none")
    check_names(ledger, source)
    if len({record.dtype for record in ledger.fisher.values()}) > 1:
        raise InputError(
            f"{source}, fisher: expected one dtype for all tensors, found F32 and BF16"
        )
    if ledger.anchor is not None:
        _check_set(ledger, ledger.anchor, "anchor", ("F32",), source)
        for name in ledger.fisher.keys() ^ ledger.anchor.keys():
            raise InputError(
                f"{source}: the tensor {_shown(name)} is in only one of fisher and anchor; "
                "both must have the same names"
            )


def check_names(ledger: Ledger, source: str) -> None:
    """Refuse a ledger in which a tensor of the weights has neither a Fisher nor a reason, or both.

    Args:
        ledger: Its `weights`, `fisher` and `unprotected`; the digests are not looked at.
        source: What a message calls the file.

    Raises:
        InputError: That, or a Fisher that fits no tensor of the weights.
    """
    _check_set(ledger, ledger.fisher, "fisher", FISHER_DTYPES, source)
    for name in ledger.unprotected:
        if name not in ledger.weights:
            raise InputError(f"{source}, unprotected: {_shown(name)} is not among the weights")
        if name in ledger.fisher:
            raise InputError(f"{source}, unprotected: {_shown(name)} has a Fisher all the same")
    for name in ledger.weights:
        if name not in ledger.fisher and name not in ledger.unprotected:
            raise InputError(
                f"{source}: the weights hold {_shown(name)}, which has neither a Fisher nor a "
                "reason under unprotected"
            )


def _check_set(
    ledger: Ledger,
    records: Mapping[str, TensorRecord],
    which: str,
    dtypes: tuple[str, ...],
    source: str,
) -> None:
    for name, record in records.items():
        weight = ledger.weights.get(name)
        where = f"{source}, {which}, the tensor {_shown(name)}"
        if record.dtype not in dtypes:
            raise InputError(f"{where}: expected {' or '.join(dtypes)}, found {record.dtype}")
        if weight is None:
            raise InputError(f"{where} is not among the weights")
        if weight.dtype not in PARAMETER_DTYPES:
            raise InputError(f"{where}: its weight is {weight.dtype}, which has no gradient")
        if record.shape != weight.shape:
            raise InputError(
                f"{where}: expected the weight's shape {list(weight.shape)}, "
                f"found {list(record.shape)}"
            )
