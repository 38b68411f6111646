"""By which method each parameter's per-example gradients are had, found out on a first batch.

    rule      from the inputs and outputs of its layers, for the whole batch at once
    module    by running its module again, alone, for each example
    loop      by running the model for each example

A parameter takes the first of them that agrees with single examples and with autograd.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from consolidate.batches import Batch, out_of_memory
from consolidate.example_gradients import Gradients, square
from consolidate.layer_calls import Recorder, Unit, UnitError, add_squares, has_rows
from consolidate.layer_rules import rule_of
from formats.errors import InputError

METHODS = ("rule", "module", "loop")

MOST_WAITING = 1 << 26
"""Elements of per-example gradients that are kept for a parameter that several modules use."""

_LEVELS = ("rule", "module", "module by itself", "loop")  # With vmap, and without.

_Calls = dict[nn.Module, tuple[bool, ...] | None]
"""The modules called, with which of their inputs have a row per example; None where no such."""

Forward = Callable[[Batch], Tensor]
"""From a batch to the model's outputs."""


class Plan(NamedTuple):
    """How per-example gradients are had.

    Attributes:
        levels: What `method_of` takes, by the parameters' names; those that outputs do not depend
            on are missing.
        units: What is marked for those that do not go by the loop.
        disagreed: By which method first, for those that did not agree with single examples.
    """

    levels: dict[str, str]
    units: list[Unit]
    disagreed: dict[str, str]


class _Truth(NamedTuple):
    """What a batch's gradients must agree with."""

    probe: Tensor  # What was sent back through the batch,
    kept: tuple[int, int]  # and of these examples alone too.
    sums: dict[str, Tensor]
    squares: dict[str, Tensor]


def choose_methods(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    forward: Forward,
    dtype: torch.dtype,
    levels: Mapping[str, str] | None = None,
) -> Plan:
    """Choose how each parameter's per-example gradients are had.

    A random vector is sent back through the whole batch. Each parameter's sum over the examples
    must be autograd's own gradient, so that nothing is missing. Of the first and the last example
    the squares must be those of the two run alone: squares tell what sums do not, rows that were
    taken for another example's, as in time-first layouts.

    Args:
        model: Any module, with gradients switched off for its parameters.
        parameters: Those to measure.
        batch: Two examples or more.
        forward: Runs the model.
        dtype: The type that gradients are squared in.
        levels: A former plan's, to start from.

    Raises:
        InputError: If the model draws random numbers.
    """
    everything_by_loop = Plan(dict.fromkeys(parameters, "loop"), [], {})
    try:
        calls, together, probe, sums = _scout(model, parameters, batch, forward, dtype)
    except (RuntimeError, InputError) as error:
        if out_of_memory(error):
            raise
        return everything_by_loop  # Not a model that takes several examples; one may go through.
    reached = {name: parameters[name] for name in sums}
    kept = (0, len(batch.labels) - 1)
    squares = {name: torch.zeros_like(value) for name, value in sums.items()}
    for example in kept:
        with requiring_gradients(reached):
            outputs = forward(batch.example(example))
            if outputs.shape != probe[:1].shape:
                return everything_by_loop
            if not _near(outputs.detach(), together[example : example + 1]):
                if not _near(forward(batch).detach(), together):
                    raise InputError(
                        "The model gives other outputs each time that it is run on the same batch: "
                        "it draws random numbers in eval mode too (a functional dropout without "
                        "`training=self.training`, for one). Make it deterministic there."
                    )
                # Examples that change one another's outputs: each alone is what can be measured.
                return everything_by_loop._replace(disagreed=dict.fromkeys(reached, "rule"))
            add_gradients(squares, reached, outputs, [probe[example : example + 1]])
    truth = _Truth(probe, kept, sums, squares)
    reached = {name: parameters[name] for name in sums}
    levels = {name: (levels or {}).get(name, "rule") for name in reached}
    owners = _owners(model, reached, calls)
    for name, paths in owners.items():
        if levels[name] == "rule" and not _has_rule(model, paths, calls):
            # What several modules give would have to wait for the last of them.
            waits = len(paths) > 1 and reached[name].numel() * len(batch.labels) > MOST_WAITING
            levels[name] = "loop" if waits else "module"
    disagreed: dict[str, str] = {}
    while True:
        units = _units(model, owners, levels, calls)
        marked = {name for unit in units for name in unit.names.values()}
        levels = {n: level if n in marked else "loop" for n, level in levels.items()}
        failed = _disagreeing(units, reached, batch, forward, dtype, truth)
        if not failed:
            return Plan(levels, units, disagreed)
        disagreed = {name: method_of(levels[name]) for name in failed} | disagreed
        levels |= {name: slower(levels[name]) for name in failed}


def method_of(level: str) -> str:
    """Return the method, one of METHODS, behind one of a plan's levels."""
    return level.split()[0]


def slower(level: str) -> str:
    """Return the next of a plan's levels, which needs less of a module."""
    return _LEVELS[_LEVELS.index(level) + 1]


@contextmanager
def requiring_gradients(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Switch gradients on for these parameters, and off again."""
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
) -> dict[str, Tensor]:
    """Add Σ_vectors (Jᵀ vector)² to sums.

    Returns:
        The sum of what was added, (1,), by the names that outputs depend on.
    """
    traces: dict[str, Tensor] = {}
    for vector in vectors if outputs.requires_grad else ():
        gradients = torch.autograd.grad(
            outputs, list(parameters.values()), vector, retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
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
) -> tuple[_Calls, Tensor, Tensor, dict[str, Tensor]]:
    """Run the batch; return what was called, outputs, a random vector, and its gradients."""
    size = len(batch.labels)
    calls: _Calls = {}

    def note(module: nn.Module, args: object, kwargs: object, output: object) -> None:
        rows = tuple(has_rows(value, size) for value in tree_leaves((args, kwargs)))
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        fits = any(rows) and outputs and all(has_rows(t, size) for t in outputs)
        calls[module] = rows if fits and calls.get(module, rows) == rows else None

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        with requiring_gradients(parameters):
            outputs = forward(batch)
            generator = torch.Generator().manual_seed(0)
            probe = torch.randn(outputs.shape, generator=generator).to(outputs)
            gradients = torch.autograd.grad(
                outputs, list(parameters.values()), probe, allow_unused=True
            )
    finally:
        for handle in handles:
            handle.remove()
    found = zip(parameters, gradients, strict=True)
    sums = {name: g.to_dense().to(dtype) for name, g in found if g is not None}
    return calls, outputs.detach(), probe, sums


def _owners(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], calls: _Calls
) -> dict[str, dict[str, str]]:
    """Return the modules that use each parameter: their paths, with the parameter's name there.

    Modules that own a parameter are never called where others use it: those count if none is.
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
    modules = {model.get_submodule(path): local for path, local in owners.items()}
    return all(
        rule_of(module) is not None and module in calls and local in ("weight", "bias")
        for module, local in modules.items()
    )


def _units(
    model: nn.Module,
    owners: Mapping[str, dict[str, str]],
    levels: Mapping[str, str],
    calls: _Calls,
) -> list[Unit]:
    """List what to mark: layers with a rule, and the modules that are run again by themselves."""
    by_rule: dict[str, dict[str, str]] = {}
    by_module: dict[tuple[str, bool], list[str]] = {}
    for name, paths in owners.items():
        if levels[name] == "rule":
            for path, local in paths.items():
                by_rule.setdefault(path, {})[local] = name
        elif levels[name] != "loop":
            hosts = {_host(model, path, calls) for path in paths}
            for host in hosts:
                if not any(host != other and _inside(host, other) for other in hosts):
                    by_module.setdefault((host, levels[name] == "module"), []).append(name)
    units = []
    for path, names in by_rule.items():
        module = model.get_submodule(path)
        units.append(Unit(module, names, rule_of(module)))
    for (path, vmap), inside in by_module.items():
        module = model.get_submodule(path)
        if rows := calls.get(module):
            locals_ = {id(p): k for k, p in module.named_parameters()}
            names = {locals_[id(model.get_parameter(name))]: name for name in inside}
            units.append(Unit(module, names, rows=rows, vmap=vmap))
    return units


def _host(model: nn.Module, path: str, calls: _Calls) -> str:
    """Return the path of the nearest module around this one that was called with whole rows."""
    while path and not calls.get(model.get_submodule(path)):
        path = path.rpartition(".")[0]
    return path


def _inside(path: str, other: str) -> bool:
    return not other or path.startswith(f"{other}.")


def _disagreeing(
    units: list[Unit],
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    forward: Forward,
    dtype: torch.dtype,
    truth: _Truth,
) -> set[str]:
    """Return the names of marked parameters whose gradients are not the true ones."""
    marked = {name for unit in units for name in unit.names.values()}
    size, probe = len(batch.labels), truth.probe
    kept = torch.zeros(size, *[1] * (probe.ndim - 1), dtype=torch.bool, device=probe.device)
    kept[list(truth.kept)] = True

    def differing(squared: bool) -> set[str]:
        expected = truth.squares if squared else truth.sums
        found = {name: torch.zeros_like(expected[name]) for name in marked}

        def add(gradients: Mapping[str, Gradients]) -> None:
            for name, of_name in gradients.items():
                for example in range(size):
                    of_name.add_to(found[name], example)

        with (
            closing(Recorder(units, probe.device, dtype)) as recorder,
            recorder.recording(size, alone=True) as recording,
        ):
            outputs = forward(batch)
            if squared:
                add_squares(found, recording, outputs, [probe * kept])
            else:
                recording.backward(outputs, probe, add, keep=False)
        largest = max(value.abs().max().item() for value in expected.values())
        agree = _alike if squared else _equal

        def agrees(name: str) -> bool:
            eps = torch.finfo(parameters[name].dtype).eps
            return agree(found[name], expected[name], eps, largest)

        return {name for name in marked if name in recording.unfit or not agrees(name)}

    try:
        return (differing(squared=False) or differing(squared=True)) if marked else set()
    except UnitError as error:
        return set(error.unit.names.values())
    except (RuntimeError, InputError) as error:
        if out_of_memory(error):
            raise
        return marked


def _near(alone: Tensor, together: Tensor) -> bool:
    """Return whether outputs are the same up to rounding."""
    tolerance = 10 * torch.finfo(alone.dtype).eps ** 0.5
    return bool((alone - together).abs().max() <= tolerance * together.abs().max().clamp(min=1e-6))


def _equal(found: Tensor, expected: Tensor, eps: float, largest: float) -> bool:
    """Return whether sums of gradients are equal up to rounding, largest that of any parameter."""
    # Normalisation is often in float32 whatever the weights.
    tolerance = max(eps**0.5, 1e-6)
    error = (found - expected).abs().max().item()
    return error <= tolerance * expected.abs().max().item() + _floor(eps) * largest


def _alike(found: Tensor, expected: Tensor, eps: float, largest: float) -> bool:
    """Return whether squares are those of the same gradients, run in another batch."""
    # An example may fall to the other side of a ReLU here and there.
    error = (found - expected).abs().mean().item()
    return error <= eps**0.25 * expected.mean().item() + _floor(eps) ** 2 * largest


def _floor(eps: float) -> float:
    """Return the relative size of gradients that are nothing but rounding, as of a key's bias."""
    return min(100 * eps, eps**0.5)
