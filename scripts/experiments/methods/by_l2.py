"""The penalty (λ/2) Σ (θ − μ)² around the start: the curve is over λ."""

from consolidate.ewc.penalty import Penalty
from scripts.experiments.lib.new_heads import started
from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train all weights, each pulled back alike, but those of a new head."""
    setting = job.setting
    penalty = Penalty.l2(started(setting, job.model).items(), ewc_lambda=job.strength)
    return fit(
        job.model,
        job.new_batches(),
        setting.loss,
        rate=job.rate,
        steps=setting.steps,
        after_backward=penalty.add_gradient_,
    )
