"""All of the old rows beside the new ones, as many in every step: the curve is over the rate."""

from typing import Any

from torch import Tensor, nn

from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train all weights on both tasks alike."""
    setting = job.setting
    old = map(setting.batch, job.rows(setting.old.train, setting.batch_size, 2))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        new, again = batch
        return setting.loss(model, new) + setting.loss(model, again)

    batches = zip(job.new_batches(), old, strict=True)
    return fit(job.model, batches, loss, rate=job.rate, steps=setting.steps)
