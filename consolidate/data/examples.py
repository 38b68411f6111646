"""A task's rows as the batches that a model takes."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from consolidate.models.loading import Model
from consolidate.models.objectives import Objective
from formats.errors import InputError, UsageError
from formats.rows import Rows


@dataclass(frozen=True)
class Columns:
    """The names of the columns with each role; None takes the usual ones."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    tokens: str | None = None  # the words of a token classification
    image: str | None = None
    inputs: str | None = None  # tensors for a module of the user's own
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None  # chats
    target: str | None = None  # what an encoder-decoder writes


class Examples(ABC):
    """Encoded examples; an example's index is its place in the data, in every epoch."""

    def __init__(self) -> None:
        self._notes: list[str] = []

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def collate(self, indices: Sequence[int], epoch: int = 0) -> tuple[Any, Tensor]:
        """Return the inputs and labels of these examples as one batch.

        Args:
            indices: Of the examples.
            epoch: Masks of a masked language model are drawn anew for each.

        Returns:
            A tensor or a mapping of tensors, each (B, …), and labels (B,), (B, K) or (B, T) with
            −100 where nothing is predicted.
        """

    def units(self, i: int) -> int:
        """Return how many units example `i` counts for: 1, or its predicted tokens."""
        return 1

    def length(self, i: int) -> int:
        """Return the size of example `i` beside others: 1, or its tokens."""
        return 1

    def notes(self) -> list[str]:
        """Return what a user should be told: how many texts were truncated, and so on."""
        return list(self._notes)

    def batches(
        self, batch_size: int, *, order: Sequence[int] | None = None, epoch: int = 0
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield the examples in batches; the last may be smaller.

        Args:
            batch_size: Examples per batch, at least 1.
            order: Indices in the order wanted, maybe a subset; all, as in the data, unless given.
            epoch: See `collate`.

        Yields:
            Pairs (inputs, labels) as `collate` returns them.
        """
        if batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {batch_size}")
        indices = range(len(self)) if order is None else order
        for start in range(0, len(indices), batch_size):
            yield self.collate(indices[start : start + batch_size], epoch)


class Part(Examples):
    """Some of the examples of another; each keeps what it has there, masks included."""

    def __init__(self, whole: Examples, indices: Sequence[int]) -> None:
        """Take some examples.

        Args:
            whole: All of them.
            indices: Of those to take, in this order.
        """
        super().__init__()
        self._whole = whole
        self._indices = list(indices)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._indices)

    def collate(self, indices: Sequence[int], epoch: int = 0) -> tuple[Any, Tensor]:
        """Return these of the examples as one batch."""
        return self._whole.collate([self._indices[i] for i in indices], epoch)

    def units(self, i: int) -> int:
        """Return how many units example `i` counts for."""
        return self._whole.units(self._indices[i])

    def length(self, i: int) -> int:
        """Return the size of example `i` beside others."""
        return self._whole.length(self._indices[i])


HELD_OUT, LEAST_HELD_OUT, MOST_HELD_OUT = 0.1, 50, 5000


def hold_out(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """Split off a seeded tenth: at least 50 examples, but no more than half, and at most 5,000.

    Args:
        examples: At least two.
        seed: Of the choice.

    Returns:
        Those to train on, and those held out.

    Raises:
        InputError: There are fewer than two.
    """
    count = len(examples)
    if count < 2:
        raise InputError("one example cannot be split: give --validation for the new task")
    size = min(max(round(HELD_OUT * count), LEAST_HELD_OUT), MOST_HELD_OUT, count // 2)
    held = set(subset(count, size, seed))
    rest = [i for i in range(count) if i not in held]
    return Part(examples, rest), Part(examples, sorted(held))


def subset(count: int, most: int | None, seed: int, *, shuffled: bool = False) -> list[int]:
    """Return the indices of all examples, or of a seeded random subset of them.

    Args:
        count: How many examples there are.
        most: The size of the subset; None takes all.
        seed: Of the choice.
        shuffled: Return them in random order instead of the data's.
    """
    if not shuffled and (most is None or most >= count):
        return list(range(count))
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = torch.randperm(count, generator=generator)[:most].tolist()
    return chosen if shuffled else sorted(chosen)


def encode(
    rows: Rows,
    model: Model,
    *,
    columns: Columns | None = None,
    max_length: int | None = None,
    pack: bool = False,
    seed: int = 0,
) -> Examples:
    """Encode the rows of a task for a model and its objective, checking every label.

    Texts are tokenized once, here; images are read batch by batch. Labels are numbers or names: a
    name is looked up among the model's labels, and a number written as text is a number unless it
    is a label's name.

    Args:
        rows: The data.
        model: Whose tokenizer or image processor, labels and objective decide.
        columns: Where things are; the usual names unless given.
        max_length: Tokens after which texts are truncated; what the model takes unless given.
        pack: For language models: join the texts and cut them into sequences of `max_length`.
        seed: Of the masks of a masked language model.

    Returns:
        The examples.

    Raises:
        InputError: A column or the tokenizer is missing, there is nothing to predict, or a row does
            not fit: the message names data, row and column.
        UsageError: `pack` or `max_length` contradict the objective or the model.
    """
    columns = columns or Columns()
    if pack and model.objective.name not in ("causal-lm", "masked-lm"):
        raise UsageError(f"--pack is for language models, not for {model.objective.name}")
    if max_length is not None and model.objective.modality != "text":
        raise UsageError(f"--max-length is for texts, not for {model.objective.name}")
    if len(rows) == 0:
        raise InputError(f"{rows.name} is empty")
    # Here, because these modules build on this one.
    if model.objective.modality == "tensor":
        from consolidate.data.tensors import encode_tensors

        examples = encode_tensors(rows, model, columns)
    elif model.objective.modality == "image":
        from consolidate.data.images import encode_images

        examples = encode_images(rows, model, columns)
    else:
        from consolidate.data.texts import encode_texts

        examples = encode_texts(rows, model, columns, max_length=max_length, pack=pack, seed=seed)
    examples._notes += unread_columns(columns, model.objective)
    return examples


def unread_columns(columns: Columns, objective: Objective) -> list[str]:
    """Say which of the columns that were named are not read.

    Args:
        columns: Those named.
        objective: What is predicted.

    Returns:
        A note on each.
    """
    given = {role: name for role, name in asdict(columns).items() if name is not None}
    return [
        f"the {role.replace('_', ' ')} column {given[role]!r} is not read for {objective.name}"
        for role in sorted(given.keys() - _read(objective, given))
    ]


def _read(objective: Objective, given: Collection[str]) -> set[str]:
    """Return the roles of the columns that are read where these are given."""
    if objective.modality != "text":
        return {"inputs" if objective.modality == "tensor" else "image", "label"}
    match objective.name:
        case "causal-lm" if "messages" in given:
            return {"messages"}
        case "causal-lm" if "prompt" in given or "completion" in given:
            return {"prompt", "completion"}
        case "causal-lm" | "masked-lm":
            return {"text"}
        case "seq2seq-lm":
            target = "target" if "target" in given else "completion"
            return {"text" if "text" in given else "prompt", target}
        case "token-classification":
            return {"tokens", "label"}
    return {"text", "text_pair", "label"}


def label_names(rows: Rows, objective: str, columns: Columns | None = None) -> list[str]:
    """Collect the names of the labels in the data, for a new output layer.

    Args:
        rows: The data.
        objective: A name of `OBJECTIVES`.
        columns: Where the labels are.

    Returns:
        The data's own order where they state one; else numbers in order, or names sorted. Numbers
        stand for the labels from 0 to the largest. For a regression on D > 1 numbers D names, for
        one number none.

    Raises:
        InputError: No label column, or a row without a label.
    """
    if objective == "regression":
        column = label_column(rows, columns or Columns(), objective)
        count = len(as_numbers(rows[0].get(column), rows.where(0, column)))
        return [str(i) for i in range(count)] if count > 1 else []
    found = label_values(rows, objective, columns)
    if all(name.isdecimal() for name in found):
        return [str(i) for i in range(max(map(int, found)) + 1)]
    return found


def label_values(
    rows: Rows, objective: str, columns: Columns | None = None, *, used: bool = False
) -> list[str]:
    """Collect the labels that are in the data, as names.

    Args:
        rows: The data.
        objective: A name of `OBJECTIVES` whose outcomes are labels.
        columns: Where the labels are.
        used: Leave out names that the data state and no row has.

    Returns:
        The data's own order where they state one; else numbers in order, or names sorted. Rows of
        K zeros and ones, of a multi-label task, stand for the labels from 0 to K − 1.

    Raises:
        InputError: No label column, or a row without a label.
    """
    column = label_column(rows, columns or Columns(), objective)
    stated = rows.label_names(column)
    if stated is not None and not used:
        return list(stated)
    found: set[str] = set()
    lengths: set[int] = set()
    values = rows.values(column) if rows.tensors is None else _distinct(rows.tensors[column])
    for i, value in enumerate(values):
        several = objective in ("multi-label", "token-classification")
        row = as_list(value, rows.where(i, column)) if several else [value]
        lengths.add(len(row))
        for one in row:
            if one is None or one == "":
                raise InputError(f"{rows.where(i, column)}: there is no label")
            number = as_integer(one)
            if number != -100 or objective != "token-classification":
                found.add(str(one) if number is None else str(number))
    if stated is not None:
        return [name for i, name in enumerate(stated) if {str(i), name} & found]
    if objective == "multi-label" and found <= {"0", "1"} and len(lengths) == 1:
        return [str(i) for i in range(lengths.pop())]
    return sorted(found, key=int) if all(n.isdecimal() for n in found) else sorted(found)


def matched_label(name: str, known: Sequence[str]) -> int | None:
    """Find a label of the data among those of a model.

    Args:
        name: A name, or a number as text. Where all of `known` are numbers, a number is a name.
        known: The model's labels, in the order of their ids.

    Returns:
        Its id; None where it is none of them.
    """
    if name in known:
        return known.index(name)
    number = as_integer(name)
    if number is not None:
        return number if 0 <= number < len(known) and not _numbers(known) else None
    alike = [i for i, other in enumerate(known) if other.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def _numbers(names: Iterable[str]) -> bool:
    return all(as_integer(name) is not None for name in names)


def _distinct(labels: Tensor) -> list[Any]:
    """Give the distinct values of a column of labels, (N,) or (N, 1), else its rows."""
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    return flat.unique().tolist() if flat.ndim == 1 else list(flat)


LABEL_COLUMNS = {
    "token-classification": ("labels", "ner_tags", "tags", "label"),
    "multi-label": ("labels", "label"),
    "regression": ("label", "labels", "score"),
}


def label_column(rows: Rows, columns: Columns, objective: str) -> str:
    """Find the column of the labels."""
    defaults = LABEL_COLUMNS.get(objective, ("label", "labels"))
    return find_column(rows, columns.label, defaults, "label")


def find_column(rows: Rows, given: str | None, defaults: Sequence[str], role: str) -> str:
    """Find the column with a role.

    Args:
        rows: The data.
        given: The name the user gave.
        defaults: The usual names, the likeliest first.
        role: Of the option ``--ROLE-column``.

    Returns:
        A name in `rows.columns`.

    Raises:
        InputError: There is none such.
    """
    for name in [given] if given is not None else defaults:
        if name in rows.columns:
            return name
    option = f"--{role.replace('_', '-')}-column"
    wanted = repr(given) if given is not None else " or ".join(map(repr, defaults))
    raise InputError(
        f"{rows.name} has no column {wanted}; it has {', '.join(map(repr, rows.columns))}. "
        f"Name the right one with {option}"
    )


class Labels:
    """The labels of one column as class numbers."""

    def __init__(self, rows: Rows, column: str, model: Model, count: int | None) -> None:
        """Prepare to read.

        Args:
            rows: The data.
            column: Of the labels.
            model: Whose label names count.
            count: The number of classes, None where it is not known.
        """
        self._rows = rows
        self._column = column
        self._count = count
        self._names = model.labels
        self._by_name = {name: i for i, name in enumerate(model.labels or [])}
        self.note: str | None = None
        stated = rows.label_names(column)
        self._from_data: dict[int, int] = {}  # the data's class numbers -> the model's
        self._all_named = False  # the model's labels are numbers, and numbers are their names
        if stated is not None and self._by_name:
            folded = self._folded()
            ids = [self._by_name.get(name, folded.get(name.casefold(), -1)) for name in stated]
            if any(i >= 0 for i in ids):
                self._from_data = dict(enumerate(ids))
            else:
                self.note = (
                    f"{rows.name} and the checkpoint name their classes differently "
                    f"({stated[0]}, {next(iter(self._by_name))}, …): numbers are taken as they are"
                )
        elif self._by_name and _numbers(self._by_name):
            self._from_data = {int(name): i for name, i in self._by_name.items()}
            self._all_named = True
        elif stated is not None and len(stated) == count:
            # Classes in the data's order, as every loader of image folders numbers them.
            self._by_name = {name: i for i, name in enumerate(stated)}
            self.note = (
                "the checkpoint's labels have no names; the data's classes are taken in their "
                f"order: {', '.join(stated)}"
            )

    def index(self, value: Any, i: int, *, ignorable: bool = False) -> int:
        """Return the class number of a value in row `i`.

        Args:
            value: A number or a name.
            i: The row, for the message.
            ignorable: −100 is allowed.

        Raises:
            InputError: No such label.
        """
        if isinstance(value, str) and value in self._by_name:
            return self._by_name[value]
        number = as_integer(value)
        if number is not None:
            if ignorable and number == -100:
                return number
            number = self._from_data.get(number, -1 if self._all_named else number)
            if number < 0 or (self._count is not None and number >= self._count):
                self._refuse(value, i)
            return number
        if isinstance(value, str) and value.casefold() in self._folded():
            return self._folded()[value.casefold()]
        self._refuse(value, i)
        raise AssertionError  # not reached

    def vector(self, value: Any, i: int) -> list[float]:
        """Return the yes-or-no labels of row `i`, K of them.

        Args:
            value: A list of K zeros and ones, or else a list of the numbers or names that apply.
            i: The row, for the message.

        Raises:
            InputError: No such label.
        """
        assert self._count is not None
        values = as_list(value, self._rows.where(i, self._column))
        numbers = [as_integer(one) for one in values]
        named = any(isinstance(one, str) and one in self._by_name for one in values)
        if len(values) == self._count and not named and all(n in (0, 1) for n in numbers):
            return [float(n) for n in numbers if n is not None]
        vector = [0.0] * self._count
        for one in values:
            vector[self.index(one, i)] = 1.0
        return vector

    def _folded(self) -> dict[str, int]:
        """Names in lower case, where that keeps them apart."""
        folded: dict[str, int] = {}
        for name, i in self._by_name.items():
            folded[name.casefold()] = -1 if name.casefold() in folded else i
        return {name: i for name, i in folded.items() if i >= 0}

    def _refuse(self, value: Any, i: int) -> None:
        where = self._rows.where(i, self._column)
        if value is None or value == "":
            raise InputError(f"{where}: there is no label")
        if self._by_name:
            names = list(self._by_name)
            known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
            numbers = "" if self._all_named else f" (or their numbers, 0 to {len(names) - 1})"
            raise InputError(
                f"{where}: {value!r} is none of the model's {len(names)} labels, which are {known}"
                f"{numbers}"
            )
        upto = f"numbers from 0 to {self._count - 1}" if self._count else "numbers from 0"
        hint = "" if as_integer(value) is not None else "; names need id2label in config.json"
        raise InputError(f"{where}: {value!r} is no label of the model, which has {upto}{hint}")


def as_integer(value: Any) -> int | None:
    """Return the integer that a value is or spells, None if it is none."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, str):
        try:
            return int(value.strip())
        except ValueError:
            return None
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None


def as_list(value: Any, where: str) -> list[Any]:
    """Return the list that a value is or spells: JSON, or a text with commas.

    Raises:
        InputError: Neither.
    """
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                return list(json.loads(value))
            except ValueError:
                raise InputError(f"{where}: {value!r} is not a list in JSON") from None
        return [part.strip() for part in value.split(",") if part.strip()]
    raise InputError(f"{where}: expected a list, found {describe(value)}")


def as_numbers(value: Any, where: str) -> list[float]:
    """Return the finite numbers that a value is, holds or spells.

    Raises:
        InputError: There is none, or one is not finite.
    """
    values = [value] if isinstance(value, bool | int | float) else as_list(value, where)
    try:
        numbers = [float(one) for one in values]
    except (TypeError, ValueError):
        raise InputError(f"{where}: expected numbers, found {value!r}") from None
    if not numbers:
        raise InputError(f"{where}: expected a number, found nothing")
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{where}: {value!r} is not finite")
    return numbers


def as_targets(rows: Rows, column: str, model: Model) -> Tensor:
    """Return the numbers that a regression predicts, (N,) or (N, D) float32.

    Raises:
        InputError: A row has none, or another count than the others or than the model's outputs.
    """
    targets: list[list[float]] = []
    count = model.outputs
    for i in range(len(rows)):
        where = rows.where(i, column)
        numbers = as_numbers(rows[i].get(column), where)
        count = len(numbers) if count is None else count
        if len(numbers) != count:
            raise InputError(f"{where}: expected {count} numbers, found {len(numbers)}")
        targets.append(numbers)
    tensor = torch.tensor(targets, dtype=torch.float32)
    return tensor[:, 0] if tensor.shape[1] == 1 else tensor


def describe(value: Any) -> str:
    """Say in a word or two what a value is."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
