"""Run the command line in this process."""

import json
import signal

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
