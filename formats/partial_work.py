"""What a long command keeps beside its target, to go on with when it is killed.

One safetensors file. Its metadata is one JSON string: which command it is of, by everything that
the result depends on, and how far the work was.

Of several processes each can keep its own part. Parts that belong together are all prepared under
another name, ``-new``, before the first of them is published, so that one of the two names has a
part of the same moment for every process, whenever they are killed.
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
    """Work that was broken off: what was computed, how far it was, what its result depends on."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    command: dict[str, Any]


def write_partial(
    target: Path, tensors: Mapping[str, Tensor], state: Json, command: Json, process: int = 0
) -> None:
    """Keep the work of a process, as `StoredWork` with JSON, in place of what it kept before."""
    try:
        prepare_partial(target, tensors, state, command, process)
        publish_partial(target, process)
    finally:
        discard_prepared(target, process)


def prepare_partial(
    target: Path, tensors: Mapping[str, Tensor], state: Json, command: Json, process: int = 0
) -> None:
    """Keep the work of a process beside what it kept before, until it is published."""
    discard_prepared(target, process)
    path = _unfinished(partial_path(target, process))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": _VERSION, "command": command, "state": state}
    text = json.dumps(content | {"digest": _digest(tensors, content)})
    write_tensor_file(path, tensors, {_KEY: text})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def publish_partial(target: Path, process: int = 0) -> None:
    """Put what was prepared in place of what was kept before."""
    path = partial_path(target, process)
    os.replace(_unfinished(path), path)


def discard_prepared(target: Path, process: int = 0) -> None:
    """Throw away what was prepared and not published, if anything was."""
    _unfinished(partial_path(target, process)).unlink(missing_ok=True)


def read_partial(target: Path, process: int = 0, *, whole: bool = True) -> StoredWork | None:
    """Read what was kept of work, if anything was; not `whole`, without tensors and unchecked."""
    return _read(partial_path(target, process), whole)


def read_prepared(target: Path, process: int = 0) -> StoredWork | None:
    """Read what was prepared and not published, without its tensors; None where it is not whole."""
    try:
        return _read(_unfinished(partial_path(target, process)), whole=False)
    except InputError:
        return None  # broken off while it was written


def remove_partial(target: Path, process: int = 0) -> None:
    """Throw away what was kept of work with this target; process 0 throws away everyone's."""
    path = partial_path(target, process)
    for kept in path.parent.glob(f"{glob.escape(path.name)}-*") if process == 0 else ():
        kept.unlink(missing_ok=True)
    for file in (path, _unfinished(path)):
        file.unlink(missing_ok=True)


def _read(path: Path, whole: bool) -> StoredWork | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {})[_KEY])
            if stored["version"] != _VERSION:
                raise ValueError("another release of consolidate kept it")
            digest, tensors = stored.pop("digest"), {}
            if whole:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if digest != _digest(tensors, stored):
                    raise ValueError("its digest is not that of its content")
            return StoredWork(tensors, dict(stored["state"]), dict(stored["command"]))
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be gone on with ({error}): --restart throws it away"
        ) from None


def _digest(tensors: Mapping[str, Tensor], content: Json) -> str:
    of_tensors = set_digest({name: tensor_record(tensor) for name, tensor in tensors.items()})
    return hashlib.sha256(f"{of_tensors}\n{json.dumps(content)}".encode()).hexdigest()


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}-new")
