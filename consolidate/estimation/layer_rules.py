"""Per-example gradients of a whole batch at once, from the inputs and outputs of its layers.

A layer's inputs A and the gradients G at its outputs determine each example's weight gradient
without a separate backward pass. There is one small rule per layer type; RULES lists them.
fisher_diagonal uses a rule only after its results agree with single examples.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from consolidate.estimation.example_gradients import (
    FEW_POSITIONS,
    Convolved,
    Gradients,
    Outer,
    Rows,
    Rule,
    Summed,
    Whole,
)


def linear(module: Any, a: Tensor, g: Tensor, *, transposed: bool = False) -> dict[str, Gradients]:
    """The outputs are x Wᵀ + b; x W + b where transposed, as in transformers' Conv1D."""
    a, g = _positions(a), _positions(g)  # (B, T, in), (B, T, out)
    bias = Summed(g) if g.shape[1] <= FEW_POSITIONS else Whole(g.sum(1))
    return {"weight": Outer(g, a, transposed), "bias": bias}


def convolution(module: Any, a: Tensor, g: Tensor) -> dict[str, Gradients]:
    """The outputs are w ∗ x + b, channels first, with any padding of x."""
    zeros = module._reversed_padding_repeated_twice
    if module.padding_mode != "zeros":
        a, zeros = functional.pad(a, zeros, module.padding_mode), [0] * len(zeros)
    grid, kernel, g = g.shape[2:], module.weight.shape, g.flatten(2).mT  # (B, T, out)
    few = g.shape[1] <= FEW_POSITIONS
    stride, dilation, groups = module.stride, module.dilation, module.groups
    weight = Convolved(g, a, grid, zeros, kernel, stride, dilation, groups)
    return {"weight": weight, "bias": Summed(g) if few else Whole(g.sum(1))}


def embedding(module: Any, a: Tensor, g: Tensor) -> dict[str, Gradients]:
    """The outputs are W[ids]; the padding row has no gradient."""
    ids, g = a.long().reshape(len(a), -1), _positions(g)  # (B, T), (B, T, n)
    if module.padding_idx is not None:
        g = g * (ids != module.padding_idx)[..., None]
    return {"weight": Rows(ids, g)}


def scaled_embedding(module: Any, a: Tensor, g: Tensor) -> dict[str, Gradients]:
    """The outputs are s W[ids], s a constant."""
    return embedding(module, a, g * module.embed_scale)


def layer_norm(module: Any, a: Tensor, g: Tensor) -> dict[str, Gradients]:
    """The outputs are x̂ w + b, with x̂ the normalised x."""
    shape = module.normalized_shape
    return _scaled(functional.layer_norm(a, shape, eps=module.eps), g, (len(g), -1, *shape), 1)


def rms_norm(module: Any, a: Tensor, g: Tensor) -> dict[str, Gradients]:
    """The outputs are x̂ w or x̂ (1 + w), with x̂ = x / √(mean x² + ε)."""
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    shape = module.weight.shape
    return _scaled(functional.rms_norm(a, shape, eps=eps), g, (len(g), -1, *shape), 1)


def channels_first_norm(module: Any, a: Tensor, g: Tensor) -> dict[str, Gradients]:
    """The outputs are x̂ w + b with the channels first, x̂ normalized over them at each place."""
    if getattr(module, "data_format", "channels_first") != "channels_first":
        return layer_norm(module, a, g)
    return layer_norm(module, a.movedim(1, -1), g.movedim(1, -1))


def group_norm(module: Any, a: Tensor, g: Tensor) -> dict[str, Gradients]:
    """The outputs are x̂ w + b, channel by channel."""
    x = functional.group_norm(a, module.num_groups, eps=module.eps)
    return _scaled(x, g, (*x.shape[:2], -1), 2)


def batch_norm(module: Any, a: Tensor, g: Tensor) -> dict[str, Gradients]:
    """The outputs are x̂ w + b, channel by channel; in eval mode x̂ is x, scaled and shifted."""
    mean, variance = module.running_mean, module.running_var
    x = functional.batch_norm(a, mean.to(a), variance.to(a), eps=module.eps)
    return _scaled(x, g, (*x.shape[:2], -1), 2)


def activated_batch_norm(module: Any, a: Tensor, g: Tensor) -> dict[str, Gradients]:
    """The outputs are f(x̂ w + b), with f an activation."""
    with torch.enable_grad():
        options = (module.running_mean, module.running_var, module.weight, module.bias)
        mean, variance, weight, bias = (t.to(a) for t in options)
        normalized = functional.batch_norm(a, mean, variance, weight, bias, eps=module.eps)
        normalized = normalized.detach().requires_grad_()
        outputs = module.act(module.drop(normalized * 1))  # The activation may be in place.
        (at_norm,) = torch.autograd.grad(outputs, normalized, g)
    return batch_norm(module, a, at_norm)


# By name, which needs no import. A subclass may compute something else.
RULES: dict[str, Rule] = {
    "torch.nn.modules.linear.Linear": linear,
    "timm.layers.linear.Linear": linear,
    "transformers.pytorch_utils.Conv1D": partial(linear, transposed=True),
    "torch.nn.modules.conv.Conv[12]d": convolution,
    "torch.nn.modules.sparse.Embedding": embedding,
    "transformers.models.*ScaledWordEmbedding": scaled_embedding,
    "torch.nn.modules.normalization.LayerNorm": layer_norm,
    "timm.layers.norm.LayerNorm": layer_norm,
    "timm.layers.norm.LayerNorm2d": channels_first_norm,
    "torchvision.models.convnext.LayerNorm2d": channels_first_norm,
    "transformers.models.*ConvNext*LayerNorm": channels_first_norm,
    "torch.nn.modules.normalization.RMSNorm": rms_norm,
    "timm.layers.norm.RmsNorm": rms_norm,
    "transformers.models.*RMSNorm": rms_norm,
    "transformers.models.*T5LayerNorm": rms_norm,
    "torch.nn.modules.normalization.GroupNorm": group_norm,
    "torch.nn.modules.batchnorm.BatchNorm[12]d": batch_norm,
    "timm.layers.norm_act.BatchNormAct2d": activated_batch_norm,
}


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule for a module of exactly this type."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return next((rule for pattern, rule in RULES.items() if fnmatchcase(name, pattern)), None)


def _positions(tensor: Tensor) -> Tensor:
    """Return (B, …, n) as (B, T, n)."""
    if tensor.ndim == 2:
        return tensor[:, None]
    return tensor if tensor.ndim == 3 else tensor.flatten(1, -2)


def _scaled(x: Tensor, g: Tensor, shape: Sequence[int], axis: int) -> dict[str, Gradients]:
    """Return the gradients of w and b in x w + b, whose positions lie on that axis of shape.

    It overwrites x.
    """
    return {
        "weight": Whole(x.mul_(g).reshape(shape).sum(axis)),
        "bias": Whole(g.reshape(shape).sum(axis)),
    }
