"""The choice of a method for each parameter's per-example gradients, made on a first batch.

    rule      from the inputs and outputs of its layers, or of the functions that use it, for the
              whole batch at once
    module    by running its module again, alone, for each example
    loop      by running the model for each example

A parameter takes the first of them that agrees with single examples and with autograd.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from consolidate.estimation.batches import Alone, Batch, near, out_of_memory, own_errors
from consolidate.estimation.example_gradients import Gradients, square
from consolidate.estimation.input_blocks import BlockSums, InputBlock, with_partners, zero_blocks
from consolidate.estimation.layer_hooks import (
    Recorder,
    Recording,
    Squares,
    Unit,
    UnitError,
    falling_back,
    has_rows,
    in_words,
)
from consolidate.estimation.layer_rules import rule_of
from formats.errors import InputError

METHODS = ("rule", "module", "loop")

MOST_WAITING = 1 << 26  # elements of gradients stored for a parameter that several modules use
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
    alone: Alone | None = None  # for `suspect_rows`; None where the few were the whole batch


class _Probe(NamedTuple):
    """A few examples that are run to compare gradients, and the vector that is backpropagated."""

    model: nn.Module
    few: Batch
    forward: Forward
    dtype: torch.dtype
    vector: Tensor
    blocks: Mapping[str, InputBlock]

    def expected(
        self, together: Tensor, alone: Tensor, parameters: Mapping[str, nn.Parameter]
    ) -> "_Expected":
        """Return what autograd finds, from the outputs of both and of the first alone.

        Both are negative, so that what a method finds can be added. The gradients of the second
        example are what the first leaves of the sums.
        """
        with requiring_gradients(parameters):
            sums = _gradients(together, -self.vector, parameters, self.dtype)
            one = _gradients(alone, self.vector[:1], parameters, self.dtype)
        blocks = {k: b for k, b in self.blocks.items() if b.parameters[0] in sums}
        products = zero_blocks(blocks, parameters, self.dtype)
        of_blocks = BlockSums(blocks, products, parameters, self.dtype)
        of_blocks.add_example(one)
        for block in blocks.values():
            names = [name for name in block.parameters if name in sums]
            other = {n: sums[n] + one[n] if n in one else sums[n] for n in names}
            of_blocks.add_example(other)
        squares, traces, largest = {}, {}, {}
        zero = self.vector.new_zeros((), dtype=self.dtype)
        for name, total in sums.items():  # Few sweeps: a small batch is bound by memory.
            largest[name] = _largest(total)
            if name in one:
                first = one.pop(name)
                second = total + first
                torch.addcmul(zero, second, second, value=-1, out=second)
                squares[name] = torch.addcmul(second, first, first, value=-1, out=first)
            else:
                squares[name] = torch.addcmul(zero, total, total, value=-1)
            traces[name] = -squares[name].sum().item()
        return _Expected(sums, squares, traces, largest, blocks, products)


class _Expected(NamedTuple):
    """What a method should find of the two examples, by name."""

    sums: dict[str, Tensor]  # −Σ gradients
    squares: dict[str, Tensor]  # −Σ gradients²
    traces: dict[str, float]  # the totals of these squares
    largest: dict[str, float]  # of the sums, without sign
    blocks: dict[str, InputBlock]  # of parameters that the outputs depend on
    products: dict[str, Tensor]  # in these blocks


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

    Two examples of the batch are run as a batch of their own, B being the size of the whole:

        together, by autograd     the sum of their gradients: nothing is missing, no factor is wrong
        the first alone           its outputs: the other does not change them; and as it leaves the
                                  other's gradients of the sum, the squares and blocks of both: no
                                  row belongs to the other, and sums over positions and uses are
                                  squared, not their terms
        together, by the methods  the same sums, squares and blocks, with the code of all batches

    That costs about 5/B of a training pass. Two more backward passes of the whole batch without the
    gradients of weights, about two thirds of a training pass, check what needs all of it
    (`suspect_rows`).

    The two are the longest and the shortest text where there is an attention mask, otherwise the
    last example and a random one. They and the vector that is backpropagated, which is random,
    depend on the batch's number. A parameter that fails takes the next slower method; the
    parameters of a block have one.

    `levels` are those of an earlier plan, to start from. A model that draws random numbers is
    refused.
    """
    everything_by_loop = Plan(dict.fromkeys(parameters, "loop"), [], {})
    generator = torch.Generator().manual_seed(batch.number)
    examples = _few(batch, generator)
    few = batch.some(examples)

    def run() -> tuple[Tensor, Tensor]:
        with requiring_gradients(parameters):
            return forward(few), forward(few.example(0))

    try:
        with _noting(model, len(few)) as calls, requiring_gradients(parameters):
            together = forward(few)
    except (RuntimeError, InputError) as error:
        if out_of_memory(error):
            raise
        # One at a time may succeed.
        return everything_by_loop._replace(only_single=in_words(error))
    with _noting(model, 1) as calls_alone, requiring_gradients(parameters):
        alone = forward(few.example(0))
    if alone.shape != together[:1].shape:
        shapes = f"{list(alone.shape)} for one, {list(together.shape)} for {len(few)}"
        return everything_by_loop._replace(only_single=f"outputs of shape {shapes}")
    vector = torch.randn(together.shape, generator=generator).to(together)
    probe = _Probe(model, few, forward, dtype, vector, blocks or {})
    expected = probe.expected(together, alone, parameters)
    together, alone = together.detach(), alone.detach()
    if not near(alone, together[:1]):
        if not near(forward(few), together):
            raise InputError(
                "the model's outputs differ between two runs on the same batch: it draws "
                "random numbers in eval mode (such as a functional dropout without "
                "`training=self.training`); make it deterministic in eval mode"
            )
        # Examples change one another's outputs, so only single examples can be measured.
        failures = dict.fromkeys(expected.sums, Failure("rule", None))
        return everything_by_loop._replace(failures=failures)
    calls = {m: _common(rows, calls_alone.get(m)) for m, rows in calls.items()}
    reached = {name: parameters[name] for name in expected.sums}
    levels = {name: (levels or {}).get(name, "rule") for name in reached}
    owners = _owners(model, reached, calls)
    for name, paths in owners.items():
        if levels[name] == "rule" and not _has_rule(model, paths, calls):
            # Gradients from several modules would have to wait for the last of them.
            waits = len(paths) > 1 and reached[name].numel() * len(batch) > MOST_WAITING
            levels[name] = "loop" if waits else _USED
    failures = dict[str, Failure]()
    while True:
        units = _units(model, owners, levels, calls)
        marked = {name for unit in units for name in unit.names.values()}
        levels = {n: level if n in marked else "loop" for n, level in levels.items()}
        failed = _failed(units, reached, probe, expected)
        if not failed:
            verified = Alone(examples[0], alone) if len(batch) > len(few) else None
            return Plan(levels, units, failures, alone=verified)
        for name in [*failed]:
            of_block = with_partners([name], expected.blocks) & levels.keys()
            failed |= {n: failed[name] for n in of_block if levels[n] == levels[name]}
        for name, raised in failed.items():
            if levels[name] == _USED:
                continue  # No layer's rule failed.
            failure = Failure(method_of(levels[name]), raised)
            if failures.get(name, failure).method == failure.method:
                failures[name] = failure
        levels |= {name: slower(levels[name]) for name in failed}
        del expected  # Twice as large as the model; the comparison used it up.
        expected = probe.expected(*run(), parameters)


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


def _few(batch: Batch, generator: torch.Generator) -> list[int]:
    """Return two examples: of unlike lengths where a mask shows them, else a random and the last.

    The random one comes first, as it is run alone; the last one ends what is done in chunks.
    """
    order = torch.randperm(len(batch) - 1, generator=generator).tolist()
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape[:1] == (len(batch),):
        lengths = mask.flatten(1).sum(1).tolist()
        longest, shortest = lengths.index(max(lengths)), lengths.index(min(lengths))
        if longest != shortest:
            return [longest, shortest]
    return [order[0], len(batch) - 1]


@contextmanager
def _noting(model: nn.Module, size: int) -> Iterator[_Calls]:
    """Note the calls of modules while a batch of `size` examples is run."""
    calls: _Calls = {}

    def note(module: nn.Module, args: object, kwargs: object, output: object) -> None:
        with own_errors():
            rows = tuple(has_rows(value, size) for value in tree_leaves((args, kwargs)))
            outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            fits = any(rows) and outputs and all(has_rows(t, size) for t in outputs)
            calls[module] = rows if fits and calls.get(module, rows) == rows else None

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _common(some: Sequence[bool] | None, alone: Sequence[bool] | None) -> tuple[bool, ...] | None:
    """Return the inputs with a row per example whatever the size; None if none has."""
    if some is None or alone is None or len(some) != len(alone):
        return None
    rows = tuple(a and b for a, b in zip(some, alone, strict=True))
    return rows if any(rows) else None


def _gradients(
    outputs: Tensor, vector: Tensor, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the gradients of those parameters that the outputs depend on, in memory of their own.

    They are dense, also where convolutions have their channels last.
    """
    if not outputs.requires_grad:
        return {}
    wanted = list(parameters.values())
    found: list[Tensor | None] = [*torch.autograd.grad(outputs, wanted, vector, allow_unused=True)]
    used = {vector.untyped_storage().data_ptr()}
    gradients: dict[str, Tensor] = {}
    for i, name in enumerate(parameters):
        gradient, found[i] = found[i], None  # freed once it is converted
        if gradient is None:
            continue
        gradient = gradient.to_dense().to(dtype)
        if not gradient.is_contiguous() or gradient.untyped_storage().data_ptr() in used:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
        used.add(gradient.untyped_storage().data_ptr())
        gradients[name] = gradient
    return gradients


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
    units: list[Unit], parameters: Mapping[str, nn.Parameter], probe: _Probe, expected: _Expected
) -> dict[str, str | None]:
    """Return the marked parameters whose gradients are not as expected, and what was raised.

    What is found is added to the expected sums and squares, which are used up. A RuntimeError of
    torch means that the model or its layers do not meet the assumptions of a method.
    """
    marked = {name for unit in units for name in unit.names.values()}
    if not marked:
        return {}
    sums, squares = expected.sums, expected.squares
    made: dict[str, Tensor] = {}  # of blocks

    try:
        with (
            closing(Recorder(probe.model, units, probe.dtype)) as recorder,
            recorder.recording(len(probe.few), only_marks_need_gradients=True) as recording,
        ):
            outputs = probe.forward(probe.few)
            blocks = recorded_blocks(expected.blocks, recording, parameters.keys() - marked)
            made = zero_blocks(blocks, parameters, probe.dtype)
            of_blocks = BlockSums(blocks, made, parameters, probe.dtype)
            add_squares = Squares(squares, recording, 0, of_blocks)

            def add_all(gradients: Mapping[str, Gradients], examples: range) -> None:
                with falling_back(gradients, RuntimeError):
                    for name, of_name in gradients.items():
                        for row in range(len(examples)):
                            of_name.add_to(sums[name], row)
                add_squares(gradients, examples)

            recording.backward(outputs, probe.vector, add_all, keep=False)
            add_squares.end_vector()
    except UnitError as error:
        return dict.fromkeys(error.names, str(error))
    except (RuntimeError, InputError) as error:
        if out_of_memory(error):
            raise
        # A tensor that is followed, or ids with more rows, are not what a model may expect.
        suspect = [u for u in units if u.shared] or [u for u in units if u.spread]
        names = {name for unit in suspect for name in unit.names.values()}
        return dict.fromkeys(names or marked, in_words(error))
    largest = max(expected.largest.values())

    def coarser(name: str) -> float:  # rules compute in the sums' dtype
        return max(torch.finfo(dtype).eps for dtype in (parameters[name].dtype, probe.dtype))

    def agrees(name: str) -> bool:
        eps = coarser(name)
        rounding = min(100 * eps, eps**0.5)  # for what is only rounding, as a key bias has
        # Normalization is often in float32, whatever the dtype of the weights.
        allowed = max(eps**0.5, 1e-6) * expected.largest[name] + rounding * largest
        return _largest(sums[name]) <= allowed and _squares_agree(
            squares[name], expected.traces[name], eps, largest
        )

    wrong = {name for name in marked if name in recording.mismatched or not agrees(name)}
    for key, block in made.items():
        eps = coarser(expected.blocks[key].parameters[0])
        total = torch.linalg.vector_norm(expected.products[key], 1).item()
        if not _squares_agree(block.sub_(expected.products[key]), total, eps, largest):
            wrong |= marked & {*expected.blocks[key].parameters}
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


def _squares_agree(difference: Tensor, total: float, eps: float, largest: float) -> bool:
    """Return whether squares, or a block, of a sum `total` differ by no more than rounding.

    An example may fall on the other side of a ReLU. `largest` is the largest of all gradients.
    """
    floor = (min(100 * eps, eps**0.5) * largest) ** 2 * difference.numel()
    return torch.linalg.vector_norm(difference, 1).item() <= eps**0.25 * total + floor


def _largest(values: Tensor) -> float:
    """Return max |values| without copying them; 0 if there are none."""
    if not values.numel():
        return 0.0
    least, most = values.aminmax()
    return max(-least.item(), most.item())
