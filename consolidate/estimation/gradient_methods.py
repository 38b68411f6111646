"""The choice of a method for each parameter's per-example gradients, made on a first batch.

    rule      from the inputs and outputs of its layers, or of the functions that use it, for the
              whole batch at once
    module    by running its module again, alone, for each example
    loop      by running the model for each example

A parameter takes the first of them that agrees with single examples and with autograd.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from consolidate.estimation.batches import Batch, out_of_memory, own_errors
from consolidate.estimation.example_gradients import Gradients, square
from consolidate.estimation.input_blocks import BlockSums, InputBlock, with_partners, zero_blocks
from consolidate.estimation.layer_hooks import (
    Recorder,
    Recording,
    Unit,
    UnitError,
    add_squares,
    falling_back,
    has_rows,
    in_words,
)
from consolidate.estimation.layer_rules import rule_of
from formats.errors import InputError

METHODS = ("rule", "module", "loop")

WEIGHTS = (1.0, -1.0, 2.0, -2.0, 0.5, -0.5)
"""Of examples in sums that are compared; powers of two, by which sums scale without rounding."""

MOST_WAITING = 1 << 26  # elements of gradients stored for a parameter that several modules use
_DENSE = torch.contiguous_format  # also where convolutions have their channels last
_USED = "rule where used"  # by functions, not by a layer
_LEVELS = ("rule", _USED, "module", "module by itself", "loop")  # With vmap, and without.

_Calls = dict[nn.Module, tuple[bool, ...] | None]
"""The called modules, with which of their inputs have a row per example; None if none has."""

Forward = Callable[[Batch], Tensor]  # from a batch to the model's outputs


class Failure(NamedTuple):
    """Why a parameter does not use a method."""

    method: str
    error: str | None  # what was raised; None where gradients were not those of single examples


class Plan(NamedTuple):
    """How each parameter's per-example gradients are computed."""

    levels: dict[str, str]  # what `method_of` takes, by the names of what outputs depend on
    units: list[Unit]  # the marked units, of parameters that do not use the loop
    failures: dict[str, Failure]  # the first method that failed, for those with one
    only_single: str | None = None  # why the model refuses several examples; None if it does not


class _Probe(NamedTuple):
    """A batch that is run to compare gradients, and the vector that is backpropagated."""

    model: nn.Module
    batch: Batch
    forward: Forward
    dtype: torch.dtype
    vector: Tensor
    weights: Tensor  # one of WEIGHTS for each example
    kept: tuple[int, int]  # the examples that are run alone too
    blocks: Mapping[str, InputBlock]  # of parameters that the outputs depend on

    def sums(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return autograd's own gradients of the batch, each example with its weight."""
        weighted = _weighted(self.vector, self.weights)
        with requiring_gradients(parameters):
            return _gradients(self.forward(self.batch), weighted, parameters, self.dtype)

    def squares(
        self, parameters: Mapping[str, nn.Parameter]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the squared gradients and the blocks of the examples that are run alone."""
        squares = {name: torch.zeros_like(p, dtype=self.dtype) for name, p in parameters.items()}
        products = zero_blocks(self.blocks, parameters, self.dtype)
        blocks = BlockSums(self.blocks, products, parameters, self.dtype)
        for example in self.kept:
            with requiring_gradients(parameters):
                outputs = self.forward(self.batch.example(example))
                vector = self.vector[example : example + 1]
                add_gradients(squares, parameters, outputs, [vector], blocks)
        return squares, products


def choose_methods(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    forward: Forward,
    dtype: torch.dtype,
    levels: Mapping[str, str] | None = None,
    blocks: Mapping[str, InputBlock] | None = None,
) -> Plan:
    """Choose how each parameter's per-example gradients are computed.

    A random vector is backpropagated through the whole batch of two or more examples. Each
    parameter's sum over the examples, each with a random weight, must equal autograd's gradient of
    the vector with these weights: nothing is missing, and no row belongs to an example of another
    weight, such as a neighbour, as in time-first layouts or where tokens are routed. The squares of
    two examples must equal those of the two run alone, and so must their part of each block; its
    parameters have one method. Weights, vector and the two examples depend on the batch's number.

    `levels` are those of an earlier plan, to start from. A model that draws random numbers is
    refused.
    """
    everything_by_loop = Plan(dict.fromkeys(parameters, "loop"), [], {})
    try:
        calls, together, vector, weights, expected = _scout(
            model, parameters, batch, forward, dtype
        )
    except (RuntimeError, InputError) as error:
        if out_of_memory(error):
            raise
        # One at a time may succeed.
        return everything_by_loop._replace(only_single=in_words(error))
    known = {k: b for k, b in (blocks or {}).items() if b.parameters[0] in expected}
    first = (batch.number - 1) % len(batch)
    kept = first, (first - 1) % len(batch)
    probe = _Probe(model, batch, forward, dtype, vector, weights, kept, known)
    for example in probe.kept:
        alone = forward(batch.example(example))
        if alone.shape != vector[:1].shape:
            shapes = f"{list(alone.shape)} for one, {list(vector.shape)} for all"
            return everything_by_loop._replace(only_single=f"outputs of shape {shapes}")
        if not _near(alone, together[example : example + 1]):
            if not _near(forward(batch), together):
                raise InputError(
                    "the model's outputs differ between two runs on the same batch: it draws "
                    "random numbers in eval mode (such as a functional dropout without "
                    "`training=self.training`); make it deterministic in eval mode"
                )
            # Examples change one another's outputs, so only single examples can be measured.
            return everything_by_loop._replace(
                failures=dict.fromkeys(expected, Failure("rule", None))
            )
    reached = {name: parameters[name] for name in expected}
    levels = {name: (levels or {}).get(name, "rule") for name in reached}
    owners = _owners(model, reached, calls)
    for name, paths in owners.items():
        if levels[name] == "rule" and not _has_rule(model, paths, calls):
            # Gradients from several modules would have to wait for the last of them.
            waits = len(paths) > 1 and reached[name].numel() * len(batch.labels) > MOST_WAITING
            levels[name] = "loop" if waits else _USED
    failures: dict[str, Failure] = {}
    squared, products = False, dict[str, Tensor]()
    while True:
        units = _units(model, owners, levels, calls)
        marked = {name for unit in units for name in unit.names.values()}
        levels = {n: level if n in marked else "loop" for n, level in levels.items()}
        failed = _failed(units, reached, probe, expected, products if squared else None)
        for name in [*failed]:
            of_block = with_partners([name], probe.blocks) & levels.keys()
            failed |= {n: failed[name] for n in of_block if levels[n] == levels[name]}
        if squared and not failed:
            return Plan(levels, units, failures)
        for name, raised in failed.items():
            if levels[name] == _USED:
                continue  # No layer's rule failed.
            failure = Failure(method_of(levels[name]), raised)
            if failures.get(name, failure).method == failure.method:
                failures[name] = failure
        levels |= {name: slower(levels[name]) for name in failed}
        if squared or not failed:
            # Only one of the two exists at a time, as each is as large as the model.
            squared = not failed
            expected.clear()
            products.clear()
            if squared:
                expected, products = probe.squares(reached)
            else:
                expected = probe.sums(reached)


def method_of(level: str) -> str:
    """Return the method, one of METHODS, behind one of a plan's levels."""
    return level.split()[0]


def slower(level: str) -> str:
    """Return the next of a plan's levels, which requires less of a module."""
    return _LEVELS[_LEVELS.index(level) + 1]


@contextmanager
def requiring_gradients(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Enable gradients of these parameters for a block."""
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def add_gradients(
    sums: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    outputs: Tensor,
    vectors: Iterable[Tensor],
    blocks: BlockSums | None = None,
) -> dict[str, Tensor]:
    """Add Σ_vectors (Jᵀ vector)² to sums; return the sum of each, (1,), by the names reached.

    Parameters that are not in `sums` count only for `blocks`; the outputs are then of one example.
    """
    traces: dict[str, Tensor] = {}
    for vector in vectors if outputs.requires_grad else ():
        gradients = torch.autograd.grad(
            outputs, list(parameters.values()), vector, retain_graph=True, allow_unused=True
        )
        if blocks is not None:
            blocks.add_example(dict(zip(parameters, gradients, strict=True)))
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and name in sums:
                gradient = gradient.to_dense().to(sums[name].dtype)
                sums[name].addcmul_(gradient, gradient)
                trace = square(gradient)[None]
                traces[name] = traces[name] + trace if name in traces else trace
    return traces


def _scout(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    forward: Forward,
    dtype: torch.dtype,
) -> tuple[_Calls, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Run the batch; return calls, outputs, a random vector, random weights, and the gradients."""
    size = len(batch.labels)
    calls: _Calls = {}

    def note(module: nn.Module, args: object, kwargs: object, output: object) -> None:
        with own_errors():
            rows = tuple(has_rows(value, size) for value in tree_leaves((args, kwargs)))
            outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            fits = any(rows) and outputs and all(has_rows(t, size) for t in outputs)
            calls[module] = rows if fits and calls.get(module, rows) == rows else None

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        with requiring_gradients(parameters):
            outputs = forward(batch)
            generator = torch.Generator().manual_seed(batch.number)
            vector = torch.randn(outputs.shape, generator=generator).to(outputs)
            weights = _weights(size, generator)
            sums = _gradients(outputs, _weighted(vector, weights), parameters, dtype)
    finally:
        for handle in handles:
            handle.remove()
    return calls, outputs.detach(), vector, weights, sums


def _weights(size: int, generator: torch.Generator) -> Tensor:
    """Return one of WEIGHTS for each example, never that of its neighbour."""
    steps = torch.randint(1, len(WEIGHTS), (size,), generator=generator)
    return torch.tensor(WEIGHTS)[steps.cumsum(0) % len(WEIGHTS)]


def _weighted(vector: Tensor, weights: Tensor) -> Tensor:
    """Return a vector for the outputs with the weight of each example."""
    return vector * weights.to(vector).view(-1, *[1] * (vector.ndim - 1))


def _gradients(
    outputs: Tensor, vector: Tensor, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the gradients of those parameters that the outputs depend on."""
    found = torch.autograd.grad(outputs, list(parameters.values()), vector, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return {name: g.to_dense().to(dtype) for name, g in pairs if g is not None}


def _owners(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], calls: _Calls
) -> dict[str, dict[str, str]]:
    """Return the modules that use each parameter: their paths, with the parameter's name there.

    Owners that are not called count only if no owner of the parameter is called.
    """
    names = {id(p): name for name, p in parameters.items()}
    owners: dict[str, dict[str, str]] = {name: {} for name in parameters}
    for path, module in model.named_modules():
        for local, p in module._parameters.items():
            if id(p) in names:
                owners[names[id(p)]][path] = local
    called = {
        name: {path: k for path, k in paths.items() if model.get_submodule(path) in calls}
        for name, paths in owners.items()
    }
    return {name: called[name] or paths for name, paths in owners.items()}


def _has_rule(model: nn.Module, owners: dict[str, str], calls: _Calls) -> bool:
    """Return whether all modules that use a parameter have a rule for it, and are called."""
    modules = [model.get_submodule(path) for path in owners]
    known = all(rule_of(module) is not None and module in calls for module in modules)
    return known and {"weight", "bias"}.issuperset(owners.values())


def _units(
    model: nn.Module, owners: Mapping[str, dict[str, str]], levels: Mapping[str, str], calls: _Calls
) -> list[Unit]:
    """List the units to mark: layers with a rule, and modules that are run again alone."""
    by_rule: dict[str, dict[str, str]] = {}
    where_used: dict[str, dict[str, str]] = {}
    by_module: dict[tuple[str, bool], list[str]] = {}
    for name, paths in owners.items():
        if levels[name] in ("rule", _USED):
            units_by_path = by_rule if levels[name] == "rule" else where_used
            for path, local in paths.items():
                units_by_path.setdefault(path, {})[local] = name
        elif levels[name] != "loop":
            hosts = {_host(model, path, calls) for path in paths}
            for host in hosts:  # Except those inside another.
                around = (other for other in hosts if other != host)
                if not any(not other or host.startswith(f"{other}.") for other in around):
                    by_module.setdefault((host, levels[name] == "module"), []).append(name)
    modules = {model.get_submodule(path): names for path, names in by_rule.items()}
    units = [
        Unit(m, names, rule_of(m), spread=calls.get(m) is None) for m, names in modules.items()
    ]
    units += [Unit(model.get_submodule(p), names, shared=True) for p, names in where_used.items()]
    for (path, vmap), inside in by_module.items():
        module = model.get_submodule(path)
        if rows := calls.get(module):
            locals_ = {id(p): k for k, p in module.named_parameters()}
            names = {locals_[id(model.get_parameter(name))]: name for name in inside}
            units.append(Unit(module, names, rows=rows, vmap=vmap))
    return units


def _host(model: nn.Module, path: str, calls: _Calls) -> str:
    """Return the path of the nearest enclosing module that was called with a row per example."""
    while path and not calls.get(model.get_submodule(path)):
        path = path.rpartition(".")[0]
    return path


def _failed(
    units: list[Unit],
    parameters: Mapping[str, nn.Parameter],
    probe: _Probe,
    expected: Mapping[str, Tensor],
    products: Mapping[str, Tensor] | None,
) -> dict[str, str | None]:
    """Return the marked parameters whose gradients are not as expected, and what was raised.

    Expected are the probe's `squares`, with the blocks' `products`, or its `sums`, without. A
    RuntimeError of torch means that the model or its layers do not meet the assumptions of a
    method.
    """
    marked = {name for unit in units for name in unit.names.values()}
    if not marked:
        return {}
    vector, squared = probe.vector, products is not None
    found = {n: torch.zeros_like(expected[n], memory_format=_DENSE) for n in marked}
    made: dict[str, Tensor] = {}  # of blocks

    def add(gradients: Mapping[str, Gradients], examples: range) -> None:
        with falling_back(gradients, RuntimeError):
            for name, of_name in gradients.items():
                for weight in WEIGHTS:
                    own = [i for i, at in enumerate(examples) if probe.weights[at] == weight]
                    if not own:
                        continue
                    found[name].div_(weight)
                    for example in own:
                        of_name.add_to(found[name], example)
                    found[name].mul_(weight)

    try:
        with (
            closing(Recorder(probe.model, units, probe.dtype)) as recorder,
            recorder.recording(len(probe.batch), only_marks_need_gradients=True) as recording,
        ):
            outputs = probe.forward(probe.batch)
            if squared:
                kept = torch.zeros_like(vector)
                kept[list(probe.kept)] = vector[list(probe.kept)]
                blocks = recorded_blocks(probe.blocks, recording, parameters.keys() - marked)
                made = zero_blocks(blocks, parameters, probe.dtype)
                sums = BlockSums(blocks, made, parameters, probe.dtype)
                add_squares(found, recording, outputs, [kept], blocks=sums)
            else:
                recording.backward(outputs, vector, add, keep=False)
    except UnitError as error:
        return dict.fromkeys(error.names, str(error))
    except (RuntimeError, InputError) as error:
        if out_of_memory(error):
            raise
        # A tensor that is followed, or ids with more rows, are not what a model may expect.
        suspect = [u for u in units if u.shared] or [u for u in units if u.spread]
        names = {name for unit in suspect for name in unit.names.values()}
        return dict.fromkeys(names or marked, in_words(error))
    largest = max(_largest(value) for value in expected.values())

    def agrees(name: str) -> bool:
        eps = torch.finfo(parameters[name].dtype).eps
        return _agree(found[name], expected[name], eps, largest, squared)

    wrong = {name for name in marked if name in recording.mismatched or not agrees(name)}
    for key, block in made.items():
        eps = torch.finfo(parameters[probe.blocks[key].parameters[0]].dtype).eps
        if not _blocks_agree(block, (products or {})[key], eps, largest):
            wrong |= marked & {*probe.blocks[key].parameters}
    return dict.fromkeys(wrong)


def recorded_blocks(
    blocks: Mapping[str, InputBlock], recording: Recording, one_by_one: Collection[str]
) -> dict[str, InputBlock]:
    """Return the blocks whose parameters' gradients in a recorded batch arrive together.

    `one_by_one` are parameters that the recording does not follow, and outputs depend on.
    """
    missing = {*one_by_one, *recording.mismatched}
    return {
        key: block
        for key, block in blocks.items()
        if missing.isdisjoint(block.parameters) and not recording.apart(block.parameters)
    }


def _near(alone: Tensor, together: Tensor) -> bool:
    """Return whether outputs are equal up to rounding."""
    tolerance = 10 * torch.finfo(alone.dtype).eps ** 0.5
    return bool((alone - together).abs().max() <= tolerance * together.abs().max().clamp(min=1e-6))


def _agree(found: Tensor, expected: Tensor, eps: float, largest: float, squared: bool) -> bool:
    """Return whether sums, or squares, are as expected up to rounding; overwrites `found`.

    `largest` is the largest number expected of any parameter.
    """
    rounding = min(100 * eps, eps**0.5)  # for gradients that are only rounding, as a key bias has
    found.sub_(expected)
    if squared:  # An example may fall on the other side of a ReLU.
        floor = rounding**2 * largest * found.numel()
        return found.abs_().sum().item() <= eps**0.25 * expected.sum().item() + floor
    # Normalization is often in float32, whatever the dtype of the weights.
    return _largest(found) <= max(eps**0.5, 1e-6) * _largest(expected) + rounding * largest


def _blocks_agree(found: Tensor, expected: Tensor, eps: float, largest: float) -> bool:
    """Return whether a block is as expected up to rounding, like squares; overwrites `found`."""
    floor = min(100 * eps, eps**0.5) ** 2 * largest * found.numel()
    wanted = torch.linalg.vector_norm(expected, 1).item()
    return found.sub_(expected).abs_().sum().item() <= eps**0.25 * wanted + floor


def _largest(values: Tensor) -> float:
    """Return max |values| without copying them; 0 if there are none."""
    if not values.numel():
        return 0.0
    least, most = values.aminmax()
    return max(-least.item(), most.item())
