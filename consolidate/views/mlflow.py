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
from formats.errors import InputError, NetworkError, UsageError
from formats.fisher_folder import LEDGER_NAME
from formats.fisher_json import read_ledger

LOG = logging.getLogger("consolidate")
SECONDS_BETWEEN_SENDS = 10.0
LONGEST_VALUE = 500  # characters, which every server takes
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is gone is noticed in seconds
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE": "1",  # all arrives in the order it was taken
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # which carries the result
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nobody but the store is told
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what its thread fails at is told here, without passwords
}


class Tracker:
    """What goes into a run in MLflow; a store that fails costs a note, never the command.

    Without a client nothing may be given to it.
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

    def tell(self, kind: str, values: Mapping[str, object]) -> None:
        """Send options, which cannot change (`params`), or what is known of the run (`tags`)."""
        from mlflow.entities import Param, RunTag

        entity = {"params": Param, "tags": RunTag}[kind]
        texts = {_key(f"{self.command}.{name}"): _text(value) for name, value in values.items()}
        told = {kind: [entity(key, text) for key, text in texts.items() if text]}
        _went(f"refused {len(told[kind])} {kind}", self._client.log_batch, self._run_id, **told)

    def metric(self, name: str, value: float | None, step: int = 0) -> None:
        """Take a number, unless it is None."""
        from mlflow.entities import Metric

        if value is not None:
            self._waiting.append(Metric(_key(name), value, round(1000 * time.time()), step))

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
        """Let a thread of MLflow's send the metrics taken so far; keep what it could not send."""
        self._failed = not _went("did not take what was reported", self._send)
        self._sent_at = time.monotonic()

    def _send(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:  # one at a time: a server that is gone is noticed
            sending.wait()
            del self._waiting[: self._on_its_way]
        self._on_its_way = len(self._waiting)
        self._sending = self._client.log_batch(
            self._run_id, metrics=self._waiting, synchronous=False
        )


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
    run_file = _run_file(options["path"]) if command == "run" else {}
    tracker.tell("params", {**options, **run_file})
    tracker.tell("tags", {"version": version("consolidate-ewc")})
    status = "FINISHED"
    try:
        yield tracker
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"  # by Ctrl-C or SIGTERM
        raise
    finally:
        tracker.send()
        tracker.send()  # which waits for the first, and sends what did not arrive before it
        if not joined:
            _went(f"run {run_id} could not be ended", mlflow.end_run, status)


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
    tags = {"status": result.get("status"), "commits": result.get("commits")}
    if "checkpoint" in result:
        folder = Path(result["checkpoint"])
        ledger = read_ledger(folder / "fisher" / LEDGER_NAME)
        tags |= {
            "checkpoint": folder.absolute().as_uri(),
            "weights": set_digest(ledger.weights),
            "fisher": set_digest(ledger.fisher),
            "trained_from": ledger.tasks[-1].parent,
            "data_digest": ledger.tasks[-1].data_digest,
        }
    tracker.tell("tags", tags)


def _begin(mlflow: Any, command: str) -> tuple[Any, str, bool]:
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
        refused = getattr(error, "error_code", None) in (
            *("INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"),
            *("RESOURCE_DOES_NOT_EXIST", "UNAUTHENTICATED"),
        )
        far = uri.startswith("http") and not refused
        raise (NetworkError if far else InputError)(message) from None


def _went(what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Tell of whatever a store raises, as what it did; the command goes on."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        LOG.info("MLflow %s: %s; the work goes on", what, _reason(error))
        return False
    return True


def _run_file(path: str | Path) -> dict[str, Any]:
    try:
        return _flat("", tomllib.loads(Path(path).read_text("utf-8")))
    except (OSError, ValueError):
        return {}  # the command will say what is wrong with it


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Lay a run file's contents out flat, by names such as ``task.1.ewc-lambda``."""
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        value = dict(enumerate(value, 1))
    if not isinstance(value, dict):
        return {name: value}
    below = [_flat(f"{name}.{key}" if name else key, below) for key, below in value.items()]
    return {key: found for flat in below for key, found in flat.items()}


def _key(name: str) -> str:
    """Give a name as MLflow takes it: a path without detours, of few characters."""
    return normpath("/" + re.sub(r"[^\w./ -]", "_", name)[:250]).lstrip("/")


def _text(value: object) -> str:
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
    return _public([*str(error).splitlines(), type(error).__name__][0])[:300]


def _public(text: str) -> str:
    """Leave out the name and password that an address can have."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)
