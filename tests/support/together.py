"""Start commands in several processes, forks of this one, as `torchrun` would start them.

An import of torch takes longer than most commands of tests, and a fork has it behind it.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from consolidate import cli

_stores: list[dist.TCPStore] = []


def started(
    count: int, words: Sequence[str], log: Path, prepare: Callable[[], object] = lambda: None
) -> list[int]:
    """Start a command in so many processes; gives their numbers.

    Args:
        count: How many; of one alone nobody says that there are others.
        words: What is typed after `consolidate`.
        log: What they print is appended there.
        prepare: Called in each of them before the command.
    """

    def command() -> None:
        prepare()
        cli.main(words)

    return forked(count, command, log, log)


def forked(count: int, call: Callable[[], object], out: Path, err: Path) -> list[int]:
    """Start a function in so many processes; what they print is appended to two files."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _stores[:] = [store]  # which outlives each of them, as torchrun's does
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            code = 1
            try:
                for name, number, path in (("stdout", 1, out), ("stderr", 2, err)):
                    with path.open("a") as file:
                        os.dup2(file.fileno(), number)
                    stream = os.fdopen(number, "w", buffering=1, closefd=False)
                    setattr(sys, name, stream)
                if count > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
                    os.environ |= {"MASTER_PORT": str(store.port)}
                    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
                    os.environ |= {"TORCHELASTIC_RESTART_COUNT": "0"}
                call()
                code = 0
            except SystemExit as left:
                code = int(left.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


def ended(children: Sequence[int]) -> list[int]:
    """Wait for processes; gives their exit codes, a signal's number below zero."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
