"""A run in MLflow, by its client."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from posixpath import normpath
from typing import Any

from consolidate.views.tracking import Point, public, reason
from formats.errors import InputError, NetworkError, UsageError, install

LONGEST_VALUE = 500  # characters, which every server takes
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a lost server is noticed in seconds
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE": "1",  # everything arrives in order
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # which carries the result
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing goes to anyone but the store
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # failures of its thread are logged here, without passwords
}


class MlflowRun:
    """A run in MLflow; one that existed before is left open."""

    title = "MLflow"

    def __init__(self, mlflow: Any, client: Any, run_id: str, joined: bool) -> None:
        self._mlflow, self._client, self._run_id, self._joined = mlflow, client, run_id, joined
        self.place = f"{'joined' if joined else 'started'} run {run_id}"
        self._in_flight = 0  # metrics that are being sent
        self._sending: Any = None

    def record(self, kind: str, values: Mapping[str, object]) -> None:
        """Send options or facts as texts."""
        from mlflow.entities import Param, RunTag

        entity = {"params": Param, "tags": RunTag}[kind]
        sent = {kind: [entity(_key(name), _text(value)) for name, value in values.items()]}
        self._client.log_batch(self._run_id, **sent)

    def send(self, points: list[Point]) -> None:
        """Send metrics in a thread of MLflow, one batch at a time, so that failures are noticed."""
        from mlflow.entities import Metric

        sending, self._sending = self._sending, None
        if sending is not None:
            sending.wait()
            del points[: self._in_flight]
        self._in_flight = len(points)
        metrics = [Metric(_key(p.name), p.value, round(1000 * p.time), p.step) for p in points]
        self._sending = self._client.log_batch(self._run_id, metrics=metrics, synchronous=False)

    def end(self, status: str) -> None:
        """End a run of its own."""
        if not self._joined:
            self._mlflow.end_run(status)


def open_run(command: str) -> MlflowRun:
    """Open the run that MLFLOW_RUN_ID names, else a new one.

    The store is that of MLFLOW_TRACKING_URI, the experiment that of MLFLOW_EXPERIMENT_NAME.
    """
    for name, value in SETTINGS.items():  # read when it is imported
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ImportError as error:
        raise UsageError(f"--mlflow needs mlflow: {install('mlflow', error)}") from error
    return MlflowRun(mlflow, *_begin(mlflow, command))


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
    except ModuleNotFoundError as error:  # of the small mlflow, which needs a server
        own = error.name in ("sqlalchemy", "alembic")
        packages = "sqlalchemy alembic" if own else error.name
        raise UsageError(
            f"--mlflow: {public(uri)} needs {error.name}: pip install {packages}, or set "
            "MLFLOW_TRACKING_URI to a server"
        ) from error
    except Exception as error:
        what = f"open the run {given} (MLFLOW_RUN_ID)" if given else "start a run"
        message = f"--mlflow: cannot {what} in {public(uri)}: {reason(error)}"
        refused = getattr(error, "error_code", None) in (
            *("INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"),
            *("RESOURCE_DOES_NOT_EXIST", "UNAUTHENTICATED"),
        )
        far = uri.startswith("http") and not refused
        raise (NetworkError if far else InputError)(message) from None


def _key(name: str) -> str:
    """Give a name that MLflow accepts: a normalized path of at most 250 characters."""
    return normpath("/" + re.sub(r"[^\w./ -]", "_", name)[:250]).lstrip("/")


def _text(value: object) -> str:
    """Give a value as text that every server accepts."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    if len(text) <= LONGEST_VALUE:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    rest = f"… ({len(text)} characters, sha256 {digest}…)"
    return text[: LONGEST_VALUE - len(rest)] + rest
