"""`NN-NAME.json` beside a checkpoint of a run: what it was made from, and what was made."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.atomic import write_file
from formats.errors import InputError

FORMAT = "consolidate-run-step"
VERSION = 1


@dataclass(frozen=True)
class StepRecord:
    """One step of a run, told by its content: digests and options, no time and no path.

    Attributes:
        made_from: what the step takes, JSON-ready.
        made: digests of what it left; None until it is finished.
    """

    made_from: dict[str, Any]
    made: dict[str, Any] | None


def write_step_record(path: Path, record: StepRecord) -> None:
    """Write a record whole: the same content, the same bytes.

    Raises:
        InputError: the disk is full or the place not writable.
    """
    content = {"format": FORMAT, "version": VERSION}
    content |= {"made_from": record.made_from, "made": record.made}
    write_file(path, json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def read_step_record(path: Path) -> StepRecord | None:
    """Read a record; None where there is none.

    Raises:
        InputError: there is a file that is no such record, or of another version.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError
        return StepRecord(dict(content["made_from"]), content["made"])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{path} is no record of a run that this program wrote: move it away, or choose "
            "another output folder"
        ) from None
