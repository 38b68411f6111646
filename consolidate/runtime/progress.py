"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from consolidate.runtime.torchrun import rank

LOG = logging.getLogger("consolidate")
SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress(label: str, total: int, unit: str, before: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how far a pass over `total` units has come; yield a function to tell what was done."""
    start = last = time.monotonic()
    done = 0
    with tqdm(
        total=total,
        initial=before,  # what an interrupted pass had done
        desc=label,
        unit=f" {unit}",
        file=sys.stderr,
        disable=None if rank() == 0 else True,
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
