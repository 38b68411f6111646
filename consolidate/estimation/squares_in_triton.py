"""The kernel of squares in Triton, compiled at the first use: for float32 on a CUDA device."""

from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton import language as tl

HIGH, WIDE = tl.constexpr(64), tl.constexpr(64)  # a tile of a gradient
DEEP = tl.constexpr(32)  # positions that are added to it at once


def add_squares(total: Tensor, g: Tensor, a: Tensor, seen: tuple[int, ...], traces: Tensor) -> None:
    """Add Σ_b (Σ_t g_bt a_btᵀ)² to total, and what each example adds to its trace.

    Args:
        total: (m, n), with neighbouring columns next to each other.
        g: (B, T, m).
        a: What `seen` points into.
        seen: Where the n numbers of each position are, in the order of `squares.c`.
        traces: (B,); those that are negative stay as they are.
    """
    rows, columns = total.shape
    positions, offsets = _places(seen[1:], columns, total.device)
    tiles = triton.cdiv(rows, HIGH.value) * triton.cdiv(columns, WIDE.value)
    found = total.new_empty(len(g), tiles)
    with torch.cuda.device_of(total):
        _squares[(tiles,)](
            *(total, total.stride(0), g.contiguous(), a, seen[0], positions, offsets, found),
            *(len(g), g.shape[1], rows, columns),
        )
    traces += torch.where(traces < 0, 0.0, found.double().sum(1))


@lru_cache(256)
def _places(fields: tuple[int, ...], columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where in an example each position begins, (T,), and the columns from there, (n,)."""
    down, across, height, width, run, runs_in_row, next_row, next_run = fields
    positions = torch.arange(height)[:, None] * down + torch.arange(width) * across
    numbers = torch.arange(columns)
    runs = numbers // run
    offsets = runs // runs_in_row * next_row + runs % runs_in_row * next_run + numbers % run
    return positions.flatten().to(device), offsets.to(device)


@triton.jit
def _squares(
    total: tl.tensor,
    next_row: tl.tensor,
    g: tl.tensor,
    a: tl.tensor,
    next_example: tl.tensor,
    places: tl.tensor,
    offsets: tl.tensor,
    traces: tl.tensor,
    examples: tl.tensor,
    positions: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
) -> None:
    """Square a tile of each example's gradient, (HIGH, WIDE), and add it to the sums."""
    tile = tl.program_id(0)
    across = tl.cdiv(columns, WIDE)
    row = (tile // across) * HIGH + tl.arange(0, HIGH)
    column = (tile % across) * WIDE + tl.arange(0, WIDE)
    offset = tl.load(offsets + column, mask=column < columns, other=0)
    sums = tl.zeros((HIGH, WIDE), dtype=tl.float32)
    for example in range(examples):
        of_outputs = g + tl.cast(example, tl.int64) * positions * rows
        of_inputs = a + tl.cast(example, tl.int64) * next_example
        gradient = tl.zeros((HIGH, WIDE), dtype=tl.float32)
        for first in range(0, positions, DEEP):
            at = first + tl.arange(0, DEEP)
            place = tl.load(places + at, mask=at < positions, other=0)
            left = tl.load(
                of_outputs + tl.cast(at, tl.int64)[None, :] * rows + row[:, None],
                mask=(at < positions)[None, :] & (row < rows)[:, None],
                other=0.0,
            )
            right = tl.load(
                of_inputs + place[:, None] + offset[None, :],
                mask=(at < positions)[:, None] & (column < columns)[None, :],
                other=0.0,
            )
            gradient += tl.dot(left, right, input_precision="ieee")
        squares = gradient * gradient
        sums += squares
        trace = tl.sum(tl.sum(squares, axis=1), axis=0)
        tl.store(traces + example * tl.num_programs(0) + tile, trace)
    target = total + row[:, None].to(tl.int64) * next_row + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(target, tl.load(target, mask=inside, other=0.0) + sums, mask=inside)
