"""LoRA of rank 8 on linear layers and convolutions, and the head: the curve is over the rate."""

import peft
from torch import nn

from scripts.experiments.lib.low_rank import NAME, RANK
from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train the adapter and the head."""
    setting = job.setting
    adapted = [
        name
        for name, layer in job.model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not f"{name}.".startswith(setting.head)
    ]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=adapted)
    peft.inject_adapter_in_model(config, job.model, adapter_name=NAME)
    for name, parameter in job.model.named_parameters():
        if name.startswith(setting.head):
            parameter.requires_grad_(True)
    return fit(job.model, job.new_batches(), setting.loss, rate=job.rate, steps=setting.steps)
