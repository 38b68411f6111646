"""What the start says of the new inputs is kept (LwF): the curve is over the weight of that."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train all weights on the loss and on the divergence from what the start says."""
    setting, strength = job.setting, job.strength
    with torch.random.fork_rng():  # dropout is drawn as without a teacher
        teacher = job.start().eval()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            before = setting.old_logits(teacher, batch).log_softmax(1)
        logits = setting.logits(model, batch)
        now = setting.old_logits(model, batch, logits).log_softmax(1)
        apart = kl_div(now, before, log_target=True, reduction="batchmean")
        return setting.loss_of(logits, batch) + strength * apart

    return fit(job.model, job.new_batches(), loss, rate=job.rate, steps=setting.steps)
