"""The saved progress of a long command, beside its target, from which it resumes when killed.

One safetensors file. Its metadata is one JSON string: the command, with everything that its result
depends on, and how far the work was.

Each of several processes saves its own part. All parts of one moment are prepared under another
name, ``-new``, before the first of them is published, so that under one of the two names there is
a part of the same moment for every process, whenever they are killed.
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
_VERSION = 3
Json = Mapping[str, Any]


class StoredWork(NamedTuple):
    """Interrupted work: what was computed, how far it was, what its result depends on."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    command: dict[str, Any]


def write_partial(
    target: Path, tensors: Mapping[str, Tensor], state: Json, command: Json, process: int = 0
) -> None:
    """Save the progress of a process, replacing what it saved before."""
    try:
        prepare_partial(target, tensors, state, command, process)
        publish_partial(target, process)
    finally:
        discard_prepared(target, process)


def prepare_partial(
    target: Path, tensors: Mapping[str, Tensor], state: Json, command: Json, process: int = 0
) -> None:
    """Save the progress of a process beside what it saved before, until it is published."""
    discard_prepared(target, process)
    path = _unfinished(partial_path(target, process))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": _VERSION, "command": command, "state": state}
    text = json.dumps(content | {"digest": _digest(tensors, content)})
    write_tensor_file(path, tensors, {_KEY: text})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def publish_partial(target: Path, process: int = 0) -> None:
    """Replace the saved progress of a process by what was prepared."""
    path = partial_path(target, process)
    os.replace(_unfinished(path), path)


def discard_prepared(target: Path, process: int = 0) -> None:
    """Discard what was prepared and not published, if anything."""
    _unfinished(partial_path(target, process)).unlink(missing_ok=True)


def read_partial(target: Path, process: int = 0, *, whole: bool = True) -> StoredWork | None:
    """Read the saved progress, if any; unless `whole`, without tensors and unchecked."""
    return _read(partial_path(target, process), whole)


def read_prepared(target: Path, process: int = 0) -> StoredWork | None:
    """Read what was prepared and not published, without tensors; None where it is incomplete."""
    try:
        return _read(_unfinished(partial_path(target, process)), whole=False)
    except InputError:
        return None  # interrupted while it was written


def remove_partial(target: Path, process: int = 0) -> None:
    """Discard the saved progress beside a target; process 0 discards that of all processes."""
    path = partial_path(target, process)
    for other in path.parent.glob(f"{glob.escape(path.name)}-*") if process == 0 else ():
        other.unlink(missing_ok=True)
    for file in (path, _unfinished(path)):
        file.unlink(missing_ok=True)


def _read(path: Path, whole: bool) -> StoredWork | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {})[_KEY])
            if stored["version"] != _VERSION:
                raise ValueError("another release of consolidate saved it")
            digest, tensors = stored.pop("digest"), {}
            if whole:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if digest != _digest(tensors, stored):
                    raise ValueError("its digest does not match its content")
            return StoredWork(tensors, dict(stored["state"]), dict(stored["command"]))
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: the saved progress cannot be resumed ({error}); discard it with --restart"
        ) from None


def _digest(tensors: Mapping[str, Tensor], content: Json) -> str:
    of_tensors = set_digest({name: tensor_record(tensor) for name, tensor in tensors.items()})
    return hashlib.sha256(f"{of_tensors}\n{json.dumps(content)}".encode()).hexdigest()


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}-new")
