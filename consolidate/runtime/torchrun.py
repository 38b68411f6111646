"""The rank of this process and the number of processes, as set by `torchrun`."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """Return how many processes were started together; 1 without `torchrun`."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _VARIABLES) else 1


def rank() -> int:
    """Return the rank of this process, from 0; the first reports and writes for all."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """Return the rank of this process on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", rank())) if world_size() > 1 else 0


def stop_with_torchrun() -> None:
    """Send this process a SIGTERM if `torchrun` is killed, which ends none; on Linux only."""
    # A process that works on alone would save its progress beside that of a restarted run.
    if world_size() > 1 and "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
