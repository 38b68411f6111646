"""The interface of every kind of task data: rows by number, columns by name, places as text."""

import bisect
import hashlib
import itertools
import json
import operator
import os
import stat
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from formats.errors import InputError
from formats.wording import few


def stamp(file: Path | int) -> tuple[int, int]:
    """Return size and time of change of a file, by its path or its descriptor."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: Path, before: Sequence[int], now: Sequence[int]) -> None:
    """Refuse a file that was changed, or replaced by another, since it was opened."""
    if now != before:
        raise InputError(f"{path} was changed while it was being read; start again")


class Rows(Sequence[dict[str, Any]]):
    """The rows of one dataset, read on access.

    A row is a dict with an entry for every name in `columns`. No file stays open between two
    reads, so rows may be read from several threads and after a fork. `name` is that of the file or
    folder, or the Hub id, and `path` the file's path; `tensors` has whole columns, (N, …), for
    tensor files only, so that a batch is one indexing operation.
    """

    name: str
    path: Path
    columns: list[str]
    tensors: Mapping[str, Tensor] | None = None
    fills_in = False  # whether objects have nulls for keys that only other rows have

    @abstractmethod
    def read_row(self, i: int) -> dict[str, Any]:
        """Return row `i`, 0 <= i < len(self)."""

    def digest(self) -> str:
        """Return the SHA-256 of the content in hexadecimal; for a file, that of its bytes."""
        return file_digest(self.path)

    def beside_digest(self) -> dict[str, Any]:
        """Describe what rows mean and their digest does not cover."""
        return {}

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """Return row `i`, or the list of rows a slice names."""
        if isinstance(i, slice):
            return [self.read_row(j) for j in range(*i.indices(len(self)))]
        index = operator.index(i)
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows; there is no row {i}")
        return self.read_row(index)

    def where(self, i: int, column: str | None = None) -> str:
        """Return the place of row `i` as text: "a.npz, row 17, column 'x'", counted from 1."""
        return self._place(i) if column is None else f"{self._place(i)}, column {column!r}"

    def _place(self, i: int) -> str:
        return f"{self.name}, row {i + 1}"

    def values(self, column: str) -> Iterator[Any]:
        """Yield one column, None where a row lacks it; other columns are not decoded."""
        return (self.read_row(i).get(column) for i in range(len(self)))

    def label_names(self, column: str) -> list[str] | None:
        """Return the class names of `column` in the order of their ids, if the data have them."""
        return None


class JoinedRows(Rows):
    """The rows of several files with the same columns, one after the other."""

    def __init__(self, folder: Path, parts: Sequence[Rows]) -> None:
        first = parts[0]
        for part in parts[1:]:
            if set(part.columns) != set(first.columns):
                raise InputError(
                    f"{folder}: expected the same columns in all files, found "
                    f"{', '.join(first.columns)} in {first.name} and {', '.join(part.columns)} in "
                    f"{part.name}; name one file instead of the folder, or give the files the same "
                    "columns"
                )
        self.name = folder.name
        self.columns = list(first.columns)
        self.fills_in = first.fills_in
        self._parts = list(parts)
        self._starts = list(itertools.accumulate(map(len, parts), initial=0))
        if all(part.tensors is not None for part in parts):
            self.tensors = JoinedColumns(folder, parts)

    def __len__(self) -> int:
        return self._starts[-1]

    def _part(self, i: int) -> tuple[Rows, int]:
        part = bisect.bisect_right(self._starts, i) - 1
        return self._parts[part], i - self._starts[part]

    def read_row(self, i: int) -> dict[str, Any]:
        """Return row `i` of all the files together."""
        part, j = self._part(i)
        return part.read_row(j)

    def where(self, i: int, column: str | None = None) -> str:
        """Return the file and the row within that file."""
        part, j = self._part(i)
        return f"{self.name}/{part.where(j, column)}"

    def values(self, column: str) -> Iterator[Any]:
        """Yield one column, part after part."""
        return itertools.chain.from_iterable(part.values(column) for part in self._parts)

    def label_names(self, column: str) -> list[str] | None:
        """Return the class names, in which all files must agree."""
        names = [part.label_names(column) for part in self._parts]
        for part, other in zip(self._parts, names, strict=True):
            if other != names[0]:
                first, second = (few(one or ["no names"], 10) for one in (names[0], other))
                raise InputError(
                    f"{self.name}, column {column!r}: expected the same classes in all files, "
                    f"found {first} in {self._parts[0].name} and {second} in {part.name}: save the "
                    "files with one list of classes"
                )
        return names[0]

    def digest(self) -> str:
        """Return the SHA-256 over JSON lines [file name, digest of the file], in order of name."""
        return listing_digest((part.name, part.digest()) for part in self._parts)


class JoinedColumns(Mapping[str, Tensor]):
    """Whole columns of several tensor files, joined on first access."""

    def __init__(self, folder: Path, parts: Sequence[Rows]) -> None:
        self._folder = folder
        self._parts = parts
        self._joined: dict[str, Tensor] = {}

    def __getitem__(self, column: str) -> Tensor:
        if column not in self._joined:
            pieces = [part.tensors[column] for part in self._parts if part.tensors is not None]
            for part, piece in zip(self._parts, pieces, strict=True):
                if (piece.dtype, piece.shape[1:]) != (pieces[0].dtype, pieces[0].shape[1:]):
                    raise InputError(
                        f"{self._folder}, column {column!r}: expected rows of "
                        f"{_described(pieces[0])} as in {self._parts[0].name}, found rows of "
                        f"{_described(piece)} in {part.name}; give the files the same dtype and "
                        "shape"
                    )
            self._joined[column] = torch.cat(pieces)
        return self._joined[column]

    def __iter__(self) -> Any:
        return iter(self._parts[0].columns)

    def __len__(self) -> int:
        return len(self._parts[0].columns)


def _described(column: Tensor) -> str:
    return f"{str(column.dtype).removeprefix('torch.')} of shape {tuple(column.shape[1:])}"


def check_regular(path: Path) -> Path:
    """Return the path, and refuse a pipe or a device, on which reading could wait without end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = ("pipe", stat.S_ISFIFO), ("device", stat.S_ISCHR), ("folder", stat.S_ISDIR)
        kind = next((name for name, is_kind in kinds if is_kind(mode)), "special file")
        raise InputError(
            f"{path}: expected a regular file, found a {kind}; save the content in a file first"
        )
    return path


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read in pieces."""
    with check_regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing_digest(entries: Any) -> str:
    """Return the SHA-256 over JSON lines [name, digest in hexadecimal], in the order given."""
    total = hashlib.sha256()
    for name, digest in entries:
        total.update(json.dumps([name, digest], ensure_ascii=False).encode() + b"\n")
    return total.hexdigest()
