import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from consolidate.api import finetune
from support import loopback_hub
from support.networks import FAST, SIZES, make_network


@pytest.fixture
def network_checkpoint(tmp_path: Path) -> Path:
    """A folder with the random weights of `make_network`."""
    folder = tmp_path / "start"
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make_network({"sizes": SIZES})
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"sizes": SIZES}))
    (folder / "LICENSE").write_text("free\n")
    return folder


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., Path]:
    """Write a learnable task for `make_network`: three noisy clusters, placed by the seed."""

    def write(name: str, seed: int = 0, count: int = 60) -> Path:
        random = np.random.default_rng(seed)
        labels = random.integers(0, 3, count)
        inputs = random.normal(size=(3, SIZES[0]))[labels] * 2 + random.normal(
            size=(count, SIZES[0])
        )
        path = tmp_path / f"{name}.npz"
        np.savez(path, inputs=inputs.astype(np.float32), labels=labels)
        return path

    return write


@pytest.fixture
def learned(network_checkpoint: Path, write_task: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that knows task a."""
    out = tmp_path / "first"
    options = {**FAST, "epochs": 20, "penalty": "none"}
    finetune(network_checkpoint, write_task("a", count=120), output_dir=out, **options)
    return out


@pytest.fixture
def hub() -> Iterator[loopback_hub.Hub]:
    """An empty Hub on loopback."""
    with loopback_hub.running() as hub:
        yield hub


_OF_OTHERS = ("HF_", "TRANSFORMERS_", "CONSOLIDATE_", "MLFLOW_", "WANDB_", "GIT_", "MASTER_")
_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def pytest_configure() -> None:
    """Leave the caller's settings out: tokens, caches, proxies, another repository of git, GPUs."""
    for name in set(os.environ) - {"CONSOLIDATE_TEST_DEVICE"}:
        if name.startswith(_OF_OTHERS) or name.upper() in _PROCESS:
            del os.environ[name]
    if "CONSOLIDATE_TEST_DEVICE" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is expected is what a CPU computes


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections; a pass that lacks memory makes many."""
    gc.freeze()
