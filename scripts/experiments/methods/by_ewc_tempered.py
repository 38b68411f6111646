"""EWC with the Fisher of softened outputs, softmax(z/T): the curve is over λ.

What the old task has learned by heart has hardly a Fisher: with p near 0 or 1 the outputs hardly
change. Softened outputs still do.
"""

from consolidate.ewc.penalty import Penalty
from scripts.experiments.lib.tempered_fisher import tempered_fisher
from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train all weights, each pulled back by the Fisher of softened outputs."""
    setting = job.setting
    penalty = Penalty(job.model, tempered_fisher(job), ewc_lambda=job.strength)
    return fit(
        job.model,
        job.new_batches(),
        setting.loss,
        rate=job.rate,
        steps=setting.steps,
        after_backward=penalty.add_gradient_,
    )
