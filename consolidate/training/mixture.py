"""Where replayed rows stand among the new ones, as a function of the place in a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count


@dataclass(frozen=True)
class Mixture:
    """The rows of a run, epoch after epoch: new ones, with replayed ones spread among them.

    Of the first p rows ⌊p·X⌋ are replayed, so of any k successive rows ⌊k·X⌋ or ⌈k·X⌉, whatever the
    batches. An epoch ends with the last of its n new rows: it takes n/(1 − X) rows on average.

    Attributes:
        new: n, the new rows of an epoch.
        share: X, 0 ≤ X < 1, as an exact fraction; 0 without replay.
    """

    new: int
    share: Fraction = Fraction(0)

    def begin(self, epoch: int) -> int:
        """Return how many rows of the run come before an epoch."""
        if epoch == 0:
            return 0
        # The least p with p − ⌊p·X⌋ = n·epoch, where a new row has just come.
        return (self.new * epoch - 1) // (1 - self.share) + 1

    def steps(self, epoch: int, step_rows: int) -> int:
        """Return the optimizer steps of an epoch with `step_rows` rows each; the last has fewer."""
        return -(-(self.begin(epoch + 1) - self.begin(epoch)) // step_rows)

    def length(self, step_rows: int, epochs: int | None, most: int | None) -> int:
        """Return the optimizer steps of a run: of `epochs`, at most `most` unless that is None.

        Without `epochs` it is one, or as many as `most` steps take.
        """
        total = 0
        for epoch in count() if epochs is None and most is not None else range(epochs or 1):
            total += self.steps(epoch, step_rows)
            if most is not None and total >= most:
                return most
        return total

    def replayed(self, rows: int) -> int:
        """Return how many of the run's first rows are replayed."""
        return rows * self.share.numerator // self.share.denominator

    def mixed(self, order: Sequence[int], epoch: int) -> list[int]:
        """Return an epoch's rows in order: the new ones of `order`, and ~j for the j-th replayed.

        j counts from 0 at the start of the run.
        """
        if not self.share:
            return list(order)
        new, rows = iter(order), []
        done = self.replayed(self.begin(epoch))
        for place in range(self.begin(epoch), self.begin(epoch + 1)):
            if self.replayed(place + 1) > done:
                rows.append(~done)
                done += 1
            else:
                rows.append(next(new))
        return rows
