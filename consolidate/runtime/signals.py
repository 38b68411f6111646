"""Stopping where it costs least: a signal can wait for the next point that work can go on from.

Of several processes all stop at one such point, or none: each says what it was asked for, and what
they say is summed.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_TOGETHER = "all processes stop here"


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C, so that nothing half-written stays behind."""

    exit_code = 143


STOPS = (KeyboardInterrupt, Terminated)

_waits = False  # whether what is being done now should come to such a point first
_asked: type[BaseException] | None = None


def ask(reason: type[BaseException]) -> bool:
    """Ask what is being done to stop; False if it does not wait, and the handler is to raise."""
    global _asked
    # A Ctrl-C waits for nothing that was asked to stop before.
    if not _waits or (_asked is not None and reason is KeyboardInterrupt):
        return False
    _asked = _asked or reason
    return True


def asked() -> bool:
    """Say whether this is the time to keep what was done, because a stop is waiting."""
    return _asked is not None


def wishes() -> tuple[bool, bool]:
    """Say whether a Ctrl-C and whether a SIGTERM waits, to be summed over processes."""
    return _asked is KeyboardInterrupt, _asked is Terminated


def stop_together(interrupted: float, terminated: float) -> None:
    """Raise in all processes what any of them was asked for, as `stopped_together` tells."""
    if interrupted or terminated:
        raise (Terminated if terminated else KeyboardInterrupt)(_TOGETHER)


def stopped_together(stop: BaseException) -> bool:
    """Say whether all processes stop here: then they can keep what belongs together."""
    return stop.args == (_TOGETHER,)


def until_asked(items: Iterable[T]) -> Iterator[T]:
    """Yield items until a stop waits, as all are in vain then; the first in any case."""
    for number, item in enumerate(items):
        if number and asked():
            return
        yield item


def stop_if_asked() -> None:
    """Raise what is waiting, if anything is."""
    global _asked
    if _asked is not None:
        reason, _asked = _asked, None
        raise reason


@contextmanager
def waiting(waits: bool = True) -> Iterator[None]:
    """Let a stop wait for `stop_if_asked` inside the block; with false, for nothing there."""
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
