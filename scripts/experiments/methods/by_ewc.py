"""EWC, the penalty's gradient added to the loss's: the curve is over λ."""

from consolidate.ewc.penalty import Penalty
from scripts.experiments.lib.ours import fisher
from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train all weights, each pulled back by its Fisher."""
    setting = job.setting
    penalty = Penalty(job.model, fisher(job), ewc_lambda=job.strength)
    return fit(
        job.model,
        job.new_batches(),
        setting.loss,
        rate=job.rate,
        steps=setting.steps,
        after_backward=penalty.add_gradient_,
    )
