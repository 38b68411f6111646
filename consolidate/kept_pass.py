"""What is kept of a long pass over the data, so that the same command can go on with it."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from consolidate.distributed import place_in
from consolidate.passes import PartialPass
from formats.atomic import partial_path
from formats.errors import InputError
from formats.partial_pass import read_partial, remove_partial, write_partial

LOG = logging.getLogger("consolidate")


class KeptPass:
    """What is kept of a long pass beside its target, so that the same command can go on with it."""

    def __init__(
        self,
        target: Path,
        digests: Mapping[str, Callable[[], str]],
        options: Mapping[str, Any],
        *,
        every: float,
        result_bytes: int,
        restart: bool = False,
        group: ProcessGroup | None = None,
    ):
        """Prepare to keep a pass.

        Args:
            target: The folder that the command will write.
            digests: Functions that give the digests of what the result depends on; called when
                something is kept, or was.
            options: The options that the result depends on, as JSON.
            every: Seconds between two times.
            result_bytes: What the command will write; nothing is kept that would leave less room.
            restart: Throw away what was kept.
            group: The processes that share the pass; each keeps its own part.
        """
        self._target = target
        self._digests = digests
        self._process, processes = place_in(group)
        self._options = {**options, "processes": processes}
        self._every = every
        self._result_bytes = result_bytes
        self._command: dict[str, Any] = {}
        self._last = time.monotonic()
        if restart:
            remove_partial(target, self._process)

    def start(self) -> PartialPass | None:
        """Return where a pass of the same command was broken off; None where none was.

        Raises:
            InputError: Something else was kept; the message says what differs.
        """
        if not partial_path(self._target, self._process).is_file():
            return None
        stored = read_partial(self._target, self._described(), self._process)
        return PartialPass(stored.tensors, stored.state["levels"], stored.state["most"])

    def keep(self, partial: PartialPass) -> None:
        """Keep this if it is time to; a pass goes on where that fails."""
        if time.monotonic() - self._last < self._every:
            return
        state = {"levels": partial.levels, "most": partial.most}
        try:
            self._leave_room(sum(tensor.nbytes for tensor in partial.tensors.values()))
            write_partial(self._target, partial.tensors, state, self._described(), self._process)
        except (InputError, OSError) as error:
            LOG.info("what was measured so far cannot be kept, and the pass goes on: %s", error)
            self._every = math.inf
        self._last = time.monotonic()

    def remove(self) -> None:
        """Throw away what was kept, once the result is written."""
        remove_partial(self._target, self._process)

    def _leave_room(self, size: int) -> None:
        path = partial_path(self._target, self._process)
        place = next(folder for folder in path.parents if folder.exists())
        free = shutil.disk_usage(place).free + (path.stat().st_size if path.is_file() else 0)
        if free < size + self._result_bytes:
            raise InputError(
                f"{place} has room for {free:,} bytes, and beside the {size:,} of the half-done "
                f"pass the result needs {self._result_bytes:,}"
            )

    def _described(self) -> dict[str, Any]:
        if not self._command:
            digests = {name: digest() for name, digest in self._digests.items()}
            self._command = {**digests, **self._options}
        return self._command
