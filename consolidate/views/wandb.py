"""A run in Weights & Biases, by its client; offline where WANDB_MODE says so."""

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import groupby
from typing import Any

from consolidate.views.tracking import Point, reason
from formats.errors import InputError, NetworkError, UsageError, install

SETTINGS: dict[str, Any] = {
    "silent": True,  # stdout carries the result
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "x_disable_stats": True,
    "init_timeout": 20.0,  # a lost server is noticed in seconds
    "x_graphql_retry_max": 1,
    "x_graphql_retry_wait_max_seconds": 2.0,
    "x_graphql_timeout_seconds": 10.0,
    "x_file_stream_retry_max": 2,
    "x_file_stream_timeout_seconds": 10.0,
    "x_file_transfer_retry_max": 1,
    "finish_timeout": 60.0,
    "finish_timeout_raises": True,
}
STEP = "step"
"""The metric that the others are drawn over, as W&B's own step never goes back."""


class WandbRun:
    """A run in Weights & Biases: params are its config, tags are in its summary."""

    title = "W&B"

    def __init__(self, run: Any, hooks: tuple[Any, Any]) -> None:
        self._run, self._hooks = run, hooks
        self.place = f"offline run in {run.dir}" if run.offline else f"run {run.url}"
        if run.disabled:
            self.place = "disabled by WANDB_MODE"
        with _silenced():
            run.define_metric("*", step_metric=STEP)

    def record(self, kind: str, values: Mapping[str, object]) -> None:
        """Send options to the config, facts to the summary."""
        known = json.loads(json.dumps(dict(values), default=str, ensure_ascii=False))
        with _silenced():
            if kind == "params":
                self._run.config.update(known)
            else:
                self._run.summary.update(known)

    def send(self, points: list[Point]) -> None:
        """Hand metrics to the client's own process, which sends them."""
        with _silenced():
            for step, some in groupby(list(points), key=lambda point: point.step):
                found = list(some)
                self._run.log({STEP: step} | {point.name: point.value for point in found})
                del points[: len(found)]

    def end(self, status: str) -> None:
        """End the run, once everything is sent or a minute has passed."""
        with _silenced():
            self._run.finish(exit_code=0 if status == "FINISHED" else 1)
        sys.exit, sys.excepthook = self._hooks  # which the client leaves replaced


def open_run(command: str) -> WandbRun:
    """Begin a run, in the project and with the id, mode and folder of the WANDB_… variables."""
    hooks = sys.exit, sys.excepthook
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nothing goes to anyone but the store
    try:
        import wandb
    except ImportError as error:
        raise UsageError(f"--wandb needs wandb: {install('wandb', error)}") from error
    try:
        with _silenced():
            settings = wandb.Settings(**SETTINGS)
            mode = wandb.setup(settings).settings.mode
            if mode in ("online", "shared", None) and not wandb.login(prompt=False):
                raise UsageError(
                    "--wandb: there is no API key: use `wandb login`, set WANDB_API_KEY, or "
                    "WANDB_MODE=offline"
                )
            name = os.environ.get("WANDB_NAME") or f"consolidate {command}"
            return WandbRun(wandb.init(name=name, settings=settings), hooks)
    except wandb.errors.UsageError as error:
        raise UsageError(f"--wandb: {reason(error)}") from None
    except ValueError as error:  # pydantic's, of a setting: its name, and what was expected
        lines = [line.strip() for line in str(error).splitlines()]
        raise UsageError(f"--wandb: {': '.join(lines[1:3]) or reason(error)}") from None
    except (wandb.errors.Error, OSError) as error:
        refused = isinstance(error, wandb.errors.AuthenticationError) and not any(
            words in str(error) for words in ("giving up after", "in time")
        )
        kind = InputError if refused else NetworkError
        raise kind(f"--wandb: cannot start a run: {reason(error)}") from None


@contextmanager
def _silenced() -> Iterator[None]:
    """Hide what the client prints in spite of `silent`."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
