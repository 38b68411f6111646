"""What a long pass over the data keeps beside its target, to go on with when it is killed.

One safetensors file with the sums so far. Its metadata is one JSON string: which command it is of,
by everything that the result depends on, and where the pass was.
"""

import glob
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

_KEY = "consolidate-partial-pass"


class StoredPass(NamedTuple):
    """A pass that was broken off.

    Attributes:
        tensors: The sums so far.
        state: Where the pass was.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write_partial(
    target: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    command: Mapping[str, Any],
    process: int = 0,
) -> None:
    """Keep a pass, in place of what was kept of it before.

    Args:
        target: The folder that the command will write.
        tensors: The sums so far.
        state: Where the pass is, as JSON.
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
    content = {"version": 1, "command": command, "state": state, "digest": _digest(tensors)}
    text = json.dumps(content)
    try:
        write_tensor_file(new, tensors, {_KEY: text})
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def read_partial(target: Path, command: Mapping[str, Any], process: int = 0) -> StoredPass:
    """Read what was kept of a pass with this target.

    Args:
        target: The folder that the command will write.
        command: What the result depends on now.
        process: Which of several that work together.

    Returns:
        The pass.

    Raises:
        InputError: If what was kept cannot be read, or is of another command; the message says what
            differs.
    """
    path = partial_path(target, process)
    remedy = "--restart throws it away"
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        version, was, state = stored["version"], dict(stored["command"]), stored["state"]
        if stored["digest"] != _digest(tensors):
            raise ValueError("its digest is not that of its tensors")
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path} cannot be gone on with ({error}): {remedy}") from None
    if version != 1:
        raise InputError(f"{path} was kept by another release of consolidate: {remedy}")
    now = json.loads(json.dumps(command))
    if different := [name for name in {**was, **now} if was.get(name) != now.get(name)]:
        changes = "; ".join(f"{n}: {was.get(n)} then, {now.get(n)} now" for n in different)
        raise InputError(
            f"{path} is of a pass that was broken off, but not of this one ({changes}): start that "
            f"command again, or {remedy}"
        )
    return StoredPass(tensors, state)


def remove_partial(target: Path, process: int = 0) -> None:
    """Throw away what was kept of a pass with this target, if anything was.

    Args:
        target: The folder that the command writes.
        process: Which of several that work together; the first throws away what any has kept.
    """
    path = partial_path(target, process)
    for kept in path.parent.glob(f"{glob.escape(path.name)}-*") if process == 0 else ():
        kept.unlink(missing_ok=True)
    for file in (path, _unfinished(path)):
        file.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return set_digest({name: tensor_record(tensor) for name, tensor in tensors.items()})


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}-new")
