"""Saved progress of several processes: saved by the first for all, or by each for its own part.

Where each process has the whole model, the first one saves what all have in common; what differs,
such as random states, is sent to it. Each process saves its part of a pass for the Fisher on its
own. Where the model is sharded, all processes save at the same moment: a set, whose parts have the
same mark. An incomplete set is ignored; the one before it is kept until the new one is complete.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from consolidate.runtime.distributed import from_all, from_first, is_first, place_in, summed
from formats.atomic import partial_path
from formats.errors import InputError
from formats.partial_work import (
    StoredWork,
    discard_prepared,
    prepare_partial,
    publish_partial,
    read_partial,
    read_prepared,
)

_OF_PROCESS = "process-"
_MARK = "set"
PASS, _OF_A_PASS = "pass/", ("levels", "most")


def gather_own(
    tensors: Mapping[str, Tensor], own: tuple[str, ...], group: ProcessGroup | None
) -> dict[str, Tensor]:
    """Send the first process what only the others have, as ``process-1/NAME`` beside its own.

    Names of tensors that differ between processes begin with one of `own`.
    """
    found = dict(tensors)
    number, size = place_in(group)
    if size == 1:
        return found
    for name, tensor in tensors.items():
        if not name.startswith(own) or not tensor.numel():
            continue
        sent = _bytes(tensor)
        parts = [torch.empty_like(sent) for _ in range(size)] if number == 0 else None
        dist.gather(sent, parts, 0, group=group)
        for other, part in enumerate(parts or ()):
            if other:
                values = part.view(tensor.dtype).view(tensor.shape)
                found[f"{_OF_PROCESS}{other}/{name}"] = values
    return found


def start_with_first(own: StoredWork | None, group: ProcessGroup | None) -> StoredWork | None:
    """Resume from what the first process saved for all, and from this one's part of a pass."""
    if group is None:
        return own
    common = _from_first(own, group)
    if own is None or is_first(group):
        return own if is_first(group) else common
    mark = None if common is None else common.state.get("trained")
    if own.state.get("trained") != mark:  # measured at other weights
        return common
    if common is None:
        return own
    return StoredWork({**common.tensors, **own.tensors}, {**common.state, **own.state}, own.command)


def start_with_set(
    target: Path, check: Callable[[StoredWork | None], object], group: ProcessGroup | None
) -> StoredWork | None:
    """Resume from this process's part of the newest complete set.

    Parts without any complete set are refused; None where no set was ever saved.
    """
    process = place_in(group)[0]
    marks = []
    for part in (read_partial(target, process, whole=False), read_prepared(target, process)):
        check(part)
        marks.append(0 if part is None else int(part.state.get(_MARK, 0)))
    everywhere = from_all(marks, group)
    whole = set.intersection(*map(set, everywhere)) - {0}
    if not whole:
        if any(published for published, _ in everywhere):
            raise InputError(
                f"{partial_path(target)}: no saved progress is complete over all processes: "
                "restore the missing files, or discard it with --restart"
            )
        return None
    if max(whole) != marks[0]:
        publish_partial(target, process)
    return read_partial(target, process)


def write_set(
    target: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    command: Mapping[str, Any],
    check: Callable[[], None],
    group: ProcessGroup | None,
) -> None:
    """Save this process's part of a set, while the others save theirs: all of them, or none.

    `check` raises an InputError where disk space is lacking.
    """
    process = place_in(group)[0]
    mark = from_first(time.time_ns(), group)
    failure: InputError | OSError | None = None
    try:
        check()
        prepare_partial(target, tensors, {**state, _MARK: mark}, command, process)
    except (InputError, OSError) as error:
        failure = error
    if summed(group, failure is not None)[0]:
        discard_prepared(target, process)
        raise failure or InputError("another process could not save its part")
    publish_partial(target, process)


def _from_first(stored: StoredWork | None, group: ProcessGroup) -> StoredWork | None:
    """Give every process what the first one saved, except its part of a pass."""
    number = place_in(group)[0]
    own: dict[str, Tensor] = {}
    sent = None
    if stored is not None and number == 0:
        own = {n: t for n, t in stored.tensors.items() if not n.startswith(PASS)}
        listed = [[n, list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in own.items()]
        state = {n: v for n, v in stored.state.items() if n not in _OF_A_PASS}
        sent = [listed, state, stored.command]
    sent = from_first(sent, group)
    if sent is None:
        return None
    listed, state, command = sent
    received: dict[str, Tensor] = {}
    for name, shape, dtype in listed:
        values = own[name] if number == 0 else torch.empty(shape, dtype=getattr(torch, dtype))
        if values.numel():
            dist.broadcast(_bytes(values), 0, group=group)
        received[name] = values
    for name in [name for name in received if name.startswith(_OF_PROCESS)]:
        values = received.pop(name)
        process, _, inside = name.removeprefix(_OF_PROCESS).partition("/")
        if int(process) == number:
            received[inside] = values
    return StoredWork(received, state, command)


def _bytes(tensor: Tensor) -> Tensor:
    """Give the bytes of a tensor on the CPU, without a copy if it is contiguous there."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
