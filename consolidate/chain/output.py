"""Where an output goes: what may be replaced, and the disk space needed."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from consolidate.runtime.distributed import all_processes, is_first
from formats.atomic import check_leavings, check_target, has_content, partial_path
from formats.checkpoint import Checkpoint, open_checkpoint, other_files
from formats.errors import InputError
from formats.fisher_folder import LEDGER_NAME
from formats.tensors import dtype_of, shape_of


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a target that must not be replaced."""
    if target.name == "fisher" and (target / LEDGER_NAME).is_file() and not overwrite:
        raise InputError(
            f"{target} already exists: --overwrite replaces it, --add adds another task measured "
            "at the same weights"
        )
    check_target(target, overwrite=overwrite)
    check_leavings(target)
    if not has_content(target):
        return
    # Weights with a ledger are a checkpoint, even if they are damaged.
    ours = (target / "fisher" / LEDGER_NAME).is_file() and any(target.glob("*.safetensors"))
    if not ours and not (target / LEDGER_NAME).is_file():
        try:
            open_checkpoint(target)
        except InputError:
            raise InputError(
                f"{target} already exists and is not a checkpoint, so it is not replaced: remove "
                "it yourself, or choose another folder"
            ) from None
    if (target / ".git").exists():
        raise InputError(
            f"{target} is a git repository, so it is not replaced: choose another folder"
        )


def check_output(target: Path, source: Checkpoint, *, overwrite: bool, whole: bool) -> None:
    """Refuse before the work what would fail after it: an existing target, or too little space."""
    refuse_existing(target, overwrite=overwrite)
    place = target.resolve()
    if whole and source.path.is_dir():
        if source.path.resolve() in place.parents:
            raise InputError(
                f"{target} is inside the checkpoint {source.path}, whose files the output has too: "
                "choose a folder outside of it"
            )
        list(other_files(source))  # refuses a link that could not be copied
    parent = next(folder for folder in (place, *place.parents) if folder.exists())
    needed = output_bytes(source, whole=whole)
    free = shutil.disk_usage(parent).free
    if free < needed:
        partial = partial_path(target)
        saved = f" ({partial} is saved progress)" if partial.is_file() else ""
        raise InputError(
            f"{parent}: not enough disk space: expected {needed:,} bytes, found {free:,}: free "
            f"some{saved}, or choose another folder"
        )


def output_bytes(source: Checkpoint, *, whole: bool) -> int:
    """Give the bytes of a Fisher with its ledger, and of the weights where they are written."""
    fisher = 4 * sum(math.prod(shape_of(source.weights, name)) for name in source.weights)
    records = 1024 * (1 + len(source.weights))  # more than headers and ledger take for a tensor
    return fisher + records + (bytes_of(source.weights) if whole else 0)


def bytes_of(weights: Mapping[str, Tensor]) -> int:
    """Give the bytes of these tensors in a file."""
    return sum(
        math.prod(shape_of(weights, name)) * dtype_of(weights, name).itemsize for name in weights
    )


def failed_folder(target: Path) -> Path:
    """Name the folder beside a target for an output that exceeds --max-forgetting."""
    place = _named(target)
    return place.with_name(f"{place.name}.failed-forgetting")


def measured_folder(target: Path) -> Path:
    """Name the folder beside a target for the Fisher that is measured before training."""
    place = _named(target)
    return place.with_name(f".{place.name}.measured")


def discard_measured(target: Path) -> None:
    """Remove that folder, once nothing resumes from it; one without a ledger is somebody's own."""
    folder = measured_folder(target)
    if is_first(all_processes()) and (folder / LEDGER_NAME).is_file():
        shutil.rmtree(folder, ignore_errors=True)


def _named(target: Path) -> Path:
    return target if target.name not in ("", "..") else target.resolve()
