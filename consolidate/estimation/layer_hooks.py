"""Per-example gradients of a whole batch, computed layer by layer during one backward pass.

Every call of a layer is marked in the graph. When the gradient at its outputs arrives there, the
layer's rule, or the layer run again alone, computes its parameters' gradients of each example,
which are squared and added at once: none of them outlives its layer.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from consolidate.estimation.batches import out_of_memory, own_errors
from consolidate.estimation.example_gradients import (
    Convolved,
    Gradients,
    Outer,
    Pulled,
    Rule,
    Summed,
    Whole,
    add_pairs,
    add_squares_of_sums,
    pairs_of,
)
from consolidate.estimation.gradient_checkpointing import checkpointed_layers
from consolidate.estimation.input_blocks import BlockSums
from consolidate.estimation.layer_rules import linear
from consolidate.estimation.shared_parameters import Shared, Source, Use

VMAP_ELEMENTS = 1 << 22  # of per-example gradients that one module computes at a time
Sink = Callable[[Mapping[str, Gradients], range], Tensor | None]
"""Takes per-example gradients of a call's parameters, by name, and which examples they are of.

It may return a sum of g², (B, out), if that is all to which the call's later vectors must add.
"""


class Unit(NamedTuple):
    """A module, and its parameters whose gradients are computed at its calls."""

    module: nn.Module
    names: dict[str, str]  # The model's names by the module's.
    rule: Rule | None = None
    rows: tuple[bool, ...] = ()  # Without a rule: which of its inputs have one row per example,
    vmap: bool = False  # and whether it can be run for several examples by vmap.
    shared: bool = False  # Whether the parameters are followed to where functions use them.
    spread: bool = False  # Whether its ids were shared by all examples.


class UnitError(Exception):
    """A unit's rule does not fit its module, or its module raised when it was run again."""

    def __init__(self, names: Iterable[str], error: Exception):
        super().__init__(in_words(error))
        self.names = set(names)


def in_words(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def falling_back(names: Iterable[str], *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds into a UnitError, except running out of memory."""
    try:
        yield
    except kinds as error:
        if out_of_memory(error):
            raise
        raise UnitError(names, error) from error


class _Function(NamedTuple):
    """Stands for a layer where a function is called with its weight."""

    weight: Tensor


class Call(NamedTuple):
    """One call of a unit, on the way to the model's outputs."""

    unit: Unit
    inputs: list[Any]
    spec: TreeSpec | None  # None with a rule.
    outputs: list[int]  # Which of its outputs the gradients are at.


@dataclass(eq=False)
class Recording:
    """The marked calls of one forward pass, and the sink of their gradients in a backward pass."""

    size: int  # of the batch, in examples
    anchor: Tensor  # what to differentiate by, so that gradients pass by every mark
    dtype: torch.dtype  # that gradients are computed in
    only_marks_need_gradients: bool  # and no parameter of the model
    layers_recompute: bool  # in the backward pass, instead of storing what it needs
    use_counts: dict[str, int] = field(default_factory=dict)  # of each parameter, by name
    mismatched: set[str] = field(default_factory=set)  # with a call without a row per example
    calls: dict[str, list[int]] = field(default_factory=dict)  # the numbers of each one's, by name
    made: int = 0  # calls in all
    sink: Sink | None = None  # while a backward pass runs
    squares: dict[int, Tensor] = field(default_factory=dict)  # what the sink returned, by call
    recording_forward: bool = True
    rerunning_unit: bool = False
    time_first: bool = False  # inside an attention of torch, whose examples are columns

    def backward(self, outputs: Tensor, vector: Tensor, sink: Sink, *, keep: bool) -> None:
        """Backpropagate a vector from the outputs, and pass all parameters' gradients to `sink`."""
        self.recording_forward = False
        self.sink = sink
        try:
            # Hooks in this thread: on an accelerator they would not see that the kernel is in use.
            with torch.autograd.set_multithreading_enabled(False):
                torch.autograd.grad(
                    outputs, self.anchor, vector, retain_graph=keep, allow_unused=True
                )
        finally:
            self.sink = None  # It refers to this recording.

    def mark(self, unit: Unit, args: Any, kwargs: Any, output: Any) -> Any:
        """Return a call's output, marked; None where the output needs no replacement."""
        inputs, spec = [*args, *kwargs.values()], None
        if unit.rule is None:
            inputs, spec = tree_flatten((args, dict(kwargs)))
        outputs, output_spec = [output], None
        if not isinstance(output, Tensor):
            outputs, output_spec = tree_flatten(output)
        marked = [
            i for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.is_floating_point()
        ]
        if not self._fits(unit, inputs, [outputs[i] for i in marked]):
            if self.recording_forward:
                self.mismatched.update(unit.names.values())
            return None
        # Calls that a checkpoint runs again look the same in the graph, but nothing arrives there.
        self._count(unit.names.values())
        inputs = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
        call = Call(unit, inputs, spec, marked)
        # A tensor that gradients reach on their way to an earlier mark needs no mark.
        reached = self.only_marks_need_gradients and output_spec is None and output.requires_grad
        if reached and not self.layers_recompute and not output._is_view():
            if self.recording_forward:
                output.register_hook(lambda gradient: self.receive(call, (gradient,)))
            return None
        marks = _Mark.apply(self, call, self.anchor, *(outputs[i] for i in marked))
        if output_spec is None:
            return marks[0]
        for i, tensor in zip(marked, marks, strict=True):
            outputs[i] = tensor
        return tree_unflatten(outputs, output_spec)

    def mark_linear(self, names: dict[str, str], weight: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """Return the output of `linear` with a parameter, marked."""
        layer: Any = _Function(weight)
        marked = self.mark(Unit(layer, names, linear), (x,), {}, out)
        return out if marked is None else marked

    def mark_use(self, use: Use) -> Tensor:
        """Return a copy for each example of what parameters share, marked."""
        value = use.value.detach()
        self._count(source.name for source in use.sources)
        copies = value.expand(self.size, *value.shape[1:])
        marked: Tensor = _Mark.apply(self, use, self.anchor, copies)[0]
        return marked

    def _count(self, names: Iterable[str]) -> None:
        if self.recording_forward:
            self.made += 1
            for name in names:
                self.use_counts[name] = self.use_counts.get(name, 0) + 1
                self.calls.setdefault(name, []).append(self.made)

    def apart(self, parameters: Iterable[str]) -> bool:
        """Return whether gradients of some of these parameters arrive without those of others."""
        used = [self.calls[name] for name in parameters if name in self.calls]
        return any(calls != used[0] for calls in used)

    def mismatch(self, names: Iterable[str]) -> None:
        """Note parameters with a use that cannot be followed."""
        if self.recording_forward:
            self.mismatched.update(names)

    def receive(self, call: Call | Use, gradients: Sequence[Tensor | None]) -> None:
        """Pass the gradients of a call's parameters on to the sink, given those at its outputs."""
        if self.sink is None or all(g is None for g in gradients):
            return
        if (squares := self.squares.get(id(call))) is not None:
            (g,) = (g.to(self.dtype).reshape(squares.shape) for g in gradients if g is not None)
            squares.addcmul_(g, g)
            return
        try:
            self.rerunning_unit = True
            if isinstance(call, Use):
                each = self._gradients_of_use(call, gradients)
            else:
                each = self._example_gradients(call, gradients)
            for found, examples in each:
                with falling_back(found, RuntimeError):  # None but its own parameters.
                    squares = self.sink(found, examples)
                if squares is not None and not self.layers_recompute:  # Or a call is a new one.
                    self.squares[id(call)] = squares
        finally:
            self.rerunning_unit = False

    def _example_gradients(
        self, call: Call, gradients: Sequence[Tensor | None]
    ) -> Iterator[tuple[Mapping[str, Gradients], range]]:
        """Yield per-example gradients by the model's names, some examples at a time, and which."""
        unit = call.unit
        if unit.rule is not None:
            (a,), (g,) = call.inputs, (g for g in gradients if g is not None)
            a = a.to(self.dtype) if a.is_floating_point() else a
            # The rule was found by the class's name, and the module may differ from that class.
            with falling_back(unit.names.values(), RuntimeError, AttributeError):
                found = unit.rule(unit.module, a, g.to(self.dtype))
            yield {name: found[local] for local, name in unit.names.items()}, range(self.size)
            return
        elements = sum(unit.module.get_parameter(local).numel() for local in unit.names)
        chunk = self._chunk(elements, unit.names.values())
        for start in range(0, self.size, chunk):
            examples = range(start, min(start + chunk, self.size))
            rows = slice(examples.start, examples.stop)
            inputs = [t[rows] if r else t for t, r in zip(call.inputs, unit.rows, strict=True)]
            vectors = [None if g is None else g[rows] for g in gradients]
            made = module_gradients(call, inputs, vectors)
            yield (
                {unit.names[local]: Whole(each.to(self.dtype)) for local, each in made.items()},
                examples,
            )

    def _gradients_of_use(
        self, use: Use, gradients: Sequence[Tensor | None]
    ) -> Iterator[tuple[Mapping[str, Gradients], range]]:
        names = [source.name for source in use.sources]
        (g,) = (g for g in gradients if g is not None)
        elements = sum(source.leaf.numel() for source in use.sources)
        with falling_back(names, RuntimeError):
            yield from use.gradients(g, self._chunk(elements, names), self.dtype)

    def _chunk(self, elements: int, names: Iterable[str]) -> int:
        """Return for how many examples explicit gradients are computed at a time."""
        several = any(self.use_counts[name] > 1 for name in names)
        return self.size if several else max(1, VMAP_ELEMENTS // max(1, elements))

    def _fits(self, unit: Unit, inputs: list[Any], outputs: list[Tensor]) -> bool:
        if not outputs or not all(has_rows(t, self.size) for t in outputs):
            return False
        if unit.rule is not None:
            if len(inputs) != 1 or len(outputs) != 1 or not has_rows(inputs[0], self.size):
                return False
            # An example without a batch dimension may have as many channels as there are rows.
            weight: Any = unit.module.weight
            return outputs[0].ndim >= max(2, weight.ndim)
        return len(inputs) == len(unit.rows) and all(
            has_rows(t, self.size) for t, rows in zip(inputs, unit.rows, strict=True) if rows
        )


_SAVED = object()  # stands for a tensor that autograd keeps


class _Mark(torch.autograd.Function):
    """The identity, which passes the gradients in a backward pass to the recording."""

    @staticmethod
    def forward(
        ctx: Any, recording: Recording, call: Call, anchor: Tensor, *tensors: Tensor
    ) -> Any:
        if recording.layers_recompute:
            # A checkpoint drops what is saved this way, and recomputes it.
            ctx.save_for_backward(*(t for t in call.inputs if isinstance(t, Tensor)))
            left = [_SAVED if isinstance(t, Tensor) else t for t in call.inputs]
            call = call._replace(inputs=left)
        ctx.recording, ctx.call = recording, call
        ctx.set_materialize_grads(False)
        # Not views, so that the next layer may write into them.
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        call = ctx.call
        if ctx.recording.layers_recompute:
            saved = iter(ctx.saved_tensors)
            inputs = [next(saved) if value is _SAVED else value for value in call.inputs]
            call = call._replace(inputs=inputs)
        ctx.recording.receive(call, gradients)
        return None, None, None, *gradients


class Squares:
    """A sink that adds squares of per-example gradients, also of parameters used several times.

    Terms of few positions are summed over vectors before the one product with the inputs, which
    the vectors share. Gradients of a parameter's several uses wait for the last of them.
    """

    def __init__(
        self, sums: Mapping[str, Tensor], recording: Recording, first: int, blocks: BlockSums | None
    ):
        self.sums = sums  # where to add, by name
        self.blocks = blocks  # where to add the products of the same gradients
        self.shared = False  # whether there are several vectors
        self.traces: dict[str, Tensor] = {}  # the total that each example added, by name
        self.additions = 1  # to an element, one after the other
        self._recording = recording
        self._first = first
        self._products: dict[str, tuple[Outer | Summed | Convolved, Tensor]] = {}
        self._waiting: dict[str, list[Gradients]] = {}
        self._one_by_one = False

    def __call__(self, gradients: Mapping[str, Gradients], examples: range) -> Tensor | None:
        """Add per-example gradients of one call's parameters for one vector.

        Those of `few` positions, and those that wait for a last use, cover all examples. Returns
        the sum of pairs if these are of one position, and all that the call adds to.
        """
        pairs: dict[int, Tensor] = {}  # A layer's weight and bias share them.
        others = self.blocks is not None
        if self.blocks is not None:
            counts = self._recording.use_counts
            once = {name: [found] for name, found in gradients.items() if counts[name] == 1}
            self.blocks.add_uses(once, len(examples))
        for name, found in gradients.items():
            if name in self._recording.mismatched:
                continue
            if self._recording.use_counts[name] > 1:
                others = True
                waiting = self._waiting.setdefault(name, [])
                if waiting and isinstance(found, Pulled) and isinstance(waiting[-1], Pulled):
                    waiting[-1].gradients.add_(found.gradients)
                else:
                    waiting.append(found)
            elif isinstance(found, Summed) or (isinstance(found, Outer | Convolved) and found.few):
                if name not in self._products:
                    if id(found.g) not in pairs:
                        pairs[id(found.g)] = pairs_of(found.g, 2)
                    self._products[name] = found, pairs[id(found.g)]
                elif id(found.g) not in pairs:
                    pairs[id(found.g)] = total = self._products[name][1]
                    add_pairs(total, found.g)
            else:
                others = self._one_by_one = True
                self._add(name, found.add_squares(self.sums[name], self._first), examples)
        if not self.shared:
            self.end()
        elif not others and len(pairs) == 1:
            (total,) = pairs.values()
            return total if len(total) == self._recording.size else None
        return None

    def end_vector(self) -> None:
        """Add what waited for a parameter's last use."""
        size = self._recording.size
        if self.blocks is not None:
            self.blocks.add_uses(self._waiting, size)
        for name, uses in self._waiting.items():
            self._one_by_one = True
            traces = add_squares_of_sums(self.sums[name], uses, size, self._first)
            self._add(name, traces, range(size))
        self._waiting.clear()
        self.additions += size * self._one_by_one
        self._one_by_one = False

    def end(self) -> None:
        """Add what was summed over vectors."""
        sums: dict[int, Tensor] = {}  # A layer's weight and bias share them.
        examples = range(self._recording.size)
        for name, (gradients, pairs) in self._products.items():
            if id(pairs) not in sums:
                sums[id(pairs)] = pairs.sum(1)
            traces = gradients.add_product(self.sums[name], pairs, sums[id(pairs)])
            self._add(name, traces, examples)
        self._products.clear()

    def _add(self, name: str, traces: Tensor, examples: range) -> None:
        if name not in self.traces and len(examples) == self._recording.size:
            self.traces[name] = traces
            return
        if name not in self.traces:
            self.traces[name] = traces.new_zeros(self._recording.size)
        self.traces[name][examples.start : examples.stop] += traces


def has_rows(value: Any, size: int) -> bool:
    """Return whether a value is a tensor with one row for each of `size` examples."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size


class Recorder:
    """Marks the calls of units in the forward passes that are recorded, until it is closed."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], dtype: torch.dtype):
        """Watch the units' modules; per-example gradients will be squared in `dtype`."""
        device = next(model.parameters()).device
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._dtype = dtype
        self._layers_recompute = bool(checkpointed_layers(model))
        self._recording: Recording | None = None
        self._handles: list[Any] = []
        self._shared = [unit for unit in units if unit.shared]
        for unit in units:
            if unit.shared:
                continue
            mark = partial(self._mark, unit)
            self._handles.append(unit.module.register_forward_hook(mark, with_kwargs=True))
            if isinstance(unit.module, nn.Embedding):
                self._handles.append(unit.module.register_forward_pre_hook(self._spread))

    def close(self) -> None:
        """Remove the hooks from the modules."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def recording(self, size: int, *, only_marks_need_gradients: bool) -> Iterator[Recording]:
        """Record a batch of `size` examples during its forward and backward pass."""
        only, recompute = only_marks_need_gradients, self._layers_recompute
        try:
            self._recording = Recording(size, self._anchor, self._dtype, only, recompute)
            with self._following(self._recording):
                yield self._recording
        finally:
            self._recording = None

    @contextmanager
    def _following(self, recording: Recording) -> Iterator[None]:
        """Put tensors that are followed in place of the parameters without a layer's rule."""
        places = [(u.module, local, name) for u in self._shared for local, name in u.names.items()]
        before = [(module, local, module._parameters[local]) for module, local, _ in places]
        made: dict[str, Any] = {}
        try:
            for module, local, name in places:
                if name not in made:
                    leaf = module.get_parameter(local).detach().requires_grad_()
                    made[name] = Shared.of(recording, (Source(name, leaf),), leaf, root=True)
                module._parameters[local] = made[name]
            yield
        finally:
            for module, local, parameter in before:
                module._parameters[local] = parameter

    def _mark(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        recording = self._recording
        if recording is None or recording.rerunning_unit:
            return None
        with own_errors():
            return recording.mark(unit, args, kwargs, output)

    def _spread(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Ids of shape (1, T) are shared by the batch, and their gradient would be shared too.
        recording = self._recording
        if recording is None or recording.rerunning_unit or len(args) != 1:
            return args
        (ids,) = args
        with own_errors():
            shared = ids.ndim > 1 and ids.shape[0] == 1
            return (ids.expand(recording.size, *ids.shape[1:]),) if shared else args


def add_squares(
    sums: Mapping[str, Tensor],
    recording: Recording,
    outputs: Tensor,
    vectors: Iterable[Tensor],
    first: int,
    blocks: BlockSums | None,
    *,
    keep: bool,
) -> Squares:
    """Add Σ_vectors Σ_examples (Jᵀ vector)² to sums, in the parameters' shapes by name.

    Parameters with a call that does not have one row per example are left out.

    Args:
        sums: The totals to add to, by name.
        recording: The recorded forward pass.
        outputs: Its outputs, (B, …).
        vectors: The vectors to backpropagate, each like outputs.
        first: The first example whose share is measured where not all are.
        blocks: Where to add Σ Jᵀ J of layers, whose parameters' gradients arrive together.
        keep: Whether the graph is used again.
    """
    squares = Squares(sums, recording, first, blocks)
    vectors = iter(vectors)
    vector = next(vectors, None)
    while vector is not None:
        following = next(vectors, None)
        squares.shared |= following is not None
        if blocks is not None:
            blocks.shared, blocks.last = squares.shared, following is None
        recording.backward(outputs, vector, squares, keep=keep or following is not None)
        squares.end_vector()
        vector = following
    recording.squares.clear()
    squares.end()
    return squares


def module_gradients(
    call: Call, inputs: list[Any], gradients: list[Tensor | None]
) -> dict[str, Tensor]:
    """Return one module's per-example gradients, by the module's names, from running it again.

    Args:
        call: The call to repeat.
        inputs: Its inputs for some examples, (B, …) each or shared.
        gradients: The gradients at its outputs for the same examples, (B, …).
    """
    unit = call.unit
    values = {name: unit.module.get_parameter(name).detach() for name in unit.names}
    arrived = [i for i, g in zip(call.outputs, gradients, strict=True) if g is not None]
    vectors = [g for g in gradients if g is not None]
    own = [t for t, rows in zip(inputs, unit.rows, strict=True) if rows]

    def arguments(example: list[Tensor]) -> tuple[Any, Any]:
        rows = iter(example)
        alone = [next(rows)[None] if r else t for t, r in zip(inputs, unit.rows, strict=True)]
        assert call.spec is not None
        return tree_unflatten(alone, call.spec)

    def outputs(parameters: dict[str, Tensor], arguments: tuple[Any, Any]) -> list[Tensor]:
        output = torch.func.functional_call(unit.module, parameters, *arguments)
        return [tree_flatten(output)[0][i] for i in arrived]

    def of_example(example: list[Tensor], vector: list[Tensor]) -> dict[str, Tensor]:
        alone = arguments(example)
        with falling_back(unit.names.values(), Exception), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # vmap warns of a slow loop.
            vjp = torch.func.vjp(lambda parameters: outputs(parameters, alone), values)[1]
            return vjp([v[None] for v in vector])[0]

    def run_alone(example: list[Tensor], vector: list[Tensor]) -> dict[str, Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        with falling_back(unit.names.values(), Exception), torch.enable_grad():
            made, wanted = outputs(leaves, arguments(example)), list(leaves.values())
            at_outputs = [v[None] for v in vector]
            found = torch.autograd.grad(made, wanted, at_outputs, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    if unit.vmap:
        return torch.func.vmap(of_example)(own, vectors)
    each = [run_alone([t[b] for t in own], [v[b] for v in vectors]) for b in range(len(vectors[0]))]
    return {name: torch.stack([found[name] for found in each]) for name in values}
