"""One command at a time on a checkpoint: claims on what is written, and a last look at weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from consolidate.runtime.distributed import all_processes, is_first, summed
from formats.atomic import claimed, claimed_in_place
from formats.checkpoint import open_checkpoint, weight_records
from formats.digest import TensorRecord, differences
from formats.errors import InputError
from formats.fisher_folder import in_one_line

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def claiming(target: Path, *, part: str | None = None) -> Iterator[None]:
    """Claim what a command writes, in the first process; the others begin once it has it.

    Args:
        target: The folder that is to be made or replaced.
        part: The folder in it, where no more than that is.

    Raises:
        InputError: Another command is at work on it, or the place is not writable.
    """
    group = all_processes()
    claim: Any = nullcontext()
    if is_first(group):
        claim = claimed(target) if part is None else claimed_in_place(target, part)
    with claim:
        summed(group, 0)  # or one could open what the claim was waited for to replace
        yield


def claiming_output(command: Callable[P, R]) -> Callable[P, R]:
    """Claim ``output_dir`` for a command from its start to its end: a decorator."""

    @wraps(command)
    def with_claim(*arguments: P.args, **options: P.kwargs) -> R:
        target = signature(command).bind(*arguments, **options).arguments["output_dir"]
        with claiming(Path(target)):
            return command(*arguments, **options)

    return with_claim


def refuse_changed(weights: Path, records: Mapping[str, TensorRecord], measured: Path) -> None:
    """Refuse to put a Fisher beside weights that are no longer those it was measured at.

    Other tools do not heed a claim. Every byte is read again, since sizes and times of files do not
    tell of all that may be done to them (through maps into memory, or on a network file system),
    and that is little beside a pass over data.

    Args:
        weights: The checkpoint that the Fisher is to lie in.
        records: Of the weights that it was measured at.
        measured: Where these were.

    Raises:
        InputError: They differ; the message says which tensors and how.
    """
    lines = differences(records, weight_records(open_checkpoint(weights).weights))
    if lines:
        raise InputError(
            f"{measured}: its weights changed while their Fisher was measured "
            f"({in_one_line(lines, 2)}), and nothing was written: start again once nothing else "
            "writes there"
        )
