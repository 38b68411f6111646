"""Models with sharded parameters, one shard in each process (FSDP2, torch's `fully_shard`).

A block's parameters are gathered while it runs and released afterwards. A tensor that belongs to a
parameter, such as its gradient, its Λ or its μ, is sharded like the parameter.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor


def shard(
    module: nn.Module, group: ProcessGroup, device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Shard a module's parameters along their first dimension, and move it to the device."""
    mesh = DeviceMesh.from_group(group, device.type)
    for block in _blocks(module):
        fully_shard(block.to(dtype=dtype), mesh=mesh)
    if dtype is not None:
        module.to(dtype=dtype)
    # The rest is released after the forward pass too, so that parameters are shards outside of it.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module's parameters are sharded."""
    return isinstance(module, FSDPModule)


def is_cut(tensor: Tensor) -> bool:
    """Return whether this process has only a part of a tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, in shared memory; all of an unsharded one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a tensor that matches this process's part of a parameter."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return local(tensor)
    if tensor.dim() and not any(tensor.stride()):  # one number for all
        return tensor.as_strided((), ()).expand(local(parameter).shape)
    mesh, placements = parameter.device_mesh, parameter.placements
    tensor = tensor.to(parameter.device)
    return local(distribute_tensor(tensor, mesh, placements, src_data_rank=None))


def cut_as(part: Tensor, parameter: Tensor) -> Tensor:
    """Return the tensor, sharded like a parameter, of which `part` is this process's part."""
    if not isinstance(parameter, DTensor) or not part.dim():
        return part
    return DTensor.from_local(
        part.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def whole(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Gather a tensor, or the parts of one sharded `like` another; all processes must call it."""
    if like is not None:
        tensor = cut_as(tensor, like)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_of_parts(value: Tensor, parameter: Tensor) -> Tensor:
    """Sum over the processes a number that each computed from its part of a parameter."""
    if not isinstance(parameter, DTensor):
        return value
    return whole(DTensor.from_local(value, parameter.device_mesh, [Partial()], run_check=False))


def add_shard_(total: Tensor, values: Tensor, parameter: Tensor) -> None:
    """Add the sum of values over the processes to a total that is sharded like a parameter."""
    assert isinstance(parameter, DTensor)
    partial = DTensor.from_local(values, parameter.device_mesh, [Partial()], run_check=False)
    total += local(partial.redistribute(placements=parameter.placements)).to(total.dtype)


@contextmanager
def gradients_of(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Pass each gradient of this process's examples to `take` when it arrives, then free it."""
    seen: set[int] = set()
    handles: list[Any] = []

    def prepare(prefix: str, block: nn.Module, args: object) -> None:
        for inside, parameter in block.named_parameters():
            if isinstance(parameter, DTensor):
                continue  # of a block inside this one
            name = prefix + inside
            if name in parameters and id(parameter) not in seen:
                seen.add(id(parameter))
                hand_over = partial(_hand_over, name, take)
                handles.append(parameter.register_post_accumulate_grad_hook(hand_over))

    for path, block in model.named_modules():
        if is_sharded(block):
            prefix = f"{path}." if path else ""
            handles.append(block.register_forward_pre_hook(partial(prepare, prefix)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_over(name: str, take: Callable[[str, Tensor], None], parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None  # FSDP would sum it over the processes
    assert gradient is not None
    take(name, gradient.detach())


def _blocks(module: nn.Module) -> list[nn.Module]:
    """List the modules that are gathered one by one: members of the outermost module lists."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    inside = {id(below) for one in lists for below in one.modules() if below is not one}
    uses = Counter(_uses(module))
    found = []
    for one in lists:
        if id(one) in inside:
            continue
        for block in one.children():
            own = Counter(_uses(block))
            # Whether it shares no parameter with modules outside of it.
            alone = all(uses[at] == count for at, count in own.items())
            if own and alone and any(True for _ in block.children()):  # more than a single layer
                found.append(block)
    return found


def _uses(module: nn.Module) -> Iterator[int]:
    """Yield the id of each parameter once per module that owns it; None is skipped."""
    for owner in module.modules():
        yield from (id(p) for p in owner._parameters.values() if p is not None)
