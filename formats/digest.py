"""SHA-256 digests of tensors and of sets of tensors, and the differences of two sets."""

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from msgspec import Struct
from torch import Tensor

from formats.errors import InputError
from formats.fields import Hex, Natural, whole

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The safetensors names of the dtypes that can be stored."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 26


class TensorRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """A stored tensor's dtype, named as in safetensors, its shape and its digest."""

    dtype: Annotated[str, whole("[A-Z][A-Z0-9_]{0,15}", "a safetensors dtype such as F32")]
    shape: tuple[Natural, ...]
    sha256: Hex

    @property
    def count(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they are."""
        return self.count * DTYPES[self.dtype].itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as safetensors does; InputError where the format cannot store it."""
    if dtype not in _NAMES:
        raise InputError(
            f"dtype {dtype} cannot be stored; convert the tensor to one of: {', '.join(DTYPES)}"
        )
    return _NAMES[dtype]


def little_endian_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor as a file stores them, row-major, at most 64 MiB at a time."""
    dtype_name(tensor.dtype)
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    array = plain.reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        # A complex number is two floats, each in its own byte order.
        width = plain.element_size() // (2 if plain.is_complex() else 1)
        array = array.reshape(-1, width)[:, ::-1].copy().reshape(-1)
    view = memoryview(array)  # type: ignore[arg-type]  # numpy's stubs hide the buffer
    for start in range(0, len(view), _CHUNK):
        yield view[start : start + _CHUNK]


def tensor_record(t: Tensor) -> TensorRecord:
    """Digest one tensor: SHA-256 over its little-endian bytes in row-major order."""
    digest = hashlib.sha256()
    for chunk in little_endian_chunks(t):
        digest.update(chunk)
    return TensorRecord(dtype_name(t.dtype), tuple(t.shape), digest.hexdigest())


def set_digest(records: Mapping[str, TensorRecord]) -> str:
    r"""Digest a set of tensors: SHA-256 over the lines ``["name","F32",[2,3],"hex"]\n``.

    The lines are compact JSON in UTF-8 without escapes that JSON does not demand, sorted by name
    (by code points); so one file and ten shards of the same tensors have the same digest.
    """
    digest = hashlib.sha256()
    for name in sorted(records):
        record = records[name]
        line = [name, record.dtype, list(record.shape), record.sha256]
        text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def json_digest(content: Any) -> str:
    """Digest JSON in UTF-8 without blanks, keys sorted by code points; a NaN is a `ValueError`."""
    text = json.dumps(
        content, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def differences(
    expected: Mapping[str, TensorRecord], found: Mapping[str, TensorRecord]
) -> list[str]:
    """Describe how two sets of tensors differ, one line per tensor, unexpected ones last."""
    unclaimed: dict[TensorRecord, list[str]] = {}
    for name in found:
        if name not in expected:
            unclaimed.setdefault(found[name], []).append(name)
    lines = []
    for name, record in expected.items():
        if (there := found.get(name)) is None:
            if namesakes := unclaimed.get(record):
                lines.append(f"{name!r} is stored as {namesakes.pop(0)!r}, with the same bytes")
            else:
                lines.append(f"{name!r} is missing")
        elif there.shape != record.shape:
            lines.append(f"{name!r} has shape {list(there.shape)}, expected {list(record.shape)}")
        elif there.dtype != record.dtype:
            lines.append(f"{name!r} has dtype {there.dtype}, expected {record.dtype}")
        elif there.sha256 != record.sha256:
            lines.append(f"{name!r} has the expected dtype and shape, but other values")
    left = {name for names in unclaimed.values() for name in names}
    return lines + [f"{name!r} was not expected" for name in found if name in left]
