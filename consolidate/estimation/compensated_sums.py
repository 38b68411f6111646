"""Sums of squared gradients over many examples, and the spread of the examples."""

import math
from collections.abc import Mapping
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from consolidate.estimation.input_blocks import InputBlock, whole_matrix, zero_blocks
from consolidate.runtime.distributed import sum_, summed
from consolidate.runtime.shards import is_cut, local
from formats.errors import NonFiniteError

FOLDED_BATCHES, FOLDED_ADDITIONS = 16, 1000
"""The batches, or additions to one element, after which the sums are folded into the totals."""

NEGLIGIBLE = 1e-7
"""The share of the whole trace below which a parameter's trace counts as rounding noise.

For a bias that does not change a softmax, such as those of BERT's keys, the share is 10⁻⁸ or less
in bfloat16 and 10⁻¹⁷ in float32, and its spread is meaningless."""


class Counts(NamedTuple):
    """Counts of what was read, and moments of the traces s over draws: examples, or batches."""

    moments: Tensor  # Σ 1, Σ s, Σ u, Σ s², Σ s u and Σ u² where s was measured, (6, parameters)
    reached: frozenset[str] = frozenset()  # the parameters that any output depended on
    batches: int = 0
    examples: int = 0
    draws: int = 0
    units: int = 0  # Σ u, u the units of a draw: 1 each, or predicted tokens


class _Batch(NamedTuple):
    traces: Mapping[str, Tensor]
    units: Tensor
    examples: int
    where: str


class Accumulators:
    """Σ squares of each parameter's gradients, in totals with compensated rounding (Kahan).

    Squares are added to `sums`, and products to the matrices of `blocks`, which are folded into the
    totals at intervals; the rounding error remains there for the next fold. Where a batch fails
    half way, `rewind` returns to the last fold. Of a sharded parameter there is only this process's
    part, summed over all processes.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
        blocks: Mapping[str, InputBlock] | None = None,
    ):
        self.sums = {
            name: torch.zeros(local(p).shape, dtype=dtype, device=p.device)
            for name, p in parameters.items()
        }
        self.blocks = zero_blocks(blocks or {}, parameters, dtype)  # flat
        self._weights = {name: block.parameters[0] for name, block in (blocks or {}).items()}
        self._cut = any(is_cut(p) for p in parameters.values())
        self._totals = {name: values.clone() for name, values in self.sums.items()}
        self._block_totals = {name: values.clone() for name, values in self.blocks.items()}
        self._counts = Counts(torch.zeros(6, len(parameters), dtype=torch.float64))
        self._folded = self._counts
        self._waiting: list[_Batch] = []  # Not looked at yet: that would wait for the device.
        self._additions = 0  # to an element, since the last fold

    @property
    def counts(self) -> Counts:
        """The counts of the totals and the sums; a trace that is not finite raises."""
        if self._waiting:
            self._count(self._waiting)
            self._waiting = []
        return self._counts

    @property
    def examples(self) -> int:
        """The number of examples in the totals and the sums."""
        return self._counts.examples + sum(batch.examples for batch in self._waiting)

    def end_batch(
        self,
        traces: Mapping[str, Tensor],
        units: Tensor,
        examples: int,
        where: str,
        additions: int = 1,
    ) -> None:
        """Count a batch whose squares have been added to the sums.

        Args:
            traces: The sum of what each draw added, (draws,), by the names that outputs depend on;
                negative where it was not measured.
            units: The units of each draw, (draws,).
            examples: The number of examples in the batch.
            where: The name of the batch in a message.
            additions: How many numbers were added to an element, one after the other.
        """
        self._additions += additions
        self._waiting.append(_Batch(traces, units, examples, where))

    def fold_if_due(self) -> bool:
        """Fold the sums into the totals if enough was added since the last fold; return whether."""
        batches = self._counts.batches + len(self._waiting) - self._folded.batches
        due = batches >= FOLDED_BATCHES or self._additions >= FOLDED_ADDITIONS
        if due:
            self._fold()
        return due

    def rewind(self) -> None:
        """Discard what was added since the last fold, and its rounding error."""
        for values in (*self.sums.values(), *self.blocks.values()):
            values.zero_()
        self._waiting.clear()
        self._additions = 0
        self._counts = self._folded

    def sum_over(self, group: ProcessGroup | None) -> None:
        """Add the sums of the other processes; nothing may be added after that."""
        self._fold()
        if not self._cut:  # A shard already has the sums of all.
            for values in (self._totals, self.sums, self._block_totals, self.blocks):
                sum_(values.values(), group)
        self._counts = self._summed(group)

    def relative_errors(self, group: ProcessGroup | None = None) -> dict[str, float]:
        """Return the relative standard error of each trace, over the draws of all processes.

        Left out are traces of zero, and those below NEGLIGIBLE of the whole, which are noise.
        The trace is a ratio, R = Σ s / Σ u. Where n draws were measured, the residuals d = s − R u
        have the variance σ² = Σ d² / (n − 1), and R has N σ² / (Σ u)² over all N (Cochran 1977,
        ch. 6); infinite for n < 2.
        """
        counts = self._summed(group)
        n, s, u, ss, su, uu = counts.moments
        ratio = s / u
        variance = (ss - 2 * ratio * su + ratio.square() * uu).clamp(min=0) / (n - 1)
        errors = (counts.draws * variance).sqrt() / counts.units / ratio
        matters = ratio > NEGLIGIBLE * ratio.nansum()  # Where none was measured it is NaN.
        errors = torch.where(n > 1, errors, math.inf).tolist()
        return dict(compress(zip(self.sums, errors, strict=True), matters.tolist()))

    def means(self, divisor: int) -> dict[str, Tensor]:
        """Return the totals over the divisor; nothing may be added to them afterwards."""
        self._fold()
        # Sums over pairs of positions can round to a little below 0 where a gradient is 0.
        return {name: total.div_(divisor).clamp_(min=0) for name, total in self._totals.items()}

    def block_means(self, divisor: int) -> dict[str, Tensor]:
        """Return the blocks' matrices over the divisor; call it after `means`."""
        return {name: whole_matrix(t.div_(divisor)) for name, t in self._block_totals.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return all that `load` needs; call it directly after a fold."""
        moments, reached, *numbers = self._counts
        return {
            **{f"total/{name}": values for name, values in self._totals.items()},
            **{f"rest/{name}": values for name, values in self.sums.items()},
            **{f"block-total/{name}": values for name, values in self._block_totals.items()},
            **{f"block-rest/{name}": values for name, values in self.blocks.items()},
            "moments": moments,
            "reached": torch.tensor([name in reached for name in self.sums]),
            "counts": torch.tensor(numbers),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from what `tensors` returned."""
        for name in self.sums:
            self._totals[name].copy_(tensors[f"total/{name}"])
            self.sums[name].copy_(tensors[f"rest/{name}"])
        for name in self.blocks:
            self._block_totals[name].copy_(tensors[f"block-total/{name}"])
            self.blocks[name].copy_(tensors[f"block-rest/{name}"])
        reached = frozenset(compress(self.sums, tensors["reached"].tolist()))
        self._counts = Counts(tensors["moments"], reached, *tensors["counts"].tolist())
        self._folded = self._counts

    def _summed(self, group: ProcessGroup | None) -> Counts:
        counts = self.counts
        if group is None:
            return counts
        reached = [name in counts.reached for name in self.sums]
        numbers = summed(group, *counts.moments.flatten().tolist(), *counts[2:], *reached)
        size = counts.moments.numel()
        return Counts(
            torch.tensor(numbers[:size], dtype=torch.float64).view_as(counts.moments),
            frozenset(compress(self.sums, numbers[size + 4 :])),
            *map(int, numbers[size : size + 4]),
        )

    def _fold(self) -> None:
        first, counts = self._folded.batches + 1, self.counts
        for sums, totals in ((self.sums, self._totals), (self.blocks, self._block_totals)):
            for name, total in totals.items():
                new = total + sums[name]
                sums[name] += total.sub_(new)  # The rounding error.
                totals[name] = new
                if not math.isfinite(new.sum()) and not new.isfinite().all():
                    parameter = self._weights[name] if totals is self._block_totals else name
                    raise _not_finite(parameter, f"one of the batches {first} to {counts.batches}")
        self._additions = 0
        self._folded = counts

    def _count(self, batches: list[_Batch]) -> None:
        u = torch.cat([batch.units for batch in batches]).cpu().double()
        # Parameters that no output depends on have no traces.
        parts = [
            batch.traces[name] if name in batch.traces else torch.zeros_like(batch.units)
            for name in self.sums
            for batch in batches
        ]
        s = torch.cat(parts).cpu().double().view(len(self.sums), -1)  # (parameters, draws)
        if not math.isfinite(s.sum()) and not (finite := s.isfinite()).all():
            row, column = finite.logical_not().nonzero()[0].tolist()
            wheres = [batch.where for batch in batches for _ in batch.units]
            raise _not_finite(list(self.sums)[row], wheres[column])
        counts, measured = self._counts, (s >= 0).double()
        s = s * measured
        powers = torch.stack([torch.ones_like(u), u, u.square()], 1)  # (draws, 3)
        n, su, suu = (measured @ powers).unbind(1)
        first, mixed, _ = (s @ powers).unbind(1)
        self._counts = Counts(
            counts.moments + torch.stack([n, first, su, s.square().sum(1), mixed, suu]),
            counts.reached.union(*(batch.traces for batch in batches)),
            counts.batches + len(batches),
            counts.examples + sum(batch.examples for batch in batches),
            counts.draws + len(u),
            counts.units + int(u.sum()),
        )


def _not_finite(name: str, where: str) -> NonFiniteError:
    return NonFiniteError(
        f"the gradient of {name!r} is not finite in {where}; look for infinite weights or inputs, "
        "or use a wider dtype"
    )
