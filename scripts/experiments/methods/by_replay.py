"""One per cent of the old rows kept, some of them in every step: the curve is over their weight."""

from typing import Any

from torch import Tensor, nn

from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train all weights on the new rows and, weighted, on a quarter as many of the kept ones."""
    setting, strength = job.setting, job.strength
    size = setting.batch_size // 4
    rows = setting.old.train[: max(size, len(setting.old.train) // 100)]
    old = map(setting.batch, job.rows(rows, size, 2))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        new, again = batch
        return setting.loss(model, new) + strength * setting.loss(model, again)

    batches = zip(job.new_batches(), old, strict=True)
    return fit(job.model, batches, loss, rate=job.rate, steps=setting.steps)
