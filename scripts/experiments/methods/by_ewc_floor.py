"""EWC with a floor, so that no weight is free: the curve is over λ."""

from consolidate.ewc.penalty import Penalty
from scripts.experiments.lib.ours import fisher
from scripts.experiments.lib.tuning import Done, Job, fit

FLOOR = 0.1
"""Times the mean of the Fisher over all weights."""


def tune(job: Job) -> Done:
    """Train all weights, each pulled back by its Fisher and by a part that all have alike."""
    setting = job.setting
    found = fisher(job)
    count = sum(one.numel() for one in found.values())
    floor = FLOOR * sum(float(one.double().sum()) for one in found.values()) / count
    raised = {name: one + floor for name, one in found.items()}
    penalty = Penalty(job.model, raised, ewc_lambda=job.strength)
    return fit(
        job.model,
        job.new_batches(),
        setting.loss,
        rate=job.rate,
        steps=setting.steps,
        after_backward=penalty.add_gradient_,
    )
