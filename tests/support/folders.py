"""What is in an output folder, and what damages it."""

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


def flip(file: Path, at: int = -1) -> None:
    """Flip the lowest bit of a byte of a file."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
