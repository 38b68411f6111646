"""Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing if quiet.

And the seconds that each phase took, for the result of a command.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from consolidate.runtime.torchrun import rank

LOG = logging.getLogger("consolidate")
SECONDS_BETWEEN_LINES = 30.0
_shown = True


@dataclass
class _Clock:
    """The seconds of each phase so far; those of a phase within another count for it alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    phases: list[str] = field(default_factory=list)  # the present one is the last
    last: float = 0.0

    def charge(self) -> None:
        """Count the time that has passed for the present phase."""
        now = time.perf_counter()
        if self.phases:
            phase = self.phases[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


_clock = _Clock()


def start_timing() -> None:
    """Count the seconds of phases from zero."""
    global _clock
    _clock = _Clock()


def seconds_of(phase: str) -> float:
    """Return the wall time in seconds that a phase has taken since the timing was started."""
    return round(_clock.seconds.get(phase, 0.0), 3)


@contextmanager
def _timed(phase: str) -> Iterator[None]:
    clock = _clock
    clock.charge()
    clock.phases.append(phase)
    try:
        yield
    finally:
        clock.charge()
        clock.phases.pop()


def show_progress(shown: bool) -> None:
    """Show bars from now on, or hide them; lines are notes, which the level of the log decides."""
    global _shown
    _shown = shown


@contextmanager
def progress(
    label: str, total: int, unit: str, before: int = 0, *, phase: str = ""
) -> Iterator[Callable[[int], None]]:
    """Show how far a pass over `total` units has come; yield a function that counts what is done.

    A bar shows the rate and the remaining time, as the lines do that replace it in a log. The
    seconds are those of `phase`, by default `label`.
    """
    from tqdm import tqdm

    start = last = time.monotonic()
    done = 0
    with (
        _timed(phase or label),
        tqdm(
            total=total,
            initial=before,  # what an interrupted pass had done
            desc=label,
            unit=f" {unit}",
            file=sys.stderr,
            disable=None if _shown and rank() == 0 else True,
            leave=False,
            dynamic_ncols=True,
        ) as bar,
    ):

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            bar.update(count)
            now = time.monotonic()
            if bar.disable and now - last >= SECONDS_BETWEEN_LINES and before + done < total:
                last = now
                rate = done / (now - start)
                left = (total - before - done) / rate
                words = "%s: %d of %d %s, %.3g/s, %.0f s left"
                LOG.info(words, label, before + done, total, unit, rate, left)

        yield advance
