"""The device that computations run on."""

import gc
from typing import Any

import torch

from consolidate.runtime.torchrun import world_size
from formats.errors import UsageError


def best_device(name: str | None = None) -> torch.device:
    """Return the named device, or the best available; each process has its own CUDA device."""
    if name is None:
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and world_size() == 1:
            name = "mps"
        else:
            name = "cpu"
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


def dtype_of_name(name: str | None) -> torch.dtype | None:
    """Return the dtype of that name, such as ``float32``; None for None."""
    return None if name is None else getattr(torch, name)


def release_memory(device: torch.device) -> None:
    """Give back what is no longer used, and cached memory in pieces that are too small."""
    gc.collect()
    backend: Any = getattr(torch, device.type, None)
    if hasattr(backend, "empty_cache"):
        backend.empty_cache()
