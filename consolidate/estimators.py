"""The Fisher diagonal of any torch module: per example, squared per example.

    F = (1/units) Σ_x E_y[(∇_θ log p(y|x, θ))²]

The four estimators differ only in which vectors are sent back through the network and in whether an
example or a batch is what gets squared.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consolidate import layer_rules
from consolidate.likelihood import IGNORED, Likelihood, get_likelihood
from consolidate.uniforms import uniforms
from formats.errors import InputError, NonFiniteError, UsageError

ESTIMATORS = ("exact", "mc", "empirical", "batched")


class FisherDiagonal(dict[str, Tensor]):
    """The Fisher diagonal by parameter name, in the parameters' shapes, with its counts beside it.

    Attributes:
        examples: How many examples were read.
        units: How many units the sum was divided by: examples, or predicted tokens.
        estimator: One of ESTIMATORS.
        mc_samples: Sampled outcomes per example; None where nothing is sampled.
        seed: The seed of the sampled outcomes.
        unreached: Names of parameters that no output depended on; their Fisher is zero.
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
    ):
        super().__init__(tensors)
        self.examples = examples
        self.units = units
        self.estimator = estimator
        self.mc_samples = mc_samples
        self.seed = seed
        self.unreached = unreached

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
) -> FisherDiagonal:
    """Measure F = (1/units) Σ_x E_y[(∇_θ log p(y|x, θ))²] for every trainable parameter.

    The model is used in eval mode and comes back bit for bit: modes, buffers and gradients. Only
    `batched` depends on how the examples were cut into batches. Layers with a rule of their own
    (`layer_rules`) take a batch at once, where that agrees with single examples; everything else
    takes one example after the other.

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

    def scores(outputs: Tensor, batch: _Batch) -> Iterator[Tensor]:
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

    def run(batch: _Batch) -> tuple[Tensor, Iterator[Tensor]]:
        outputs = model_outputs(model, batch.inputs, batch.labels)
        _check_outputs(outputs, batch.number)
        likelihood.check_labels(outputs.detach(), batch.labels)
        return outputs, scores(outputs.detach(), batch)

    reached: set[str] = set()
    trusted: dict[str, nn.Parameter] | None = None
    examples = units = 0
    with _measuring(model):
        totals, sums = _zeros(parameters, accumulate_dtype), _zeros(parameters, accumulate_dtype)
        for number, (inputs, labels) in enumerate(map(split_batch, batches), start=1):
            if not (size := len(labels)):
                continue
            read = range(examples, examples + size)
            if indices is not None and len(indices) < read.stop:
                raise InputError(f"{len(indices)} indices were given for {read.stop} examples.")
            numbers = torch.tensor([i if indices is None else indices[i] for i in read])
            batch = _Batch(number, *to_model(model, inputs, labels), numbers)
            if estimator == "batched":
                reached |= _add_gradients(sums, parameters, *run(batch))
            else:
                if trusted is None and size > 1:
                    trusted = _trusted(model, parameters, accumulate_dtype, batch, run)
                reached |= _add_examples(model, sums, parameters, trusted or {}, batch, run)
            for name, total in totals.items():
                _fold(total, sums[name])
                if not total.isfinite().all():
                    raise NonFiniteError(
                        f"The gradient of {name!r} is not finite in batch {number} (examples "
                        f"{read[0]} to {read[-1]}): look for infinite weights or inputs, or use a "
                        "wider dtype."
                    )
            units += int(likelihood.units(batch.labels).sum())
            examples += size
            if progress is not None:
                progress(size)
    if examples == 0:
        raise InputError("There is no example to measure the Fisher on: the batches are empty.")
    if units == 0:
        raise InputError(f"None of the {examples} examples has a position that is predicted.")
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
    )


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Return the inputs and labels of a batch: a pair, or a mapping with "labels".

    Raises:
        InputError: If it is neither, or its labels are not a tensor with a row per example.
    """
    inputs: Any
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise InputError(f'A batch has no "labels"; it has {", ".join(map(str, batch))}.')
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch["labels"]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
    else:
        raise InputError(
            'A batch is a pair (inputs, labels) or a mapping with "labels", '
            f"found {type(batch).__name__}."
        )
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        raise InputError(
            "The labels of a batch are a tensor with one row per example, "
            f"found {type(labels).__name__}."
        )
    return inputs, labels


def to_model(model: nn.Module, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
    """Move a batch to where the model's parameters are.

    Args:
        model: Gives the device, and the type of floating-point inputs if its parameters share one.
        inputs: A tensor, or tensors inside tuples, lists and mappings.
        labels: The labels of the same examples.

    Returns:
        The inputs, in the same structure, and the labels.
    """
    device = next(model.parameters()).device
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}

    def place(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and len(dtypes) == 1:
            return tensor.to(device, next(iter(dtypes)))
        return tensor.to(device)

    return _map(place, inputs), labels.to(device)


def model_outputs(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
    """Return what the likelihood is computed from: the model's output tensor, or its `logits`.

    The model never sees the labels, except that an encoder-decoder's inputs are made from them
    where they are not given.

    Args:
        model: Any module.
        inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments.
        labels: The labels of the same examples.

    Returns:
        The outputs, (B, …) floating point, attached to the graph.

    Raises:
        InputError: If the model gives neither a tensor nor something with `logits`.
    """
    if isinstance(inputs, Mapping):
        outputs = model(**_with_decoder_inputs(model, inputs, labels))
    elif isinstance(inputs, tuple | list):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits", outputs)
    elif not isinstance(outputs, Tensor):
        outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"The model returned {type(outputs).__name__}; expected a tensor, or `logits` in it."
        )
    return outputs


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


class _Batch(NamedTuple):
    """Examples on the model's device, with their indices in the data set."""

    number: int
    inputs: Any
    labels: Tensor
    indices: Tensor

    def example(self, i: int) -> "_Batch":
        """Return a batch of example i alone."""
        row, size = slice(i, i + 1), len(self.labels)
        inputs = _take(self.inputs, row, size)
        return _Batch(self.number, inputs, self.labels[row], self.indices[row])


_Run = Callable[[_Batch], tuple[Tensor, Iterator[Tensor]]]
"""From a batch to the model's outputs and the vectors to send back, each like outputs."""


def _add_examples(
    model: nn.Module,
    sums: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    trusted: dict[str, nn.Parameter],
    batch: _Batch,
    run: _Run,
) -> set[str]:
    """Add Σ_examples Σ_vectors (Jᵀ vector)² to sums; return the names that outputs depend on.

    The trusted parameters go by layer rules, all at once; the rest by one example after the other.
    """
    done: set[str] = set()
    reached: set[str] = set()
    if trusted:
        with layer_rules.recorded(model, trusted, len(batch.labels)) as calls:
            outputs, vectors = run(batch)
        done, reached = layer_rules.add_squares(sums, calls, outputs, vectors)
        del calls, outputs, vectors  # The graph of a whole batch, before others are made.
    if rest := {name: p for name, p in parameters.items() if name not in done}:
        for example in range(len(batch.labels)):
            reached |= _add_gradients(sums, rest, *run(batch.example(example)))
    return reached


def _add_gradients(
    sums: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    outputs: Tensor,
    vectors: Iterator[Tensor],
) -> set[str]:
    """Add Σ_vectors (Jᵀ vector)² to sums; return the names that outputs depend on."""
    reached = set()
    for vector in vectors:
        gradients = torch.autograd.grad(
            outputs, list(parameters.values()), vector, retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                gradient = gradient.to_dense().to(sums[name].dtype)
                sums[name].addcmul_(gradient, gradient)
                reached.add(name)
    return reached


def _trusted(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    dtype: torch.dtype,
    batch: _Batch,
    run: _Run,
) -> dict[str, nn.Parameter]:
    """Return the parameters for which layer rules agree with single examples.

    The whole batch goes through the rules with all scores but those of its first and last example
    set to zero; what comes out is held against those two run alone. Squares tell what sums over
    the batch do not: rows that were taken for another example's, as in time-first layouts.
    """
    if not (candidates := layer_rules.covered(model, parameters)):
        return {}
    by_rules, alone = _zeros(candidates, dtype), _zeros(candidates, dtype)
    size = len(batch.labels)
    try:
        with layer_rules.recorded(model, candidates, size) as calls:
            outputs, vectors = run(batch)
        kept = torch.zeros(size, *[1] * (outputs.ndim - 1), dtype=torch.bool, device=outputs.device)
        kept[[0, -1]] = True
        masked = (vector * kept for vector in vectors)
        done, _ = layer_rules.add_squares(by_rules, calls, outputs, masked)
    except (RuntimeError, InputError):
        return {}  # Not a model that takes several examples; one alone may still go through.
    for example in (0, size - 1):
        _add_gradients(alone, candidates, *run(batch.example(example)))
    largest = max((alone[name].max().item() for name in done), default=0.0)

    def agree(name: str) -> bool:
        eps = torch.finfo(candidates[name].dtype).eps
        # The floor is for gradients that are nothing but rounding, as of a key's bias.
        tolerance = eps**0.5 * alone[name].max().item() + 100 * eps**2 * largest
        return (by_rules[name] - alone[name]).abs().max().item() <= tolerance

    return {name: candidates[name] for name in candidates if name in done and agree(name)}


def _zeros(parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: torch.zeros(p.shape, dtype=dtype, device=p.device) for n, p in parameters.items()}


def _fold(total: Tensor, part: Tensor) -> None:
    """Move part into total; what rounding takes stays in part, for the next time (Kahan)."""
    new = total + part
    part.sub_(new - total)
    total.copy_(new)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode with gradients on; modes and buffers come back bit for bit."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    copies = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
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
    if not outputs.requires_grad:
        raise InputError("The model's outputs do not depend on any parameter that is trained.")
    if not outputs.isfinite().all():
        raise NonFiniteError(
            f"The model's outputs are not finite in batch {batch}: look for NaN or infinite "
            "weights or inputs, or use a wider dtype."
        )


def _take(inputs: Any, rows: slice, size: int) -> Any:
    """Return those rows of every tensor that has one row for each of the batch's examples."""

    def take(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or (tensor.shape[0] == 1 and size != 1):
            return tensor
        if tensor.shape[0] != size:
            raise InputError(
                f"An input has shape {tuple(tensor.shape)} in a batch of {size} labels: its first "
                "size must be the number of examples, or 1 where they share it."
            )
        return tensor[rows]

    return _map(take, inputs)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply function to every tensor inside mappings, tuples and lists."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(function, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_map(function, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _with_decoder_inputs(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
    """Give an encoder-decoder the labels, one to the right, as its decoder's inputs."""
    given = any(
        inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")
    )
    config = getattr(model, "config", None)
    if given or labels.ndim != 2 or not getattr(config, "is_encoder_decoder", False):
        return dict(inputs)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    else:
        start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], 1)
        shifted = shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)
    return {**inputs, "decoder_input_ids": shifted}
