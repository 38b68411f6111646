"""Rows of tensor files, `.safetensors` and `.npz`: one tensor per column, one entry per row."""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats.errors import InputError
from formats.rows import Rows, check_unchanged, stamp
from formats.tensors import LazyTensors, open_tensors

_PLAUSIBLE_BYTES = 2**29
_PLAUSIBLE_RATIO = 100


class NpzColumns(LazyTensors):
    """The arrays of an `.npz` file as tensors, read on first access; none is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path, self._stamp = path, stamp(path)
        self._loaded: dict[str, Tensor] = {}
        self.headers = {}
        try:
            with zipfile.ZipFile(path) as archive:
                _refuse_bomb(path, archive)
                for member in archive.namelist():
                    with archive.open(member) as file:
                        shape, dtype = _npy_header(file)
                        start = file.tell()
                    name = member.removesuffix(".npy")
                    if name in self.headers:
                        raise InputError(
                            f"{path}: array {name!r}: expected it once, found it twice; save the "
                            "file again"
                        )
                    if dtype.hasobject or dtype.kind not in "biufc":
                        raise InputError(
                            f"{path}: array {name!r}: expected numbers, found {_kind(dtype)} "
                            f"({dtype}); save labels as integers, or the data as .jsonl or .csv"
                        )
                    # The shape is untrusted: it is checked against the bytes before allocation.
                    size = archive.getinfo(member).file_size - start
                    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
                        raise ValueError(f"array {name!r} of shape {shape} has {size} bytes")
                    empty = torch.from_numpy(np.empty(0, dtype.newbyteorder("=")))
                    self.headers[name] = empty.dtype, shape
        except (InputError, MemoryError):
            raise
        except Exception as error:  # damaged bytes can raise anything
            raise InputError(
                f"{path} is not a valid .npz file ({error}); check that numpy.savez wrote it and "
                "that it was copied in full"
            ) from None

    def __getitem__(self, column: str) -> Tensor:
        if column not in self.headers:
            raise KeyError(column)
        if column not in self._loaded:
            try:
                check_unchanged(self.path, self._stamp, stamp(self.path))
                with np.load(self.path, allow_pickle=False) as archive:
                    values = archive[column]
                # torch only supports the machine's byte order
                values = values.astype(values.dtype.newbyteorder("="), copy=False)
                self._loaded[column] = torch.from_numpy(values)
            except (InputError, MemoryError):
                raise
            except Exception as error:
                raise InputError(
                    f"{self.path}: array {column!r} is damaged ({error}); check that the file was "
                    "copied in full"
                ) from None
        return self._loaded[column]


def _refuse_bomb(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse a small file that would take much memory: deflated zeros shrink a thousandfold."""
    members = archive.infolist()
    stored, held = (sum(getattr(m, of) for m in members) for of in ("compress_size", "file_size"))
    if held > _PLAUSIBLE_BYTES and held > _PLAUSIBLE_RATIO * stored:
        raise InputError(
            f"{path}: expected arrays of at most {_PLAUSIBLE_RATIO} times their compressed size, "
            f"found {held:,} bytes in {stored:,}; if you trust the file, save it by numpy.savez, "
            "which does not compress"
        )


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    major, minor = np.lib.format.read_magic(file)
    read = getattr(np.lib.format, f"read_array_header_{major}_{minor}", None)
    if read is None:
        raise ValueError(f"unknown array format {major}.{minor}")
    shape, _, dtype = read(file)
    return shape, dtype


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.hasobject:
        return "Python objects"
    return "text" if dtype.kind in "SU" else "another type"


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
                f"{path} is empty: expected one tensor per column, such as inputs and labels"
            )
        for name, shape in shapes.items():
            if not shape:
                raise InputError(
                    f"{path}: tensor {name!r}: expected one entry per row in its first dimension, "
                    "found a single number"
                )
        first = self.columns[0]
        self._length = shapes[first][0]
        for name, shape in shapes.items():
            if shape[0] != self._length:
                raise InputError(
                    f"{path}: expected the same first dimension in all tensors, found "
                    f"{self._length} in {first!r} and {shape[0]} in {name!r}"
                )
        if self._length == 0:
            raise InputError(f"{path} is empty: its tensors have 0 rows")

    def __len__(self) -> int:
        return self._length

    def read_row(self, i: int) -> dict[str, Any]:
        """Return entry `i` of every tensor as views, to copy before writing to them."""
        return {name: column[i] for name, column in self.tensors.items()}
