"""A command as a run in a tracking store: its options, metrics and digests, never the files."""

import logging
import re
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from consolidate.training.loop import Step
from consolidate.views.matrix import columns_and_rows
from consolidate.views.metrics import evaluate_metrics
from formats.digest import set_digest
from formats.fisher_folder import LEDGER_NAME
from formats.fisher_json import read_ledger

LOG = logging.getLogger("consolidate")
SECONDS_BETWEEN_SENDS = 10.0


class Point(NamedTuple):
    """A number, at a step and a time in seconds."""

    name: str
    value: float
    step: int
    time: float


class Store(Protocol):
    """A run in a tracking store; its methods may raise anything."""

    title: str
    place: str  # of the run, in words

    def record(self, kind: str, values: Mapping[str, object]) -> None:
        """Send options, which cannot change (`params`), or facts about the run (`tags`)."""

    def send(self, points: list[Point]) -> None:
        """Send points, and remove from the list those that have arrived."""

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""


class Tracker:
    """Reports a command to a store; one that fails is logged and never stops the command."""

    def __init__(self, command: str, store: Store):
        self.command = command  # parameters and tags begin with it: several can share a run
        self._store = store
        self._waiting: list[Point] = []
        self._reported = range(0)  # optimizer steps
        self._sent_at = time.monotonic()
        self._failed = False

    def record(self, kind: str, values: Mapping[str, object]) -> None:
        """Send options, which cannot change (`params`), or facts about the run (`tags`)."""
        given = {
            f"{self.command}.{name}": value
            for name, value in values.items()
            if value is not None and value not in ((), [], {}, "")
        }
        self._attempt(f"refused {len(given)} {kind}", self._store.record, kind, given)

    def metric(self, name: str, value: float | None, step: int = 0) -> None:
        """Queue a number, unless it is None."""
        if value is not None:
            self._waiting.append(Point(name, value, step, time.time()))

    def on_step(self, step: Step) -> None:
        """Queue what an optimizer step reports, and send the queue now and then."""
        if self._failed:  # `history` sends it at the end
            return
        self._reported = range(self._reported.start or step.step, step.step + 1)
        self._take_step(vars(step))
        if time.monotonic() - self._sent_at >= SECONDS_BETWEEN_SENDS:
            self.send()

    def history(self, steps: Iterable[Mapping[str, Any]]) -> None:
        """Queue the steps that `on_step` has not reported."""
        for step in steps:
            if step["step"] not in self._reported:
                self._take_step(step)

    def _take_step(self, step: Mapping[str, Any]) -> None:
        for name in ("loss", "penalty", "learning_rate", "gradient_norm"):
            self.metric(name, step[name], step["step"])

    def send(self) -> None:
        """Send the queued metrics; keep what could not be sent."""
        self._failed = not self._attempt(
            "did not accept the metrics", self._store.send, self._waiting
        )
        self._sent_at = time.monotonic()

    def end(self, status: str) -> None:
        """Send what is queued, and end the run."""
        self.send()
        self.send()  # waits for the first, and sends what it did not
        self._attempt(f"could not end the run {self._store.place}", self._store.end, status)

    def _attempt(self, what: str, call: Callable[..., Any], *args: Any) -> bool:
        """Call the store and log whatever it raises, so that the command continues."""
        try:
            call(*args)
        except Exception as error:
            LOG.info("%s %s: %s; the command continues", self._store.title, what, reason(error))
            return False
        return True


@contextmanager
def tracked(
    command: str, options: Mapping[str, Any], open_run: Callable[[str], Store]
) -> Iterator[Tracker]:
    """Track a command as a run, which ends with it as finished, failed or killed."""
    store = open_run(command)
    tracker = Tracker(command, store)
    LOG.info("%s: %s", store.title, store.place)
    run_file = _run_file(options["path"]) if command == "run" else {}
    tracker.record("params", {**options, **run_file})
    tracker.record("tags", {"version": version("consolidate-ewc")})
    status = "FINISHED"
    try:
        yield tracker
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"  # by Ctrl-C or SIGTERM
        raise
    finally:
        tracker.end(status)


def report(tracker: Tracker, result: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
    """Report what a command returned: curves, metrics, digests, and where the output is."""
    if tracker.command == "evaluate":
        result = {}
    matrix = result.get("accuracy_matrix")
    if tracker.command == "run":  # where the gate fails this is what the last step returned
        result = {key: result[key] for key in ("checkpoint", "status") if key in result}
    moments = {
        int(number): scores
        for when, scores in result.get("metrics", {}).items()
        # the result does not say after how many steps an epoch ended
        if (number := {"before": "0"}.get(when) or when.removeprefix("step ")).isdigit()
    }
    last = result.get("steps", 0)
    if moments and not last:  # the output was up to date
        last = max(1, *moments)
    if "after" in result.get("metrics", {}):  # what was saved, which may be interpolated
        moments.pop(last, None)
    tracker.history(result.get("history", ()))
    for step, scores in moments.items():
        for name, value in evaluate_metrics(scores).items():
            tracker.metric(name, value, step)
    if matrix is not None:
        names, rows = columns_and_rows(matrix)
        for learned, row in enumerate(rows):
            for name, score in zip(names, row, strict=True):
                tracker.metric(f"{name}.score", score, learned)
    tags = {"status": result.get("status"), "commits": result.get("commits")}
    if "checkpoint" in result:
        folder = Path(result["checkpoint"])
        tags["checkpoint"] = folder.absolute().as_uri()
    if "checkpoint" in result and (folder / "fisher" / LEDGER_NAME).is_file():
        ledger = read_ledger(folder / "fisher" / LEDGER_NAME)
        tags |= {
            "weights": set_digest(ledger.weights),
            "fisher": set_digest(ledger.fisher),
            "trained_from": ledger.tasks[-1].parent,
            "data_digest": ledger.tasks[-1].data_digest,
        }
        if tracker.command == "run":
            last = len(ledger.tasks)
    for name, value in numbers.items():
        tracker.metric(name, value, last)
    tracker.record("tags", tags)


def _run_file(path: str | Path) -> dict[str, Any]:
    try:
        return _flat("", tomllib.loads(Path(path).read_text("utf-8-sig")))
    except (OSError, ValueError):
        return {}  # the command reports what is wrong with it


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Flatten a run file's contents to names such as ``task.1.ewc-lambda``."""
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        value = dict(enumerate(value, 1))
    if not isinstance(value, dict):
        return {name: value}
    below = [_flat(f"{name}.{key}" if name else key, below) for key, below in value.items()]
    return {key: found for flat in below for key, found in flat.items()}


def reason(error: Exception) -> str:
    """Give an error's first line, without credentials and details of the request."""
    line = public([*str(error).splitlines(), type(error).__name__][0])
    return line if len(line) <= 300 else f"{line[:200]} … {line[-98:]}"


def public(text: str) -> str:
    """Remove user name and password from addresses."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)
