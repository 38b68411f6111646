"""Labels in the rows of task data: names, values and class numbers."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from consolidate.data.columns import label_column, lacks_labels
from consolidate.models.model import Model
from consolidate.options import Columns
from formats.errors import InputError
from formats.rows import Rows
from formats.wording import few, shown

LABELS_OF_IDS = 20
"""At least as many rows, no two with the same label, have no classes."""
UNNAMED = (
    "the model's labels have no names (transformers' LABEL_0, LABEL_1, … count as none): number "
    "the labels, or write names into id2label in config.json"
)


def label_names(rows: Rows, objective: str, columns: Columns | None = None) -> list[str]:
    """Name the labels of a new head: by the data's names, or sorted, or 0 to the largest."""
    column = label_column(rows, columns or Columns(), objective)
    if objective == "regression":
        count = len(as_numbers(rows[0].get(column), rows.where(0, column)))
        return [str(i) for i in range(count)] if count > 1 else []
    found = label_values(rows, objective, columns)
    if rows.label_names(column) is not None:
        return found
    one_each = objective not in ("multi-label", "token-classification")
    if one_each and len(found) == len(rows) >= LABELS_OF_IDS:
        where = place_of_label(rows, objective, columns, {found[0]})
        raise InputError(
            f"{where}: expected classes, found another label in each of {len(rows)} rows, as in a "
            "column of ids: name the column of the labels"
        )
    if _are_classes(found):
        largest = max(map(int, found))
        if largest > 10 * len(found) + 1000:
            where = place_of_label(rows, objective, columns, {str(largest)})
            raise InputError(
                f"{where}: expected class numbers from 0, of {len(found)} classes, found "
                f"{shown(largest)}: name the column of the labels"
            )
        return [str(i) for i in range(largest + 1)]
    return found


def label_values(
    rows: Rows, objective: str, columns: Columns | None = None, *, used: bool = False
) -> list[str]:
    """Collect the labels in the data as names, in the order of the data's names, or sorted."""
    column = label_column(rows, columns or Columns(), objective)
    stated = rows.label_names(column)
    if stated is not None and not used:
        return list(stated)
    found: set[str] = set()
    lengths: set[int] = set()
    numbered: tuple[int, Any] | None = None  # the first row with a number that is no text
    values = rows.values(column) if rows.tensors is None else _distinct(within_int64(rows, column))
    several = objective in ("multi-label", "token-classification")
    for i, value in enumerate(values):
        row = as_list(value, rows.where(i, column)) if several else [value]
        lengths.add(len(row))
        for one in row:
            if one is None or one == "":
                raise InputError(f"{rows.where(i, column)}: the label is missing")
            number = as_integer(one)
            if not several and _is_target(one):
                if rows.tensors is not None and isinstance(one, float):  # of any row
                    numbers = rows.tensors[column].flatten()
                    i = int((numbers != numbers.long()).nonzero()[0])
                    one = numbers[i].item()
                raise no_class(rows.where(i, column), one)
            if not several and isinstance(one, list | tuple | dict):
                raise InputError(
                    f"{rows.where(i, column)}: expected one label, found {shown(one)}: for lists "
                    "of labels use --objective multi-label"
                )
            if number != -100 or objective != "token-classification":
                found.add(str(one) if number is None else str(number))
                if number is not None and not isinstance(one, str):
                    numbered = numbered or (i, one)
    if numbered and stated is None and not used and not _numbers(found):
        raise InputError(
            f"{rows.where(numbered[0], column)}: expected text, as other labels are names, found "
            f"the number {numbered[1]!r}: write all labels as text"
        )
    if stated is not None:
        return [name for i, name in enumerate(stated) if {str(i), name} & found]
    if objective == "multi-label" and found <= {"0", "1"} and len(lengths) == 1:
        return [str(i) for i in range(lengths.pop())]  # rows of K zeros and ones
    return sorted(found, key=int if _are_classes(found) else None)


def place_of_label(
    rows: Rows, objective: str, columns: Columns | None, names: Collection[str]
) -> str:
    """Name the first row that has one of these labels, as `label_values` names them."""
    column = label_column(rows, columns or Columns(), objective)
    stated = rows.label_names(column) or []
    wanted = {*names, *(str(i) for i, name in enumerate(stated) if name in names)}
    several = objective in ("multi-label", "token-classification")
    for i, value in enumerate(rows.values(column)):
        for one in as_list(value, rows.where(i, column)) if several else [value]:
            number = as_integer(one)
            if (str(one) if number is None else str(number)) in wanted:
                return rows.where(i, column)
    return rows.name


def lacking_labels(found: Iterable[str], known: Sequence[str]) -> list[str]:
    """Return the labels that a model lacks; numbers are names if all of the model's names are."""
    numbers = range(0 if _numbers(known) else len(known))
    alike = Counter(name.casefold() for name in known)
    return [
        name
        for name in found
        if name not in known and as_integer(name) not in numbers and alike[name.casefold()] != 1
    ]


def _numbers(names: Iterable[str]) -> bool:
    return all(as_integer(name) is not None for name in names)


def _are_classes(names: Iterable[str]) -> bool:
    return all((number := as_integer(name)) is not None and number >= 0 for name in names)


def within_int64(rows: Rows, column: str) -> Tensor:
    """Return a column of a tensor file, and refuse numbers that do not fit into int64."""
    assert rows.tensors is not None
    values = rows.tensors[column]
    if values.dtype == torch.uint64:
        beyond = (values.long() < 0).flatten(1).any(1) if values.ndim > 1 else values.long() < 0
        for i in beyond.nonzero()[:1].flatten().tolist():
            largest = max(values[i].flatten().tolist())
            raise InputError(
                f"{rows.where(i, column)}: expected at most the largest int64, {2**63 - 1}, found "
                f"{largest}; save smaller numbers"
            )
    return values


def _distinct(labels: Tensor) -> list[Any]:
    """Return the distinct values of a column of labels, (N,) or (N, 1), or else its rows."""
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    return flat.unique().tolist() if flat.ndim == 1 else list(flat)


_TARGETS = "; for numbers as targets use --objective regression"


def no_class(where: str, value: Any) -> InputError:
    """Return the error for numbers where a class is expected, as in the data of a regression."""
    if isinstance(value, float | Decimal):
        found = f"{value:.6g}"
    else:
        shape = list(value.shape) if isinstance(value, Tensor) else [len(value)]
        found = f"rows of shape {shape}"
    return InputError(f"{where}: expected one class number per row, found {found}{_TARGETS}")


class Labels:
    """The labels of one column as class numbers."""

    def __init__(self, rows: Rows, column: str, model: Model, count: int | None) -> None:
        self._rows = rows
        self._column = column
        self._count = count
        self._by_name = {name: i for i, name in enumerate(model.labels or [])}
        self.notes: list[str] = []
        self._stated = stated = rows.label_names(column)
        self._from_data: dict[int, int] = {}  # the data's class numbers -> the model's
        self._all_named = False  # the model's labels are numbers, and numbers are their names
        if stated is not None and self._by_name:
            ids = [self._named(name) for name in stated]
            if any(i >= 0 for i in ids):
                self._from_data = dict(enumerate(ids))
            else:
                self.notes.append(
                    f"the class names of {rows.name} and of the checkpoint differ "
                    f"({stated[0]}, {next(iter(self._by_name))}, …); class numbers are used "
                    "unchanged"
                )
        elif self._by_name and _numbers(self._by_name):
            self._from_data = {int(name): i for name, i in self._by_name.items()}
            self._all_named = True
        elif any(_PADDED.fullmatch(name) for name in self._by_name):
            self._all_named = True  # 1 may be 01 or 1.0, whose zero a program has dropped or added
        elif stated is not None and len(stated) == count:
            # Classes in the data's order, as every loader of image folders numbers them.
            self._by_name = {name: i for i, name in enumerate(stated)}
            self.notes.append(
                "the checkpoint's labels have no names; the data's classes are used in their "
                f"order: {', '.join(stated)}"
            )
        self._names = {*self._by_name, *(stated if stated and self._from_data else ())}

    def index(self, value: Any, i: int, *, ignorable: bool = False) -> int:
        """Return the class number of a value in row `i`, a number or a name."""
        number = as_integer(value)
        if isinstance(value, bool) and (named := self._named(str(value))) >= 0:  # as text files do
            number = named
        elif isinstance(value, str) and (number is None or value.strip() in self._names):
            number = self._named(value if number is None else value.strip())
        elif ignorable and number == -100:
            return number
        elif number is not None:
            number = self._from_data.get(number, -1 if self._all_named else number)
        if number is None or number < 0 or (self._count is not None and number >= self._count):
            raise self._refusal(value, i)
        return number

    def vector(self, value: Any, i: int) -> list[float]:
        """Return K zeros and ones for row `i`, from such a list or from a list of labels."""
        assert self._count is not None
        values = as_list(value, self._rows.where(i, self._column))
        numbers = [as_integer(one) for one in values]
        binary = len(values) == self._count and all(n in (0, 1) for n in numbers)
        if binary and len(values) < 3:  # else 0 or 1 is there twice, and this is no list of labels
            counted = list(self._by_name) == [str(i) for i in range(self._count)]
            named = any(isinstance(one, str) and one in self._by_name for one in values)
            binary = self._stated is None and (counted or not named)
        if binary:
            return [float(n) for n in numbers if n is not None]
        vector = [0.0] * self._count
        for one in values:
            vector[self.index(one, i)] = 1.0
        return vector

    def _named(self, name: str) -> int:
        """Find a class by its name, ignoring case if that is unique; −1 if there is none."""
        if name in self._by_name:
            return self._by_name[name]
        alike = [i for other, i in self._by_name.items() if other.casefold() == name.casefold()]
        return alike[0] if len(alike) == 1 else -1

    def _refusal(self, value: Any, i: int) -> InputError:
        where = self._rows.where(i, self._column)
        if value is None or value == "":
            return InputError(f"{where}: the label is missing")
        if isinstance(value, list | tuple) and _is_target(value):
            return no_class(where, value)
        targets = _TARGETS if _is_target(value) else ""
        if self._by_name:
            names = list(self._by_name)
            numbers = "" if self._all_named else f" (or their numbers, 0 to {len(names) - 1})"
            return InputError(
                f"{where}: expected one of the model's {len(names)} labels, {few(names, 20)}"
                f"{numbers}, found {value!r}{targets}"
            )
        upto = f" to {self._count - 1}" if self._count else ""
        name = as_integer(value) is None and not targets
        hint = f"; {UNNAMED}" if name else targets
        return InputError(
            f"{where}: expected a label of the model, a number from 0{upto}, found {value!r}{hint}"
        )


_PADDED = re.compile(r"0[0-9]+|-?[0-9]+\.0+", re.ASCII)
_INTEGER = re.compile(r"\s*(0|-?[1-9][0-9]{0,400})\s*", re.ASCII)


def as_integer(value: Any) -> int | None:
    """Return the integer that a value is or spells, None if there is none."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, str):  # 01, +1 and 1_0 are names
        return int(value) if _INTEGER.fullmatch(value) else None
    if isinstance(value, Decimal):  # of Parquet
        return int(value) if value == value.to_integral_value() else None
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole else None


def _is_target(value: Any) -> bool:
    """Whether a value is several numbers, or one with a fraction, as in data of a regression."""
    if isinstance(value, Tensor):
        return value.numel() > 1
    if isinstance(value, list | tuple):
        return len(value) > 1 and all(isinstance(one, int | float | Decimal) for one in value)
    return isinstance(value, float | Decimal) and as_integer(value) is None


def as_list(value: Any, where: str) -> list[Any]:
    """Return the list that a value is or spells: JSON, or a text with commas."""
    if isinstance(value, Tensor):
        return torch.atleast_1d(value).tolist()
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                return list(json.loads(value))
            except ValueError:
                raise InputError(f"{where}: expected a list in JSON, found {value!r}") from None
        return [part.strip() for part in value.split(",") if part.strip()]
    raise InputError(f"{where}: expected a list, found {describe(value)}")


def as_numbers(value: Any, where: str) -> list[float]:
    """Return the finite numbers that a value is, contains or spells, at least one."""
    if value is None:
        raise InputError(f"{where}: the label is missing")
    values = [value] if isinstance(value, int | float | Decimal) else as_list(value, where)
    try:
        numbers = [float(one) for one in values]
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: expected numbers, found {shown(value)}") from None
    if not numbers:
        raise InputError(f"{where}: expected a number, found nothing")
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{where}: expected finite numbers, found {value!r}")
    return numbers


def read_labels(
    rows: Rows, columns: Columns, model: Model, count: int | None, *, needed: bool
) -> tuple[Tensor, list[str]]:
    """Read class numbers, (N,), binary labels, (N, K), or regression targets, and the notes.

    Where they are not needed, rows without any have zeros in their place.
    """
    if not needed and lacks_labels(rows, columns, model.objective.name):
        several = model.objective.name == "multi-label" or (count or 1) > 1
        several &= model.objective.name in ("multi-label", "regression")
        shape = (len(rows), count or 1) if several else (len(rows),)
        whole = torch.float32 if several or model.objective.name == "regression" else torch.int64
        return torch.zeros(shape, dtype=whole), [f"{rows.name} has no labels: none are needed"]
    column = label_column(rows, columns, model.objective.name)
    if model.objective.name == "regression":
        return _targets(rows, column, model), []
    reader = Labels(rows, column, model, count)
    read = reader.vector if model.objective.name == "multi-label" else reader.index
    labels = []
    for i, value in enumerate(rows.values(column)):
        try:
            labels.append(read(value, i))
        except InputError as error:
            left_out = "" if needed else "; or leave the column out: no labels are needed here"
            raise InputError(f"{error}{left_out}") from None
    return torch.tensor(labels), reader.notes


def _targets(rows: Rows, column: str, model: Model) -> Tensor:
    """Return the targets of a regression, (N,) or (N, D) float32."""
    targets: list[list[float]] = []
    count = model.outputs
    for i, value in enumerate(rows.values(column)):
        where = rows.where(i, column)
        numbers = as_numbers(value, where)
        count = len(numbers) if count is None else count
        if len(numbers) != count:
            raise InputError(f"{where}: expected {count} numbers, found {len(numbers)}")
        targets.append(numbers)
    tensor = torch.tensor(targets, dtype=torch.float32)
    return tensor[:, 0] if tensor.shape[1] == 1 else tensor


def describe(value: Any) -> str:
    """Return the type and the beginning of a value, for a message."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
