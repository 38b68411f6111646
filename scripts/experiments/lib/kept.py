"""What is made once for many units, and kept in experiments-output/tradeoff."""

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[3] / "experiments-output" / "tradeoff"


def kept(
    name: str, make: Callable[[], tuple[Mapping[str, Tensor], Any]]
) -> tuple[dict[str, Tensor], Any]:
    """Read tensors and what was noted beside them, made first where they are not there.

    Args:
        name: Of the file; what it says has to tell it from all that is made otherwise.
        make: Makes both; the note can be written as JSON. Others that want it wait meanwhile.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.safetensors"
    with open(FOLDER / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with torch.random.fork_rng():  # what comes after is the same, made or read
                tensors, note = make()
            part = path.with_suffix(".part")
            owned = {key: tensor.detach().clone() for key, tensor in tensors.items()}
            save_file(owned, part, {"note": json.dumps(note)})
            os.replace(part, path)
    with safe_open(path, "pt") as file:
        found = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return found, json.loads(file.metadata()["note"])
