"""`NN-NAME.json` beside a checkpoint of a run: what it was made from, and its result."""

import json
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins

from formats.atomic import write_file
from formats.conversion import converted, strict_json
from formats.errors import InputError

FORMAT = "consolidate-run-step"
VERSION = 1


class StepRecord(Struct, frozen=True, omit_defaults=True):
    """One step of a run, identified by digests and options, without times or paths."""

    made_from: dict[str, Any]
    made: dict[str, Any] | None  # digests of its output, once it is finished
    replaces: dict[str, Any] | None = None  # until then, those of the earlier output


def write_step_record(path: Path, record: StepRecord) -> None:
    """Write a record atomically; the same content gives the same bytes."""
    content = {"format": FORMAT, "version": VERSION, **to_builtins(record)}
    write_file(path, json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def read_step_record(path: Path) -> StepRecord | None:
    """Read a record, None where there is none; any other file is refused."""
    if not path.exists():
        return None
    try:
        content = strict_json(path.read_bytes())
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise ValueError
        return converted(content, StepRecord, str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (InputError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{path} is not a step record of `consolidate run`; move it away, or choose another "
            "output folder"
        ) from None
