"""Several processes that work on one task: examples dealt among them, and sums over them.

`torchrun` starts the processes, torch.distributed joins them: gloo for the CPU, NCCL for CUDA. In a
process that was started alone the group is None, and everything here is the identity.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from consolidate.runtime.signals import stopped_at_once, stopped_together
from consolidate.runtime.torchrun import local_rank, rank, world_size
from formats.errors import PeerError, UsageError

T = TypeVar("T")
P = ParamSpec("P")
BUCKET = 1 << 23  # elements summed over the processes at a time: a negligible amount of memory
_FAILURE = "consolidate/failure"
_GONE = "another process of this run ended without a reason; it may have been killed"


@contextmanager
def process_group() -> Iterator[dist.ProcessGroup | None]:
    """Join the processes that `torchrun` started for the block, unless they are joined already.

    If one of them fails, it alone raises its error; the others raise a PeerError.
    """
    if dist.is_initialized() or world_size() == 1:
        yield all_processes()
        return
    # NCCL cannot sum tensors on the CPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with stopped_at_once():
        store, own, size = next(dist.rendezvous("env://"))
    log = logging.getLogger("consolidate")
    level = log.level
    if rank() > 0:
        log.setLevel(logging.WARNING)  # the first process reports for all of them
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        with stopped_at_once():
            dist.init_process_group(backend, store=store, rank=own, world_size=size)
            summed(dist.group.WORLD, 0)  # so that a process that dies while joining fails all
        yield dist.group.WORLD
        summed(dist.group.WORLD, 0)  # so that no process ends before all have succeeded
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        try:
            failed = store.compare_set(_FAILURE, "", f"{own} {code}").decode().split()
        except RuntimeError:  # The process that hosts the store has ended.
            failed = [str(0 if stopped_together(error) else own), str(code)]
        if int(failed[0]) != own:
            raise PeerError(int(failed[1])) from error
        if is_lost(error):
            raise PeerError(1, _GONE) from error
        raise
    finally:
        log.setLevel(level)
        dist.destroy_process_group()


def as_one(command: Callable[P, T]) -> Callable[P, T]:
    """Run a command in all processes that `torchrun` started: a decorator, see `process_group`."""

    @wraps(command)
    def joined(*arguments: P.args, **options: P.kwargs) -> T:
        with process_group():
            return command(*arguments, **options)

    return joined


def all_processes() -> dist.ProcessGroup | None:
    """Return the group of all processes; None in one that was started alone."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def shards_among(*, shard: bool, check: bool) -> dist.ProcessGroup | None:
    """Return the group over which a model is sharded; None where every process has all of it."""
    if not shard:
        return None
    if all_processes() is None:
        raise UsageError("--shard needs several processes; start them with torchrun")
    if check:
        raise UsageError(
            "--check cannot be combined with --shard, which runs every example alone; leave it out"
        )
    return all_processes()


def is_first(group: dist.ProcessGroup | None) -> bool:
    """Return whether this is the process that writes and reports for the group."""
    return group is None or group.rank() == 0


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return this process's number in a group, and the group's size."""
    return (0, 1) if group is None else (group.rank(), group.size())


def dealt(order: Sequence[int], batch_size: int, group: dist.ProcessGroup | None) -> Sequence[int]:
    """Deal examples to processes in turn, in the batches that a single process would read."""
    number, size = place_in(group)
    if size == 1:
        return order
    starts = range(number * batch_size, len(order), size * batch_size)
    return [i for start in starts for i in order[start : start + batch_size]]


def shares(
    order: Sequence[int], batch_size: int, group: dist.ProcessGroup | None
) -> Iterator[Sequence[int]]:
    """Yield this process's share of each batch, `batch_size` examples at most; it may be empty."""
    number, size = place_in(group)
    for start in range(0, len(order), size * batch_size):
        batch = order[start : start + size * batch_size]
        first, last = (-(-len(batch) * i // size) for i in (number, number + 1))
        yield batch[first:last]


def rounds(items: Iterable[T], group: dist.ProcessGroup | None) -> Iterator[tuple[T | None, bool]]:
    """Yield this process's items, then None while others have more, and whether all have one."""
    size = place_in(group)[1]
    iterator = iter(items)
    while True:
        item = next(iterator, None)
        (having,) = summed(group, int(item is not None))
        if not having:
            return
        yield item, having == size


def in_step(items: Iterable[T], group: dist.ProcessGroup | None) -> Iterator[T | None]:
    """Yield the items of `rounds` alone."""
    return (item for item, _ in rounds(items, group))


def summed(group: dist.ProcessGroup | None, *numbers: float) -> list[float]:
    """Sum numbers over the processes, in float64; the sums are the same in every process."""
    if group is None:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums, group=group)
    return sums.tolist()


def sum_(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """Replace tensors by their sums over the processes, many small ones at a time."""
    if group is None:
        return
    waiting: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() >= BUCKET and tensor.is_contiguous():
            dist.all_reduce(tensor, group=group)
            continue
        bucket = waiting.setdefault((tensor.device, tensor.dtype), [])
        bucket.append(tensor)
        if sum(one.numel() for one in bucket) >= BUCKET:
            _sum_together(bucket, group)
            bucket.clear()
    for bucket in waiting.values():
        _sum_together(bucket, group)


def from_first(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Send the value of the first process, serializable as JSON, to all processes."""
    if group is None:
        return value
    text = torch.tensor(list(json.dumps(value).encode()) if is_first(group) else [])
    size = torch.tensor(len(text))
    dist.broadcast(size, 0, group=group)
    text = text.to(torch.uint8) if is_first(group) else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(text, 0, group=group)
    return json.loads(bytes(text.tolist()))


def from_all(numbers: Sequence[int], group: dist.ProcessGroup | None) -> list[list[int]]:
    """Gather equally many numbers below 2⁶³ from every process, in the order of the processes."""
    if group is None:
        return [list(numbers)]
    own = torch.tensor(numbers, dtype=torch.int64)
    found = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(found, own, group=group)
    return [one.tolist() for one in found]


def is_lost(error: BaseException) -> bool:
    """Return whether an error only means that another process does not respond."""
    words = ("connection closed by peer", "connection reset by peer", "gloo", "nccl")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def _sum_together(bucket: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    if not bucket:
        return
    flat = torch.cat([tensor.flatten() for tensor in bucket])
    dist.all_reduce(flat, group=group)
    for tensor, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(summed.view(tensor.shape))
