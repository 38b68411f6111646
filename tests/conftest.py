import gc
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from support import loopback_hub
from support.checkpoints import Write, first_task, random_network, write_clusters
from support.networks import FAST

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture
def network_checkpoint(tmp_path: Path) -> Path:
    """A folder with the random weights of `make_network`."""
    return random_network(tmp_path / "start")


@pytest.fixture
def write_task(tmp_path: Path) -> Write:
    """Write a learnable task for `make_network`: three noisy clusters, placed by the seed."""
    return partial(write_clusters, tmp_path)


@pytest.fixture(scope="module")
def learned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows task a, which `learned` copies."""
    folder = tmp_path_factory.mktemp("learned")
    return first_task(folder, write_clusters(folder, "a", count=120), epochs=20, **FAST)


@pytest.fixture
def learned(learned_once: Path, tmp_path: Path) -> Path:
    """A checkpoint that knows task a."""
    return shutil.copytree(learned_once, tmp_path / "first")


@pytest.fixture
def hub() -> Iterator[loopback_hub.Hub]:
    """An empty Hub on loopback."""
    with loopback_hub.running() as hub:
        yield hub


_OF_OTHERS = ("HF_", "TRANSFORMERS_", "CONSOLIDATE_", "MLFLOW_", "WANDB_", "GIT_", "MASTER_")
_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def pytest_configure() -> None:
    """Leave the caller's settings out: tokens, caches, proxies, another repository of git, GPUs."""
    if "OMP_NUM_THREADS" not in os.environ:  # a fork would wait for threads that it does not have
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    for name in set(os.environ) - {"CONSOLIDATE_TEST_DEVICE"}:
        if name.startswith(_OF_OTHERS) or name.upper() in _PROCESS:
            del os.environ[name]
    if "CONSOLIDATE_TEST_DEVICE" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is expected is what a CPU computes


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections; a pass that lacks memory makes many."""
    gc.freeze()
