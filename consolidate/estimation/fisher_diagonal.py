"""The Fisher diagonal of any torch module: per example, squared per example.

    F = (1/units) Σ_x E_y[(∇_θ log p(y|x, θ))²]

The four estimators differ only in which vectors are sent back through the network, which
`score_vectors` lists, and in whether an example or a batch is what gets squared.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from consolidate.estimation.batches import Batch, eval_mode, model_outputs, split_batch
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.estimation.gradient_checkpointing import checkpointing_in_eval_mode
from consolidate.estimation.gradient_methods import method_of
from consolidate.estimation.likelihoods import Likelihood, get_likelihood
from consolidate.estimation.passes import PartialPass, Pass, Scores
from consolidate.estimation.sharded_passes import ShardedPass
from consolidate.runtime.distributed import place_in, rounds, summed
from consolidate.runtime.randomness import uniforms
from consolidate.runtime.shards import is_sharded
from formats.errors import InputError, NonFiniteError, UsageError

ESTIMATORS = ("exact", "mc", "empirical", "batched")

LEAST_EXAMPLES = 64
"""No pass is ended by a tolerance before so many examples: few show too little of their spread."""


class Estimator(NamedTuple):
    """One of ESTIMATORS, with the options of `fisher_diagonal` that are for it."""

    name: str
    samples: int | None  # outcomes sampled for each example; None where none are
    seed: int
    max_outcomes: int


def score_vectors(
    estimator: Estimator, likelihood: Likelihood, outputs: Tensor, batch: Batch
) -> Iterator[Tensor]:
    """Yield the gradients of log p at the outputs whose squares, sent back, make the Fisher.

    Those of `batched` are summed over the batch before they are squared.

    Args:
        estimator: Which one is measured.
        likelihood: log p.
        outputs: Of the model for the batch, (B, …), detached.
        batch: B examples.
    """
    labels = batch.labels
    likelihood.check_labels(outputs, labels)
    match estimator.name:
        case "exact":
            if (outcomes := likelihood.outcomes(outputs, labels)) > estimator.max_outcomes:
                raise UsageError(
                    f"The exact Fisher would take {outcomes} backward passes per example, more "
                    f"than {estimator.max_outcomes}: use the estimator mc, or raise the limit."
                )
            yield from likelihood.exact_scores(outputs, labels)
        case "empirical":
            yield likelihood.observed_scores(outputs, labels)
        case "mc" | "batched":
            examples, draws = torch.as_tensor(batch.indices), likelihood.draws(outputs)
            for sample in range(estimator.samples or 0):
                drawn = uniforms(estimator.seed, examples, draws, sample)
                yield likelihood.sampled_scores(outputs, labels, drawn)


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
    tolerance: float | None = None,
    start: PartialPass | None = None,
    keep: Callable[[PartialPass], None] | None = None,
    note: Callable[[str], None] | None = None,
    group: ProcessGroup | None = None,
) -> FisherDiagonal:
    """Measure F = (1/units) Σ_x E_y[(∇_θ log p(y|x, θ))²] for every trainable parameter.

    The model is used in eval mode and comes back bit for bit: modes, buffers and gradients. Only
    `batched` depends on how the examples were cut into batches. Layers with a rule of their own
    (`layer_rules`) take a batch at once; other modules are run again alone, and what is left takes
    one example after the other. What the first batch does not prove right goes the slower way. A
    batch that the memory does not suffice for is taken in halves.

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
        tolerance: End the pass once each of the `relative_errors` is at most this, after
            LEAST_EXAMPLES at the earliest; the batches should come in random order.
        start: Where to go on. The batches are the same again; those that it has are only read.
        keep: Called now and then with what `start` takes, valid until it returns.
        note: Takes what should be known at once, such as that the memory does not suffice.
        group: Processes that the batches were dealt to, one by one in turn (`dealt`). Each is given
            its own, with their indices, and gets the Fisher of all. With a tolerance they are asked
            before each round of batches, not before each batch. A model in shards goes one example
            after the other, each process is given its part by `keep`, all at the same time, `check`
            does nothing, and the first process alone is given the tensors.

    Returns:
        The Fisher diagonal and its counts.

    Raises:
        UsageError: If an option is unknown or out of range, or `exact` has too many outcomes.
        InputError: If there is no example, nothing to differentiate, a batch does not fit the
            model, or the memory does not suffice for a single example.
        NonFiniteError: If outputs or gradients are not finite, naming parameter and batch.
    """
    likelihood = get_likelihood(likelihood)
    _check_options(estimator, mc_samples, tolerance, accumulate_dtype)
    samples = mc_samples if estimator in ("mc", "batched") else None
    method = Estimator(estimator, samples, seed, max_outcomes)
    parameters = _measurable(model)
    scores = Scores(
        partial(_finite_outputs, model),
        partial(score_vectors, method, likelihood),
        likelihood.units,
        whole=estimator == "batched",
    )
    sharded = is_sharded(model)
    prepare = partial(ShardedPass if sharded else Pass, model, parameters, scores, accumulate_dtype)
    with (
        _measuring(model),
        closing(prepare(check=check, note=note, start=start, group=group)) as measured,
    ):
        done, seen = measured.examples, 0
        for batch, all_have_one in rounds(
            _numbered(batches, indices, group), group if sharded or tolerance is not None else None
        ):
            # Before a batch, not after it, so that a resumed pass ends where it would have.
            if tolerance is not None and _is_settled(measured, tolerance, seen < done, group):
                break
            if batch is None:
                measured.wait()
                continue
            first, seen = seen, seen + len(batch)
            if seen <= done:
                measured.see(batch)
                continue
            if first < done:
                batch = batch.rows(done - first, len(batch))
            measured.take(batch, keep if all_have_one or not sharded else None)
            if progress is not None:
                progress(len(batch))
        measured.sum_over_processes()
    return _result(measured, method, parameters)


def _check_options(
    estimator: str, mc_samples: int, tolerance: float | None, accumulate_dtype: torch.dtype
) -> None:
    if estimator not in ESTIMATORS:
        raise UsageError(f"No estimator is named {estimator!r}; there are {', '.join(ESTIMATORS)}.")
    if mc_samples < 1:
        raise UsageError(f"mc_samples is {mc_samples}; at least 1 outcome must be sampled.")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise UsageError(f"tolerance is {tolerance}; it must be finite and above 0.")
    if accumulate_dtype not in (torch.float32, torch.float64):
        raise UsageError(f"accumulate_dtype is {accumulate_dtype}; it is float32 or float64.")


def _measurable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients; refuse a model that has no Fisher."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{name or 'the model'!r} is a torch.jit.ScriptModule, whose layers cannot be "
                "looked into: give the module that it was compiled from."
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(
                f"{name!r} ({type(module).__name__}) keeps no running statistics and normalises by "
                "those of the batch, so no example has a gradient of its own."
            )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise InputError("The model has no parameter that requires gradients: nothing to measure.")
    if complex_ones := [name for name, p in parameters.items() if p.is_complex()]:
        raise InputError(
            f"The parameter {complex_ones[0]!r} is complex, and its Fisher would be a matrix: hold "
            "its real and imaginary part as two parameters, or leave it out."
        )
    return parameters


def _finite_outputs(model: nn.Module, batch: Batch) -> Tensor:
    outputs = model_outputs(model, batch.inputs, batch.labels)
    if not math.isfinite(outputs.detach().sum()) and not outputs.isfinite().all():
        raise NonFiniteError(
            f"The model's outputs are not finite in batch {batch.number}: look for NaN or infinite "
            "weights or inputs, or use a wider dtype."
        )
    return outputs


def _result(
    measured: Pass, estimator: Estimator, parameters: dict[str, nn.Parameter]
) -> FisherDiagonal:
    """Divide the sums of a pass that is over, and say what they were made of."""
    if measured.accumulators is None or measured.examples == 0:
        raise InputError("There is no example to measure the Fisher on: the batches are empty.")
    counts = measured.accumulators.counts
    if counts.units == 0:
        raise InputError(
            f"None of the {counts.examples} examples has a position that is predicted."
        )
    if not counts.reached:
        raise InputError("The model's outputs do not depend on any parameter that is trained.")
    levels = measured.levels or {}
    return FisherDiagonal(
        measured.means(counts.units * (estimator.samples or 1)),
        examples=counts.examples,
        units=counts.units,
        estimator=estimator.name,
        mc_samples=estimator.samples,
        seed=estimator.seed,
        unreached=[name for name in parameters if name not in counts.reached],
        methods={
            name: method_of(levels.get(name, "loop"))
            for name in parameters
            if name in counts.reached and estimator.name != "batched"
        },
        relative_errors=measured.relative_errors(),
    )


def _is_settled(measured: Pass, tolerance: float, behind: bool, group: ProcessGroup | None) -> bool:
    """Say whether every trace is certain enough, alike in every process.

    `behind` says that this one still reads what the pass had before: it would have ended there.
    """
    measured.count()
    any_behind, examples = summed(group, behind, measured.examples)
    if any_behind or examples < LEAST_EXAMPLES:
        return False
    errors = measured.relative_errors(group)
    return bool(errors) and max(errors.values()) <= tolerance


def _numbered(
    batches: Iterable[Any], indices: Sequence[int] | None, group: ProcessGroup | None
) -> Iterator[Batch]:
    """Yield the batches that are not empty, with their places in the order of reading."""
    process, processes = place_in(group)
    first = width = 0
    for round_, (inputs, labels) in enumerate(map(split_batch, batches)):
        if not (size := labels.shape[0]):
            continue
        last = first + size
        if indices is not None and len(indices) < last:
            raise InputError(f"{len(indices)} indices were given for {last} examples.")
        numbers = range(first, last) if indices is None else indices[first:last]
        width = width or size
        others = round_ * (processes - 1) + process  # batches that they have read before this one
        number = 1 + round_ + others
        yield Batch(number, first + others * width, inputs, labels, numbers)
        first = last


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode with its parameters' gradients off, others' on.

    Products of float32 are float32's: rounded to TF32 or bfloat16 a batch would not agree with its
    single examples. Modes, buffers, precisions and what requires gradients come back bit for bit.
    """
    settings: list[tuple[Any, str, Any]]
    settings = [(product, "fp32_precision", "ieee") for product in _products()]
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        settings.append((config, "use_cache", False))  # It would change when a layer runs again.
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    trained = [p for p in model.parameters() if p.requires_grad]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    # An embedding with max_norm changes its weight when it is called.
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    changing: list[Tensor] = [m.weight for m in tables if m.max_norm is not None]
    kept: list[Tensor] = [*model.buffers(), *changing]
    copies = [(tensor, tensor.detach().clone()) for tensor in kept]
    try:
        model.requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(False)  # It would leave the layers out.
        for owner, name, value in settings:
            setattr(owner, name, value)
        with (
            eval_mode(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            checkpointing_in_eval_mode(model),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for owner, name, value in before:
            setattr(owner, name, value)
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, tensors in buffers:
            module._buffers.clear()
            module._buffers.update(tensors)
        for buffer, copy in copies:
            if not torch.equal(buffer, copy):
                with torch.no_grad():
                    buffer.copy_(copy)


def _products() -> list[Any]:
    """Return torch's settings of how products of float32 are taken; none are known before 2.9."""
    backends = torch.backends
    kinds = [(backends.cuda, "matmul"), (backends.mkldnn, "matmul")]
    kinds += [(of, kind) for of in (backends.cudnn, backends.mkldnn) for kind in ("conv", "rnn")]
    found = [getattr(of, kind, None) for of, kind in kinds]
    return [one for one in found if hasattr(one, "fp32_precision")]
