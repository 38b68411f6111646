"""Small networks, and the options that train them fast."""

from itertools import pairwise
from typing import Any

import torch
from torch import nn

SIZES = [6, 8, 3]


def make_network(config: dict[str, Any]) -> nn.Sequential:
    """The factory `support.networks:make_network` of a small classifier."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(config["sizes"]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


NETWORK = {"model": "support.networks:make_network"}


FAST = {**NETWORK, "optimizer": "adam", "learning_rate": 0.01, "batch_size": 16}


def normed_network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    )


class Network(torch.nn.Module):
    """With dropout, running statistics, a tied weight and a parameter that nothing uses."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        inputs, hidden, outputs = config["sizes"]
        self.first = torch.nn.Linear(inputs, hidden)
        self.again = torch.nn.Linear(inputs, hidden, bias=False)
        self.again.weight = self.first.weight
        self.norm = torch.nn.BatchNorm1d(hidden)
        self.dropout = torch.nn.Dropout(0.3)
        self.last = torch.nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.dropout(self.norm(self.first(x).relu() + self.again(x).tanh())))
