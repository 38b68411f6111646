"""Without a penalty: the curve is over the learning rate."""

from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train all weights."""
    setting = job.setting
    return fit(job.model, job.new_batches(), setting.loss, rate=job.rate, steps=setting.steps)
