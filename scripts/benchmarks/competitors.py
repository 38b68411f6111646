"""The Fisher diagonal of one batch by consolidate and by other tools, each as its manual says.

A tool gets a model of its own in eval mode and a batch, and returns a function that makes one pass:
Σ over the examples of squared gradients by parameter name, not divided by anything. What a tool
cannot do it says by an exception, which the benchmark reports.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import consolidate
from scripts.benchmarks.harness import Squares, forward_backward, nll, squares_one_by_one


class Case(NamedTuple):
    """A model and a batch of a workload."""

    model: nn.Module
    inputs: Any  # a tensor for the other tools
    labels: Tensor
    likelihood: str
    estimator: str
    chunk: int


Timed = Callable[[], tuple[float, Squares]]
"""Make one pass; return its wall time in seconds and what it found."""


WARM, SHORT, REPEATS = 2.0, 0.25, 16
"""A pass of fewer seconds than WARM is repeated, REPEATS times or for SHORT; the first is not
counted."""


def clocked(run: Callable[[], Squares]) -> Timed:
    """Time the whole of run."""

    def timed() -> tuple[float, Squares]:
        times = [time.perf_counter()]
        while unsettled(times):
            found = run()
            times.append(time.perf_counter())
        return settled(times), found

    return timed


def unsettled(times: list[float]) -> bool:
    """Return whether to time another pass after those that began and ended at these times."""
    if len(times) < 3:
        return len(times) < 2 or times[1] - times[0] < WARM
    return len(times) < REPEATS + 2 and times[-1] - times[1] < SHORT


def settled(times: list[float]) -> float:
    """Return the seconds of a pass, the mean over all but the first unless it is the only one."""
    return (times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else times[1] - times[0]


def training_pass(case: Case) -> Timed:
    """Make a plain forward and backward pass, the unit of every ratio."""

    def run() -> Squares:
        forward_backward(case.model, case.inputs, case.labels, case.likelihood)
        return {}

    return clocked(run)


def forward_only(case: Case) -> Timed:
    """Evaluate the loss without a graph."""

    def run() -> Squares:
        with torch.no_grad():
            nll(case.likelihood, case.model(case.inputs), case.labels)
        return {}

    return clocked(run)


def input_gradients(case: Case) -> Timed:
    """Send gradients back as far as the first layer's output and form none of a weight.

    No rule of layers can be faster than that.
    """
    case.model.requires_grad_(False)
    first = next(
        m for m in case.model.modules() if next(m.parameters(recurse=False), None) is not None
    )
    first.register_forward_hook(lambda module, inputs, output: output.requires_grad_())

    def run() -> Squares:
        nll(case.likelihood, case.model(case.inputs), case.labels).backward()
        return {}

    return clocked(run)


def ours(case: Case, **options: Any) -> Timed:
    """Time batches in the middle of a pass: what each but the first one costs."""
    times: list[float] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield case.inputs, case.labels
        times[:] = [time.perf_counter()]
        while unsettled(times):
            yield case.inputs, case.labels
            times.append(time.perf_counter())

    def timed() -> tuple[float, Squares]:
        # The mean over equal batches, times one.
        found = _ours(case, batches(), **options)
        return settled(times), found

    return timed


def ours_alone(case: Case) -> Timed:
    """Time a pass of one batch: with the comparison against single examples, and all overhead."""
    return clocked(lambda: _ours(case, [(case.inputs, case.labels)]))


def ours_with_blocks(case: Case) -> Timed:
    """Time the same batches with the structure `inputs`."""
    return ours(case, structure="inputs")


def ours_with_kernel(case: Case) -> Timed:
    """Time the same batches with squares by the compiled kernel."""
    return ours(case, kernel=True, note=_refuse)


def _refuse(note: str) -> None:
    if "kernel cannot" in note:
        raise RuntimeError(note)


def _ours(case: Case, batches: Any, **options: Any) -> Squares:
    found = consolidate.fisher_diagonal(
        case.model,
        batches,
        case.likelihood,
        estimator=case.estimator,
        accumulate_dtype=next(case.model.parameters()).dtype,
        **options,
    )
    scale = len(case.labels) * found.units / found.examples
    return {name: value.mul_(scale) for name, value in found.items()}


def one_by_one(case: Case) -> Timed:
    """Take one example after the other."""
    return clocked(
        lambda: squares_one_by_one(
            case.model, case.inputs, case.labels, case.likelihood, case.estimator
        )
    )


def vmap(case: Case) -> Timed:
    """Take torch.func.vmap of torch.func.grad, a chunk of examples at once."""
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}

    def loss(values: Squares, x: Tensor, y: Tensor) -> Tensor:
        outputs = torch.func.functional_call(case.model, values, (x[None],))
        return nll(case.likelihood, outputs, y[None])

    def weighted(values: Squares, x: Tensor, y: Tensor) -> Tensor:
        # By outcome; the weight √p itself is a constant.
        logs = torch.func.functional_call(case.model, values, (x[None],))[0].log_softmax(0)
        return logs.detach().mul(0.5).exp() * logs

    exact = case.estimator == "exact"
    gradients = torch.func.jacrev(weighted) if exact else torch.func.grad(loss)
    by_example = torch.func.vmap(gradients, (None, 0, 0), randomness="different")

    def run() -> Squares:
        totals = {name: torch.zeros_like(value) for name, value in parameters.items()}
        pairs = zip(case.inputs.split(case.chunk), case.labels.split(case.chunk), strict=True)
        for x, y in pairs:
            for name, gradient in by_example(parameters, x, y).items():
                totals[name] += gradient.square().flatten(0, 1 if exact else 0).sum(0)
        return totals

    return clocked(run)


def backpack(case: Case) -> Timed:
    """Use BackPACK's SumGradSquared, or DiagGGNExact, which is the exact Fisher of a softmax."""
    import backpack as library
    from backpack.extensions import DiagGGNExact, SumGradSquared

    exact = case.estimator == "exact"
    names = {p: name for name, p in case.model.named_parameters()}
    case = _for_cross_entropy(case)
    extension = DiagGGNExact() if exact else SumGradSquared()
    attribute = "diag_ggn_exact" if exact else "sum_grad_squared"
    loss = library.extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> Squares:
        model.zero_grad(set_to_none=True)
        with library.backpack(extension):
            loss(model(case.inputs), case.labels).backward()
        return {name: getattr(p, attribute).detach().clone() for p, name in names.items()}

    model = library.extend(case.model)
    try:
        run()
    except NotImplementedError:
        model = library.extend(case.model, use_converter=True).eval()
    return clocked(run)


def nngeometry(case: Case) -> Timed:
    """Use nngeometry's PMatDiag with its own hooks."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader

    layers = LayerCollection.from_model(case.model)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        outputs = case.model(x)
        return torch.stack(
            [
                nll(case.likelihood, o[None], label[None])
                for o, label in zip(outputs, y, strict=True)
            ]
        )[:, None]

    def run() -> Squares:
        # One "example" of the loader is the whole batch, so the mean over examples is their sum.
        batches: Any = [(case.inputs.detach(), case.labels)]
        loader: Any = DataLoader(batches, batch_size=None)
        if case.estimator == "exact":
            flat = FIM(case.model, loader, PMatDiag, function=lambda x, y: case.model(x)).get_diag()
        else:
            backend = TorchHooksJacobianBackend(case.model, losses, layer_collection=layers)
            flat = PMatDiag(backend, examples=loader).get_diag()
        found = {}
        for name, start in layers.p_pos.items():
            for local, p in case.model.get_submodule(name).named_parameters(recurse=False):
                found[f"{name}.{local}"] = flat[start : start + p.numel()].view_as(p)
                start += p.numel()
        return found

    return clocked(run)


def opacus(case: Case) -> Timed:
    """Square the per-example gradients of Opacus."""
    from opacus import GradSampleModule

    names: dict[Any, str] = {p: name for name, p in case.model.named_parameters()}
    for module in case.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)  # Not supported, in eval mode either.
        else:  # Opacus records in training mode only; what drops out has no parameters.
            module.training = next(module.parameters(recurse=False), None) is not None
    model = GradSampleModule(case.model, loss_reduction="sum", strict=False)

    def run() -> Squares:
        model.zero_grad(set_to_none=True)
        nll(case.likelihood, model(case.inputs), case.labels).backward()
        found = {
            name: p.grad_sample.square().sum(0)
            for p, name in names.items()
            if getattr(p, "grad_sample", None) is not None
        }
        for p in names:
            p.grad_sample = None
        return found

    return clocked(run)


def asdl(case: Case) -> Timed:
    """Use ASDL's diagonal Fisher (`asdfghjkl` on PyPI; `asdl` there is something else)."""
    from asdl.fisher import FisherConfig, get_fisher_maker
    from asdl.grad_maker import LOSS_CROSS_ENTROPY
    from asdl.matrices import FISHER_EMP, FISHER_EXACT, SHAPE_DIAG

    exact = case.estimator == "exact"
    config = FisherConfig(
        fisher_type=FISHER_EXACT if exact else FISHER_EMP,
        fisher_shapes=[SHAPE_DIAG],
        loss_type=LOSS_CROSS_ENTROPY,
        data_size=1,
    )
    maker = get_fisher_maker(case.model, config)
    names = {p: name for name, p in case.model.named_parameters()}

    def run() -> Squares:
        case.model.zero_grad(set_to_none=True)
        outputs = maker.setup_model_call(case.model, case.inputs)
        if not exact:
            labels = case.labels
            if case.likelihood == "next-token-softmax":
                outputs, labels = outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            maker.setup_loss_call(nn.CrossEntropyLoss(reduction="sum"), outputs, labels)
        maker.forward_and_backward()
        found: Squares = {}
        for module in case.model.modules():
            diagonal = getattr(getattr(module, "fisher", None), "diag", None)
            for local, p in module.named_parameters(recurse=False):
                value = getattr(diagonal, local, None)
                if value is not None:  # It has no notion of tied parameters: one value per layer.
                    found[names[p]] = found.get(names[p], 0) + value.detach().view_as(p)
        return found

    return clocked(run)


def laplace(case: Case) -> Timed:
    """Use laplace-torch's curvlinops backend, a chunk at once: it stacks whole gradients.

    curvlinops 3.0.1 itself has matrix-vector products and random estimates of a diagonal only.
    """
    from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN

    exact = case.estimator == "exact"
    kind = CurvlinopsGGN if exact else CurvlinopsEF
    shapes = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    case = _for_cross_entropy(case)
    backend = kind(case.model, "classification")

    def run() -> Squares:
        pairs = zip(case.inputs.split(case.chunk), case.labels.split(case.chunk), strict=True)
        flat = sum(backend.diag(x, y, N=len(case.labels))[1] for x, y in pairs)
        values = flat.split([p.numel() for p in shapes.values()])
        return {
            name: value.view_as(p) for (name, p), value in zip(shapes.items(), values, strict=True)
        }

    return clocked(run)


def _for_cross_entropy(case: Case) -> Case:
    """Make torch's own cross entropy of outputs and labels the loss of every likelihood."""
    if case.likelihood == "softmax":
        return case
    return case._replace(model=_ClassesSecond(case.model), labels=case.labels[:, 1:])


class _ClassesSecond(nn.Module):
    """(B, T, C) as torch's cross entropy wants it, shifted for the next token: (B, C, T − 1)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)[:, :-1].movedim(-1, 1)


class Tool(NamedTuple):
    """A row of the table."""

    prepare: Callable[[Case], Timed]
    title: str
    distribution: str = "torch"
    fisher: bool = True  # whether it gives squares at all
    exact: bool = True  # whether it takes the expectation over the outcomes


TOOLS = {
    "training": Tool(training_pass, "forward + backward", fisher=False),
    "forward": Tool(forward_only, "forward only", fisher=False),
    "inputs": Tool(input_gradients, "forward + input gradients", fisher=False),
    "ours": Tool(ours, "**consolidate**"),
    "kernel": Tool(ours_with_kernel, "**consolidate, with `--kernel`**"),
    "blocks": Tool(ours_with_blocks, "consolidate, structure `inputs`"),
    "alone": Tool(ours_alone, "consolidate, a pass of one batch, checks included"),
    "loop": Tool(one_by_one, "batch-of-one loop"),
    "vmap": Tool(vmap, "vmap(grad), chunked"),
    "backpack": Tool(backpack, "BackPACK", "backpack-for-pytorch"),
    "nngeometry": Tool(nngeometry, "nngeometry PMatDiag", "nngeometry"),
    "opacus": Tool(opacus, "Opacus, then square", "opacus", exact=False),
    "asdl": Tool(asdl, "ASDL", "asdfghjkl"),
    "laplace": Tool(laplace, "laplace, curvlinops backend", "laplace-torch"),
}
