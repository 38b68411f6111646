"""Examples of one task, in batches and parts."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from consolidate.data.preprocessing import Preprocessing
from formats.errors import InputError


@dataclass(eq=False)
class Examples(ABC):
    """Encoded examples; an example's index is its place in the data, in every epoch."""

    # Notes for the user, such as which columns are not read.
    notes: list[str] = field(default_factory=list, kw_only=True)
    # How images become inputs of a user's own module; None for everything else.
    preprocessing: Preprocessing | None = field(default=None, kw_only=True)

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def collate(self, indices: Sequence[int], epoch: int = 0) -> tuple[Any, Tensor]:
        """Return the inputs and labels of these examples as one batch; masks depend on the epoch.

        Labels are (B,), (B, K) or (B, T), with −100 where nothing is predicted.
        """

    def length(self, i: int) -> int:
        """Return the relative size of example `i`: 1, or its number of tokens."""
        return 1

    def longest_first(
        self, order: Sequence[int] | None = None, window: int | None = None
    ) -> Sequence[int]:
        """Sort an order of all examples, or each window of it, so that batches need little padding.

        Examples of one length keep their order; where all have one, the order itself is returned.
        """
        order = range(len(self)) if order is None else order
        if len({self.length(i) for i in order}) < 2:
            return order
        window = window or len(order)
        windows = (order[start : start + window] for start in range(0, len(order), window))
        return [i for some in windows for i in sorted(some, key=self.length, reverse=True)]

    def notes_on(self, used: Sequence[int] | None = None) -> list[str]:
        """Return the notes on the examples that are used, or on all."""
        return self.notes

    def batches(
        self, batch_size: int, *, order: Sequence[int] | None = None
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield the examples, or those of `order`, in batches; the last may be smaller."""
        indices = range(len(self)) if order is None else order
        for start in range(0, len(indices), batch_size):
            yield self.collate(indices[start : start + batch_size])


@dataclass(eq=False)
class Part(Examples):
    """Some of the examples of another; each is encoded as there, with the same masks."""

    whole: Examples
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def collate(self, indices: Sequence[int], epoch: int = 0) -> tuple[Any, Tensor]:
        """Return these examples as one batch."""
        return self.whole.collate([self.indices[i] for i in indices], epoch)

    def length(self, i: int) -> int:
        """Return the relative size of example `i`."""
        return self.whole.length(self.indices[i])

    def notes_on(self, used: Sequence[int] | None = None) -> list[str]:
        """Return the notes on the examples of this part that are used."""
        used = range(len(self)) if used is None else used
        return self.whole.notes_on([self.indices[i] for i in used])


def hold_out(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """Split off a seeded tenth: at least 50 examples, but no more than half, and at most 5,000."""
    count = len(examples)
    if count < 2:
        raise InputError(
            f"expected at least two examples to split off a validation set, found {count}; pass "
            "--validation for the new task"
        )
    size = min(max(round(0.1 * count), 50), 5000, count // 2)
    held_out = set(subset(count, size, seed))
    rest = [i for i in range(count) if i not in held_out]
    return Part(examples, rest), Part(examples, sorted(held_out))


def subset(count: int, most: int | None, seed: int, *, shuffled: bool = False) -> list[int]:
    """Return the indices of a seeded subset of examples, or of all, shuffled or in order."""
    if not shuffled and (most is None or most >= count):
        return list(range(count))
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = torch.randperm(count, generator=generator)[:most].tolist()
    return chosen if shuffled else sorted(chosen)
