"""Files and folders that are replaced atomically: completely, or not at all.

A folder is built as a hidden sibling of its target, ``.NAME.consolidate-new``, and is moved into
place by one system call. Where the file system cannot exchange two folders, the old one is first
moved to ``.NAME.consolidate-old``; the names that exist are the journal, which shows `recover` how
far a killed run came. A mount point cannot be renamed: there the new content is built inside it,
and the names `_COMMIT` and `_PUBLISH` mark the two halves of the move. A writer locks a lock file,
so that no other process mistakes its work for that of a killed run; the system releases the lock
when the process ends.
"""

import ctypes
import errno
import glob
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from formats.disk_errors import FORBIDDEN, FULL, NEW, explain_full_disk, explained
from formats.errors import BusyError, InputError
from formats.locks import Lock, lock_soon, remove_stale, try_lock

# Inside a mount point: NEW is being built; COMMIT is complete, while the old content moves to OLD;
# PUBLISH is complete, while the new content moves in.
_OLD = ".consolidate-old"
_COMMIT = ".consolidate-commit"
_PUBLISH = ".consolidate-publish"
_LOCK = ".consolidate-lock"
_PARTIAL = ".consolidate-partial"
_CLAIM = ".consolidate-claim"
_TEMPORARY = ".consolidate-tmp"
_LONGEST_OF_FOLDER = len(f"..failed-forgetting{_PARTIAL}-9999-new")
_LONGEST_OF_FILE = len(f"..01234567{_TEMPORARY}")
_NOT_CONTENT = {NEW, _OLD, _COMMIT, _PUBLISH, _LOCK, _CLAIM, "lost+found"}
_UNLINKED = re.compile(r"\.(nfs|fuse_hidden)[0-9a-f]{16,}")
"""What NFS and FUSE keep of a removed file that is still in use."""

_READS = 5  # of a folder that is replaced again and again

T = TypeVar("T")

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def replace_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Build a folder beside its target and move it into place when the block succeeds.

    A link to a folder is followed: the folder it points to is replaced. Missing parents are
    created. On any exception the new content is discarded and the target is unchanged. A target
    that is not empty is replaced only with `overwrite`, the home and current folder never.
    """
    place = _Place(target)
    with ExitStack() as cleanup:
        with explained(place.target, FULL | FORBIDDEN):
            recover(target)
            _make_parents(place.target, cleanup)
            _lock_or_refuse(place, cleanup)
            _refuse_content(place, overwrite)
            _make_staging(place)
        try:
            with explained(place.target, FULL):
                yield place.new
            with explained(place.target, FULL | FORBIDDEN):
                _sync_tree(place.new)
                _refuse_content(place, overwrite)
                _put_in_place(place)
        finally:
            with explained(place.target, FULL | FORBIDDEN):
                _settle(place)


@contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Claim a target for the block, which may work for long before it calls `replace_folder`.

    A process that dies releases its claim; the file that it leaves behind is stale and harmless.
    """
    check_target(target, overwrite=True)
    with ExitStack() as cleanup:
        _claim(_Place(target), cleanup)
        yield


@contextmanager
def claimed_in_place(folder: Path, part: str) -> Iterator[None]:
    """Claim a folder and the part of it to be replaced, so that no other process replaces them."""
    check_target(folder / part, overwrite=True)
    place = _Place(folder)
    with ExitStack() as cleanup:
        # Without permission to write beside a folder one cannot replace it, but may write into it.
        if os.access(place.claim.parent, os.W_OK):
            _claim(place, cleanup)
        _claim(_Place(folder / part), cleanup)
        yield


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Refuse, before any work is done, a target that `replace_folder` would refuse after it."""
    place = _Place(target)
    _check_name(place.target, _LONGEST_OF_FOLDER)
    _refuse_content(place, overwrite)
    _check_parent(target, [*([place.target] if place.mounted else []), *place.target.parents])


def check_leavings(target: Path) -> None:
    """Refuse, before any work is done, what another run left and `recover` cannot settle.

    That is where files cannot be locked or removed.
    """
    place = _Place(target)
    if any(map(os.path.exists, place.leavings)):
        with explained(place.target, FULL | FORBIDDEN), ExitStack() as cleanup:
            if _lock_or_refuse(place, cleanup) is Lock.TAKEN:
                _settle(place)
            _refuse_leavings(place)


def recover(target: Path) -> None:
    """Complete or roll back a killed `replace_folder` of this target.

    Does nothing while another process writes the target, but waits a moment where there is no
    target, as that process may be about to restore it. Cheap where nothing was left behind.
    """
    place = _Place(target)
    if not any(map(os.path.exists, place.leavings)):
        return
    take = try_lock if os.path.exists(place.target) else lock_soon
    try:
        with ExitStack() as cleanup:
            if take(place.lock, cleanup) is Lock.TAKEN:
                _settle(place)
    except OSError as error:
        halfway = [place.target / _COMMIT, place.target / _PUBLISH]
        if os.path.isdir(place.target) and not any(map(os.path.exists, halfway)):
            return
        raise InputError(
            f"{place.target}: a run was killed while it replaced this folder, which cannot be "
            f"restored: {error.strerror}; make its parent folder writable and try again"
        ) from error


def unreplaced(path: Path, read: Callable[[], T]) -> T:
    """Read a checkpoint, and again if it was replaced meanwhile.

    A folder is replaced in one step, but its files are opened one after the other, so that some
    can be the old ones.
    """
    for _ in range(_READS - 1):
        before = _identity(path)
        try:
            return read()
        except (InputError, OSError):
            if _identity(path) == before:
                raise
    return read()


def _identity(path: Path) -> list[tuple[int, int, int] | None]:
    """Identify a folder and its Fisher, either of which can be replaced."""
    found: list[tuple[int, int, int] | None] = []
    for part in (path, path / "fisher"):
        try:
            status = os.stat(part)
        except OSError:
            found.append(None)
        else:  # an inode's number is used again, with another time
            found.append((status.st_dev, status.st_ino, status.st_ctime_ns))
    return found


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file atomically: into a temporary sibling, synced, then renamed to the path.

    Links are followed, missing parents are created, and text is stored as UTF-8. Temporary siblings
    of this path that killed commands left are removed.
    """
    path = Path(os.path.realpath(path))
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    with explained(path, FORBIDDEN), explain_full_disk(path, len(content)), ExitStack() as moment:
        path.parent.mkdir(parents=True, exist_ok=True)
        moment.callback(temporary.unlink, missing_ok=True)
        lock = lock_soon(temporary, moment)  # a sibling that is not locked was left
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        if lock is Lock.TAKEN:
            remove_stale(path.parent, f".{glob.escape(path.name)}.*{_TEMPORARY}")
        _sync(path.parent)


def check_file(path: Path) -> None:
    """Refuse, before the work, a file that could not be written after it."""
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; name a file")
    if os.path.exists(path) and not os.path.isfile(path):  # it would be replaced
        raise InputError(f"{path} is a device or a pipe; name a file")
    place = Path(os.path.realpath(path))
    _check_name(place, _LONGEST_OF_FILE)
    _check_parent(path, place.parents)


def check_own_file(path: Path, kind: str, is_own: Callable[[str], bool]) -> None:
    """Refuse, before the work, a file that could not be written, or whose content is another's.

    Args:
        path: It may exist.
        kind: What the command writes, for the message.
        is_own: Whether the text of an existing file is such a thing.
    """
    check_file(path)
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if text.strip() and not is_own(text):
        raise InputError(
            f"{path} already exists and is not {kind}: choose another name, or remove it first"
        )


def has_content(target: Path) -> bool:
    """Return whether a folder exists and contains more than the files of this module."""
    return target.is_dir() and any(_is_content(entry.name) for entry in target.iterdir())


def partial_path(target: Path, process: int = 0) -> Path:
    """Return the file of a process's saved progress beside a target (in it, at a mount point)."""
    place = _Place(target)
    ending = _PARTIAL if process == 0 else f"{_PARTIAL}-{process}"
    if place.mounted:
        return place.target / ending
    return place.target.with_name(f".{place.target.name}{ending}")


class _Place:
    """The paths that replacing one target needs."""

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target))
        if not self.target.name:
            raise InputError(f"{target} is the root of the file system; choose another folder")
        try:
            str(self.target).encode()
        except UnicodeEncodeError:
            shown = os.fsencode(self.target).decode(errors="backslashreplace")
            raise InputError(
                f"{shown}: the path is not UTF-8, and safetensors reads no other; rename the folder"
            ) from None
        self.mounted = is_mount(self.target)
        self.new, self.old, self.lock, self.claim = (
            self.target / name
            if self.mounted
            else self.target.with_name(f".{self.target.name}{name}")
            for name in (NEW, _OLD, _LOCK, _CLAIM)
        )
        self.leavings = [self.new, self.old, self.lock]
        if self.mounted:
            self.leavings += [self.target / _COMMIT, self.target / _PUBLISH]


def _make_parents(target: Path, cleanup: ExitStack) -> None:
    """Create the missing parents; those that stay empty are removed again."""
    for folder in reversed(target.parents):
        if not folder.exists():
            folder.mkdir(exist_ok=True)
            cleanup.callback(_remove_if_empty, folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _is_content(name: str) -> bool:
    own = name in _NOT_CONTENT or name.startswith(_PARTIAL)
    return not own and _UNLINKED.fullmatch(name) is None


def _refuse_content(place: _Place, overwrite: bool) -> None:
    target = place.target
    if os.path.islink(target):  # although resolved
        raise InputError(f"{target} is a link that leads to itself; remove it")
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file; name a folder to write into")
    content = sorted(entry.name for entry in target.iterdir() if _is_content(entry.name))
    if content and not overwrite:
        raise InputError(
            f"{target} is not empty: found {content[0]!r} ({len(content)} entries in all); "
            "choose another folder, or replace all of it with --overwrite"
        )
    if not content and place.mounted:  # which stays where it is
        return
    for what, keep in (("your home", os.path.expanduser("~")), ("the current", ".")):
        if Path(os.path.realpath(keep)).is_relative_to(target):
            raise InputError(
                f"{target} contains {what} folder, which is never replaced; choose another folder"
            )


def _check_name(place: Path, ending: int) -> None:
    """Refuse a name to which the longest ending of a hidden sibling cannot be added."""
    parent = next(folder for folder in place.parents if folder.exists())
    size, limit = len(os.fsencode(place.name)), os.pathconf(parent, "PC_NAME_MAX")
    if 0 <= limit < size + ending:
        raise InputError(
            f"{place}: the name has {size} bytes: expected at most {limit - ending}, since the "
            "names of temporary files beside it are longer; choose a shorter name"
        )


def _check_parent(given: Path, above: Iterable[Path]) -> None:
    """Refuse a place if the nearest existing one of the folders above is not a writable folder."""
    parent = next(folder for folder in above if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"{given} cannot be created: {parent} is not a writable folder; choose another place"
        )


def _lock_or_refuse(place: _Place, cleanup: ExitStack) -> Lock:
    if (found := lock_soon(place.lock, cleanup)) is Lock.BUSY:
        raise BusyError(
            f"{place.target}: another process is writing this folder; wait until it ends"
        )
    return found


def _claim(place: _Place, cleanup: ExitStack) -> None:
    """Hold the claim on a place until `cleanup` closes, or refuse."""
    with explained(place.target, FULL | FORBIDDEN | {errno.ENOENT}):  # as in /proc
        _make_parents(place.claim, cleanup)
        try:
            found = lock_soon(place.claim, cleanup)
        except PermissionError as error:
            if not place.claim.exists():
                raise
            raise InputError(
                f"{place.claim} was left by another user: remove it, or choose another folder"
            ) from error
        if found is Lock.BUSY:
            number = place.claim.read_text()
            holder = f"process {number}" if number else "another process"
            raise BusyError(
                f"{place.target} is in use by {holder}, which has locked {place.claim}; wait until "
                "it ends, or choose another folder"
            )
        with suppress(OSError):  # where files cannot be locked, or the disk is full
            if place.claim.exists():
                write = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
                with open(os.open(place.claim, write), "w") as claim:
                    claim.write(f"{os.getpid()} on {platform.node()}")
        remove_stale(place.claim.parent, f".*{_CLAIM}")


def _refuse_leavings(place: _Place) -> None:
    """Refuse what another run left and `recover` cannot settle: without locks, or another's."""
    for leaving in (place.new, place.old):
        if leaving.exists():
            keep = leaving == place.old and not place.target.exists()
            remedy = f"rename it to {place.target.name}" if keep else "remove it"
            raise InputError(
                f"{leaving} was left by another run; {remedy} if no other run is active"
            )


def _make_staging(place: _Place) -> None:
    _refuse_leavings(place)
    place.new.mkdir()
    if place.target.is_dir() and not place.mounted:
        shutil.copymode(place.target, place.new)


def _put_in_place(place: _Place) -> None:
    """Commit the staging folder; `_settle` does what is left to do."""
    target = place.target
    if place.mounted:
        os.rename(place.new, target / _COMMIT)
        _sync(target)
        return
    if not target.is_dir() or not any(target.iterdir()):
        os.rename(place.new, target)
    elif not _exchange(place.new, target):
        os.rename(target, place.old)
        _sync(target.parent)
        os.rename(place.new, target)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; false where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    done = renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _settle(place: _Place) -> None:
    """Bring the target into its complete old or new state, and remove everything else."""
    target, new, old = place.target, place.new, place.old
    if place.mounted:
        _move_in(target, old)
    elif old.is_dir() and not target.exists():
        # The old folder is moved away only once the new one is complete.
        os.rename(new if new.is_dir() else old, target)
        _sync(target.parent)
    for leaving in (new, old):
        # What cannot be removed affects only the next writer, which reports it.
        shutil.rmtree(leaving, ignore_errors=True)


def _move_in(target: Path, old: Path) -> None:
    commit, publish = target / _COMMIT, target / _PUBLISH
    if commit.is_dir():
        old.mkdir(exist_ok=True)
        for entry in sorted(target.iterdir()):
            if _is_content(entry.name):
                os.rename(entry, old / entry.name)
        _sync(target)
        os.rename(commit, publish)
        _sync(target)
    if publish.is_dir():
        for entry in sorted(publish.iterdir(), key=_publishing_order):
            os.rename(entry, target / entry.name)
        _sync(target)
        publish.rmdir()


def _publishing_order(entry: Path) -> tuple[bool, bool, str]:
    """Sort last what makes the folder complete for a reader: the index, then the ledger."""
    ledger = entry.name == "fisher" or entry.name == "fisher.json"
    return ledger, entry.name.endswith(".index.json"), entry.name


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems sync no folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF) or not path.is_dir():
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


def is_mount(target: Path) -> bool:
    """Whether a folder is a mount point; bind mounts show only in the kernel's table."""
    if os.path.ismount(target):
        return True
    try:
        table = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return False
    places = {line.split()[4] for line in table.splitlines()}
    escaped = re.sub(rb"[\s\\]", lambda match: b"\\%03o" % ord(match[0]), os.fsencode(target))
    return escaped in places
