"""Gradient checkpointing: layers keep only their inputs, and run again in the backward pass.

The layers are transformers' own, which checkpoint themselves in training mode alone. The Fisher is
measured in eval mode, so there their forward pass is wrapped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from formats.errors import UsageError


def enable(module: nn.Module) -> None:
    """Let a model's layers keep only their inputs, and run again when gradients pass."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        switch: Callable[..., None] | None = getattr(module, name, None)
        if switch is not None:
            break
    else:
        raise UsageError(
            "--gradient-checkpointing needs a model of transformers, or one that has its method "
            f"{name}: {type(module).__name__} has none"
        )
    try:
        switch({"use_reentrant": False})
    except ValueError as error:
        raise UsageError(f"--gradient-checkpointing: {error}") from None
    # What reentrant checkpoints need would tell layers that gradients are wanted at their inputs.
    release: Any = getattr(module, "disable_input_require_grads", None)
    if release is not None:
        release()


def checkpointed_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers that keep only their inputs."""
    return [
        layer
        for layer in module.modules()
        if getattr(layer, "gradient_checkpointing", False) and _checkpoints_itself(layer)
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


def _checkpoints_itself(layer: nn.Module) -> bool:
    """Return whether this is a layer, and not a stack of them that only has the switch."""
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(layer).__mro__)
