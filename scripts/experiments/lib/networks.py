"""Networks that transformers does not know, for `--model networks:NAME`."""

from itertools import pairwise
from typing import Any

from torch import nn

DROPOUT = (0.2, 0.5)
"""Of inputs and of hidden units (Kirkpatrick et al. 2017, table S1)."""


def mlp(config: dict[str, Any]) -> nn.Sequential:
    """Make a fully connected network with ReLU, its layer sizes from config.json's `sizes`.

    With `dropout` it drops inputs and hidden units while it is trained.
    """
    sizes, dropout = config["sizes"], config.get("dropout", False)
    layers: list[nn.Module] = [nn.Dropout(DROPOUT[0])] if dropout else []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(DROPOUT[1]))
    return nn.Sequential(*layers[: -2 if dropout else -1])
