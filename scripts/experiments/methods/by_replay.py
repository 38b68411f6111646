"""One per cent of each old task kept, some rows in every step: the curve is over their weight."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from scripts.experiments.lib.tuning import Done, Job, Task, fit


class _Chain(Protocol):
    tasks: Sequence[Task]


class _Stage(Protocol):
    chain: _Chain


def tune(job: Job) -> Done:
    """Train all weights on the new rows and, weighted, on a quarter as many of the kept ones."""
    setting, strength = job.setting, job.strength
    size = setting.batch_size // 4
    tasks: Sequence[Task] = [setting.old]
    if (number := getattr(setting, "number", None)) is not None:  # of tasks before, in a chain
        tasks = cast(_Stage, setting).chain.tasks[:number]
    rows = [row for one in tasks for row in one.train[: max(size, len(one.train) // 100)]]
    old = map(setting.batch, job.rows(rows, size, 2))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        new, again = batch
        return setting.loss(model, new) + strength * setting.loss(model, again)

    batches = zip(job.new_batches(), old, strict=True)
    return fit(job.model, batches, loss, rate=job.rate, steps=setting.steps)
