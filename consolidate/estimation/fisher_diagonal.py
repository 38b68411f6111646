"""The Fisher diagonal of any torch module: per example, squared per example.

    F = (1/units) Σ_x E_y[(∇_θ log p(y|x, θ))²]

The four estimators differ only in the vectors that are backpropagated, which `score_vectors`
yields, and in whether gradients are squared per example or per batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_backend_config
from torch.distributed.tensor import DTensor

from consolidate.estimation.batches import Batch, eval_mode, model_outputs, place_of, split_batch
from consolidate.estimation.covered_layers import covered_layers
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.estimation.gradient_checkpointing import checkpointing_in_eval_mode
from consolidate.estimation.gradient_methods import method_of
from consolidate.estimation.input_blocks import InputBlock
from consolidate.estimation.likelihoods import Likelihood, get_likelihood
from consolidate.estimation.passes import PartialPass, Pass, Scores, where_in_data
from consolidate.estimation.sharded_passes import ShardedPass
from consolidate.estimation.squares_kernel import DEVICES, using_kernel
from consolidate.runtime.distributed import place_in, rounds, summed
from consolidate.runtime.randomness import uniforms
from consolidate.runtime.shards import is_sharded
from formats.errors import InputError, NonFiniteError, UsageError
from formats.fisher_json import ESTIMATORS, Block

STRUCTURES = ("diagonal", "inputs")

LEAST_EXAMPLES = 64
"""The examples before which no tolerance ends a pass: fewer show too little of their spread.

For `batched` these are batches.
"""


class Estimator(NamedTuple):
    """One of ESTIMATORS, with the options of `fisher_diagonal` that are for it."""

    name: str
    samples: int | None  # outcomes sampled for each example; None where none are
    seed: int
    max_outcomes: int


def score_vectors(
    estimator: Estimator, likelihood: Likelihood, outputs: Tensor, batch: Batch
) -> Iterator[Tensor]:
    """Yield vectors v at the outputs, (B, …), whose (Jᵀ v)² are summed to the Fisher.

    Those of `batched` are summed over the batch before they are squared.

    Args:
        estimator: The estimator and its options.
        likelihood: log p.
        outputs: The model's outputs for the batch, (B, …), detached.
        batch: B examples.

    Raises:
        UsageError: If `exact` has too many outcomes.
    """
    labels = batch.labels
    likelihood.check_labels(outputs, labels)
    match estimator.name:
        case "exact":
            most = likelihood.outcomes(outputs, labels)
            if most > estimator.max_outcomes:  # each alone, without what only others predict
                rows = range(len(labels))
                most = max(likelihood.outcomes(outputs[i : i + 1], labels[i : i + 1]) for i in rows)
            check_outcomes(most, estimator.max_outcomes)
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
    structure: str = "diagonal",
    mc_samples: int = 1,
    seed: int = 0,
    max_outcomes: int = 4096,
    accumulate_dtype: torch.dtype = torch.float32,
    indices: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
    check: bool = False,
    kernel: bool = False,
    tolerance: float | None = None,
    tolerance_every: int = 1,
    start: PartialPass | None = None,
    keep: Callable[[PartialPass], None] | None = None,
    note: Callable[[str], None] | None = None,
    group: ProcessGroup | None = None,
) -> FisherDiagonal:
    """Measure F = (1/units) Σ_x E_y[(∇_θ log p(y|x, θ))²] for every trainable parameter.

    The model is run in eval mode and is unchanged afterwards, bit for bit: modes, buffers and
    gradients. Only `batched` depends on how the examples were split into batches. Layers with a
    rule (`layer_rules`) process a batch at once, other modules are run again alone, and everything
    else falls back to one example at a time. The first batch is verified against single examples:
    parameters that fail use a slower method. A batch that runs out of memory is split in half.

    Args:
        model: Any module; its output is a tensor or has `logits`. Names are those of
            `named_parameters()`, so tied parameters appear once; those that do not require
            gradients are skipped.
        batches: Pairs (inputs, labels), or mappings with "labels". Inputs are a tensor, a tuple of
            positional or a mapping of keyword arguments. Tensors have one example per row; an input
            whose first size is 1, or that is not a tensor, is shared by all examples of its batch.
        likelihood: A name in LIKELIHOODS, or an object with those methods.
        estimator: `exact` computes the expectation over y in closed form; `mc` samples y from the
            model; `empirical` uses the data's labels; `batched` samples y and squares the sum over
            each batch, Σ_batches (Σ_{x∈batch} ∇ log p)²: unbiased, one backward pass per batch.
        structure: `inputs` also measures, for each linear or convolutional layer with the gradients
            J = Σ_t g_t [a_t, 1]ᵀ of one example, R = (1/units) Σ_x E_y[Jᵀ J] in `factors`, whose
            trace is the sum of F over weight and bias. Covered are layers without groups, whose
            weight is not tied, and where R has at most four times its elements. Not with `batched`
            or a sharded model.
        mc_samples: Sampled outcomes per example, for `mc` and `batched`.
        seed: Random seed of the sampled outcomes, which depend only on it, on the example's index
            and on the position.
        max_outcomes: The largest number of outcomes per example for `exact`.
        accumulate_dtype: Dtype of the result and of its sums, float32 or float64.
        indices: Index of each example in its dataset, in reading order; by default 0, 1, 2 …, but
            for several processes that sample labels, which need them.
        progress: Called after each batch with the number of its examples.
        check: Whether every batch is verified against single examples and autograd, not only the
            first.
        kernel: Whether squares are computed in a kernel that is compiled for this processor at its
            first use, for float32: in C for a CPU, kept in the user's cache, or in Triton for CUDA.
            Where that fails, `note` says so, and the pass continues without it.
        tolerance: End the pass once each of the `relative_errors` is at most this, after at least
            LEAST_EXAMPLES (of `batched`, batches); the batches should come in random order.
        tolerance_every: Compare with the tolerance after this many batches of each process. Within
            as many, examples may be sorted, such as by length.
        start: The pass to resume, with the same batches; those that it has added are only read.
        keep: Called at intervals with a value for `start`, which is valid until `keep` returns.
        note: Called with messages for the user, such as that memory ran out.
        group: Processes among which the batches were dealt, one by one in turn (`dealt`). Each is
            given its own batches, with their indices, and gets the Fisher of all. With a tolerance
            they agree before each round of batches, not before each batch. A sharded model
            processes one example at a time, every process gets its part by `keep`, all at the same
            time, `check` does nothing, and only the first process gets the tensors.

    Returns:
        The Fisher diagonal by parameter name, and its factors by block name, in
        `accumulate_dtype`, and its counts.

    Raises:
        UsageError: If an option is unknown or out of range, if the structure `inputs` cannot be
            measured, or if `exact` has too many outcomes.
        InputError: If there is no example or nothing to differentiate, if a batch does not fit the
            model, or if a single example runs out of memory.
        NonFiniteError: If outputs or gradients are not finite, naming parameter and batch.
    """
    likelihood = get_likelihood(likelihood)
    _check_options(estimator, structure, mc_samples, accumulate_dtype, kernel)
    _check_tolerance(tolerance, tolerance_every)
    _check_group(group, model, numbered=indices is not None or estimator in ("exact", "empirical"))
    samples = mc_samples if estimator in ("mc", "batched") else None
    method = Estimator(estimator, samples, seed, max_outcomes)
    parameters = measurable(model)
    scores = Scores(
        partial(_finite_outputs, model),
        partial(score_vectors, method, likelihood),
        likelihood.units,
        whole=estimator == "batched",
    )
    sharded = is_sharded(model)
    blocks = _blocks(model, parameters, sharded, note) if structure == "inputs" else {}
    prepare = partial(ShardedPass if sharded else Pass, model, parameters, scores, accumulate_dtype)
    wanted = kernel and _has_kernel(model, sharded, accumulate_dtype, note)
    with (
        _measuring(model),
        using_kernel(place_of(model).device, note) if wanted else nullcontext(),
        closing(
            prepare(check=check, note=note, start=start, group=group, blocks=blocks)
        ) as measured,
    ):
        done, seen = measured.examples, 0
        in_step = group if sharded or tolerance is not None else None
        numbered = _numbered(batches, indices, group)
        for round_, (batch, all_have_one) in enumerate(rounds(numbered, in_step)):
            # Before a batch, not after it, so that a resumed pass ends where it would have.
            if (
                tolerance is not None
                and round_ % tolerance_every == 0
                and _is_settled(measured, tolerance, seen < done, group)
            ):
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
    return _result(measured, method, parameters, blocks)


def _check_options(
    estimator: str, structure: str, mc_samples: int, accumulate_dtype: torch.dtype, kernel: bool
) -> None:
    if estimator not in ESTIMATORS:
        raise UsageError(
            f"unknown estimator {estimator!r}: expected one of ({', '.join(ESTIMATORS)})"
        )
    if structure not in STRUCTURES:
        raise UsageError(
            f"unknown structure {structure!r}: expected one of ({', '.join(STRUCTURES)})"
        )
    if structure == "inputs" and estimator == "batched":
        raise UsageError(
            "the structure inputs cannot be combined with the estimator batched, which has no "
            "gradients of single examples; use the estimator mc"
        )
    if kernel and estimator == "batched":
        raise UsageError(
            "the kernel cannot be combined with the estimator batched, which has no gradients of "
            "single examples; leave it out, or use another estimator"
        )
    if mc_samples < 1:
        raise UsageError(f"mc_samples is {mc_samples}: expected at least 1")
    if accumulate_dtype not in (torch.float32, torch.float64):
        raise UsageError(f"accumulate_dtype is {accumulate_dtype}: expected float32 or float64")


def _check_tolerance(tolerance: float | None, every: int) -> None:
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise UsageError(f"tolerance is {tolerance}: expected a finite number above 0")
    if every < 1:
        raise UsageError(f"tolerance_every is {every}: expected at least 1")


def _check_group(group: ProcessGroup | None, model: nn.Module, *, numbered: bool) -> None:
    """Refuse processes that would not get the Fisher of all, or not the one of a single process."""
    parts = (p.device_mesh.size() for p in model.parameters() if isinstance(p, DTensor))
    if group is None and max(parts, default=1) > 1:
        raise UsageError("a sharded model needs group, the processes that have its parts")
    if not numbered and place_in(group)[1] > 1:
        raise UsageError(
            "several processes would draw the same labels: give indices, the examples' numbers "
            "among those of all processes"
        )
    if group is not None and "cpu:" not in (found := get_backend_config(group)):
        raise UsageError(
            f"group has the backend {found}: expected one for the CPU too, as after "
            'init_process_group("cpu:gloo,cuda:nccl")'
        )


def check_outcomes(outcomes: int, most: int) -> None:
    """Refuse more outcomes of an example than `exact` may sum over."""
    if outcomes > most:
        raise UsageError(
            f"the exact Fisher needs {outcomes} backward passes per example, more than {most}; use "
            "the estimator mc, or raise max_outcomes"
        )


def measurable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients; refuse a model that has no Fisher."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{name or 'the model'!r} is a torch.jit.ScriptModule, whose layers cannot be "
                "inspected; pass the module that it was compiled from"
            )
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise InputError(
                f"{name or 'the model'!r} was compiled by torch.compile, which does not run the "
                "hooks that follow its layers; pass the module that it was compiled from"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(
                f"{name!r} ({type(module).__name__}) has no running statistics and normalizes by "
                "those of the batch, so single examples have no gradient; use a model with running "
                "statistics"
            )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise InputError(
            "the model has no parameter that requires gradients; unfreeze those to be measured"
        )
    if len(devices := {p.device for p in model.parameters()}) > 1:
        raise InputError(
            f"the model's parameters are on several devices ({', '.join(map(str, devices))}): "
            "expected one; put them all on one, or measure with --shard in several processes"
        )
    if complex_ones := [name for name, p in parameters.items() if p.is_complex()]:
        raise InputError(
            f"the parameter {complex_ones[0]!r} is complex, and its Fisher would be a matrix; "
            "store its real and imaginary part as two parameters, or freeze it"
        )
    return parameters


def _blocks(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    sharded: bool,
    note: Callable[[str], None] | None,
) -> dict[str, InputBlock]:
    """Return the blocks of the structure `inputs`; refuse a sharded model."""
    if sharded:
        raise UsageError(
            "the structure inputs cannot be combined with a sharded model; use the structure "
            "diagonal, or do not shard the model"
        )
    blocks = covered_layers(model, parameters)
    if not blocks and note is not None:
        note(
            "structure inputs: no layer is covered, so only the diagonal is measured (covered are "
            "linear layers and 1D or 2D convolutions without groups, not tied, with at most 4 "
            "times as many inputs as outputs)"
        )
    return blocks


def _has_kernel(
    model: nn.Module, sharded: bool, dtype: torch.dtype, note: Callable[[str], None] | None
) -> bool:
    """Return whether there is a kernel for such a pass; otherwise say so."""
    device = place_of(model).device.type
    if device in DEVICES and dtype == torch.float32 and not sharded:
        return True
    if note is not None:
        found = "a sharded model" if sharded else f"{str(dtype).removeprefix('torch.')} on {device}"
        known = "float32 on a CPU or CUDA"
        note(f"the kernel is for {known}, not for {found}: continuing without it")
    return False


def _finite_outputs(model: nn.Module, batch: Batch) -> Tensor:
    outputs = model_outputs(model, batch.inputs, batch.labels)
    if not math.isfinite(outputs.detach().sum()) and not outputs.isfinite().all():
        raise NonFiniteError(
            f"the model's outputs are not finite in {where_in_data(batch)}; look for NaN or "
            "infinite weights or inputs, or use a wider dtype"
        )
    return outputs


def _result(
    measured: Pass,
    estimator: Estimator,
    parameters: dict[str, nn.Parameter],
    blocks: dict[str, InputBlock],
) -> FisherDiagonal:
    """Divide the sums of a finished pass, and return them with its counts."""
    if measured.accumulators is None or measured.examples == 0:
        raise InputError(
            "the batches are empty: expected at least one example to measure the Fisher on"
        )
    counts = measured.accumulators.counts
    if counts.units == 0:
        raise InputError(
            f"none of the {counts.examples} examples has a predicted position: expected at least "
            "one label other than -100"
        )
    if not counts.reached:
        raise InputError(
            "the model's outputs do not depend on any parameter that requires gradients; unfreeze "
            "those to be measured"
        )
    levels = measured.levels or {}
    divisor = counts.units * (estimator.samples or 1)
    return FisherDiagonal(
        measured.means(divisor),
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
        factors=measured.block_means(divisor),
        blocks={key: Block("R", block.dims, block.parameters) for key, block in blocks.items()},
    )


def _is_settled(measured: Pass, tolerance: float, behind: bool, group: ProcessGroup | None) -> bool:
    """Return whether every trace is certain enough, with the same answer in every process.

    `behind` means that this process still reads what the resumed pass had added before.
    """
    # Counted at fixed batches, so that the sums are rounded identically.
    draws = 0 if measured.accumulators is None else measured.accumulators.counts.draws
    any_behind, of_all = summed(group, behind, draws)
    if any_behind or of_all < LEAST_EXAMPLES:
        return False
    errors = measured.relative_errors(group)
    return bool(errors) and max(errors.values()) <= tolerance


def _numbered(
    batches: Iterable[Any], indices: Sequence[int] | None, group: ProcessGroup | None
) -> Iterator[Batch]:
    """Yield the batches that are not empty, with their numbers in the order of reading."""
    process, processes = place_in(group)
    first = 0
    for round_, (inputs, labels) in enumerate(map(split_batch, batches)):
        if not (size := labels.shape[0]):
            continue
        last = first + size
        if indices is not None and len(indices) < last:
            raise InputError(f"{len(indices)} indices for {last} examples: expected one for each")
        numbers = range(first, last) if indices is None else indices[first:last]
        yield Batch(1 + round_ * processes + process, inputs, labels, numbers)
        first = last


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode with its parameters' gradients off, others' on.

    Products of float32 use full precision, also inside autocast: in TF32 or bfloat16 a batch would
    not agree with its single examples. Modes, buffers, precisions and `requires_grad` are restored
    bit for bit.
    """
    settings: list[tuple[Any, str, Any]]
    settings = [(product, "fp32_precision", "ieee") for product in _products()]
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        settings.append((config, "use_cache", False))  # It would change when a layer runs again.
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    # No part of ∇ log p: it divides a row's gradient by how often the batch has the row.
    settings += [(table, "scale_grad_by_freq", False) for table in tables]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    trained = [p for p in model.parameters() if p.requires_grad]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    # An embedding with max_norm changes its weight when it is called.
    changing: list[Tensor] = [m.weight for m in tables if m.max_norm is not None]
    kept: list[Tensor] = [*model.buffers(), *changing]
    copies = [(tensor, tensor.detach().clone()) for tensor in kept]
    try:
        model.requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(False)  # It would bypass the layers.
        for owner, name, value in settings:
            setattr(owner, name, value)
        with (
            eval_mode(model),
            _without_autocast(place_of(model).device.type),
            _recurrent_in_training_mode(model),
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


@contextmanager
def _recurrent_in_training_mode(model: nn.Module) -> Iterator[None]:
    """Put recurrent layers into training mode without dropout: cuDNN differentiates no other."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.RNNBase)]
    before = [(layer.training, layer.dropout) for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.dropout = True, 0.0
        yield
    finally:
        for layer, (training, dropout) in zip(layers, before, strict=True):
            layer.training, layer.dropout = training, dropout


def _products() -> list[Any]:
    """Return torch's settings for the precision of float32 products."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return [backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
