"""Stopping where it costs least: a signal can wait for the next point that work can resume from.

Several processes all stop at the same point or not at all: the requests of all are summed.
"""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_TOGETHER = "all processes stop here"


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C, so that no half-written file is left behind."""

    exit_code = 143


STOPS = (KeyboardInterrupt, Terminated)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_waits = False  # whether the current work should reach such a point first
_asked: type[BaseException] | None = None


def ask(reason: type[BaseException]) -> bool:
    """Request a stop; False if the current work does not wait, so that the handler must raise."""
    global _asked
    # A Ctrl-C after an earlier request does not wait.
    if not _waits or (_asked is not None and reason is KeyboardInterrupt):
        return False
    _asked = _asked or reason
    return True


def asked() -> bool:
    """Return whether a stop is pending, so that progress should be saved now."""
    return _asked is not None


def wishes() -> tuple[bool, bool]:
    """Return whether a Ctrl-C and whether a SIGTERM is pending, to be summed over processes."""
    return _asked is KeyboardInterrupt, _asked is Terminated


def stop_together(interrupted: float, terminated: float) -> None:
    """Raise in all processes what is pending in any, marked for `stopped_together`."""
    if interrupted or terminated:
        raise (Terminated if terminated else KeyboardInterrupt)(_TOGETHER)


def stopped_together(stop: BaseException) -> bool:
    """Return whether all processes stop at this point, and so can save their progress together."""
    return stop.args == (_TOGETHER,)


def until_asked(items: Iterable[T]) -> Iterator[T]:
    """Yield the first item, and the others until a stop is pending, which makes them useless."""
    for number, item in enumerate(items):
        if number and asked():
            return
        yield item


def stop_if_asked() -> None:
    """Raise the pending stop, if there is one."""
    global _asked
    if _asked is not None:
        reason, _asked = _asked, None
        raise reason


@contextmanager
def waiting(waits: bool = True) -> Iterator[None]:
    """Let a stop wait for `stop_if_asked` inside the block; if false, raise it at once."""
    global _waits, _asked
    before = _waits
    if not waits:
        stop_if_asked()
    try:
        _waits = waits
        yield
    except BaseException:
        _asked = None  # the work ends anyway
        raise
    finally:
        _waits = before
    if not before:
        stop_if_asked()


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Let signals end the process inside the block, which waits where no handler of Python runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in _SIGNALS}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
