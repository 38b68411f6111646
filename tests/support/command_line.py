"""Run the command line, in this process or in a new one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from consolidate.cli import main
from support.json_schema import check_json

MODEL = ("--model", "support.networks:make_network")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; give exit code, stdout and stderr.

    What `--json` writes is held against its schema.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_flush_denormal(False)
    out, err = capsys.readouterr()
    if "--json" in arguments and out:
        check_json(str(arguments[0]), json.loads(out))
    return int(left.value.code or 0), out, err


def launched(
    *words: object, variables: Mapping[str, str] | None = None, **how: Any
) -> subprocess.Popen[Any]:
    """Start the command line in a new interpreter, which can import what the tests can.

    Its environment has `variables` too; `how` are options of Popen in place of text from pipes.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    own = {"PYTHONPATH": os.pathsep.join(sys.path), **(variables or {})}
    command = [sys.executable, "-m", "consolidate", *map(str, words)]
    return subprocess.Popen(command, env={**os.environ, **own}, **{**pipes, **how})


def finished(process: subprocess.Popen[Any]) -> tuple[int, str, str]:
    """Wait for its end; give exit code, stdout and stderr."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err
