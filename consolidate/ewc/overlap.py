"""The overlap of two Fishers: how far they weight the same parameters (Kirkpatrick et al. 2017)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def fisher_overlap(a: Tensor, b: Tensor) -> float:
    """Return Σ √(â b̂), â and b̂ scaled to unit trace: 1 − ½‖√â − √b̂‖², Kirkpatrick et al. 2017.

    Args:
        a: The Fisher diagonal of one task, any shape, floating point.
        b: That of another task, of the same shape.

    Returns:
        Between 0 (disjoint) and 1 (equal up to scale); 0 where either is zero everywhere.
    """
    return _overlap([(a, b)])


def _overlap(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the overlap over all tensors of a layer, scaled together and read one at a time."""
    shared = first = second = 0.0
    for a, b in ((_wide(one), _wide(other)) for one, other in pairs):
        first += a.sum(dtype=torch.float64).item()
        second += b.sum(dtype=torch.float64).item()
        shared += (a.sqrt() * b.sqrt()).sum(dtype=torch.float64).item()
    traces = first * second
    return min(shared / traces**0.5, 1.0) if traces > 0 else 0.0


def _wide(values: Tensor) -> Tensor:
    return values.to("cpu", torch.promote_types(values.dtype, torch.float32))


def layer_overlaps(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the overlap of two Fishers in each layer, the module that owns the parameters.

    Args:
        one: The Fisher diagonal of one task by parameter name.
        other: That of another; names that are not in both are left out.

    Returns:
        The overlap by layer, in the order of `one`.
    """
    layers: dict[str, list[str]] = {}
    for name in one:
        if name in other:
            layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return {
        layer: _overlap((one[name], other[name]) for name in names)
        for layer, names in layers.items()
    }
