"""A second device, computed on the CPU: it refuses what CUDA refuses, and needs no accelerator.

Its tensors claim to be on `meta`, where torch plans everything but computes nothing; behind each is
one of the CPU with its values. So the code runs to its end, decisions on values included.

Where CONSOLIDATE_TEST_DEVICE names a device of this machine, that is the second one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
REAL = os.environ.get("CONSOLIDATE_TEST_DEVICE")
WIDE = torch.float32 if REAL == "mps" else torch.float64  # which mps lacks
ATEN = torch.ops.aten
MOVES = {ATEN._to_copy.default, ATEN.copy_.default}
TAKE_INDICES_OF_THE_HOST = {
    ATEN.index.Tensor,
    ATEN.index_put_.default,
    ATEN.index_put.default,
    ATEN._index_put_impl_.default,
    ATEN._unsafe_index.Tensor,
}


class Elsewhere(Tensor):
    """A tensor of the second device."""

    values: Tensor  # on the CPU

    @staticmethod
    def __new__(cls, values: Tensor) -> "Elsewhere":
        """Wrap a tensor of the CPU."""
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.values = values
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Elsewhere({self.values})"

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Return the tensor without its graph; torch's own `data` would leave `values` behind."""
        return self.detach()

    @data.setter
    def data(self, other: "Elsewhere") -> None:
        self.values = other.values

    def tolist(self) -> Any:
        """Return the values, which torch refuses for tensors of other classes."""
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatched(function, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Brings what names the device to it: moves, and tensors that are made there."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatched(function, args, kwargs or {})


def dispatched(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the values, after refusing operands of both devices."""
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = any(isinstance(leaf, Elsewhere) for leaf in leaves)
    if there:
        _check(function, args, kwargs, leaves)
    device, inner = kwargs.get("device"), dict(kwargs)
    if device is not None:
        there = torch.device(device) == DEVICE
        inner["device"] = torch.device("cpu")
    elif function is ATEN.copy_.default:
        there = isinstance(args[0], Elsewhere)
    if not there and not any(isinstance(leaf, Elsewhere) for leaf in leaves):
        return function(*args, **kwargs)
    values = partial(tree_map_only, Elsewhere, lambda tensor: tensor.values)
    found = function(*values(args), **values(inner))
    if not there:
        return found  # a number, or moved to the CPU
    wrapped = tree_map_only(Tensor, Elsewhere, found)
    return return_and_correct_aliasing(function, args, kwargs, wrapped)


def _check(function: Any, args: Any, kwargs: dict[str, Any], leaves: list[Tensor]) -> None:
    """Refuse tensors of the CPU among others, but single numbers and indices, as CUDA does.

    And those that are really on `meta`, which have no values: torch makes an index of a list there.
    """
    if any(leaf.device == DEVICE and not isinstance(leaf, Elsewhere) for leaf in leaves):
        raise RuntimeError(f"{function}: a tensor without values; give an index as a tensor")
    host = [leaf for leaf in leaves if not isinstance(leaf, Elsewhere) and leaf.dim()]
    if function in TAKE_INDICES_OF_THE_HOST and isinstance(args[0], Elsewhere):
        indices = {id(leaf) for leaf in tree_flatten(args[1])[0]}
        host = [leaf for leaf in host if id(leaf) not in indices]
    if host and function not in MOVES:
        shapes = [tuple(leaf.shape) for leaf in host]
        raise RuntimeError(f"{function}: tensors of two devices; on the CPU are {shapes}")
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{function}: a generator of the CPU for a tensor of another device")


@contextmanager
def second_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Give the device for a block."""
    if REAL is not None:
        yield torch.device(REAL)
        return
    plain = torch.autocast
    # torch has no autocast for meta, even one that is switched off.
    for module in (torch, torch.amp, torch.amp.autocast_mode):
        monkeypatch.setattr(
            module,
            "autocast",
            lambda kind, *a, **o: plain("cpu" if kind == "meta" else kind, *a, **o),
        )
    # Modules keep their parameters, which may be tied, when they are moved.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with SecondDevice():
            yield DEVICE
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def back(tensor: Tensor) -> Tensor:
    """Return the values of a tensor of the second device; it must be there."""
    assert isinstance(tensor, Elsewhere), "computed on the CPU"
    return tensor.values.detach()
