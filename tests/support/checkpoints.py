"""Checkpoints of the small networks, and a Fisher of one by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from consolidate.api import finetune, fisher
from formats.data import open_data
from support.networks import SIZES, Network, make_network

Write = Callable[..., Path]


def random_network(folder: Path) -> Path:
    """A folder with the random weights of `make_network`."""
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make_network({"sizes": SIZES})
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"sizes": SIZES}))
    (folder / "LICENSE").write_text("free\n")
    return folder


def write_clusters(folder: Path, name: str, seed: int = 0, count: int = 60) -> Path:
    """Write a learnable task for `make_network`: three noisy clusters, placed by the seed."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    inputs = random.normal(size=(3, SIZES[0]))[labels] * 2 + random.normal(size=(count, SIZES[0]))
    path = folder / f"{name}.npz"
    np.savez(path, inputs=inputs.astype(np.float32), labels=labels)
    return path


def first_task(folder: Path, data: Path, **options: Any) -> Path:
    """A checkpoint of `make_network` that knows one task."""
    start, out = random_network(folder / "start"), folder / "first"
    finetune(start, data, output_dir=out, penalty="none", **options)
    return out


def measured_by_hand(weights: dict[str, torch.Tensor], data: Path) -> dict[str, torch.Tensor]:
    """E_y[(∇ log p(y|x))²] of `make_network`, one example and one outcome at a time."""
    network = make_network({"sizes": [6, 8, 3]}).double()
    network.load_state_dict(weights)
    inputs = open_data(data).tensors["inputs"].double()
    total = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for x in inputs:
        probabilities = network(x).softmax(-1).detach()
        for y, p in enumerate(probabilities):
            network.zero_grad()
            cross_entropy(network(x), torch.tensor(y)).backward()
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None
                total[name] += p * parameter.grad**2 / len(inputs)
    return {name: values.float() for name, values in total.items()}


def normed(folder: Path, data: Path) -> Path:
    """A checkpoint of `Network` with its Fisher."""
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network({"sizes": [6, 8, 3]})
    network(torch.randn(30, 6, generator=torch.Generator().manual_seed(1)))
    state = network.state_dict()
    del state["again.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"sizes": [6, 8, 3]}')
    fisher(folder, data, model="support.networks:Network")
    return folder
