"""Named tensors in safetensors files: one file, or shards with an index.

Files are memory-mapped, and only their headers are read until a tensor is accessed.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from formats.checkpoint_files import broken, check_index, check_link, inside, read_index
from formats.digest import DTYPES, dtype_name, little_endian_chunks
from formats.disk_errors import explain_full_disk, final_path
from formats.errors import InputError

Header = tuple[torch.dtype, tuple[int, ...]]

MAX_SHARD_SIZE = 5 * 10**9
MAX_HEADER_BYTES = 25 * 10**6
"""The limit for all files of a set together, twice what models of 70,000 tensors need: each
tensor of a header takes time even if it is empty, and the Hub has the same limit for a file."""

MAX_TENSORS = 100_000
"""Each takes a tenth of a millisecond, and the largest models have 70,000."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are read or computed on access; `headers` has their dtypes and shapes."""

    headers: dict[str, Header]

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self.headers[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.headers[name][1]


class Overlaid(LazyTensors):
    """Tensors of which some are `replaced` or left out, in the original order."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        replaced: Mapping[str, Tensor] | None = None,
        without: Collection[str] = (),
    ) -> None:
        self._tensors = tensors
        self._replaced = replaced or {}
        self.headers = {
            name: header_of(self._replaced if name in self._replaced else tensors, name)
            for name in tensors
            if name not in without
        }

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.headers:
            raise KeyError(name)
        return (self._replaced if name in self._replaced else self._tensors)[name]

    def apart(self) -> "Overlaid":
        """Return the same values in separate memory, as `apart` does."""
        left_out = self._tensors.keys() - self.headers.keys()
        return Overlaid(apart(self._tensors), replaced=apart(self._replaced), without=left_out)


class Renamed(LazyTensors):
    """Some of the tensors of a mapping; `names` maps new names to those of the mapping."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._names = names
        self.headers = {name: header_of(tensors, there) for name, there in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def apart(self) -> "Renamed":
        """Return the same values in separate memory, as `apart` does."""
        return Renamed(apart(self._tensors), self._names)


class TensorFiles(LazyTensors):
    """The tensors of one or several safetensors files, each read on access.

    A tensor is a private view of the mapped file: writing to it does not change the file. The
    order is that of the files and, within a file, of the bytes; all headers are checked on opening.
    """

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.files = files
        self.metadata: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        self.headers = {}
        self._handles: dict[Path, Any] = {}
        room = MAX_HEADER_BYTES
        for file in reversed(files):
            self._handles[file], size = _open(file, room)
            room -= size
            self.metadata = dict(self._handles[file].metadata() or {})
        count = sum(len(handle.keys()) for handle in self._handles.values())
        if count > MAX_TENSORS:
            raise InputError(
                f"{path}: expected at most {MAX_TENSORS:,} tensors, found {count:,}; join "
                "small ones"
            )
        for file in files:
            handle = self._handles[file]
            for name in handle.offset_keys():
                header = handle.get_slice(name)
                dtype = header.get_dtype()
                if dtype not in DTYPES:
                    raise InputError(
                        f"{file}: tensor {name!r} has an unsupported dtype: expected one of "
                        f"{', '.join(DTYPES)}, found {dtype}"
                    )
                if name in self._file_of:
                    raise InputError(
                        f"{file}: tensor {name!r} is also in {self._file_of[name].name}; "
                        "remove the file that does not belong to the checkpoint"
                    )
                self._file_of[name] = file
                self.headers[name] = DTYPES[dtype], tuple(header.get_shape())

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        try:
            return self._handles[file].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise InputError(
                f"{file}: tensor {name!r} cannot be read ({error}); fetch or save the file again"
            ) from error

    def file_of(self, name: str) -> Path:
        """Return the file that contains a tensor."""
        return self._file_of[name]


class _Copies(LazyTensors):
    """Copies of tensors, a new one on each access."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.headers = {name: header_of(tensors, name) for name in tensors}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].clone()


def apart(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the same values in separate memory, in which a model can be trained.

    Files are memory-mapped again: a page takes memory only once it is written to.
    """
    if isinstance(tensors, TensorFiles):
        return TensorFiles(tensors.path, tensors.files)
    return tensors.apart() if isinstance(tensors, Overlaid | Renamed) else _Copies(tensors)


def open_tensors(path: Path, stem: str = "model") -> TensorFiles:
    """Open a safetensors file, or a folder's file or shards named STEM."""
    if not path.is_dir():
        return TensorFiles(path, [path])
    single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    if not index.exists():
        if not single.exists():
            raise InputError(
                f"{path}: expected {single.name} or {index.name}, found neither; fetch or save "
                "the folder again"
            )
        return TensorFiles(path, [inside(path, single.name)])
    weight_map = read_index(check_link(path, index))
    tensors = TensorFiles(path, [inside(path, name) for name in sorted(set(weight_map.values()))])
    check_index(index, weight_map, {name: tensors.file_of(name).name for name in tensors})
    return tensors


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    stem: str = "model",
    metadata: Mapping[str, str],
    max_shard_size: int = MAX_SHARD_SIZE,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write tensors as ``STEM.safetensors``, or as shards with an index, named as on the Hub.

    One tensor is in memory at a time. Within a file wider dtypes come first, so that every tensor
    is aligned, and otherwise the order is that of `tensors`; the bytes depend on nothing else.
    Floating-point tensors are cast to `dtype`, if given.
    """
    headers = {name: _header(tensors, name, dtype) for name in tensors}
    sizes = {name: _size(header) for name, header in headers.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    shards = split.filename_to_tensors or {f"{stem}.safetensors": []}
    written = []
    with explain_full_disk(folder, sum(sizes.values())):
        for file_name, names in shards.items():
            written.append(folder / file_name)
            _write_file(written[-1], {name: headers[name] for name in names}, tensors, metadata)
        if split.is_sharded:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": dict(sorted(split.tensor_to_filename.items())),
            }
            written.append(folder / f"{stem}.safetensors.index.json")
            with open(written[-1], "x", encoding="utf-8") as file:
                file.write(json.dumps(index, indent=2, ensure_ascii=False) + "\n")
    return written


def write_tensor_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors as one safetensors file of any name."""
    headers = {name: _header(tensors, name, None) for name in tensors}
    with explain_full_disk(path, sum(map(_size, headers.values()))):
        _write_file(path, headers, tensors, metadata)


def header_of(tensors: Mapping[str, Tensor], name: str) -> Header:
    """Return dtype and shape of a tensor, without reading its values where the mapping is lazy."""
    if isinstance(tensors, LazyTensors):
        return tensors.headers[name]
    return tensors[name].dtype, tuple(tensors[name].shape)


def dtype_of(tensors: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Return the dtype of a tensor, as `header_of`."""
    return header_of(tensors, name)[0]


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of a tensor, as `header_of`."""
    return header_of(tensors, name)[1]


def extremes(tensor: Tensor) -> tuple[float, float]:
    """Return the least and the largest number in a tensor of floats, both NaN if one is.

    All are finite if these two are, which takes a tenth of the time of `isfinite`.
    """
    if not tensor.numel():
        return 0.0, 0.0
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    elif tensor.element_size() == 1:
        tensor = tensor.float()  # aminmax does not support float8
    least, largest = torch.aminmax(tensor)
    return least.item(), largest.item()


def _open(file: Path, room: int) -> tuple[Any, int]:
    """Open a file whose header has at most `room` bytes; return it and the header's size."""
    if not file.is_file():
        what = "is not a file" if file.exists() else "does not exist"
        raise InputError(f"{file} {what}")
    try:
        with open(file, "rb") as content:
            size = int.from_bytes(content.read(8), "little")
        if size > room:
            reason = f"header too large: expected at most {room:,} of {MAX_HEADER_BYTES:,} bytes "
            reason += f"for the headers of all shards, found {size:,}"
            raise broken(file, "a safetensors file", reason)
        return safe_open(file, framework="pt"), size
    except PermissionError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise broken(file, "a safetensors file", str(error)) from error


def _header(tensors: Mapping[str, Tensor], name: str, cast: torch.dtype | None) -> Header:
    dtype, shape = header_of(tensors, name)
    if cast is not None and dtype.is_floating_point:
        dtype = cast
    dtype_name(dtype)
    return dtype, shape


def _size(header: Header) -> int:
    return header[0].itemsize * math.prod(header[1])


def _write_file(
    path: Path,
    headers: Mapping[str, Header],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    order = sorted(headers, key=lambda name: -headers[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = headers[name]
        start, end = end, end + _size(headers[name])
        header[name] = {
            "dtype": dtype_name(dtype),
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _naming(path), open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            dtype, shape = headers[name]
            tensor = tensors[name].to(dtype)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{final_path(path)}: {name!r} changed while being written")
            for chunk in little_endian_chunks(tensor):
                file.write(chunk)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in a system error of writing to it, which has no name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
