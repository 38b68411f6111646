"""Sums of squares by a kernel, beside sums in float64."""

import pytest
import torch

from consolidate.estimation.squares_kernel import add_squares, using_kernel


def check_sums_and_traces(
    examples: int, positions: int, rows: int, columns: int, layout: str
) -> None:
    """Hold the kernel in use on the CPU against float64, for factors of a layout in memory."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(examples, positions, 2 * rows, generator=generator)
    g = g[..., ::2] if layout == "apart" else g[..., :rows]
    g = g.mT.contiguous().mT if layout == "positions" else g
    a = torch.randn(examples, columns, positions, generator=generator).mT
    a = a if layout == "apart" else a.contiguous()
    total = torch.rand(rows, columns + 3, generator=generator)[:, :columns]
    squares = (g.double().mT @ a.double()).square()
    expected = total + squares.sum(0)
    traces = torch.full((examples,), -1.0)
    traces[::2] = 0.5
    with using_kernel(torch.device("cpu"), pytest.fail):
        add_squares(total, g, a, traces)
    torch.testing.assert_close(total.double(), expected, rtol=2e-6, atol=2e-6 * expected.max())
    measured = 0.5 + squares.sum((1, 2))[::2]
    torch.testing.assert_close(traces[::2].double(), measured, rtol=1e-6, atol=0)
    assert (traces[1::2] == -1).all()
