"""The Fisher diagonal by its definition, plain and slow; the other modules compute it faster."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

X = TypeVar("X")
Y = TypeVar("Y")


def fisher_by_definition(
    log_p: Callable[[X, Y], Tensor],
    parameters: Mapping[str, nn.Parameter],
    examples: Iterable[tuple[X, Iterable[Y]]],
) -> dict[str, Tensor]:
    """Return F = Σ_x Σ_y p(y|x, θ) (∇_θ log p(y|x, θ))², not divided by anything.

    Args:
        log_p: From an x and a y to log p(y|x, θ), 0-dimensional, with its graph.
        parameters: θ, by name.
        examples: Each x with all the y that it can have.

    Returns:
        F by name, in the parameters' shapes and dtypes.
    """
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for x, outcomes in examples:
        for y in outcomes:
            log = log_p(x, y)
            gradients = torch.autograd.grad(log, [*parameters.values()], materialize_grads=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] += log.detach().exp() * gradient**2
    return total
