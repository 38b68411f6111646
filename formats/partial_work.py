"""What a long command keeps beside its target, to go on with when it is killed.

One safetensors file. Its metadata is one JSON string: which command it is of, by everything that
the result depends on, and how far the work was.
"""

import glob
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from formats.atomic import partial_path
from formats.digest import set_digest, tensor_record
from formats.errors import InputError
from formats.tensors import write_tensor_file

_KEY = "consolidate-partial-work"
_VERSION = 2


class StoredWork(NamedTuple):
    """Work that was broken off.

    Attributes:
        tensors: What was computed so far.
        state: How far the work was.
        command: What its result depends on.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    command: dict[str, Any]


def write_partial(
    target: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    command: Mapping[str, Any],
    process: int = 0,
) -> None:
    """Keep work, in place of what was kept of it before.

    Args:
        target: The folder that the command will write.
        tensors: What was computed so far.
        state: How far the work is, as JSON.
        command: Everything that the result depends on, as JSON: digests and options.
        process: Which of several that work together; each keeps its own.

    Raises:
        InputError: If the disk is full.
        OSError: If the place cannot be written.
    """
    path = partial_path(target, process)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _unfinished(path)
    new.unlink(missing_ok=True)
    content = {"version": _VERSION, "command": command, "state": state}
    text = json.dumps(content | {"digest": _digest(tensors, content)})
    try:
        write_tensor_file(new, tensors, {_KEY: text})
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def read_partial(target: Path, process: int = 0) -> StoredWork | None:
    """Read what was kept of work with this target.

    Args:
        target: The folder that the command will write.
        process: Which of several that work together.

    Returns:
        The work; None where nothing was kept.

    Raises:
        InputError: If what was kept cannot be read.
    """
    path = partial_path(target, process)
    if not path.is_file():
        return None
    remedy = "--restart throws it away"
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if stored["version"] != _VERSION:
            raise ValueError("another release of consolidate kept it")
        if stored.pop("digest") != _digest(tensors, stored):
            raise ValueError("its digest is not that of its content")
        command, state = dict(stored["command"]), dict(stored["state"])
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path} cannot be gone on with ({error}): {remedy}") from None
    return StoredWork(tensors, state, command)


def remove_partial(target: Path, process: int = 0) -> None:
    """Throw away what was kept of work with this target, if anything was.

    Args:
        target: The folder that the command writes.
        process: Which of several that work together; the first throws away what any has kept.
    """
    path = partial_path(target, process)
    for kept in path.parent.glob(f"{glob.escape(path.name)}-*") if process == 0 else ():
        kept.unlink(missing_ok=True)
    for file in (path, _unfinished(path)):
        file.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> str:
    of_tensors = set_digest({name: tensor_record(tensor) for name, tensor in tensors.items()})
    return hashlib.sha256(f"{of_tensors}\n{json.dumps(content)}".encode()).hexdigest()


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}-new")
