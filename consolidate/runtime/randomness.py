"""Random numbers that depend on seed and example alone; global generators are unchanged."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def untouched_randomness(seed: int) -> Iterator[None]:
    """Seed the CPU's generators for a block, and restore their state after it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


_STEP = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def uniforms(
    seed: int, examples: Tensor, positions: int, sample: int = 0, *, stream: int = 0
) -> Tensor:
    """Draw (B, positions) float64 on the CPU, strictly between 0 and 1, for (B,) examples.

    A number depends on (seed, stream, sample, example index, position) alone, so results do not
    change with batch size, order, rank count, device or a restart. The words are absorbed one
    after the other by SplitMix64 (Steele, Lea & Flood 2014).
    """
    key = _mix(torch.tensor((seed + 2**63) % 2**64 - 2**63))
    for word in (torch.tensor(stream), torch.tensor(sample), examples.cpu().long()[:, None]):
        key = _mix(key + (word + 1) * _STEP)
    bits = _mix(key + (torch.arange(positions) + 1) * _STEP)  # (B, positions)
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIERS[1]
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)  # torch's >> extends the sign
