"""A command as a run in MLflow: its options, metrics and digests, never the files themselves."""

import hashlib
import json
import logging
import os
import re
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consolidate.training.loop import Step
from consolidate.views.metrics import evaluate_metrics
from formats.digest import set_digest
from formats.errors import InputError, NetworkError, UsageError
from formats.fisher_folder import LEDGER_NAME
from formats.fisher_json import read_ledger

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOG = logging.getLogger("consolidate")
SECONDS_BETWEEN_SENDS = 10.0
LONGEST_VALUE = 500  # characters, which every server takes
METRICS_AT_ONCE, VALUES_AT_ONCE = 1000, 100  # a server takes no more
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is gone is noticed in seconds
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # which carries the result
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nobody but the store is told
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}


class Tracker:
    """What goes into a run in MLflow; a store that fails costs a note, never the command.

    Without a client nothing is tracked.
    """

    def __init__(self, command: str, client: "MlflowClient | None" = None, run_id: str = ""):
        self.command = command  # parameters and tags begin with it: several can share a run
        self.enabled = client is not None
        self._client = client
        self._run_id = run_id
        self._waiting: dict[str, list[tuple[Any, ...]]] = {"params": [], "tags": [], "metrics": []}
        self._reported = range(0)  # optimizer steps
        self._sent_at = time.monotonic()
        self._failed = False

    def parameter(self, name: str, value: object) -> None:
        """Take an option, unless it is None or empty."""
        self._take("params", f"{self.command}.{name}", _shortened(value))

    def tag(self, name: str, value: object) -> None:
        """Take what is known of the run afterwards, unless it is None or empty."""
        self._take("tags", f"{self.command}.{name}", _shortened(value))

    def metric(self, name: str, value: float | None, step: int = 0) -> None:
        """Take a number, unless it is None."""
        self._take("metrics", name, value, round(1000 * time.time()), step)

    def _take(self, kind: str, name: str, value: object, *rest: int) -> None:
        if self._client is not None and value not in (None, ""):
            key = re.sub(r"[^\w./ -]", "_", name)[:250]  # as MLflow takes it
            self._waiting[kind].append((key, value, *rest))

    def on_step(self, step: Step) -> None:
        """Take what an optimizer step reports, and send it now and then."""
        if self._failed:  # `history` has it at the end
            return
        self._reported = range(self._reported.start or step.step, step.step + 1)
        self._take_step(vars(step))
        if time.monotonic() - self._sent_at >= SECONDS_BETWEEN_SENDS:
            self.send()

    def history(self, steps: Iterable[Mapping[str, Any]]) -> None:
        """Take the steps that were not reported when they were taken."""
        for step in steps:
            if step["step"] not in self._reported:
                self._take_step(step)

    def _take_step(self, step: Mapping[str, Any]) -> None:
        for name in ("loss", "penalty", "learning_rate", "gradient_norm"):
            self.metric(name, step[name], step["step"])

    def send(self) -> None:
        """Send what was taken so far; where that fails, say so and keep it for the next time."""
        if self._client is None:
            return
        from mlflow.entities import Metric, Param, RunTag

        try:
            for kind, entity, most in (
                ("params", Param, VALUES_AT_ONCE),
                ("tags", RunTag, VALUES_AT_ONCE),
                ("metrics", Metric, METRICS_AT_ONCE),
            ):
                while batch := self._waiting[kind][:most]:
                    self._send(kind, [entity(*values) for values in batch])
                    del self._waiting[kind][:most]
        except Exception as error:  # whatever a store raises, the command goes on
            self._failed = True
            LOG.info("MLflow did not take what was reported: %s; the work goes on", _reason(error))
        self._sent_at = time.monotonic()

    def _send(self, kind: str, batch: list[Any]) -> None:
        """Send one batch; leave it out where the server refuses it, as parameters that changed."""
        assert self._client is not None
        arguments: dict[str, Any] = {kind: batch}
        try:
            self._client.log_batch(self._run_id, **arguments)
        except Exception as error:
            if getattr(error, "error_code", None) not in REFUSALS:
                raise
            LOG.info("MLflow refused %d %s: %s", len(batch), kind, _reason(error))


@contextmanager
def tracked(command: str, options: Mapping[str, Any], *, enabled: bool) -> Iterator[Tracker]:
    """Track a command as a run in MLflow: that which MLFLOW_RUN_ID names, else one of its own.

    The store is that of MLFLOW_TRACKING_URI, the experiment that of MLFLOW_EXPERIMENT_NAME. A run
    of its own ends with the command, as finished, failed or killed; a joined one is left open.
    """
    if not enabled:
        yield Tracker(command)
        return
    for name, value in SETTINGS.items():  # read when it is imported
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ImportError:
        raise UsageError("--mlflow needs mlflow: pip install 'consolidate-ewc[mlflow]'") from None
    client, run_id, joined = _begin(mlflow, command)
    tracker = Tracker(command, client, run_id)
    LOG.info("MLflow: %s run %s", "joined" if joined else "began", run_id)
    for name, value in {**options, **_run_file(options.get("run_file"))}.items():
        tracker.parameter(name, value)
    tracker.tag("version", version("consolidate-ewc"))
    tracker.send()
    status = "FINISHED"
    try:
        yield tracker
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"  # by Ctrl-C or SIGTERM
        raise
    finally:
        tracker.send()
        if not joined:
            try:
                mlflow.end_run(status)
            except Exception as error:
                LOG.info("MLflow: run %s could not be ended: %s", run_id, _reason(error))


def report(tracker: Tracker, result: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
    """Give a tracker what a command returned: curves, metrics, digests, and where the output is."""
    if tracker.command == "evaluate":
        result = {}
    steps = result.get("steps", 0)
    last = steps if isinstance(steps, int) else 0  # those of a run are its checkpoints
    tracker.history(result.get("history", ()))
    for when, scores in result.get("metrics", {}).items():
        number = {"before": "0"}.get(when) or when.removeprefix("step ")
        if number.isdigit():  # of an epoch it is not told after how many steps it ended
            for name, value in evaluate_metrics(scores).items():
                tracker.metric(name, value, int(number))
    if (matrix := result.get("accuracy_matrix")) is not None:
        last = len(matrix["tasks"])
        for learned, row in enumerate([matrix["start"], *matrix["scores"]]):
            for name, score in zip(matrix["tasks"], row, strict=True):
                tracker.metric(f"{name}.score", score, learned)
    for name, value in numbers.items():
        tracker.metric(name, value, last)
    tracker.tag("status", result.get("status"))
    tracker.tag("commits", result.get("commits"))
    if "checkpoint" in result:
        _tag_output(tracker, Path(result["checkpoint"]))


def _tag_output(tracker: Tracker, folder: Path) -> None:
    ledger = read_ledger(folder / "fisher" / LEDGER_NAME)
    tracker.tag("checkpoint", folder.absolute().as_uri())
    tracker.tag("weights", set_digest(ledger.weights))
    tracker.tag("fisher", set_digest(ledger.fisher))
    tracker.tag("trained_from", ledger.tasks[-1].parent)
    tracker.tag("data_digest", ledger.tasks[-1].data_digest)


def _begin(mlflow: Any, command: str) -> tuple["MlflowClient", str, bool]:
    """Open the store and a run in it; say whether the run was there before."""
    uri = mlflow.get_tracking_uri()
    given = os.environ.get("MLFLOW_RUN_ID")
    try:
        client = mlflow.MlflowClient()
        if given:
            return client, client.get_run(given).info.run_id, True
        name = os.environ.get("MLFLOW_RUN_NAME") or f"consolidate {command}"
        return client, mlflow.start_run(run_name=name).info.run_id, False
    except Exception as error:
        what = f"the run {given} (MLFLOW_RUN_ID)" if given else "a run"
        message = f"--mlflow: {what} cannot be had from {_public(uri)}: {_reason(error)}"
        code = getattr(error, "error_code", None)
        far = uri.startswith("http") and code not in REFUSALS
        raise (NetworkError if far else InputError)(message) from None


def _run_file(path: str | None) -> dict[str, Any]:
    """Lay a run file's contents out flat, by names such as ``task.1.ewc-lambda``."""
    if path is None:
        return {}
    try:
        nested = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError):
        return {}  # the command will say what is wrong with it
    flat = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            value = dict(enumerate(value, 1))
        if isinstance(value, dict):
            for key, below in value.items():
                visit(f"{name}.{key}" if name else key, below)
        else:
            flat[name] = value

    visit("", nested)
    return flat


def _shortened(value: object) -> str:
    """Give a value as text that every server takes; none where there is nothing to tell."""
    if value is None or value in ((), [], {}):
        return ""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    if len(text) <= LONGEST_VALUE:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    rest = f"… ({len(text)} characters, sha256 {digest}…)"
    return text[: LONGEST_VALUE - len(rest)] + rest


def _reason(error: Exception) -> str:
    """Give an error's first line, without what a client adds on how it was asked."""
    lines = str(error).splitlines() or [type(error).__name__]
    return _public(lines[0])[:300]


def _public(text: str) -> str:
    """Leave out the name and password that an address can have."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)
