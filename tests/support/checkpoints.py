"""Checkpoints of the small networks, and a Fisher of one by hand."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from consolidate.api import fisher
from formats.data import open_data
from support.networks import Network, make_network

Write = Callable[..., Path]


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
