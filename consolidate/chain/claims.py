"""Claims on outputs, so that one command at a time writes there; a last check of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from consolidate.runtime.distributed import all_processes, is_first, summed
from formats.atomic import claimed, claimed_in_place, recover
from formats.checkpoint import open_checkpoint, weight_records
from formats.digest import TensorRecord, differences
from formats.errors import InputError
from formats.fisher_folder import in_one_line


@contextmanager
def claiming(target: Path, *, part: str | None = None) -> Iterator[None]:
    """Claim a command's output in the first process; the other processes wait for the claim."""
    group = all_processes()
    claim: Any = nullcontext()
    if is_first(group):
        claim = claimed(target) if part is None else claimed_in_place(target, part)
    with claim:
        if is_first(group):  # else one could be refused while another removes what was left
            recover(target if part is None else target / part)
        summed(group, 0)  # else another process could open an output that is being replaced
        yield


def refuse_changed(
    weights: Path,
    records: Mapping[str, TensorRecord],
    measured: Path,
    *,
    meanwhile: str = "their Fisher was measured",
) -> None:
    """Refuse to put a Fisher beside weights that are no longer those it was measured at.

    Other tools ignore a claim. Every byte is read again, since sizes and times of files miss some
    writes (through memory maps, or on a network file system); that costs little beside a pass.
    """
    lines = differences(records, weight_records(open_checkpoint(weights).weights))
    if lines:
        raise InputError(
            f"{measured}: the weights changed while {meanwhile} ({in_one_line(lines, 2)}); nothing "
            "was written: run the command again once nothing else writes there"
        )
