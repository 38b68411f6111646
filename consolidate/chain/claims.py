"""One command at a time on a checkpoint: claims on what is written, and a last look at weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from consolidate.runtime.distributed import all_processes, is_first, summed
from formats.atomic import claimed, claimed_in_place
from formats.checkpoint import open_checkpoint, weight_records
from formats.digest import TensorRecord, differences
from formats.errors import InputError
from formats.fisher_folder import in_one_line


@contextmanager
def claiming(target: Path, *, part: str | None = None) -> Iterator[None]:
    """Claim what a command writes, in the first process; the others begin once it has it."""
    group = all_processes()
    claim: Any = nullcontext()
    if is_first(group):
        claim = claimed(target) if part is None else claimed_in_place(target, part)
    with claim:
        summed(group, 0)  # or one could open what the claim was waited for to replace
        yield


def refuse_changed(weights: Path, records: Mapping[str, TensorRecord], measured: Path) -> None:
    """Refuse to put a Fisher beside weights that are no longer those it was measured at.

    Other tools do not heed a claim. Every byte is read again, since sizes and times of files do not
    tell of all that may be done to them (through maps into memory, or on a network file system),
    and that is little beside a pass over data.
    """
    lines = differences(records, weight_records(open_checkpoint(weights).weights))
    if lines:
        raise InputError(
            f"{measured}: its weights changed while their Fisher was measured "
            f"({in_one_line(lines, 2)}), and nothing was written: start again once nothing else "
            "writes there"
        )
