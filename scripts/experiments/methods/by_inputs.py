"""EWC with the structure `inputs`: the curve is over λ."""

from consolidate.ewc.block_penalty import BlockPenalty
from scripts.experiments.lib.block_fisher import block_fisher
from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train all weights; a layer with a matrix over its inputs is pulled back by it."""
    setting = job.setting
    found = block_fisher(job)
    penalty = BlockPenalty(
        job.model,
        found.diagonal,
        factors=found.factors,
        blocks=found.blocks,
        ewc_lambda=job.strength,
    )
    return fit(
        job.model,
        job.new_batches(),
        setting.loss,
        rate=job.rate,
        steps=setting.steps,
        after_backward=penalty.add_gradient_,
    )
