"""LoRA of rank 8 on every linear layer, and the head: the curve is over the learning rate."""

from scripts.experiments.lib.low_rank import adapt
from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train the adapter and the head."""
    setting = job.setting
    adapt(job.model, setting.head)
    return fit(job.model, job.new_batches(), setting.loss, rate=job.rate, steps=setting.steps)
