"""Examples of one task: batches of them, and parts."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from formats.errors import InputError, UsageError


class Examples(ABC):
    """Encoded examples; an example's index is its place in the data, in every epoch."""

    def __init__(self, notes: Iterable[str] = ()) -> None:
        self._notes = list(notes)

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def collate(self, indices: Sequence[int], epoch: int = 0) -> tuple[Any, Tensor]:
        """Return the inputs and labels of these examples as one batch; masks depend on the epoch.

        Labels are (B,), (B, K) or (B, T), with −100 where nothing is predicted.
        """

    def units(self, i: int) -> int:
        """Return how many units example `i` counts for: 1, or its predicted tokens."""
        return 1

    def length(self, i: int) -> int:
        """Return the size of example `i` beside others: 1, or its tokens."""
        return 1

    def notes(self) -> list[str]:
        """Return what a user should be told: how many texts were truncated, and so on."""
        return list(self._notes)

    def batches(
        self, batch_size: int, *, order: Sequence[int] | None = None
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield the examples, or those of `order`, in batches, of which the last may be smaller."""
        if batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {batch_size}")
        indices = range(len(self)) if order is None else order
        for start in range(0, len(indices), batch_size):
            yield self.collate(indices[start : start + batch_size])


class Part(Examples):
    """Some of the examples of another; each keeps what it has there, masks included."""

    def __init__(self, whole: Examples, indices: Sequence[int]) -> None:
        super().__init__()
        self._whole = whole
        self._indices = list(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def collate(self, indices: Sequence[int], epoch: int = 0) -> tuple[Any, Tensor]:
        """Return these of the examples as one batch."""
        return self._whole.collate([self._indices[i] for i in indices], epoch)

    def units(self, i: int) -> int:
        """Return how many units example `i` counts for."""
        return self._whole.units(self._indices[i])

    def length(self, i: int) -> int:
        """Return the size of example `i` beside others."""
        return self._whole.length(self._indices[i])


HELD_OUT, LEAST_HELD_OUT, MOST_HELD_OUT = 0.1, 50, 5000


def hold_out(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """Split off a seeded tenth: at least 50 examples, but no more than half, and at most 5,000."""
    count = len(examples)
    if count < 2:
        raise InputError("one example cannot be split: give --validation for the new task")
    size = min(max(round(HELD_OUT * count), LEAST_HELD_OUT), MOST_HELD_OUT, count // 2)
    held = set(subset(count, size, seed))
    rest = [i for i in range(count) if i not in held]
    return Part(examples, rest), Part(examples, sorted(held))


def subset(count: int, most: int | None, seed: int, *, shuffled: bool = False) -> list[int]:
    """Return the indices of a seeded subset of examples, or of all, shuffled or in their order."""
    if not shuffled and (most is None or most >= count):
        return list(range(count))
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = torch.randperm(count, generator=generator)[:most].tolist()
    return chosen if shuffled else sorted(chosen)
