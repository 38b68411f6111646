"""Where the computations run."""

import torch

from consolidate.runtime.torchrun import world_size
from formats.errors import UsageError


def best_device(name: str | None = None) -> torch.device:
    """Give the device of that name, or the best there is; processes have a CUDA device each."""
    if name is None:
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and world_size() == 1:
            name = "mps"
        else:
            name = "cpu"
    if name.startswith("cuda:") and world_size() > 1:
        raise UsageError(f"--device {name} is one device: each process needs its own, as by cuda")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used here: {reason}") from None
    return device


def dtype_of_name(name: str | None) -> torch.dtype | None:
    """Give the dtype of that name, such as ``float32``; None for none."""
    return None if name is None else getattr(torch, name)
