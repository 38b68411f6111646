"""The Fisher diagonal of any torch module: per example, squared per example.

    F = (1/units) Σ_x E_y[(∇_θ log p(y|x, θ))²]

The four estimators differ only in which vectors are sent back through the network and in whether an
example or a batch is what gets squared.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.batches import Batch, model_outputs, split_batch, to_model
from consolidate.layer_calls import add_squares, recorded
from consolidate.likelihood import Likelihood, get_likelihood
from consolidate.methods import Plan, add_gradients, choose_methods, requiring_gradients
from consolidate.uniforms import uniforms
from formats.errors import InputError, NonFiniteError, UsageError

ESTIMATORS = ("exact", "mc", "empirical", "batched")

FOLDED_BATCHES, FOLDED_EXAMPLES = 16, 512
"""After so many batches or examples what was added goes to the sums that keep rounding errors."""


class FisherDiagonal(dict[str, Tensor]):
    """The Fisher diagonal by parameter name, in the parameters' shapes, with its counts beside it.

    Attributes:
        examples: How many examples were read.
        units: How many units the sum was divided by: examples, or predicted tokens.
        estimator: One of ESTIMATORS.
        mc_samples: Sampled outcomes per example; None where nothing is sampled.
        seed: The seed of the sampled outcomes.
        unreached: Names of parameters that no output depended on; their Fisher is zero.
        methods: How the per-example gradients of each of the others were had, one of METHODS;
            empty for `batched`.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        examples: int,
        units: int,
        estimator: str,
        mc_samples: int | None,
        seed: int,
        unreached: list[str],
        methods: dict[str, str],
    ):
        super().__init__(tensors)
        self.examples = examples
        self.units = units
        self.estimator = estimator
        self.mc_samples = mc_samples
        self.seed = seed
        self.unreached = unreached
        self.methods = methods

    def trace(self) -> dict[str, float]:
        """Return the sum of each tensor, by parameter name."""
        return {name: tensor.cpu().sum(dtype=torch.float64).item() for name, tensor in self.items()}


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    likelihood: str | Likelihood,
    *,
    estimator: str = "exact",
    mc_samples: int = 1,
    seed: int = 0,
    max_outcomes: int = 4096,
    accumulate_dtype: torch.dtype = torch.float32,
    indices: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
    check: bool = False,
) -> FisherDiagonal:
    """Measure F = (1/units) Σ_x E_y[(∇_θ log p(y|x, θ))²] for every trainable parameter.

    The model is used in eval mode and comes back bit for bit: modes, buffers and gradients. Only
    `batched` depends on how the examples were cut into batches. Layers with a rule of their own
    (`layer_rules`) take a batch at once; other modules are run again alone, and what is left takes
    one example after the other. What the first batch does not prove right goes the slower way.

    Args:
        model: Any module; its output is a tensor or has `logits`. Names are those of
            `named_parameters()`, so tied parameters appear once; those that do not require
            gradients are skipped.
        batches: Pairs (inputs, labels), or mappings with "labels". Inputs are a tensor, a tuple of
            positional or a mapping of keyword arguments. Tensors hold one example per row; what
            has a first size of 1 or is no tensor is shared by all examples of its batch.
        likelihood: A name in LIKELIHOODS, or an object with those methods.
        estimator: `exact` takes the expectation over y in closed form; `mc` samples y from the
            model; `empirical` takes the data's labels; `batched` samples y and squares the sum over
            each batch, Σ_batches (Σ_{x∈batch} ∇ log p)²: unbiased, one backward pass a batch.
        mc_samples: Sampled outcomes per example, for `mc` and `batched`.
        seed: Seed of the sampled outcomes, which depend on it, on the example's index and on the
            position alone.
        max_outcomes: `exact` is refused above this many outcomes per example.
        accumulate_dtype: Type of the result and of the sums behind it.
        indices: Index of each example in its data set, in reading order; by default 0, 1, 2 …
        progress: Called after each batch with the number of its examples.
        check: Whether every batch is held against single examples and autograd, not only the first.

    Returns:
        The Fisher diagonal and its counts.

    Raises:
        UsageError: If an option is unknown or out of range, or `exact` has too many outcomes.
        InputError: If there is no example, nothing to differentiate, or a batch does not fit.
        NonFiniteError: If outputs or gradients are not finite, naming parameter and batch.
    """
    likelihood = get_likelihood(likelihood)
    if estimator not in ESTIMATORS:
        raise UsageError(f"No estimator is named {estimator!r}; there are {', '.join(ESTIMATORS)}.")
    if mc_samples < 1:
        raise UsageError(f"mc_samples is {mc_samples}; at least 1 outcome must be sampled.")
    _refuse_batch_statistics(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise InputError("The model has no parameter that requires gradients: nothing to measure.")

    def scores(outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        if estimator == "exact":
            outcomes = likelihood.outcomes(outputs, batch.labels)
            if outcomes > max_outcomes:
                raise UsageError(
                    f"The exact Fisher would take {outcomes} backward passes per example, more "
                    f"than {max_outcomes}: use the estimator mc, or raise the limit."
                )
            yield from likelihood.exact_scores(outputs, batch.labels)
        elif estimator == "empirical":
            yield likelihood.observed_scores(outputs, batch.labels)
        else:
            for sample in range(mc_samples):
                drawn = uniforms(seed, batch.indices, likelihood.draws(outputs), sample)
                yield likelihood.sampled_scores(outputs, batch.labels, drawn)

    def forward(batch: Batch) -> Tensor:
        outputs = model_outputs(model, batch.inputs, batch.labels)
        _check_outputs(outputs, batch.number)
        return outputs

    def run(batch: Batch) -> tuple[Tensor, Iterator[Tensor]]:
        outputs = forward(batch)
        likelihood.check_labels(outputs.detach(), batch.labels)
        return outputs, scores(outputs.detach(), batch)

    reached: set[str] = set()
    plan: Plan | None = None
    examples = units = pending = 0
    with _measuring(model):
        totals: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for number, (inputs, labels) in enumerate(map(split_batch, batches), start=1):
            if not (size := len(labels)):
                continue
            read = range(examples, examples + size)
            if indices is not None and len(indices) < read.stop:
                raise InputError(f"{len(indices)} indices were given for {read.stop} examples.")
            numbers = torch.tensor([i if indices is None else indices[i] for i in read])
            batch = Batch(number, *to_model(model, inputs, labels), numbers)
            if estimator != "batched" and size > 1 and (plan is None or check):
                levels = None if plan is None else plan.levels
                plan = choose_methods(model, parameters, batch, forward, accumulate_dtype, levels)
            if not sums:  # After the check, which takes as much memory.
                totals = _zeros(parameters, accumulate_dtype)
                sums = _zeros(parameters, accumulate_dtype)
            if estimator == "batched":
                with requiring_gradients(parameters):
                    reached |= add_gradients(sums, parameters, *run(batch))
            else:
                reached |= _add_examples(sums, parameters, plan, batch, run)
            for name, part in sums.items():
                if not part.sum().isfinite() and not part.isfinite().all():
                    raise NonFiniteError(
                        f"The gradient of {name!r} is not finite in batch {number} (examples "
                        f"{read[0]} to {read[-1]}): look for infinite weights or inputs, or use a "
                        "wider dtype."
                    )
            pending += 1
            if pending == FOLDED_BATCHES or pending * size >= FOLDED_EXAMPLES:
                _fold(totals, sums)
                pending = 0
            units += int(likelihood.units(batch.labels).sum())
            examples += size
            if progress is not None:
                progress(size)
        _fold(totals, sums)
    if examples == 0:
        raise InputError("There is no example to measure the Fisher on: the batches are empty.")
    if units == 0:
        raise InputError(f"None of the {examples} examples has a position that is predicted.")
    if not reached:
        raise InputError("The model's outputs do not depend on any parameter that is trained.")
    sampled = estimator in ("mc", "batched")
    divisor = units * mc_samples if sampled else units
    return FisherDiagonal(
        {name: total.div_(divisor) for name, total in totals.items()},
        examples=examples,
        units=units,
        estimator=estimator,
        mc_samples=mc_samples if sampled else None,
        seed=seed,
        unreached=[name for name in parameters if name not in reached],
        methods={}
        if estimator == "batched"
        else {
            name: "loop" if plan is None else plan.methods.get(name, "loop")
            for name in parameters
            if name in reached
        },
    )


def fisher_overlap(a: Tensor, b: Tensor) -> float:
    """Return Σ √(â b̂), â and b̂ scaled to unit trace: 1 − ½‖√â − √b̂‖², Kirkpatrick et al. 2017.

    Args:
        a: The Fisher diagonal of one task, any shape.
        b: That of another task, the same shape.

    Returns:
        Between 0 (disjoint) and 1 (equal up to scale); 0 where either is zero everywhere.
    """
    a, b = a.cpu(), b.cpu()
    traces = a.sum(dtype=torch.float64).item() * b.sum(dtype=torch.float64).item()
    shared = (a.sqrt() * b.sqrt()).sum(dtype=torch.float64).item()
    return min(shared / traces**0.5, 1.0) if traces > 0 else 0.0


_Run = Callable[[Batch], tuple[Tensor, Iterator[Tensor]]]
"""From a batch to the model's outputs and the vectors to send back, each like outputs."""


def _add_examples(
    sums: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    plan: Plan | None,
    batch: Batch,
    run: _Run,
) -> set[str]:
    """Add Σ_examples Σ_vectors (Jᵀ vector)² to sums; return the names that outputs depend on.

    What is marked in the plan goes all at once; the rest by one example after the other.
    """
    size = len(batch.labels)
    rest = parameters
    reached: set[str] = set()
    if plan is not None and plan.units:
        rest = {n: p for n, p in parameters.items() if plan.levels.get(n) == "loop"}
        # Those that the first batch did not depend on are watched: this one might.
        others = {n: p for n, p in parameters.items() if n not in plan.levels}
        dtype = next(iter(sums.values())).dtype
        with (
            requiring_gradients(others),
            recorded(plan.units, size, batch.labels.device, dtype) as recording,
        ):
            outputs, vectors = run(batch)
            rest |= {n: others[n] for n in _dependencies(outputs, others)}
            rest |= {n: parameters[n] for n in recording.unfit}
            if outputs.requires_grad:
                reached |= add_squares(sums, recording, outputs, vectors)
            del outputs, vectors  # The graph of a whole batch, before others are made.
    with requiring_gradients(rest):
        for example in range(size) if rest else ():
            reached |= add_gradients(sums, rest, *run(batch.example(example)))
    return reached


def _dependencies(outputs: Tensor, parameters: dict[str, nn.Parameter]) -> list[str]:
    """Return the names of the parameters that outputs depend on."""
    if not parameters or not outputs.requires_grad:
        return []
    gradients = torch.autograd.grad(
        outputs,
        list(parameters.values()),
        torch.zeros_like(outputs),
        retain_graph=True,
        allow_unused=True,
    )
    return [name for name, g in zip(parameters, gradients, strict=True) if g is not None]


def _zeros(parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: torch.zeros(p.shape, dtype=dtype, device=p.device) for n, p in parameters.items()}


def _fold(totals: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
    """Move sums into totals; what rounding takes stays in sums, for the next time (Kahan)."""
    for name, total in totals.items():
        new = total + sums[name]
        sums[name] -= new - total
        total.copy_(new)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode with its parameters' gradients off, others' on.

    Modes, buffers and what requires gradients come back bit for bit.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", False)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    copies = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        model.eval()
        model.requires_grad_(False)
        if use_cache:
            config.use_cache = False  # A cache that is kept is changed when a layer runs again.
        torch.backends.mha.set_fastpath_enabled(False)  # It would leave the layers out.
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        if use_cache:
            config.use_cache = use_cache
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
        for module, tensors in buffers:
            module._buffers.clear()
            module._buffers.update(tensors)
        for buffer, copy in copies:
            if not torch.equal(buffer, copy):
                with torch.no_grad():
                    buffer.copy_(copy)


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(
                f"{name!r} ({type(module).__name__}) keeps no running statistics and normalises by "
                "those of the batch, so no example has a gradient of its own."
            )


def _check_outputs(outputs: Tensor, batch: int) -> None:
    if not outputs.isfinite().all():
        raise NonFiniteError(
            f"The model's outputs are not finite in batch {batch}: look for NaN or infinite "
            "weights or inputs, or use a wider dtype."
        )
