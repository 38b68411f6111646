"""Per-example squared gradients of a whole batch at once, from what goes in and out of its layers.

A layer's inputs A and the gradients G at its outputs give each example's weight gradient without a
backward pass of its own. One small rule per layer type says how; RULES lists them. What the rules
give is trusted by fisher_diagonal only after it has agreed with single examples.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional


class Outer(NamedTuple):
    """Gradients that are products of two factors, Σ_t left_t right_tᵀ."""

    left: Tensor  # (B, T, m)
    right: Tensor  # (B, T, n)

    def of(self, example: int) -> Tensor:
        """Return one example's gradient, (m, n)."""
        return self.left[example].T @ self.right[example]

    def add_squares(self, total: Tensor) -> None:
        """Add Σ_b (Σ_t left_t right_tᵀ)² to total, (m, n)."""
        if self.left.shape[1] == 1:
            total.addmm_(self.left[:, 0].square().T, self.right[:, 0].square())
        else:
            _add_each(total, (self.of(example) for example in range(len(self.left))))


class Rows(NamedTuple):
    """Gradients that touch a few rows of a table, Σ_t values_t at row ids_t."""

    ids: Tensor  # (B, T)
    values: Tensor  # (B, T, n)
    size: int

    def of(self, example: int) -> Tensor:
        """Return one example's gradient, (size, n)."""
        gradient = self.values.new_zeros(self.size, self.values.shape[-1])
        return gradient.index_add_(0, self.ids[example], self.values[example])

    def add_squares(self, total: Tensor) -> None:
        """Add Σ_b (Σ_t values_t at ids_t)² to total, (size, n)."""
        for ids, values in zip(self.ids, self.values, strict=True):
            rows, places = ids.unique(return_inverse=True)
            sums = values.new_zeros(len(rows), values.shape[-1]).index_add_(0, places, values)
            total.index_add_(0, rows, sums.square_())


class Whole(NamedTuple):
    """Gradients as they are, for parameters small enough."""

    gradients: Tensor  # (B, …)

    def of(self, example: int) -> Tensor:
        """Return one example's gradient."""
        return self.gradients[example]

    def add_squares(self, total: Tensor) -> None:
        """Add Σ_b gradients² to total."""
        total += self.gradients.square().sum(0)


Use = Outer | Rows | Whole


def linear(module: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    """The outputs are x Wᵀ + b."""
    a, g = _positions(a), _positions(g)  # (B, T, in), (B, T, out)
    return {"weight": Outer(g, a), "bias": Whole(g.sum(1))}


def conv1d(module: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    """The outputs are x W + b: transformers' transposed Linear."""
    a, g = _positions(a), _positions(g)
    return {"weight": Outer(a, g), "bias": Whole(g.sum(1))}


def embedding(module: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    """The outputs are W[ids]; the padding row learns nothing."""
    ids, g = a.long().flatten(1), _positions(g)  # (B, T), (B, T, n)
    if module.padding_idx is not None:
        g = g * (ids != module.padding_idx)[..., None]
    return {"weight": Rows(ids, g, module.num_embeddings)}


def layer_norm(module: Any, a: Tensor, g: Tensor) -> dict[str, Use]:
    """The outputs are x̂ w + b, with x̂ the normalised x."""
    shape = module.normalized_shape
    x = functional.layer_norm(a, shape, eps=module.eps)
    by_position = (len(g), -1, *shape)
    return {
        "weight": Whole((g * x).reshape(by_position).sum(1)),
        "bias": Whole(g.reshape(by_position).sum(1)),
    }


Rule = Callable[[Any, Tensor, Tensor], dict[str, Use]]

# By name, so that nothing is imported for it. A subclass may compute something else.
RULES: dict[str, Rule] = {
    "torch.nn.modules.linear.Linear": linear,
    "transformers.pytorch_utils.Conv1D": conv1d,
    "torch.nn.modules.sparse.Embedding": embedding,
    "torch.nn.modules.normalization.LayerNorm": layer_norm,
}


class Call(NamedTuple):
    """One call of a layer, on the way to the model's outputs.

    Inputs and edge (where the gradient at the layer's outputs is had) are None where the call does
    not have one row per example, so that no rule applies.
    """

    module: nn.Module
    names: dict[str, str]
    inputs: Tensor | None = None
    edge: GradientEdge | None = None


def covered(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return those of the parameters that belong to layers with a rule and to no other module."""
    others = {
        id(p)
        for module in model.modules()
        for local, p in module._parameters.items()
        if _rule(module) is None or local not in ("weight", "bias")
    }
    return {name: p for name, p in parameters.items() if id(p) not in others}


@contextmanager
def recorded(
    model: nn.Module, parameters: dict[str, nn.Parameter], size: int
) -> Iterator[list[Call]]:
    """List the calls of the layers that own the parameters while a batch of that size runs.

    Args:
        model: Any module.
        parameters: Some of those that `covered` returns.
        size: The number of examples in the batch.
    """
    calls: list[Call] = []
    by_id = {id(p): name for name, p in parameters.items()}
    handles = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        names = {k: by_id[id(p)] for k, p in module._parameters.items() if id(p) in by_id}
        tensors = (*args, output)
        fits = (
            not kwargs
            and len(tensors) == 2
            and all(isinstance(t, Tensor) and t.shape[:1] == (size,) for t in tensors)
            and output.requires_grad
        )
        if fits:
            # The edge rather than the tensor, into which the next layer may write.
            calls.append(Call(module, names, args[0].detach(), get_gradient_edge(output)))
        else:
            calls.append(Call(module, names))

    def spread(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Ids of shape (1, T) are shared by the batch, and so would be the gradient at their rows.
        shared = len(args) == 1 and args[0].ndim > 1 and args[0].shape[0] == 1
        return (args[0].expand(size, *args[0].shape[1:]),) if shared else args

    try:
        for module in model.modules():
            if any(id(p) in by_id for p in module._parameters.values()):
                handles.append(module.register_forward_hook(record, with_kwargs=True))
                if isinstance(module, nn.Embedding):
                    handles.append(module.register_forward_pre_hook(spread))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def add_squares(
    sums: dict[str, Tensor], calls: list[Call], outputs: Tensor, vectors: Iterable[Tensor]
) -> tuple[set[str], set[str]]:
    """Add Σ_vectors Σ_examples (Jᵀ vector)² to sums, for parameters with a rule for every call.

    Args:
        sums: Where to add, by name, in the parameters' shapes.
        calls: The calls on the way to outputs.
        outputs: The model's outputs for the batch.
        vectors: What to send back, each like outputs.

    Returns:
        The names that are done, and those of them that outputs depend on.
    """
    without = {name for call in calls if call.edge is None for name in call.names.values()}
    done = {name for call in calls for name in call.names.values()} - without
    usable = [(call, call.edge) for call in calls if call.edge is not None]
    reached: set[str] = set()
    for vector in vectors if done else ():
        gradients = torch.autograd.grad(
            outputs, [edge for _, edge in usable], vector, retain_graph=True, allow_unused=True
        )
        uses: dict[str, list[Use]] = {}
        for (call, _), gradient in zip(usable, gradients, strict=True):
            if gradient is not None:
                for name, use in _uses(call, gradient, sums):
                    uses.setdefault(name, []).append(use)
        for name in done & uses.keys():
            if len(uses[name]) == 1:
                uses[name][0].add_squares(sums[name])
            else:
                examples = range(len(outputs))
                each = (torch.stack([u.of(b) for u in uses[name]]).sum(0) for b in examples)
                _add_each(sums[name], each)
        reached |= uses.keys()
    return done, done & reached


def _uses(call: Call, gradient: Tensor, sums: dict[str, Tensor]) -> Iterator[tuple[str, Use]]:
    rule = _rule(call.module)
    assert rule is not None
    assert call.inputs is not None
    dtype = sums[next(iter(call.names.values()))].dtype
    inputs = call.inputs.to(dtype) if call.inputs.is_floating_point() else call.inputs
    uses = rule(call.module, inputs, gradient.to(dtype))
    return ((name, uses[local]) for local, name in call.names.items())


def _rule(module: nn.Module) -> Rule | None:
    kind = type(module)
    return RULES.get(f"{kind.__module__}.{kind.__qualname__}")


def _positions(tensor: Tensor) -> Tensor:
    """Return (B, …, n) as (B, T, n)."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _add_each(total: Tensor, gradients: Iterable[Tensor]) -> None:
    for gradient in gradients:
        total.addcmul_(gradient, gradient)
