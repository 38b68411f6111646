"""Examples of tensors, for a user's own modules."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consolidate.data.columns import INPUT_COLUMNS, find_column, label_column, lacks_labels
from consolidate.data.examples import Examples
from consolidate.data.labels import Labels, as_list, no_class, read_labels, within_int64
from consolidate.models.model import Model, module_dtype, outputs_of_first
from consolidate.options import Columns
from formats.errors import InputError
from formats.rows import Rows


@dataclass(eq=False)
class TensorExamples(Examples):
    """Rows of two tensors; inputs may be memory-mapped and are cast batch by batch."""

    inputs: Tensor
    labels: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.labels)

    def collate(self, indices: Sequence[int], epoch: int = 0) -> tuple[Any, Tensor]:
        """Return those rows of both tensors."""
        chosen = list(indices)
        return _cast(self.inputs[chosen], self.dtype), self.labels[chosen]


def encode_tensors(rows: Rows, model: Model, columns: Columns, *, labels_needed: bool) -> Examples:
    """Encode rows of tensors, or of lists of numbers; the first row shows the model's outputs."""
    name = find_column(rows, columns, "inputs", *INPUT_COLUMNS)
    inputs = _stacked(rows, name) if rows.tensors is None else within_int64(rows, name)
    dtype = module_dtype(model)
    outputs = outputs_of_first(model, _cast(inputs[:1], dtype), rows.where(0, name))
    without = not labels_needed and lacks_labels(rows, columns, model.objective.name)
    if without or rows.tensors is None or model.objective.name == "multi-label":
        count = outputs.shape[-1]
        encoded, notes = read_labels(rows, columns, model, count, needed=labels_needed)
        return TensorExamples(inputs, encoded, dtype, notes=notes)
    column = label_column(rows, columns, model.objective.name)
    labels = _signed(within_int64(rows, column))
    if model.objective.name == "regression":
        return TensorExamples(inputs, _finite(rows, column, labels), dtype)
    reader = Labels(rows, column, model, outputs.shape[-1])
    encoded = _class_numbers(rows, column, labels, reader)
    return TensorExamples(inputs, encoded, dtype, notes=reader.notes)


def _class_numbers(rows: Rows, column: str, labels: Tensor, reader: Labels) -> Tensor:
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.ndim != 1 or flat.is_complex():
        raise no_class(rows.where(0, column), labels[0])
    numbers = flat.long()
    for i in (numbers != flat).nonzero()[:1].flatten().tolist():
        reader.index(flat[i].item(), i)  # raises the error for it
    encoded = torch.empty_like(numbers)
    for number in numbers.unique().tolist():
        rows_of_it = numbers == number
        encoded[rows_of_it] = reader.index(number, int(rows_of_it.nonzero()[0]))
    return encoded


def _signed(values: Tensor) -> Tensor:
    """Convert unsigned numbers to int64: few operations support uint16, uint32 and uint64."""
    wide = values.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return values.long() if wide else values


def _finite(rows: Rows, column: str, labels: Tensor) -> Tensor:
    wrong = ~labels.float().isfinite().flatten(1).all(1) if labels.ndim > 1 else ~labels.isfinite()
    for i in wrong.nonzero()[:1].flatten().tolist():
        raise InputError(
            f"{rows.where(i, column)}: expected finite numbers, found {labels[i].tolist()}"
        )
    return labels.float()


def _stacked(rows: Rows, name: str) -> Tensor:
    values = []
    for i in range(len(rows)):
        where = rows.where(i, name)
        value = rows[i].get(name)
        if hasattr(value, "convert"):
            raise InputError(
                f"{where}: expected numbers, found an image; name the column of images with "
                "--image-column"
            )
        try:
            if isinstance(value, str):
                value = [float(one) for one in as_list(value, where)]
            tensor = torch.tensor(as_list(value, where))
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for None
            raise InputError(f"{where}: expected numbers, found {value!r:.60}") from None
        values.append(tensor)
        if tensor.shape != values[0].shape:
            raise InputError(
                f"{where}: expected the shape {list(values[0].shape)} of the first row, found "
                f"{list(tensor.shape)}"
            )
    return torch.stack(values)


def _cast(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    return inputs.to(dtype) if inputs.is_floating_point() else _signed(inputs)
