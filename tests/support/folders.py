"""What is in an output folder."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def fisher_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "fisher" / "fisher.safetensors")
