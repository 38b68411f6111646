"""LoRA adapters by peft."""

import peft
from torch import nn

NAME = "default"
RANK = 8


def adapt(model: nn.Module, head: str) -> None:
    """Put an adapter on every linear layer but the head, in place; train it and the head alone.

    Args:
        model: At the start; it computes what it did until it is trained.
        head: What names of the head's parameters begin with; "" where there is none to train.
    """
    linear = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and not (head and f"{name}.".startswith(head))
        and name != "lm_head"
    ]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=linear)
    peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    for name, parameter in model.named_parameters():
        if head and name.startswith(head):
            parameter.requires_grad_(True)
