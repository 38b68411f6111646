"""Gradient checkpointing: layers store only their inputs, and run again in the backward pass.

The layers are those of transformers, which checkpoint themselves only in training mode. The Fisher
is measured in eval mode, so their forward pass is wrapped there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from formats.errors import UsageError


def enable(module: nn.Module) -> None:
    """Let a model's layers store only their inputs, and run again in the backward pass."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    switches: list[Any] = [getattr(module, name) for name in names if hasattr(module, name)]
    if not switches:
        raise UsageError(
            "--gradient-checkpointing needs a model of transformers, or one with its method "
            f"{names[-1]}, which {type(module).__name__} lacks; leave the option out"
        )
    try:
        switches[0]({"use_reentrant": False})
    except ValueError as error:
        raise UsageError(f"--gradient-checkpointing: {error}") from None
    # It serves reentrant checkpoints, and would make layers compute gradients at their inputs.
    getattr(module, "disable_input_require_grads", lambda: None)()


def checkpointed_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers that store only their inputs, without stacks of them with the switch."""
    return [
        layer
        for layer in module.modules()
        if getattr(layer, "gradient_checkpointing", False)
        and any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(layer).__mro__)
    ]


@contextmanager
def checkpointing_in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Let those layers checkpoint in eval mode as they do in training mode."""
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
