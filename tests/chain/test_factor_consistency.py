"""Matrices beside Λ: which are refused for their eigenvalues or their trace."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from consolidate.chain import factor_consistency
from consolidate.chain.factor_consistency import broken_bound, factor_contradictions
from formats.fisher_folder import read_fisher
from support.factor_checkpoints import rewrite, write


def low_rank(size: int, rank: int, seed: int = 0) -> Tensor:
    """A sum of squares with many eigenvalues of 0."""
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(rank, size, generator=generator) * torch.logspace(0, -3, size)
    matrix = jacobian.T @ jacobian
    return (matrix + matrix.T) / 2


def with_eigenvalue(matrix: Tensor, share: float) -> Tensor:
    """The matrix with an eigenvalue of −share of its norm instead of about 0."""
    null = torch.linalg.eigh(matrix.double())[1][:, 0]
    changed = matrix.double() - share * matrix.norm() * torch.outer(null, null)
    return ((changed + changed.T) / 2).float()


@pytest.mark.parametrize("exact_size", [2048, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_squares_pass_and_negative_eigenvalues_do_not(
    monkeypatch: pytest.MonkeyPatch, exact_size: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(factor_consistency, "EXACT_SIZE", exact_size)
    for size, rank in ((1, 1), (7, 2), (300, 40), (300, 300)):
        matrix = low_rank(size, rank)
        for scale in (1e-20, 1.0, 1e20):
            assert broken_bound((matrix * scale).to(dtype)) is None
    matrix = low_rank(300, 40)
    for share in (0.5, 0.05):
        bound = broken_bound(with_eigenvalue(matrix, share).to(dtype))
        assert bound is not None
        assert -float(matrix.norm()) / 100 < bound < 0
    assert broken_bound(torch.zeros(5, 5, dtype=dtype)) is None


def test_a_small_negative_eigenvalue_is_found_up_to_the_exact_size() -> None:
    matrix = low_rank(300, 40)
    assert broken_bound(with_eigenvalue(matrix, 5e-3)) is not None
    assert broken_bound(with_eigenvalue(matrix, 3e-3)) is None  # as large as rounding


def test_what_was_rounded_before_another_task_was_added_passes(tmp_path: Path) -> None:
    matrix = low_rank(300, 5).bfloat16().float() + 1e-3 * low_rank(300, 5, seed=1)
    assert float(torch.linalg.eigvalsh(matrix.double())[0]) < -1e-5 * float(matrix.norm())
    assert broken_bound((matrix + matrix.T) / 2) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_another_trace(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write(tmp_path / "a", dtype=dtype)
    stored = read_fisher(folder / "fisher")
    traces = {name: float(stored.fisher[name].double().sum()) for name in stored.fisher}
    assert list(factor_contradictions(stored, traces)) == []
    rewrite(folder, lambda tensors: tensors["0.weight.R"].mul_(1.05), "factors")
    stored = read_fisher(folder / "fisher")
    [line] = factor_contradictions(stored, traces)
    assert "factors.safetensors: '0.weight.R': expected the trace 0.78" in line
    assert "that of the Fisher of 0.weight and 0.bias, found 0.8" in line
    without = replace(stored, ledger=replace(stored.ledger, blocks=None), factors=None)
    assert list(factor_contradictions(without, traces)) == []
