"""What is kept of long work beside its target, so that the same command can go on with it."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from consolidate import stopping
from consolidate.distributed import place_in
from consolidate.made_from import changes, plain
from consolidate.passes import PartialPass
from formats.atomic import partial_path
from formats.errors import InputError
from formats.partial_work import StoredWork, read_partial, remove_partial, write_partial

LOG = logging.getLogger("consolidate")


class KeptWork:
    """What is kept of a command's work beside its target."""

    def __init__(
        self,
        target: Path,
        description: Callable[[], Mapping[str, Any]],
        *,
        every: float,
        result_bytes: int,
        restart: bool = False,
        group: ProcessGroup | None = None,
    ):
        """Prepare to keep work.

        Args:
            target: The folder that the command will write.
            description: Gives what the result depends on, JSON-ready; called when something is
                kept, or was.
            every: Seconds between two times.
            result_bytes: What the command will write; nothing is kept that would leave less room.
            restart: Throw away what was kept.
            group: The processes that work together; each keeps its own part.
        """
        self._target = target
        self._command = cache(lambda: plain(description()))
        self._every = every
        self._result_bytes = result_bytes
        self._last = time.monotonic()
        self._process = place_in(group)[0]
        if restart:
            remove_partial(target, self._process)

    def start(self) -> StoredWork | None:
        """Return where work of the same command was broken off; None where none was.

        Raises:
            InputError: Something else was kept; the message says what differs.
        """
        stored = read_partial(self._target, self._process)
        if stored is not None and (changed := changes(stored.command, self._command())):
            path = partial_path(self._target, self._process)
            raise InputError(
                f"{path} is of a run that was broken off, but not of this one ({changed}): start "
                "that command again, or --restart throws it away"
            )
        return stored

    def due(self) -> bool:
        """Say whether it is time to keep what was done, by the clock or because a stop waits."""
        return stopping.asked() or time.monotonic() - self._last >= self._every

    def keep(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], what: str) -> None:
        """Keep this; where that fails the work goes on, and nothing more is kept.

        Args:
            tensors: What was computed so far.
            state: How far the work is, JSON-ready.
            what: The word for the work in a note.
        """
        if self._every == math.inf:
            return
        try:
            self._leave_room(sum(tensor.nbytes for tensor in tensors.values()), what)
            write_partial(self._target, tensors, state, self._command(), self._process)
        except (InputError, OSError) as error:
            LOG.info("what was done so far cannot be kept, and the %s goes on: %s", what, error)
            self._every = math.inf
        self._last = time.monotonic()

    def stop_if_asked(self, where: str) -> None:
        """Stop where work can go on, if that was asked for, and say so.

        Args:
            where: How far the work is, such as ``after step 3 of 10``.
        """
        if stopping.asked():
            how = "the same command goes on from there" if self._every < math.inf else "not kept"
            LOG.info("stopped %s: %s", where, how)
        stopping.stop_if_asked()

    def remove(self) -> None:
        """Throw away what was kept, once the result is written."""
        remove_partial(self._target, self._process)

    def remove_own(self) -> None:
        """Throw away what was kept if it is of this command, whose result is there."""
        with suppress(InputError):
            if self.start() is not None:
                self.remove()

    def _leave_room(self, size: int, what: str) -> None:
        path = partial_path(self._target, self._process)
        place = next(folder for folder in path.parents if folder.exists())
        free = shutil.disk_usage(place).free + (path.stat().st_size if path.is_file() else 0)
        if free < size + self._result_bytes:
            raise InputError(
                f"{place} has room for {free:,} bytes, and beside the {size:,} of the half-done "
                f"{what} the result needs {self._result_bytes:,}"
            )


class KeptTraining:
    """A training, as part of a command's work."""

    def __init__(self, work: KeptWork, found: StoredWork | None, state: Mapping[str, Any]):
        """Prepare to keep a training.

        Args:
            work: Where it is kept.
            found: What was kept of it.
            state: What is kept beside it, JSON-ready; looked at whenever something is kept.
        """
        self._work = work
        self._found = found
        self._state = state
        self.due = work.due
        self.stop_if_asked = work.stop_if_asked

    def start(self) -> StoredWork | None:
        """Return where the training was broken off; None where it was not begun."""
        found, self._found = self._found, None
        return found if found is not None and "training" in found.state else None

    def keep(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Keep the state of the training."""
        self._work.keep(tensors, {**self._state, "training": numbers}, "training")


class KeptPass:
    """A pass over data for the Fisher, as part of a command's work."""

    def __init__(
        self,
        work: KeptWork,
        found: StoredWork | None,
        tensors: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
    ):
        """Prepare to keep a pass.

        Args:
            work: Where it is kept.
            found: What was kept of it.
            tensors: What is kept beside it: what was done before the pass.
            state: Likewise.
        """
        self._work = work
        self._found = found
        self._tensors = dict(tensors or {})
        self._state = dict(state or {})
        self._has_kept = found is not None and "levels" in found.state

    def start(self) -> PartialPass | None:
        """Return where the pass was broken off; None where it was not begun."""
        found, self._found = self._found, None
        if found is None or "levels" not in found.state:
            return None
        tensors = {
            name.removeprefix("pass/"): tensor
            for name, tensor in found.tensors.items()
            if name.startswith("pass/")
        }
        return PartialPass(tensors, found.state["levels"], found.state["most"])

    def keep(self, partial: PartialPass) -> None:
        """Keep this if it is time to, and stop there if that was asked for."""
        if self._work.due():
            tensors = {f"pass/{name}": tensor for name, tensor in partial.tensors.items()}
            state = {"levels": partial.levels, "most": partial.most}
            self._work.keep(self._tensors | tensors, self._state | state, "pass")
            self._has_kept = True
        self._work.stop_if_asked(f"after {partial.examples} examples")

    def keep_what_was_before(self) -> None:
        """Keep what was done before the pass, if that is not kept with a part of the pass."""
        if not self._has_kept:
            self._work.keep(self._tensors, self._state, "training")
