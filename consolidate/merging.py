"""Merging the Fisher of a new task into what earlier tasks left behind."""

from collections.abc import Mapping

import torch
from torch import Tensor


def merge_online(
    total: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    *,
    gamma: float = 1.0,
    weight: float = 1.0,
) -> dict[str, Tensor]:
    """Merge one task into the running total: Λ_t = γ Λ_{t−1} + w_t F_t, anchored at θ_t*.

    γ acts in this update only; Schwarz et al. 2018 put it into the penalty as well.

    Args:
        total: Λ_{t−1} by parameter name.
        fisher: F_t by parameter name; a parameter it lacks (frozen, say) keeps γ Λ_{t−1}.
        gamma: γ in [0, 1], how much of the past is kept.
        weight: w_t ≥ 0, the new task's weight.

    Returns:
        Λ_t in float32, in the order of `total`, then of `fisher`.
    """
    merged = {}
    for name in dict.fromkeys([*total, *fisher]):
        terms = []
        if name in total:
            terms.append(gamma * total[name].to(torch.float32))
        if name in fisher:
            terms.append(weight * fisher[name].to(torch.float32).cpu())
        merged[name] = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    return merged
