"""The L2 penalty, its λ times the number of tasks so far: the curve is over λ. In chains alone."""

from typing import Protocol, cast

from consolidate.ewc.penalty import Penalty
from scripts.experiments.lib.new_heads import started
from scripts.experiments.lib.tuning import Done, Job, fit


class _Stage(Protocol):
    number: int  # of tasks before the one that is learned


def tune(job: Job) -> Done:
    """Train all weights, each pulled back alike, as strongly as a sum over the tasks so far."""
    setting = job.setting
    before = cast(_Stage, setting).number
    penalty = Penalty.l2(started(setting, job.model).items(), ewc_lambda=before * job.strength)
    return fit(
        job.model,
        job.new_batches(),
        setting.loss,
        rate=job.rate,
        steps=setting.steps,
        after_backward=penalty.add_gradient_,
    )
