"""What `torchrun` told this process: which one of how many it is."""

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
    """Return which of them this is, from 0; the first speaks and writes for all."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """Return which of those on this machine it is, from 0."""
    return int(os.environ.get("LOCAL_RANK", rank())) if world_size() > 1 else 0


def stop_with_torchrun() -> None:
    """Have this process sent SIGTERM if `torchrun` is killed, which ends nobody; on Linux only."""
    # What works on alone would keep its work beside that of those who are started again.
    if world_size() > 1 and "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
