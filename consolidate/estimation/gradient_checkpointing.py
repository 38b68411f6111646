"""Gradient checkpointing: layers keep only their inputs, and run again in the backward pass.

The layers are transformers' own, which checkpoint themselves in training mode alone. The Fisher is
measured in eval mode, so there their forward pass is wrapped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from formats.errors import UsageError


def enable(module: nn.Module) -> None:
    """Let a model's layers keep only their inputs, and run again when gradients pass."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    switches: list[Any] = [getattr(module, name) for name in names if hasattr(module, name)]
    if not switches:
        raise UsageError(
            "--gradient-checkpointing needs a model of transformers, or one that has its method "
            f"{names[-1]}: {type(module).__name__} has none"
        )
    try:
        switches[0]({"use_reentrant": False})
    except ValueError as error:
        raise UsageError(f"--gradient-checkpointing: {error}") from None
    # What reentrant checkpoints need would tell layers that gradients are wanted at their inputs.
    getattr(module, "disable_input_require_grads", lambda: None)()


def checkpointed_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers that keep only their inputs, not stacks of them that have the switch."""
    return [
        layer
        for layer in module.modules()
        if getattr(layer, "gradient_checkpointing", False)
        and any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(layer).__mro__)
    ]


@contextmanager
def checkpointing_in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Let those layers do in eval mode what they do in training mode."""
    layers = checkpointed_layers(module)
    try:
        for layer in layers:
            layer.forward = partial(_checkpointed, layer)
        yield
    finally:
        for layer in layers:
            del layer.forward


def _checkpointed(layer: Any, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(layer).forward, layer, **kwargs)
    return layer._gradient_checkpointing_func(forward, *args)
