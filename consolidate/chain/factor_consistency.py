"""Consistency of the matrices beside Λ: eigenvalues and traces."""

import math
import secrets
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from consolidate.ewc.block_penalty import SAME_TRACE
from formats.errors import InputError
from formats.fisher_folder import StoredFisher, in_one_line

ROUNDING = 2.0**-8
"""Of a matrix, relative to its Frobenius norm: a negative eigenvalue up to this is rounding.

That is the rounding to bfloat16, in which an earlier task may have been stored, whatever the dtype.
"""

EXACT_SIZE = 2048  # rows up to which a matrix is factored, in about half a second
STEPS = 32  # of Lanczos beyond that, each a product with the matrix
_TINY = 1e-30
_ROWS = 256  # in float64 at a time


def factor_contradictions(stored: StoredFisher, traces: Mapping[str, float]) -> Iterator[str]:
    """Yield each matrix with a negative eigenvalue, and each R of another trace than Λ.

    A, R and G are sums of squares, so none has an eigenvalue below 0 but by rounding. Where all
    are R, as `consolidate` writes and uses them, tr R = Σ Λ over the parameters that it covers.
    """
    blocks, factors = stored.ledger.blocks, stored.factors
    if blocks is None or factors is None:
        return
    all_inputs = all(block.matrix == "R" for block in blocks.values())
    for name, block in blocks.items():
        matrix = factors[name]
        if (least := broken_bound(matrix)) is not None:
            yield (
                f"{factors.file_of(name)}: {name!r} has an eigenvalue below {least:.3g}, which a "
                "sum of squares cannot have, nor rounding explain; measure it again"
            )
        if not all_inputs:
            continue
        expected = math.fsum(traces[parameter] for parameter in block.parameters)
        found = float(matrix.diagonal().double().sum())
        if abs(found - expected) > SAME_TRACE * max(expected, found) + _TINY:
            yield (
                f"{factors.file_of(name)}: {name!r}: expected the trace {expected:.6g}, that of "
                f"the Fisher of {' and '.join(block.parameters)}, found {found:.6g}; measure it "
                "again"
            )


def traces_of(stored: StoredFisher) -> dict[str, float]:
    """Give the sum of each tensor of Λ."""
    return {name: float(stored.fisher[name].double().sum()) for name in stored.fisher}


def check_factors(stored: StoredFisher) -> None:
    """Refuse matrices beside Λ that have a negative eigenvalue, or another trace than Λ."""
    if stored.factors is None:
        return
    if lines := list(factor_contradictions(stored, traces_of(stored))):
        raise InputError(in_one_line(lines))


def broken_bound(matrix: Tensor) -> float | None:
    """Return the bound on a symmetric matrix's eigenvalues, below 0, that one of them breaks.

    Up to EXACT_SIZE rows the Cholesky factorization decides. Beyond, Lanczos from a random vector
    finds an eigenvalue that is below 0 by more than a few hundredths of the largest; it never
    refuses a matrix that has none.

    Returns:
        None if no eigenvalue below the bound −ROUNDING ‖R‖ was found.
    """
    norm = math.sqrt(math.fsum(float(r.double().square().sum()) for r in matrix.split(_ROWS)))
    if norm <= _TINY:
        return None
    if len(matrix) <= EXACT_SIZE:
        shifted = matrix.double() / norm
        shifted.diagonal().add_(ROUNDING)
        broken = bool(torch.linalg.cholesky_ex(shifted).info)
    else:
        broken = _smallest_ritz_value(matrix.float() / norm) < -ROUNDING
    return -ROUNDING * norm if broken else None


def _smallest_ritz_value(matrix: Tensor) -> float:
    """Return the smallest eigenvalue of a matrix within a Krylov space: none of it is smaller."""
    # Not from a fixed seed: a matrix can be made that hides an eigenvalue from a known vector.
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    start = torch.randn(len(matrix), generator=generator)
    basis = torch.zeros(STEPS, len(matrix))
    basis[0] = start / start.norm()
    for step in range(1, STEPS):
        vector = matrix @ basis[step - 1]
        for _ in range(2):  # once leaves a part of rounding
            vector = vector - basis[:step].T @ (basis[:step] @ vector)
        if (size := float(vector.norm())) < 1e-6:  # the space is invariant
            basis = basis[:step]
            break
        basis[step] = vector / size
    inside = (basis @ (matrix @ basis.T)).double()
    return float(torch.linalg.eigvalsh((inside + inside.T) / 2)[0])
