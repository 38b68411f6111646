"""Texts that a causal language model is to generate: what each begins with, and from what."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from consolidate.models.sampling import Distribution, Written


@dataclass(frozen=True)
class TextPlan:
    """Texts to be generated, by their number: what each begins with, and the distribution."""

    starts: list[list[int]]  # token ids; the texts begin with them in turn
    count: int
    distribution: Distribution
    batch_size: int

    @property
    def unchanged(self) -> bool:
        """Whether texts are drawn from the model's own distribution."""
        return self.distribution.temperature == 1 and self.distribution.top_p == 1

    def first(self, count: int) -> "TextPlan":
        """Give the plan of the first few texts."""
        return replace(self, count=min(count, self.count))

    def prompt(self, i: int) -> list[int]:
        """Return what text i begins with."""
        return self.starts[i % len(self.starts)]

    def batches(self) -> Iterator[list[int]]:
        """Yield the numbers of the texts of each batch, whose prompts have one length."""
        places: dict[int, list[int]] = {}
        for place, start in enumerate(self.starts):
            places.setdefault(len(start), []).append(place)
        for _, alike in sorted(places.items()):
            turns = range(0, self.count, len(self.starts))
            each = (turn + place for turn in turns for place in alike)
            numbers = (i for i in each if i < self.count)
            while batch := list(islice(numbers, self.batch_size)):
                yield batch

    def in_order(self, written: Written) -> list[list[int]]:
        """Return all that was written in the order of the texts."""
        found = zip((i for batch in self.batches() for i in batch), written.texts, strict=True)
        return [text for _, text in sorted(found)]
