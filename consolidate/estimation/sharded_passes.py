"""One pass over a dataset with a sharded model: each process has its own examples, in step.

Every process runs every block as often as the others, since its parameters are gathered from all.
An example's gradients arrive one parameter after the other, are squared and summed over the
processes, and each process stores its shard.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from consolidate.estimation.batches import Batch, out_of_memory
from consolidate.estimation.example_gradients import square
from consolidate.estimation.gradient_methods import requiring_gradients
from consolidate.estimation.passes import PartialPass, Pass, where_in_data
from consolidate.runtime.distributed import in_step, is_first
from consolidate.runtime.shards import add_shard_, gradients_of, whole
from formats.errors import InputError


class ShardedPass(Pass):
    """Σ over batches of the squares of per-example gradients, one example after the other."""

    _stand_in: Batch | None = None

    def see(self, batch: Batch) -> None:
        """Read a batch that the resumed pass has added."""
        self._stand_in = self._stand_in or batch

    def take(self, batch: Batch, keep: Callable[[PartialPass], None] | None = None) -> None:
        """Add a batch, while the other processes add theirs.

        `keep` is given only if every process has added a batch, so that all call it together.
        """
        self._stand_in = self._stand_in or batch
        batch = self._placed(batch)
        units, self._vectors = self._scores.units(batch.labels), 0
        if self._scores.whole:
            parts, units = [batch], units.sum()[None]
        else:
            parts = [batch.example(i) for i in range(len(batch))]
        try:
            traces = self._add_parts(parts)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise InputError(
                f"batch {batch.number}: out of memory; shorten the examples, use a smaller dtype, "
                "or more processes"
            ) from error
        self._accumulators().end_batch(
            traces, units, len(batch), where_in_data(batch), self._vectors
        )
        if self._accumulators().fold_if_due() and keep is not None:
            keep(PartialPass(self._accumulators().tensors(), None, None))

    def wait(self) -> None:
        """Run in step while other processes add a batch, without adding anything."""
        self._add_parts([])

    def means(self, divisor: int) -> dict[str, Tensor]:
        """Return the gathered sums over the divisor, by name; only in the first process."""
        found = {}
        for name, values in super().means(divisor).items():
            gathered = whole(values, self._parameters[name])
            if is_first(self._group):
                found[name] = gathered.cpu()
        return found

    def _add_parts(self, parts: list[Batch]) -> dict[str, Tensor]:
        """Add the squares of each part's gradients; return their traces, (parts,)."""
        each: list[dict[str, Tensor]] = []
        sums = self._sums
        reached: dict[str, Tensor] = {}

        def take(name: str, gradient: Tensor) -> None:
            gradient = gradient.to_dense().to(self._dtype)
            trace = square(gradient)[None]
            reached[name] = reached[name] + trace if name in reached else trace
            add_shard_(sums[name], gradient.square_(), self._parameters[name])

        with (
            requiring_gradients(self._parameters),
            gradients_of(self._model, self._parameters, take),
        ):
            for part in in_step(parts, self._group):
                reached = {}
                self._send_back(part)
                if part is not None:
                    each.append(reached)
        return self._joined(each)

    def _send_back(self, part: Batch | None) -> None:
        """Run a part forward and as often backward as the others; without a part, add nothing."""
        if self._stand_in is None:
            raise InputError("there are fewer batches than processes; start fewer processes")
        batch = self._placed(self._stand_in.example(0)) if part is None else part
        outputs = self._scores.forward(batch)
        own = () if part is None else self._scores.vectors(outputs.detach(), batch)
        for vector in in_step(own, self._group):
            self._vectors += 1  # in all processes, which so fold their sums together
            if outputs.requires_grad:
                sent = torch.zeros_like(outputs) if vector is None else vector
                outputs.backward(sent, retain_graph=True)
