"""Without a penalty, and stopped sooner: the curve is over the share of the steps."""

from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train all weights for a share of the steps, over which the rate falls to zero."""
    setting = job.setting
    steps = max(1, round(job.strength * setting.steps))
    return fit(job.model, job.new_batches(), setting.loss, rate=job.rate, steps=steps)
