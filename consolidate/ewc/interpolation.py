"""Weights on the way from the start of training to its end."""

import torch
from torch import Tensor


def interpolated(
    start: Tensor, trained: Tensor, share: float | Tensor, *, first_new: int | None = None
) -> Tensor:
    """Interpolate a parameter: θ_α = μ + s (θ − μ), s = α in plain interpolation (WiSE-FT).

    s = 0 gives μ and s = 1 gives θ, to the bit.

    Args:
        start: μ, the values that training began from.
        trained: θ, of the same shape.
        share: s, from 0 to 1: one number, or one for each weight, of θ's shape.
        first_new: The first row that had no value before the training; rows from there on are
            those of θ. None where there is none.

    Returns:
        θ_α in float32, or wider where μ or θ is; rounding is left to the caller.

    Source: Wortsman et al. 2022, https://arxiv.org/abs/2109.01903, section 3.
    """
    wide = torch.promote_types(torch.promote_types(start.dtype, trained.dtype), torch.float32)
    theta = trained.to(wide)
    if isinstance(share, Tensor):
        share = share.to(theta)
    # Unlike the sum of two products, lerp gives back either end to the bit.
    values = start.to(theta).lerp(theta, share)
    if first_new is not None:
        values[first_new:] = theta[first_new:]
    return values


def fisher_share(old: Tensor, new: Tensor, alpha: float, *, scale: float = 1.0) -> Tensor:
    """Weight the interpolation of a parameter by Fishers: s = α F / ((1 − α) Λ + α F).

    With it `interpolated` gives θ_i = ((1 − α) Λ_i μ_i + α F_i θ_i) / ((1 − α) Λ_i + α F_i). Where
    the denominator is zero, as where both vanish, s = α: plain interpolation.

    Args:
        old: Λ, the Fisher at the start, at least 0.
        new: F, the Fisher at the trained weights, of the same shape.
        alpha: α, from 0 to 1.
        scale: Factor of F: tr Λ / tr F over the model gives both the same trace.

    Returns:
        s in float64, of F's shape, from 0 to 1.

    Source: CoFiMA, Marouf et al., ECCV 2024, https://arxiv.org/abs/2312.08977, section 3.
    """
    end = alpha * scale * new.double()
    total = end + (1 - alpha) * old.to(end)
    return torch.where(total > 0, end / total, alpha).clamp_(max=1.0)
