"""The device that computations run on."""

import gc
import logging
from functools import cache
from typing import Any

import torch

from consolidate.runtime.torchrun import world_size
from formats.errors import UsageError
from formats.wording import first_line

LOG = logging.getLogger("consolidate")


def best_device(name: str | None = None) -> torch.device:
    """Return the named device, or the best available; each process has its own CUDA device."""
    if name is None:
        name = _available()
    if name.startswith("cuda:") and world_size() > 1:
        raise UsageError(
            f"--device {name} names one device, but each process needs its own; use --device cuda"
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {name} cannot be used on this machine: {reason}; choose another device"
        ) from None
    return device


@cache
def _available() -> str:
    """Return the best device that is there; a virtual machine's MPS may have no memory at all."""
    if torch.cuda.is_available():
        return "cuda"
    if not torch.backends.mps.is_available() or world_size() > 1:
        return "cpu"
    try:
        torch.ones(1, device="mps").add_(1)
    except (RuntimeError, AssertionError) as error:
        LOG.warning("mps is there, but cannot be used: %s", first_line(error))
        return "cpu"
    return "mps"


def dtype_of_name(name: str | None) -> torch.dtype | None:
    """Return the dtype of that name, such as ``float32``; None for None."""
    return None if name is None else getattr(torch, name)


def release_memory(device: torch.device) -> None:
    """Give back what is no longer used, and cached memory in pieces that are too small."""
    gc.collect()
    backend: Any = getattr(torch, device.type, None)
    if hasattr(backend, "empty_cache"):
        backend.empty_cache()
