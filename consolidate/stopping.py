"""Stopping where it costs least: a signal can wait for the next point that work can go on from."""

from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C, so that nothing half-written stays behind."""

    exit_code = 143


STOPS = (KeyboardInterrupt, Terminated)

_waits = False  # whether what is being done now should come to such a point first
_asked: type[BaseException] | None = None


def ask(reason: type[BaseException]) -> bool:
    """Ask what is being done to stop; called by a handler of signals.

    Args:
        reason: What is raised then.

    Returns:
        Whether that waits for the next point; if not, it is for the caller to raise. A Ctrl-C waits
        for nothing that was asked to stop before.
    """
    global _asked
    if not _waits or (_asked is not None and reason is KeyboardInterrupt):
        return False
    _asked = _asked or reason
    return True


def asked() -> bool:
    """Say whether this is the time to keep what was done, because a stop is waiting."""
    return _asked is not None


def stop_if_asked() -> None:
    """Raise what is waiting, if anything is."""
    global _asked
    if _asked is not None:
        reason, _asked = _asked, None
        raise reason


@contextmanager
def waiting(waits: bool = True) -> Iterator[None]:
    """Let a stop wait inside the block for `stop_if_asked`, or with false for nothing.

    Args:
        waits: False for a part of such a block that can be left at any moment.
    """
    global _waits, _asked
    before = _waits
    if not waits:
        stop_if_asked()
    try:
        _waits = waits
        yield
    except BaseException:
        _asked = None  # what is under way ends anyway
        raise
    finally:
        _waits = before
    if not before:
        stop_if_asked()
