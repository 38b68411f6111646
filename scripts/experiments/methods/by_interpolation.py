"""Without a penalty, then back a share of the way to the start: the curve is over the share."""

from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train all weights; the setting scores them at each share of the way."""
    setting = job.setting
    return fit(job.model, job.new_batches(), setting.loss, rate=job.rate, steps=setting.steps)
