"""Rows of earlier tasks that are replayed: in batches with the new rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from consolidate.data.examples import Examples, subset
from consolidate.data.text_examples import TextExamples
from consolidate.estimation.likelihoods import IGNORED
from consolidate.training.loop import APART
from formats.errors import InputError

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Replay:
    """What is replayed, and how much of it."""

    examples: Examples
    share: Fraction  # of the rows of a run


@dataclass(eq=False)
class WithReplay(Examples):
    """New examples by index, and by ~j the j-th that is replayed in a run.

    The old ones come in a seeded order without replacement, and in another once all have come.
    """

    new: Examples
    old: Examples
    seed: int

    def __len__(self) -> int:
        return len(self.new)

    def collate(self, indices: Sequence[int], epoch: int = 0) -> Batch:
        """Return the examples as one batch, new ones first; old masks depend on the round."""
        fresh, count = [i for i in indices if i >= 0], len(self.old)
        batches = [self.new.collate(fresh, epoch)] if fresh else []
        for number, places in groupby((~i for i in indices if i < 0), lambda j: j // count):
            order = _order(count, self.seed, number)
            batches.append(self.old.collate([order[j % count] for j in places], number))
        return batches[0] if len(batches) == 1 else _joined(batches, self._padding())

    def _padding(self) -> Mapping[str, int]:
        return self.old.padding if isinstance(self.old, TextExamples) else {}


def check_alike(new: Examples, old: Examples, where: str, other: str) -> None:
    """Refuse replayed examples that make no batch with the new ones; the first of each show it."""
    expected, found = (_described(one.collate([0])) for one in (new, old))
    if expected != found:
        raise InputError(
            f"{where}: expected rows like those of {other} ({expected}), found {found}: replay "
            "data of the same kind"
        )


def _described(batch: Batch) -> str:
    inputs, labels = batch
    named = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    # Texts have two dimensions, and are padded; so are the labels of their tokens.
    text = "input_ids" in named
    return ", ".join(
        f"{name} {str(tensor.dtype).removeprefix('torch.')}"
        + ("" if text and tensor.ndim == 2 else f" of shape {list(tensor.shape[1:])}")
        for name, tensor in {**named, "labels": labels}.items()
    )


@lru_cache(maxsize=4)
def _order(count: int, seed: int, number: int) -> list[int]:
    """Give the order of a round, which that of the new data, by the seed alone, does not share."""
    return subset(count, None, (seed + (number + 1) * APART) % 2**63, shuffled=True)


def _joined(batches: Sequence[Batch], padding: Mapping[str, int]) -> Batch:
    inputs = [batch[0] for batch in batches]
    labels = _stacked([batch[1] for batch in batches], IGNORED)
    if not isinstance(inputs[0], Mapping):
        return torch.cat(inputs), labels
    return {n: _stacked([i[n] for i in inputs], padding.get(n, 0)) for n in inputs[0]}, labels


def _stacked(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Join tensors by rows; those of texts, (B, T), are padded on the right as in one batch."""
    if tensors[0].ndim == 2:
        width = max(tensor.shape[1] for tensor in tensors)
        tensors = [pad(tensor, (0, width - tensor.shape[1]), value=value) for tensor in tensors]
    return torch.cat(list(tensors))
