"""Per-example gradients of parameters where functions use them, outside of layers with a rule.

A scale, a token or a table of relative positions has no dimension of examples, and neither has what
is computed from it alone: views, lookups, projections. Where that meets the activations of a batch,
each example gets a copy, and the gradients at the copies are those of the examples. From there they
are taken back to the parameter. The weights of `linear` have the rule of a linear layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten

from consolidate.estimation.example_gradients import Gradients, Pulled, Rows

_ELEMENTWISE = ("add", "sub", "rsub", "mul", "div", "truediv")
# Each example's row of the output depends on its rows of the inputs only, if they have a row each.
_ROW_BY_ROW = {
    *_ELEMENTWISE,
    *(f"{name}_" for name in _ELEMENTWISE),
    *(f"__{kind}{name}__" for name in _ELEMENTWISE for kind in ("", "r", "i")),
    "where",
    "matmul",
    "__matmul__",
    "bmm",
    "cat",
    "scaled_dot_product_attention",
}
_EXPANDING = {"expand", "expand_as", "broadcast_to"}


class Source(NamedTuple):
    """Where a shared tensor comes from: a parameter, or the rows of one that were looked up."""

    name: str  # the model's name of the parameter
    leaf: Tensor
    ids: Tensor | None = None  # of the rows; None where it is the parameter itself
    padding: int | None = None  # the row without a gradient

    def gradients(self, pulled: Tensor) -> Gradients:
        """Return gradients of the parameter from those of the leaf, (B, *leaf)."""
        if self.ids is None:
            return Pulled(pulled)
        ids = self.ids.long().expand(len(pulled), *pulled.shape[1:-1])
        if self.padding is not None:
            pulled = pulled * (ids != self.padding)[..., None]
        return Rows(ids.reshape(len(ids), -1), pulled.reshape(len(ids), -1, pulled.shape[-1]))


class Use(NamedTuple):
    """A shared tensor that meets the activations of a batch, each example with a copy of it."""

    sources: tuple[Source, ...]
    value: Tensor  # (1, …); of a lookup (B, …), where it has a row for each example already
    inputs: Sequence[Any] = ()  # None that a checkpoint could save.

    def gradients(
        self, g: Tensor, chunk: int, dtype: torch.dtype
    ) -> Iterator[tuple[Mapping[str, Gradients], range]]:
        """Yield the parameters' gradients from those at the copies, `chunk` examples at a time."""
        size = len(g)
        if self.value.shape[0] != 1:
            (source,) = self.sources
            yield {source.name: source.gradients(g.to(dtype))}, range(size)
            return
        leaves = [source.leaf for source in self.sources]
        for start in range(0, size, chunk):
            examples = range(start, min(start + chunk, size))
            some = g[examples.start : examples.stop, None].to(self.value.dtype)
            pulled = torch.autograd.grad(
                self.value, leaves, some, retain_graph=True, is_grads_batched=True
            )
            yield (
                {
                    source.name: source.gradients(gradient.to(dtype))
                    for source, gradient in zip(self.sources, pulled, strict=True)
                },
                examples,
            )


class Shared(Tensor):
    """A parameter, or what is computed from some without any example, while a batch is recorded."""

    recording: Any
    sources: tuple[Source, ...]
    value: Tensor  # with a graph down to the sources' leaves
    root: bool  # whether it is a parameter itself, or rows of it
    rows: int  # of the copies that `after` takes; 0 without it
    after: Callable[[Tensor], Tensor] | None  # what was done since the value got as many rows
    face: Tensor  # what a function without an interest in gradients sees
    copies: dict[int, Tensor]  # by the number of dimensions

    @classmethod
    def of(
        cls,
        recording: Any,
        sources: tuple[Source, ...],
        value: Tensor,
        face: Tensor | None = None,
        *,
        root: bool = False,
        rows: int = 0,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> "Shared":
        """Make one; its face is the value unless it is given."""
        face = (value if face is None else face).detach()
        shared = Tensor._make_subclass(cls, face)
        shared.recording, shared.sources, shared.value = recording, sources, value
        shared.root, shared.rows, shared.after, shared.face = root, rows, after, face
        shared.copies = {}
        return shared

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Follow a function of shared tensors, alone or together with activations."""
        with torch._C.DisableTorchFunctionSubclass():
            call = _Function(func, tree_flatten((tuple(args), dict(kwargs or {}))))
            shared = [t for t in call.leaves if isinstance(t, Shared)]
            recording = shared[0].recording
            if recording.rerunning_unit or not torch.is_grad_enabled():
                return call.on({})
        # These functions call others, which are followed.
        if call.name == "multi_head_attention_forward" and not recording.time_first:
            query = call.argument(0, "query")
            if query.ndim != 3 or query.shape[1] != recording.size:
                recording.mismatch(source.name for s in shared for source in s.sources)
                return call.on({})
            try:
                recording.time_first = True
                return _inside(func)(*args, **(kwargs or {}))
            finally:
                recording.time_first = False
        with torch._C.DisableTorchFunctionSubclass():
            activations = [
                t
                for t in call.leaves
                if isinstance(t, Tensor) and not isinstance(t, Shared) and t.requires_grad
            ]
            # An attention knows which dimension the examples are, also of the inputs.
            if activations or (recording.time_first and call.name == "linear"):
                found = _with(call, shared, activations)
            else:  # What this saves is no layer's: a checkpoint would recompute it in between.
                with saved_tensors_hooks(_itself, _itself):
                    found = _alone(call, shared)
            if found is None:
                recording.mismatch(source.name for s in shared for source in s.sources)
                return call.on({})
            return found


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class _Function:
    """A call of a function, whose tensors can be replaced."""

    def __init__(self, func: Any, flat: tuple[list[Any], Any]):
        self.func = func
        self.name: str = getattr(func, "__name__", "")
        self.leaves, self.spec = flat

    def on(self, others: Mapping[int, Tensor]) -> Any:
        """Call it with other tensors in place of shared ones, by id; by default their faces."""
        leaves = [others.get(id(t), t.face) if isinstance(t, Shared) else t for t in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.func(*args, **kwargs)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument by place or name."""
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return args[place] if len(args) > place else kwargs.get(name, default)

    @property
    def in_place(self) -> bool:
        """Whether it changes a shared tensor."""
        name = self.name
        changing = name.endswith("_") and not name.endswith("__")
        changing |= name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
        return (changing or name == "__setitem__") and isinstance(self.leaves[0], Shared)


def _alone(call: _Function, shared: list[Shared]) -> Any:
    """Return a function's result without activations; None where it cannot be followed."""
    first = shared[0]
    recording = first.recording
    if call.in_place:
        return None
    if call.name in ("embedding", "__getitem__"):
        looked_up = _lookup(call)
        if looked_up is not None:
            return looked_up
    if any(s.after is not None for s in shared):
        return _after(call, shared)
    out = call.on({id(s): s.value for s in shared})
    if out is first.value:  # As by `to` where nothing changes.
        return first
    made, spec = tree_flatten(out)
    if not any(isinstance(t, Tensor) and t.requires_grad for t in made):
        return out
    # The same source twice counts once.
    sources = tuple({id(source.leaf): source for s in shared for source in s.sources}.values())
    if isinstance(out, Tensor) and len(shared) == 1:
        if call.name == "repeat" and (grown := _repeated(first, out)) is not None:
            return grown
        if call.name in _EXPANDING | _ROW_BY_ROW and out.ndim >= first.ndim:
            value = _padded(first.value, out.ndim)
            if value.shape[0] == 1 < out.shape[0]:
                return Shared.of(
                    recording,
                    sources,
                    value,
                    out,
                    rows=out.shape[0],
                    after=lambda copies: call.on({id(first): copies}),
                )
    wrapped = [
        Shared.of(recording, sources, t) if isinstance(t, Tensor) and t.requires_grad else t
        for t in made
    ]
    return tree_unflatten(wrapped, spec)


def _after(call: _Function, shared: list[Shared]) -> Any:
    """Return a function's result of a tensor that has rows."""
    out = call.on({})
    if not any(isinstance(t, Tensor) and t.is_floating_point() for t in tree_flatten(out)[0]):
        return out
    if not isinstance(out, Tensor) or len(shared) > 1:
        return None
    (one,) = shared
    before = one.after
    assert before is not None
    return Shared.of(
        one.recording,
        one.sources,
        one.value,
        out,
        rows=one.rows,
        after=lambda copies: call.on({id(one): before(copies)}),
    )


def _repeated(one: Shared, out: Tensor) -> Shared | None:
    """Return a tensor repeated along its first dimension."""
    if out.shape[1:] != one.face.shape[1:] or not one.face.ndim or not len(one.face):
        return None
    times = len(out) // len(one.face)
    return Shared.of(
        one.recording,
        one.sources,
        one.value[None],
        out,
        rows=times,
        after=lambda copies: copies.flatten(0, 1),
    )


def _lookup(call: _Function) -> Shared | None:
    """Return the rows of a table."""
    changing, padding = False, None
    if call.name == "embedding":
        ids, table = call.argument(0, "input"), call.argument(1, "weight")
        changing = call.argument(3, "max_norm") is not None
        changing |= bool(call.argument(5, "scale_grad_by_freq"))
        padding = call.argument(2, "padding_idx")
    else:
        table, ids = (call.argument(place, "") for place in (0, 1))
    integers = type(ids) is Tensor and ids.dtype in (torch.int32, torch.int64)
    if not integers or not isinstance(table, Shared) or not table.root or changing:
        return None
    (source,) = table.sources
    if source.ids is not None or table.face.ndim != 2:
        return None
    ids = ids % len(table.face)  # They may count from the end.
    padding = None if padding is None else padding % len(table.face)
    rows = call.on({}).detach().requires_grad_()
    found = Source(source.name, rows, ids, padding)
    return Shared.of(table.recording, (found,), rows, root=True)


def _with(call: _Function, shared: list[Shared], activations: list[Tensor]) -> Any:
    """Return a function's result with activations; None where it cannot be followed."""
    recording = shared[0].recording
    if call.in_place:
        return None
    if call.name == "linear":
        return _linear(call, recording)
    if call.name not in _ROW_BY_ROW:
        return None
    ndim = max(t.ndim for t in activations)
    rows = {t.shape[0] for t in activations if t.ndim == ndim and ndim}
    if len(rows) != 1 or any(t.ndim != ndim for t in activations):
        return None
    if rows != {recording.size}:
        return None
    if call.name == "cat":
        dim = call.argument(1, "dim", 0)
        if dim % ndim == 0 or any(s.ndim != ndim for s in shared):
            return None
    if call.name in ("matmul", "__matmul__", "bmm") and (
        ndim < 3 or any(s.ndim < 2 for s in shared)
    ):
        return None
    copies = {id(s): _spread(s, ndim) for s in shared}
    if any(copy is None for copy in copies.values()):
        return None
    return call.on({key: copy for key, copy in copies.items() if copy is not None})


def _spread(shared: Shared, ndim: int) -> Tensor | None:
    """Return a tensor with a copy for each example; None if it cannot have one."""
    size = shared.recording.size
    if shared.after is None:
        return _copies(shared, ndim)
    if shared.ndim != ndim or len(shared.face) != size or shared.rows != size:
        return None
    copies = _copies(shared, shared.value.ndim)
    return None if copies is None else shared.after(copies)


def _copies(shared: Shared, ndim: int) -> Tensor | None:
    """Return a tensor with one row for each example, marked once for all its uses."""
    recording, value = shared.recording, shared.value
    if value.ndim > ndim:
        return None
    if ndim not in shared.copies:
        padded = _padded(value, ndim)
        # The lookups of each example's own ids have their rows.
        own = shared.root and shared.sources[0].ids is not None and padded is value
        if len(padded) != 1 and not (own and len(padded) == recording.size):
            return None
        shared.copies[ndim] = recording.mark_use(Use(shared.sources, padded))
    return shared.copies[ndim]


def _linear(call: _Function, recording: Any) -> Tensor | None:
    """Return x Wᵀ + b, marked."""
    x, weight, bias = (
        call.argument(place, name) for place, name in enumerate(("input", "weight", "bias"))
    )
    names: dict[str, str] = {}
    for local, parameter in (("weight", weight), ("bias", bias)):
        if isinstance(parameter, Shared):
            if not parameter.root or parameter.sources[0].ids is not None:
                return None
            names[local] = parameter.sources[0].name
    if isinstance(x, Shared):
        return None
    out = call.on({})
    if not recording.time_first:
        return recording.mark_linear(names, weight, x, out)
    # Inside an attention: (T, B, n), or (T · B, n).
    size = recording.size
    if x.ndim > 3 or (x.ndim == 2 and len(x) % size):
        return None
    a, y = (t.view(-1, size, t.shape[-1]) if t.ndim == 2 else t for t in (x, out))
    marked = recording.mark_linear(names, weight, a.transpose(0, 1), y.transpose(0, 1))
    return None if marked is None else marked.transpose(0, 1).reshape(out.shape)


def _padded(tensor: Tensor, ndim: int) -> Tensor:
    """Return a tensor with leading dimensions of 1, as broadcasting sees it."""
    return (
        tensor
        if tensor.ndim == ndim
        else tensor.reshape((1,) * (ndim - tensor.ndim) + tensor.shape)
    )


def _inside(func: Any) -> Any:
    """Return a function of torch.nn.functional that does not ask tensors to take its place."""
    instead = {"has_torch_function": lambda tensors: False}
    defaults, made = func.__defaults__, {**functional.__dict__, **instead}
    inner = FunctionType(func.__code__, made, func.__name__, defaults, func.__closure__)
    inner.__kwdefaults__ = func.__kwdefaults__
    return inner
