"""Saved progress of long work beside its target, from which the same command resumes."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from consolidate.chain.fingerprint import changes, plain
from consolidate.chain.rank_progress import (
    PASS,
    gather_own,
    start_with_first,
    start_with_set,
    write_set,
)
from consolidate.estimation.passes import PartialPass
from consolidate.models.sampling import Written
from consolidate.runtime import signals
from consolidate.runtime.distributed import place_in, summed
from consolidate.training.state import OWN, Descent, load_training, training_state
from formats.atomic import partial_path
from formats.errors import InputError
from formats.partial_work import StoredWork, read_partial, remove_partial, write_partial

LOG = logging.getLogger("consolidate")
WORK_TO_SAVING = 9.0
"""The next save waits at least this many times as long as the last one took."""
LONGEST_WAIT = 12.0
"""But no longer than this many times `every`: a save may be slow by chance."""
RETRY_SECONDS = 60.0
"""At least so long after a save that failed the next one is tried, but for a stop."""


class KeptWork:
    """Saved progress of a command beside its target."""

    def __init__(
        self,
        target: Path,
        description: Callable[[], Mapping[str, Any]],
        *,
        every: float,
        result_bytes: int,
        restart: bool = False,
        group: ProcessGroup | None = None,
        shard: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepare to save progress of work that `description` describes; called only if needed.

        `every` is in seconds; `result_bytes` are left free on the disk for the result.
        """
        self._target = target
        self._command = cache(lambda: plain(description()))
        self._every = every
        self._result_bytes = result_bytes
        self._clock = clock
        self._last = clock()
        self._failed = False  # whether the last attempt to save did
        self._process = place_in(group)[0]
        self.group = group
        self.shard = shard
        self.due = False  # whether to save now, as the processes agreed, by the clock or a stop
        self._stop: tuple[float, float] = (0, 0)
        if restart:
            remove_partial(target, self._process)

    def start(self) -> StoredWork | None:
        """Return saved progress of the same command, and refuse that of another."""
        if self.shard:
            return start_with_set(self._target, self._refuse_others, self.group)
        stored = read_partial(self._target, self._process)
        self._refuse_others(stored)
        return start_with_first(stored, self.group)

    def check(self) -> None:
        """Refuse saved progress of another command, without reading its tensors."""
        self._refuse_others(read_partial(self._target, self._process, whole=False))

    def settle(self, *numbers: float, alone: bool = False) -> list[float]:
        """Agree among all processes whether to save progress and whether to stop.

        Other numbers are summed at the same time, and returned; with `alone`, of this process only.
        """
        group = None if alone else self.group
        late = (group is None or self._process == 0) and self._clock() - self._last >= self._every
        *sums, due, interrupted, terminated = summed(group, *numbers, late, *signals.wishes())
        self._stop = interrupted, terminated
        self.due = bool(due) or self.stops
        return sums

    @property
    def stops(self) -> bool:
        """Whether the processes agreed to stop."""
        return any(self._stop)

    def keep(
        self,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        what: str,
        *,
        own: bool = False,
    ) -> bool:
        """Save this; where that fails the work continues, and the next save is tried in its turn.

        With `own` each process saves its own part, not the first one for all.

        Returns:
            Whether this process saved something.
        """
        if self._every == math.inf or not (own or self.shard or self._process == 0):
            return False
        size = sum(tensor.nbytes for tensor in tensors.values())
        command, began = self._command(), self._clock()
        try:
            if self.shard:
                room = partial(self._leave_room, size, what)
                write_set(self._target, tensors, state, command, room, self.group)
            else:
                self._leave_room(size, what)
                write_partial(self._target, tensors, state, command, self._process)
        except (InputError, OSError) as error:
            if not self._failed:
                note = "progress cannot be saved, and the %s continues: %s; saving is tried again"
                LOG.info(note, what, error)
            self._failed = True
            self._last = self._clock() + max(0.0, RETRY_SECONDS - self._every)
            return False
        if self._failed:
            LOG.info("progress is saved again")
        self._failed = False
        self._last = now = self._clock()
        if self._every > 0:
            wait = min(WORK_TO_SAVING * (now - began), LONGEST_WAIT * self._every)
            self._last += max(0.0, wait - self._every)
        return True

    def can_keep(self, stop: BaseException, *, gathers: bool = False) -> bool:
        """Say whether progress can be saved at a stop.

        Where not all processes stop, only what the first one has can be saved.
        """
        together = self.group is None or signals.stopped_together(stop)
        return together or not (gathers or self.shard)

    def stop_if_asked(self, where: str) -> None:
        """Stop where work can resume, if that was agreed, and log where: ``after step 3 of 10``."""
        if self.stops:
            saves = self._every < math.inf and not self._failed
            how = "the same command resumes from there" if saves else "this progress is not saved"
            LOG.info("stopped %s: %s", where, how)
        signals.stop_together(*self._stop)

    def remove(self) -> None:
        """Discard saved progress, once the result is written."""
        remove_partial(self._target, self._process)

    def remove_own(self) -> None:
        """Discard saved progress if it is of this command, whose result exists."""
        with suppress(InputError):
            stored = read_partial(self._target, self._process, whole=False)
            self._refuse_others(stored)
            if stored is not None:
                self.remove()

    def _refuse_others(self, stored: StoredWork | None) -> None:
        if stored is not None and (changed := changes(stored.command, self._command())):
            path = partial_path(self._target, self._process)
            raise InputError(
                f"{path} holds saved progress of another run (changed: {changed}): start that "
                "command again, or discard it with --restart"
            )

    def _leave_room(self, size: int, what: str) -> None:
        path = partial_path(self._target, self._process)
        place = next(folder for folder in path.parents if folder.exists())
        replaced = path.stat().st_size if path.is_file() else 0
        among = self.group if self.shard else None
        size, replaced = (int(bytes_) for bytes_ in summed(among, size, replaced))
        free = shutil.disk_usage(place).free + replaced
        if free < size + self._result_bytes:
            raise InputError(
                f"{place}: not enough disk space: expected {size:,} bytes for the {what} so far "
                f"and {self._result_bytes:,} for the result, found {free:,}"
            )


@dataclass
class KeptTraining:
    """A training run, as part of a command's work; without it, as in a search, nothing is saved."""

    work: KeptWork | None = None
    found: StoredWork | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)  # read each time

    def load(self, descent: Descent) -> bool:
        """Resume from saved progress, if there is any; return whether."""
        found, self.found = self.found, None
        if found is None or "training" not in found.state:
            return False
        load_training(descent, found.tensors, found.state["training"])
        found.tensors.clear()  # they take as much memory as what they were copied to
        return True

    def after_step(self, descent: Descent, where: str) -> None:
        """Save the training if that is due, and stop there if that was requested."""
        if self.work is not None and self.work.due:
            self.keep(descent)
            self.work.stop_if_asked(where)

    def keep(self, descent: Descent) -> None:
        """Save the state of the training after its last step, if it has taken one."""
        if self.work is None or not descent.steps:
            return
        tensors, numbers = training_state(descent)
        if not self.work.shard:
            tensors = gather_own(tensors, OWN, self.work.group)
        self.work.keep(tensors, {**self.beside, "training": numbers}, "training")

    @contextmanager
    def keeping_if_stopped(self, descent: Descent) -> Iterator[None]:
        """Save the training at a stop inside the block, such as in a measurement."""
        try:
            yield
        except signals.STOPS as stop:
            if self.work is not None and self.work.can_keep(stop, gathers=True):
                self.keep(descent)
            raise

    def end(self, descent: Descent, where: str) -> None:
        """Save the training after its last step and stop there, if that was requested since."""
        if self.work is not None:
            self.work.settle()
            if self.work.stops:
                self.keep(descent)
                self.work.stop_if_asked(where)


def kept_texts(found: StoredWork | None) -> Written | None:
    """Give the generated texts in saved progress, if there are any."""
    if found is None or "generated" not in found.state:
        return None
    lengths = found.tensors["generated/lengths"].tolist()
    texts = found.tensors["generated/tokens"].split(lengths)
    return Written([text.tolist() for text in texts], **found.state["generated"])


def texts_to_keep(written: Written) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give generated texts as tensors and state of saved progress."""
    tokens = [token for text in written.texts for token in text]
    tensors = {
        "generated/tokens": torch.tensor(tokens),
        "generated/lengths": torch.tensor([len(text) for text in written.texts]),
    }
    how = {"most": written.most, "halvings": written.halvings, "changed": written.changed}
    return tensors, {"generated": how}


def keep_texts(work: KeptWork, written: Written, count: int) -> None:
    """Save generated texts if that is due or they are all, and stop there if that was requested."""
    work.settle()
    if work.due or len(written.texts) == count:
        work.keep(*texts_to_keep(written), "texts")
    work.stop_if_asked(f"after {len(written.texts)} generated texts")


class KeptPass:
    """A pass over data for the Fisher, as part of a command's work."""

    def __init__(
        self,
        work: KeptWork,
        found: StoredWork | None,
        tensors: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
    ):
        """Prepare to save a pass, with the tensors and the state of the work before it."""
        self._work = work
        self._found = found
        self._tensors, self._state = dict(tensors or {}), dict(state or {})
        if not work.shard and place_in(work.group)[0] > 0:  # the first saves what comes before it
            self._tensors = {}
            self._state = {name: v for name, v in self._state.items() if name == "trained"}
        self._has_kept = found is not None and "levels" in found.state

    def start(self) -> PartialPass | None:
        """Return saved progress of the pass; None if there is none."""
        found, self._found = self._found, None
        if found is None or "levels" not in found.state:
            return None
        tensors = {
            name.removeprefix(PASS): tensor
            for name, tensor in found.tensors.items()
            if name.startswith(PASS)
        }
        return PartialPass(tensors, found.state["levels"], found.state["most"])

    def keep(self, partial: PartialPass) -> None:
        """Save this if that is due, and stop there if that was requested."""
        self._work.settle(alone=not self._work.shard)
        if self._work.due:
            tensors = {f"{PASS}{name}": tensor for name, tensor in partial.tensors.items()}
            state = {"levels": partial.levels, "most": partial.most}
            tensors, state = self._tensors | tensors, self._state | state
            self._has_kept |= self._work.keep(tensors, state, "pass", own=True)
        self._work.stop_if_asked(f"after {partial.examples} examples")

    def end(self) -> None:
        """Stop after the pass if that was requested, where all processes stop together."""
        if self._work.shard:
            self._work.settle()
            self._work.stop_if_asked("after the pass")

    def keep_what_was_before(self) -> None:
        """Save the work before the pass, if it is not saved with a part of the pass."""
        if not self._has_kept:
            self._work.keep(self._tensors, self._state, "training")
