"""Tensors in files of `torch.save`, read without running code that such files may contain."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from formats.checkpoint_files import broken, check_index, inside, read_index
from formats.errors import InputError
from formats.wording import first_line

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# The keys under which Lightning and torch scripts nest a state dict.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")
# The prefixes that DistributedDataParallel and torch.compile add to every name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def open_pickle(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a file of `torch.save`, or in the files of an index: weights only.

    Zip files are memory-mapped: values are read on access, and writing to them leaves the file
    unchanged.
    """
    if not path.name.endswith(".index.json"):
        return _without_wrappers(_read(path))
    weight_map = read_index(path)
    tensors: dict[str, Tensor] = {}
    found: dict[str, str] = {}
    for file_name in sorted(set(weight_map.values())):
        for name, tensor in _read(inside(path.parent, file_name)).items():
            if name in found:
                raise InputError(
                    f"{path}: tensor {name!r} is in both {found[name]} and {file_name}; "
                    "remove the file that does not belong to the checkpoint"
                )
            tensors[name], found[name] = tensor, file_name
    check_index(path, weight_map, found)
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    state_dict = _state_dict(_load(path), path)
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise InputError(
                f"{path}: expected names of tensors, found {name!r}; save the model's state_dict() "
                "alone"
            )
        if not isinstance(value, Tensor):
            raise InputError(
                f"{path}: {name!r}: expected a tensor, found {type(value).__name__}; "
                "save the model's state_dict() alone"
            )
        if value.is_quantized:
            raise InputError(
                f"{path}: tensor {name!r} is quantized; use the weights from before quantization"
            )
        if value.layout != torch.strided or value.is_meta:
            what = "has no values" if value.is_meta else "is sparse"
            raise InputError(f"{path}: tensor {name!r} {what}; save it as a dense tensor")
    return {name: value.detach() for name, value in state_dict.items()}


def _load(path: Path) -> Any:
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}")
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            _refuse_compressed(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (InputError, MemoryError):
        raise
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\w[\w.]*\.\w+)", str(error))
        if not wanted:
            raise broken(path, "a file of torch.save", _first_line(error)) from error
        raise InputError(
            f"{path}: expected tensors alone, found a pickle that would import {wanted[1]}, which "
            "could run code; if you trust it, load it in torch and save its state_dict() alone"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise broken(path, "a file of torch.save", _first_line(error)) from error


def _refuse_compressed(path: Path) -> None:
    """Refuse compressed members: torch maps the raw bytes, and their size could be anything."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            stored = member.compress_type == zipfile.ZIP_STORED
            if not stored or member.file_size > member.compress_size:
                raise InputError(
                    f"{path}: expected uncompressed values as torch.save writes them, found "
                    f"{member.filename!r} compressed; if you trust it, load it and save its "
                    "state_dict() again"
                )


def _first_line(error: Exception) -> str:
    """Shorten torch's advice, which does not apply here, to the reason."""
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return (reason[1] if reason else first_line(error)).split(". ")[0] or type(error).__name__


def _state_dict(content: Any, path: Path) -> Mapping[Any, Any]:
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path}: expected a state dict, found {type(content).__name__}; "
            "save the model's state_dict() alone"
        )
    nested = [key for key in _STATE_DICT_KEYS if _has_tensors(content.get(key))]
    if len(nested) > 1:
        raise InputError(
            f"{path}: expected one state dict, found several ({', '.join(nested)}); save the one "
            "to use alone"
        )
    if nested:
        return content[nested[0]]
    if not _has_tensors(content):
        keys = ", ".join(repr(key) for key in list(content)[:5]) or "nothing"
        raise InputError(
            f"{path} contains no state dict: expected tensors by name, or one of the keys "
            f"{', '.join(_STATE_DICT_KEYS)}, found {keys}"
        )
    return content


def _has_tensors(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(v, Tensor) for v in content.values())


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPER_PREFIXES * 2:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
