"""Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing if quiet."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from consolidate.runtime.torchrun import rank

LOG = logging.getLogger("consolidate")
SECONDS_BETWEEN_LINES = 30.0
_shown = True


def show_progress(shown: bool) -> None:
    """Show bars from now on, or hide them; lines are notes, which the level of the log decides."""
    global _shown
    _shown = shown


@contextmanager
def progress(label: str, total: int, unit: str, before: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how far a pass over `total` units has come; yield a function that counts what is done.

    A bar shows the rate and the remaining time, as the lines do that stand for it in a log.
    """
    from tqdm import tqdm

    start = last = time.monotonic()
    done = 0
    with tqdm(
        total=total,
        initial=before,  # what an interrupted pass had done
        desc=label,
        unit=f" {unit}",
        file=sys.stderr,
        disable=None if _shown and rank() == 0 else True,
        leave=False,
        dynamic_ncols=True,
    ) as bar:

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
