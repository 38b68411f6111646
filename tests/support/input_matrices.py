"""The matrices over a layer's inputs by their definition in float64: Jᵀ J of single examples."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from formats.fisher_json import Block
from support.reference import REFERENCE, example, float64, outputs


def input_matrices(
    model: nn.Module,
    examples: Iterable[tuple[Any, Tensor]],
    likelihood: str,
    kind: str,
    blocks: Mapping[str, Block],
) -> dict[str, Tensor]:
    """Sum over examples of E_y[Jᵀ J] (kind "exact") or of the labels' own ("empirical").

    `examples` are pairs (inputs, labels), as many examples in each as one likes. Not divided by
    anything. The expectation goes over every outcome, its probability being exp(log p).
    """
    model = copy.deepcopy(model).double().eval()
    log_p, outcomes = REFERENCE[likelihood]
    assert outcomes is not None
    values = {name: p.detach() for name, p in model.named_parameters()}

    def log(parameters: dict[str, Tensor], x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        args, kwargs = ((), x) if isinstance(x, dict) else ((x,), {})
        outputs = torch.func.functional_call(model, parameters, args, kwargs)
        value = log_p(getattr(outputs, "logits", outputs)[0], y)
        return value, value.detach()

    totals: dict[str, Tensor] = {}
    for inputs, labels in examples:
        for i in range(len(labels)):
            x = float64(example(inputs, i))
            with torch.no_grad():
                each = outcomes(outputs(model, x)[0], labels[i])
            for y in each if kind == "exact" else [labels[i]]:
                gradients, value = torch.func.grad(log, has_aux=True)(values, x, y)
                weight = value.exp() if kind == "exact" else 1.0
                for name, block in blocks.items():
                    j = _jacobian([gradients[p] for p in block.parameters], block.dims)
                    totals[name] = totals.get(name, 0) + weight * j.T @ j
    return totals


def _jacobian(gradients: list[Tensor], dims: tuple[int, ...]) -> Tensor:
    """Lay one example's gradients out as (out, n), the bias last."""
    weight, *bias = gradients
    (out,) = set(range(weight.ndim)) - set(dims)
    rows = weight.movedim(out, 0).reshape(weight.shape[out], -1)
    return torch.cat([rows, *(b[:, None] for b in bias)], 1)
