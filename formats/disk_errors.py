"""Errors of the disk in words: it is full, or a place cannot be written."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from formats.errors import InputError

NEW = ".consolidate-new"
"""End of the name of a folder that is being built; messages name the place it will have."""

FULL = {errno.ENOSPC, errno.EDQUOT}
FORBIDDEN = {
    errno.EACCES,
    errno.EBUSY,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.EXDEV,
}


@contextmanager
def explained(place: Path, numbers: set[int]) -> Iterator[None]:
    """Turn system errors of these numbers inside the block into an `InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise
        if error.errno in FULL:
            raise _full(place, "") from error
        what = "cannot be written"
        if error.errno in {errno.EBUSY, errno.EXDEV}:
            what = "cannot be replaced as a whole on this file system"
        raise InputError(f"{place} {what}: {error.strerror}; choose another folder") from error


@contextmanager
def explain_full_disk(place: Path, needed: int) -> Iterator[None]:
    """Turn a full disk inside the block into an `InputError` with the bytes needed and free."""
    existing = next((path for path in (place, *place.parents) if os.path.exists(path)), place)
    try:
        free = shutil.disk_usage(existing).free
        yield
    except OSError as error:
        if error.errno in FULL:
            sizes = f" ({needed:,} bytes needed, {free:,} were free)"
            raise _full(place, sizes) from error
        if error.errno == errno.EFBIG:
            path = final_path(Path(error.filename or place))
            raise InputError(
                f"{path}: the file exceeds the size limit (ulimit -f); nothing was changed; raise "
                "the limit"
            ) from error
        raise


def _full(place: Path, sizes: str) -> InputError:
    return InputError(
        f"{final_path(place)}: the disk or the quota is full{sizes}; "
        "nothing was changed; free space or choose another folder"
    )


def final_path(path: Path) -> Path:
    """Return where a path inside a staging folder will be once it is moved into place."""
    inside = re.compile(rf"(?s)\A\.(.+){re.escape(NEW)}\Z")
    return Path(*(inside.sub(r"\1", part) for part in path.parts if part != NEW))
