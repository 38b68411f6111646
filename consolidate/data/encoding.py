"""Encoding of rows of any kind as examples for a model."""

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from typing import Any

from consolidate.data.examples import Examples
from consolidate.data.images import encode_images, encode_own_images, holds_images
from consolidate.data.tensors import encode_tensors
from consolidate.data.text_encoding import encode_texts
from consolidate.models.model import Model
from consolidate.models.objectives import Objective
from consolidate.options import Columns, Encoding, Images
from consolidate.runtime.progress import progress
from formats.errors import UsageError
from formats.rows import Rows

LOG = logging.getLogger("consolidate")

_BY_DEFAULT = Encoding()


def encode(
    rows: Rows,
    model: Model,
    encoding: Encoding = _BY_DEFAULT,
    *,
    seed: int = 0,
    labels_needed: bool = True,
) -> Examples:
    """Encode the rows of a task for a model and its objective, checking every label.

    Rows without a column of labels are accepted where labels are not needed; token classification
    needs them to know which tokens count.
    """
    columns, objective = encoding.columns, model.objective
    own_images = objective.modality == "tensor" and holds_images(rows, columns)
    _check_images(encoding.images, objective, own_images)
    for option, given, fits, meant in (
        ("pack", encoding.pack, objective.name in ("causal-lm", "masked-lm"), "language models"),
        ("loss-on", encoding.loss_on, objective.name == "causal-lm", "causal language models"),
        ("max-length", encoding.max_length, objective.modality == "text", "texts"),
    ):
        if given and not fits:
            raise UsageError(f"--{option} is for {meant}, not for {objective.name}; leave it out")
    examples: Examples
    if own_images:
        objective = replace(objective, modality="image")
        examples = encode_own_images(
            rows, model, columns, encoding.images, labels_needed=labels_needed
        )
    elif objective.modality == "tensor":
        examples = encode_tensors(rows, model, columns, labels_needed=labels_needed)
    elif objective.modality == "image":
        examples = encode_images(rows, model, columns, labels_needed=labels_needed)
    else:
        with progress(f"reading {rows.name}", len(rows), "rows") as advance:
            # Labels are a column too, read before the texts.
            counted = _Counted(rows, advance, by_column=objective.language)
            examples = encode_texts(
                counted, model, encoding, seed=seed, labels_needed=labels_needed
            )
    examples.notes += unread_columns(columns, objective)
    return examples


def _check_images(images: Images, objective: Objective, own_images: bool) -> None:
    """Refuse options on images where there are none, or where a processor's file decides."""
    given = [name for name, value in asdict(images).items() if value is not None]
    if own_images or not given:
        return
    flag = f"--{given[0].replace('_', '-')}"
    if objective.modality == "image":
        raise UsageError(
            f"{flag} is for models named by --model; for a model of transformers change its "
            "preprocessor_config.json"
        )
    raise UsageError(f"{flag} is for images, found data without an image column; leave it out")


def log_images(*encoded: Examples) -> None:
    """Log how images become inputs of a user's own module, once."""
    for how in dict.fromkeys(str(one.preprocessing) for one in encoded if one.preprocessing):
        LOG.info("images: %s", how)


class _Counted(Rows):
    """Rows that count how many have been read, whole or by a column."""

    def __init__(self, rows: Rows, advance: Callable[[int], None], *, by_column: bool) -> None:
        self._rows, self._advance, self._read = rows, advance, 0
        self._by_column = by_column
        self.name, self.columns, self.tensors = rows.name, rows.columns, rows.tensors
        self.fills_in = rows.fills_in

    def __len__(self) -> int:
        return len(self._rows)

    def read_row(self, i: int) -> dict[str, Any]:
        self._count(i)
        return self._rows.read_row(i)

    def values(self, column: str) -> Iterator[Any]:
        for i, value in enumerate(self._rows.values(column)):
            if self._by_column:
                self._count(i)
            yield value

    def where(self, i: int, column: str | None = None) -> str:
        return self._rows.where(i, column)

    def beside_digest(self) -> dict[str, Any]:
        return self._rows.beside_digest()

    def label_names(self, column: str) -> list[str] | None:
        return self._rows.label_names(column)

    def _count(self, i: int) -> None:
        if i >= self._read:
            self._advance(i + 1 - self._read)
            self._read = i + 1


def unread_columns(columns: Columns, objective: Objective) -> list[str]:
    """Return a note for each named column that the objective does not use."""
    given = {role: name for role, name in asdict(columns).items() if name is not None}
    return [
        f"the {role.replace('_', ' ')} column {given[role]!r} is not used for {objective.name}"
        for role in sorted(given.keys() - _read(objective, given))
    ]


def _read(objective: Objective, given: Collection[str]) -> set[str]:
    """Return the roles of the columns that the objective uses, if these are given."""
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
