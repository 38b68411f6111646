"""Weights on the way from the start of a training to its end."""

import torch
from torch import Tensor


def interpolated(
    start: Tensor, trained: Tensor, alpha: float, *, first_new: int | None = None
) -> Tensor:
    """Interpolate a parameter: θ_α = μ + α (θ − μ) (WiSE-FT, Wortsman et al. 2022).

    α = 0 gives μ and α = 1 gives θ, to the bit.

    Args:
        start: μ, the values that training began from.
        trained: θ, of the same shape.
        alpha: α, from 0 to 1.
        first_new: The first row that had no value before the training; rows from there on are
            those of θ. None where there is none.

    Returns:
        θ_α in float32, or wider where μ or θ is; rounding is left to the caller.

    Source: https://arxiv.org/abs/2109.01903, section 3.
    """
    wide = torch.promote_types(torch.promote_types(start.dtype, trained.dtype), torch.float32)
    theta = trained.to(wide)
    # Unlike the sum of two products, lerp gives back either end to the bit.
    values = start.to(device=theta.device, dtype=wide).lerp(theta, alpha)
    if first_new is not None:
        values[first_new:] = theta[first_new:]
    return values
