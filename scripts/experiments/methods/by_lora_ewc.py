"""LoRA of rank 8, with the EWC penalty on the weights that it changes: the curve is over λ."""

from consolidate.ewc.low_rank_penalty import MergedPenalty
from consolidate.ewc.penalty import Penalty
from consolidate.models.lora import low_rank_layers, other_parameters
from scripts.experiments.lib.low_rank import adapt
from scripts.experiments.lib.ours import fisher
from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train the adapter and the head; the merged change is pulled back by the Fisher."""
    setting, strength = job.setting, job.strength
    found = fisher(job)
    adapt(job.model, setting.head)
    head = other_parameters(job.model)
    beside = Penalty(head.items(), {name: found[name] for name in head}, ewc_lambda=strength)
    penalty = MergedPenalty(low_rank_layers(job.model), found, ewc_lambda=strength, beside=beside)
    return fit(
        job.model,
        job.new_batches(),
        setting.loss,
        rate=job.rate,
        steps=setting.steps,
        after_backward=penalty.add_gradient_,
    )
