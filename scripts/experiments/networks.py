"""Networks that transformers does not know, for `--model networks:NAME`."""

from itertools import pairwise
from typing import Any

from torch import nn


def mlp(config: dict[str, Any]) -> nn.Module:
    """Make a fully connected network with ReLU, its layer sizes from config.json's `sizes`."""
    sizes = config["sizes"]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
