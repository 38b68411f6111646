"""A command as a run in MLflow: its options, metrics and digests, never the files themselves."""

import hashlib
import json
import logging
import os
import re
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from posixpath import normpath
from typing import Any

from consolidate.training.loop import Step
from consolidate.views.metrics import evaluate_metrics
from formats.digest import set_digest
from formats.errors import InputError, NetworkError, UsageError, install
from formats.fisher_folder import LEDGER_NAME
from formats.fisher_json import read_ledger

LOG = logging.getLogger("consolidate")
SECONDS_BETWEEN_SENDS = 10.0
LONGEST_VALUE = 500  # characters, which every server takes
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a lost server is noticed in seconds
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE": "1",  # everything arrives in order
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # which carries the result
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing goes to anyone but the store
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # failures of its thread are logged here, without passwords
}


class Tracker:
    """A run in MLflow; a store that fails is logged and never stops the command.

    Without a client only `enabled` may be used.
    """

    def __init__(self, command: str, client: Any = None, run_id: str = ""):
        self.command = command  # parameters and tags begin with it: several can share a run
        self.enabled = client is not None
        self._client = client
        self._run_id = run_id
        self._waiting: list[Any] = []  # metrics, the first `_on_its_way` of them being sent
        self._on_its_way = 0
        self._sending: Any = None
        self._reported = range(0)  # optimizer steps
        self._sent_at = time.monotonic()
        self._failed = False

    def record(self, kind: str, values: Mapping[str, object]) -> None:
        """Send options, which cannot change (`params`), or facts about the run (`tags`)."""
        from mlflow.entities import Param, RunTag

        entity = {"params": Param, "tags": RunTag}[kind]
        texts = {_key(f"{self.command}.{name}"): _text(value) for name, value in values.items()}
        sent = {kind: [entity(key, text) for key, text in texts.items() if text]}
        _went(f"refused {len(sent[kind])} {kind}", self._client.log_batch, self._run_id, **sent)

    def metric(self, name: str, value: float | None, step: int = 0) -> None:
        """Queue a number, unless it is None."""
        from mlflow.entities import Metric

        if value is not None:
            self._waiting.append(Metric(_key(name), value, round(1000 * time.time()), step))

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
        """Send the queued metrics in a thread of MLflow; keep what could not be sent."""
        self._failed = not _went("did not accept the metrics", self._send)
        self._sent_at = time.monotonic()

    def _send(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:  # one at a time, so that a lost server is noticed
            sending.wait()
            del self._waiting[: self._on_its_way]
        self._on_its_way = len(self._waiting)
        self._sending = self._client.log_batch(
            self._run_id, metrics=self._waiting, synchronous=False
        )


@contextmanager
def tracked(command: str, options: Mapping[str, Any], *, enabled: bool) -> Iterator[Tracker]:
    """Track a command as a run in MLflow: the one that MLFLOW_RUN_ID names, else a new one.

    The store is that of MLFLOW_TRACKING_URI, the experiment that of MLFLOW_EXPERIMENT_NAME. A new
    run ends with the command, as finished, failed or killed; a joined one is left open.
    """
    if not enabled:
        yield Tracker(command)
        return
    for name, value in SETTINGS.items():  # read when it is imported
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ImportError:
        raise UsageError(f"--mlflow needs mlflow: {install('mlflow')}") from None
    client, run_id, joined = _begin(mlflow, command)
    tracker = Tracker(command, client, run_id)
    LOG.info("MLflow: %s run %s", "joined" if joined else "started", run_id)
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
        tracker.send()
        tracker.send()  # waits for the first, and sends what it did not
        if not joined:
            _went(f"run {run_id} could not be ended", mlflow.end_run, status)


def report(tracker: Tracker, result: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
    """Report what a command returned: curves, metrics, digests, and where the output is."""
    if tracker.command == "evaluate":
        result = {}
    steps = result.get("steps", 0)
    last = steps if isinstance(steps, int) else 0  # those of a run are its checkpoints
    tracker.history(result.get("history", ()))
    for when, scores in result.get("metrics", {}).items():
        number = {"before": "0"}.get(when) or when.removeprefix("step ")
        if number.isdigit():  # the result does not say after how many steps an epoch ended
            for name, value in evaluate_metrics(scores).items():
                tracker.metric(name, value, int(number))
    if (matrix := result.get("accuracy_matrix")) is not None:
        last = len(matrix["tasks"])
        for learned, row in enumerate([matrix["start"], *matrix["scores"]]):
            for name, score in zip(matrix["tasks"], row, strict=True):
                tracker.metric(f"{name}.score", score, learned)
    for name, value in numbers.items():
        tracker.metric(name, value, last)
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
    tracker.record("tags", tags)


def _begin(mlflow: Any, command: str) -> tuple[Any, str, bool]:
    """Open the store and a run in it; return whether the run existed before."""
    uri = mlflow.get_tracking_uri()
    given = os.environ.get("MLFLOW_RUN_ID")
    try:
        client = mlflow.MlflowClient()
        if given:
            return client, client.get_run(given).info.run_id, True
        name = os.environ.get("MLFLOW_RUN_NAME") or f"consolidate {command}"
        return client, mlflow.start_run(run_name=name).info.run_id, False
    except Exception as error:
        what = f"open the run {given} (MLFLOW_RUN_ID)" if given else "start a run"
        message = f"--mlflow: cannot {what} in {_public(uri)}: {_reason(error)}"
        refused = getattr(error, "error_code", None) in (
            *("INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"),
            *("RESOURCE_DOES_NOT_EXIST", "UNAUTHENTICATED"),
        )
        far = uri.startswith("http") and not refused
        raise (NetworkError if far else InputError)(message) from None


def _went(what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Call a store and log whatever it raises, so that the command continues."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        LOG.info("MLflow %s: %s; the command continues", what, _reason(error))
        return False
    return True


def _run_file(path: str | Path) -> dict[str, Any]:
    try:
        return _flat("", tomllib.loads(Path(path).read_text("utf-8")))
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


def _key(name: str) -> str:
    """Give a name that MLflow accepts: a normalized path of at most 250 characters."""
    return normpath("/" + re.sub(r"[^\w./ -]", "_", name)[:250]).lstrip("/")


def _text(value: object) -> str:
    """Give a value as text that every server accepts; empty if there is nothing to send."""
    if value is None or value in ((), [], {}):
        return ""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    if len(text) <= LONGEST_VALUE:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    rest = f"… ({len(text)} characters, sha256 {digest}…)"
    return text[: LONGEST_VALUE - len(rest)] + rest


def _reason(error: Exception) -> str:
    """Give an error's first line, without credentials and details of the request."""
    return _public([*str(error).splitlines(), type(error).__name__][0])[:300]


def _public(text: str) -> str:
    """Remove user name and password from addresses."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)
