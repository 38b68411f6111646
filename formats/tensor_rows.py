"""Rows of tensor files, `.safetensors` and `.npz`: one tensor a column, one entry a row."""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats.errors import InputError
from formats.rows import Rows
from formats.tensors import LazyTensors, open_tensors


class NpzColumns(LazyTensors):
    """The arrays of an `.npz` file as tensors, read when first asked for; none is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._loaded: dict[str, Tensor] = {}
        self.headers = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    with archive.open(member) as file:
                        shape, dtype = _npy_header(file)
                        start = file.tell()
                    name = member.removesuffix(".npy")
                    if dtype.hasobject or dtype.kind not in "biufc":
                        raise InputError(
                            f"{path}: array {name!r} holds {_kind(dtype)} ({dtype}), expected "
                            "numbers. Save labels as integers, or the data as .jsonl or .csv."
                        )
                    # A shape is a claim: it is held against the bytes before room is made for it.
                    held = archive.getinfo(member).file_size - start
                    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
                        raise ValueError(f"array {name!r} of shape {shape} has {held} bytes")
                    empty = torch.from_numpy(np.empty(0, dtype.newbyteorder("=")))
                    self.headers[name] = empty.dtype, shape
        except (InputError, MemoryError):
            raise
        except Exception as error:  # damaged bytes fail in whatever way they happen to ask for
            raise InputError(
                f"{path} cannot be read as .npz ({error}). Was it copied in full, and written by "
                "numpy.savez?"
            ) from None

    def __getitem__(self, column: str) -> Tensor:
        if column not in self.headers:
            raise KeyError(column)
        if column not in self._loaded:
            try:
                with np.load(self.path, allow_pickle=False) as archive:
                    values = archive[column]
                # torch knows the machine's own byte order only
                values = values.astype(values.dtype.newbyteorder("="), copy=False)
                self._loaded[column] = torch.from_numpy(values)
            except MemoryError:
                raise
            except Exception as error:
                raise InputError(
                    f"{self.path}: array {column!r} cannot be read ({error})."
                ) from None
        return self._loaded[column]


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    major, minor = np.lib.format.read_magic(file)
    read = getattr(np.lib.format, f"read_array_header_{major}_{minor}", None)
    if read is None:
        raise ValueError(f"array format {major}.{minor} is not known")
    shape, _, dtype = read(file)
    return shape, dtype


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.hasobject:
        return "Python objects"
    return "text" if dtype.kind in "SU" else "no numbers"


class TensorRows(Rows):
    """Row `i` is entry `i` along the first dimension of every tensor; a label is a 0-dim tensor."""

    tensors: LazyTensors

    def __init__(self, path: Path) -> None:
        self.name, self.path = path.name, path
        is_npz = path.suffix.lower() == ".npz"
        self.tensors = NpzColumns(path) if is_npz else open_tensors(path)
        self.columns = list(self.tensors)
        shapes = {name: self.tensors.shape(name) for name in self.columns}
        if not shapes:
            raise InputError(
                f"{path} is empty: expected tensors, one a column, such as inputs and labels."
            )
        for name, shape in shapes.items():
            if not shape:
                raise InputError(
                    f"{path}: tensor {name!r} is a single number; expected one entry a row in its "
                    "first dimension."
                )
        first = self.columns[0]
        self._length = shapes[first][0]
        for name, shape in shapes.items():
            if shape[0] != self._length:
                raise InputError(
                    f"{path}: tensor {first!r} has {self._length} rows and {name!r} has "
                    f"{shape[0]}; the first dimension of all must be the same."
                )
        if self._length == 0:
            raise InputError(f"{path} is empty: its tensors have 0 rows.")

    def __len__(self) -> int:
        return self._length

    def read_row(self, i: int) -> dict[str, Any]:
        """Return entry `i` of every tensor; views, to be copied before they are changed."""
        return {name: column[i] for name, column in self.tensors.items()}
