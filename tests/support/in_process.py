"""A command in this process, with the environment that a new interpreter would have read."""

import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import huggingface_hub.constants
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from consolidate.cli import main


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have these variables and no others, in the Hub's client too, and the usual warnings.

    The client reads its own once, when it is imported; here it reads them again.
    """
    before = dict(os.environ)
    _set(dict(variables))
    try:
        with warnings.catch_warnings():
            for unseen in (DeprecationWarning, ResourceWarning):  # but for pytest
                warnings.simplefilter("ignore", unseen)
            yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    importlib.reload(huggingface_hub.constants)


def consolidate(
    folder: Path, *arguments: object, variables: Mapping[str, str]
) -> tuple[int, str, str]:
    """Run the command line in a folder.

    Args:
        folder: Where it runs.
        arguments: Those of the command.
        variables: Its whole environment.

    Returns:
        Exit code, stdout and stderr.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    path = list(sys.path)
    out, err = io.StringIO(), io.StringIO()
    disable_progress_bars()  # the command line does, for a client that is not imported yet
    try:
        with environment(variables), chdir(folder), redirect_stdout(out), redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        enable_progress_bars()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_flush_denormal(False)
        sys.path[:] = path
    return code, out.getvalue(), err.getvalue()
