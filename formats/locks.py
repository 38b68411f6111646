"""Lock files: a process holds one until it is done or dies, and one that nobody holds is stale."""

import errno
import fcntl
import os
import stat
import time
from contextlib import ExitStack, suppress
from enum import Enum
from pathlib import Path

from formats.errors import InputError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


class Lock(Enum):
    """What came of an attempt to take a lock file."""

    TAKEN = "ours"
    BUSY = "locked by another process"
    UNKNOWN = "not supported by this file system"


def try_lock(path: Path, cleanup: ExitStack) -> Lock:
    """Take the lock file until `cleanup` closes, if nobody holds it."""
    while True:
        # A stranger's checkpoint may bring a link of this name, to a file of the user's.
        if path.is_symlink() or (path.exists() and not _is_own_file(path)):
            raise InputError(
                f"{path} is a link: expected a file that only this folder holds; remove it"
            )
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno == errno.EWOULDBLOCK:
                return Lock.BUSY
            if error.errno in _NO_LOCKS:
                path.unlink(missing_ok=True)
                return Lock.UNKNOWN
            raise
        # The holder deletes the file before it releases it: then this locks a deleted file.
        if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            cleanup.callback(os.close, descriptor)
            cleanup.callback(path.unlink, missing_ok=True)
            return Lock.TAKEN
        os.close(descriptor)


def lock_soon(path: Path, cleanup: ExitStack) -> Lock:
    """Take a lock file, and wait for who holds it only for a moment: to look, or to remove it."""
    for _ in range(20):
        if (found := try_lock(path, cleanup)) is not Lock.BUSY:
            break
        time.sleep(0.05)
    return found


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove the files in a folder that killed commands left: nobody locks them."""
    for path in folder.glob(pattern):
        with suppress(OSError, InputError), ExitStack() as moment:
            try_lock(path, moment)


def _is_own_file(path: Path) -> bool:
    """Say whether a file has no other name; one that was just removed counts as such."""
    with suppress(FileNotFoundError):
        found = path.lstat()
        return not stat.S_ISREG(found.st_mode) or found.st_nlink < 2
    return True
