"""Merging Fishers: of a new task with those of earlier tasks, and of several models.

A penalty is a quadratic ½ Σ_i Λ_i (θ_i − μ_i)² + offset, apart from λ. A sum of quadratics is one
quadratic with a larger offset, so the merged penalty has constant size.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from itertools import starmap
from typing import NamedTuple

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
        gamma: γ in [0, 1], the weight of the earlier tasks.
        weight: w_t ≥ 0, the new task's weight.

    Returns:
        Λ_t in float32, in the order of `total`, then of `fisher`.
    """
    merged = {}
    for name in dict.fromkeys([*total, *fisher]):
        terms = []
        if name in total:
            terms.append(gamma * total[name].to(torch.float32).cpu())
        if name in fisher:
            terms.append(weight * fisher[name].to(torch.float32).cpu())
        merged[name] = reduce(torch.add, terms)
    return merged


def merge_separate(
    total: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    weight: float = 1.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Merge one task so that the penalty stays the sum of all tasks' penalties.

    Λ_t = Λ_{t−1} + w_t F_t and μ_t = (Λ_{t−1} μ_{t−1} + w_t F_t θ_t*) / Λ_t, θ_t* where Λ_t = 0;
    the offset grows by Σ_i ½ Λ_{t−1} w_t F_t / Λ_t (θ_t* − μ_{t−1})². So

        ½ Λ_t (θ − μ_t)² + growth = ½ Λ_{t−1} (θ − μ_{t−1})² + ½ w_t F_t (θ − θ_t*)²

    for every θ: Kirkpatrick et al. 2017's penalty per task, at constant size.

    Args:
        total: Λ_{t−1} by parameter name.
        anchor: μ_{t−1} by the names of `total`.
        fisher: F_t by parameter name; a parameter it lacks (frozen, say) keeps Λ_{t−1} and μ_{t−1}.
        weights: θ_t* by the names of `fisher`.
        weight: w_t ≥ 0, the new task's weight.

    Returns:
        Λ_t and μ_t, in float32, or in float64 where an input is, in the order of `total`, then of
        `fisher`; and the growth of the offset.
    """
    merged: dict[str, Tensor] = {}
    anchors: dict[str, Tensor] = {}
    growth = 0.0
    for name in dict.fromkeys([*total, *fisher]):
        parts = []
        if name in total:
            parts.append((total[name].cpu(), anchor[name].cpu(), 1.0))
        if name in fisher:
            parts.append((fisher[name].cpu(), weights[name].cpu(), weight))
        dtypes = [tensor.dtype for part in parts for tensor in part[:2]]
        wide = reduce(torch.promote_types, dtypes, torch.float32)
        quadratic = reduce(_sum, starmap(_quadratic, parts))
        merged[name], anchors[name] = quadratic.fisher.to(wide), quadratic.anchor.to(wide)
        growth += quadratic.offset
    return merged, anchors, growth


class ModelTensor(NamedTuple):
    """The input of `merge_models` for one tensor of a model."""

    coefficient: float  # c, the weight of its Λ
    weights: Tensor  # θ
    fisher: Tensor | None = None  # Λ; 0 where it has none
    anchor: Tensor | None = None  # μ; θ unless given


class MergedTensor(NamedTuple):
    """The output of `merge_models` for one tensor: θ, Λ, μ in float64, and the offset's growth."""

    weights: Tensor
    fisher: Tensor
    anchor: Tensor
    offset: float


def merge_models(models: Iterable[ModelTensor], base: ModelTensor | None = None) -> MergedTensor:
    """Merge one tensor of several models, read one after the other (Matena & Raffel 2022).

    Λ = Σ c_k Λ_k, θ = Σ c_k Λ_k θ_k / Λ, μ = Σ c_k Λ_k μ_k / Λ, and where Λ = 0 the mean weighted
    by c_k. The penalty is the sum of the models' penalties,

        ½ Λ (θ − μ)² + growth = Σ_k c_k ½ Λ_k (θ − μ_k)²        for every θ.

    A base whose Λ is contained in each Λ_k enters with the coefficient 1 − Σ c_k, so that it
    counts once, and does not enter the mean. The result does not depend on the order, and is
    associative except for that mean.

    Args:
        models: The models' tensors, of one shape, c_k > 0.
        base: The tensor of their common ancestor, its coefficient ignored; no value of its Λ may
            be above a model's.

    Returns:
        The merged tensor; the sum over all tensors of its offset, with Σ c_k of the models' own, is
        the merged model's.
    """
    models = iter(models)
    first = next(models)
    coefficients = first.coefficient
    theta, mu = _quadratics(first)
    for model in models:
        coefficients += model.coefficient
        theta, mu = _sums((theta, mu), model, model.coefficient / coefficients)
    if base is not None and coefficients != 1.0:
        theta, mu = _sums((theta, mu), base._replace(coefficient=1.0 - coefficients), 0.0)
    return MergedTensor(theta.anchor, theta.fisher, mu.anchor, mu.offset)


class _Quadratic(NamedTuple):
    """½ Σ_i Λ_i (θ_i − μ_i)² + offset, in float64."""

    fisher: Tensor
    anchor: Tensor
    offset: float


def _quadratic(fisher: Tensor, anchor: Tensor, weight: float) -> _Quadratic:
    return _Quadratic(weight * fisher.double(), anchor.double(), 0.0)


def _sum(a: _Quadratic, b: _Quadratic, share: float = 1.0) -> _Quadratic:
    """Add two quadratics; `share` is b's part in μ where neither has a Fisher."""
    fisher = a.fisher + b.fisher
    shares = torch.where(fisher == 0, share, b.fisher / fisher)
    offset = 0.5 * float((a.fisher * shares * (b.anchor - a.anchor).square()).sum())
    # Unlike Σ Λμ / Λ, lerp gives back equal anchors, or the only one with a Fisher, to the bit.
    return _Quadratic(fisher, a.anchor.lerp(b.anchor, shares), a.offset + b.offset + offset)


def _quadratics(model: ModelTensor) -> tuple[_Quadratic, _Quadratic]:
    """Return a model's quadratic around its weights, and the one around its anchor."""
    fisher = torch.zeros_like(model.weights) if model.fisher is None else model.fisher
    theta = _quadratic(fisher, model.weights, model.coefficient)
    if model.anchor is None:
        return theta, theta
    return theta, theta._replace(anchor=model.anchor.double())


def _sums(
    sums: tuple[_Quadratic, _Quadratic], model: ModelTensor, share: float
) -> tuple[_Quadratic, _Quadratic]:
    (theta, mu), (more_theta, more_mu) = sums, _quadratics(model)
    theta_sum = _sum(theta, more_theta, share)
    if mu is theta and more_mu is more_theta:  # half the work
        return theta_sum, theta_sum
    return theta_sum, _sum(mu, more_mu, share)
