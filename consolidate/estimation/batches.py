"""Batches of examples, and a model's outputs for them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consolidate.estimation.likelihoods import IGNORED
from consolidate.runtime.distributed import is_lost
from formats.errors import InputError


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples, with their indices in the dataset."""

    number: int  # in the order of reading
    inputs: Any
    labels: Tensor
    indices: Sequence[int]

    def __len__(self) -> int:
        return self.labels.shape[0]

    def rows(self, first: int, last: int) -> "Batch":
        """Return a batch of the examples from first up to, but excluding, last."""
        return self._of(slice(first, last), self.indices[first:last])

    def some(self, examples: Sequence[int]) -> "Batch":
        """Return a batch of these examples, in their order."""
        return self._of(torch.tensor(examples), [self.indices[i] for i in examples])

    def _of(self, rows: slice | Tensor, indices: Sequence[int]) -> "Batch":
        def take(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or (tensor.shape[0] == 1 and len(self) != 1):
                return tensor
            if tensor.shape[0] != len(self):
                raise InputError(
                    f"input of shape {tuple(tensor.shape)} in a batch of {len(self)} labels: "
                    "expected the number of examples as its first size, or 1 if they share it"
                )
            return tensor[rows]

        return Batch(self.number, _map(take, self.inputs), self.labels[rows], indices)

    def example(self, i: int) -> "Batch":
        """Return a batch of example i alone."""
        return self.rows(i, i + 1)


class Alone(NamedTuple):
    """An example of a batch that was run alone."""

    example: int
    outputs: Tensor  # (1, …)


def near(alone: Tensor, together: Tensor) -> bool:
    """Return whether outputs are equal up to rounding."""
    tolerance = min(10 * torch.finfo(alone.dtype).eps ** 0.5, 1 / 8)  # 16 ε in bfloat16
    return bool((alone - together).abs().max() <= tolerance * together.abs().max().clamp(min=1e-6))


def out_of_memory(error: BaseException) -> bool:
    """Return whether a device, or the system, ran out of memory for a tensor."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in words)
    )


class HookError(Exception):
    """An error in a hook of this package while a model ran, not in the model or its inputs."""


@contextmanager
def own_errors() -> Iterator[None]:
    """Distinguish errors of this package's code inside a model's run from those of the model.

    RuntimeErrors of torch, which can have any cause, count as the model's.
    """
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        raise HookError(f"{type(error).__name__}: {error}") from error


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Return the inputs and labels of a batch: a pair, or a mapping with "labels"."""
    inputs: Any
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise InputError(
                f'batch with the keys {", ".join(map(str, batch))}: expected one named "labels"'
            )
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch["labels"]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
    else:
        raise InputError(
            f"batch of type {type(batch).__name__}: expected a pair (inputs, labels) or a mapping "
            'with "labels"'
        )
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        raise InputError(
            f"labels of type {type(labels).__name__}: expected a tensor with one row per example"
        )
    return inputs, labels


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a module in eval mode for a block, and restore the mode of each submodule after it."""
    modes = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    if any(hasattr(module, "base_layer") for module, _ in modes):
        torch.backends.mha.set_fastpath_enabled(False)  # It would leave adapters out.
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes:
            module.training = training


class Place(NamedTuple):
    """Where a model's parameters are."""

    device: torch.device
    dtype: torch.dtype | None  # None where they do not share one.


def place_of(model: nn.Module) -> Place:
    """Return where the model's parameters are, and the floating-point type if they share one."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return Place(next(model.parameters()).device, next(iter(dtypes)) if len(dtypes) == 1 else None)


def placed(place: Place, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
    """Move a batch to where a model is, in one structure; floating-point inputs to its type."""

    def put(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and place.dtype is not None:
            return tensor.detach().to(place.device, place.dtype)
        return tensor.to(place.device)

    return _map(put, inputs), labels.to(place.device)


def model_outputs(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
    """Return what the likelihood is computed from, (B, …): the output tensor, or its `logits`.

    The model never sees the labels, except that missing decoder inputs of an encoder-decoder are
    made from them. Inputs that the model does not accept are refused with their shapes.
    """
    try:
        if isinstance(inputs, Mapping):
            outputs = model(**_with_decoder_inputs(model, inputs, labels))
        else:
            outputs = model(*(inputs if isinstance(inputs, tuple | list) else [inputs]))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if out_of_memory(error) or is_lost(error):
            raise
        raise InputError(
            f"the model does not accept {_described(inputs)}: {type(error).__name__}: {error}"
        ) from error
    return logits_of(outputs)


def logits_of(outputs: Any, where: str = "") -> Tensor:
    """Return the output tensor, or the `logits` of an output; `where` begins a refusal."""
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits", outputs)
    elif not isinstance(outputs, Tensor):
        outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"{where}model output of type {type(outputs).__name__}: expected a tensor, or `logits` "
            "in it"
        )
    return outputs


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


def _described(inputs: Any) -> str:
    """Name the inputs with their shapes and dtypes."""
    if isinstance(inputs, Tensor):
        return f"{str(inputs.dtype).removeprefix('torch.')} {list(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return ", ".join(f"{key}: {_described(item)}" for key, item in inputs.items())
    if isinstance(inputs, tuple | list):
        return ", ".join(map(_described, inputs))
    return type(inputs).__name__


def _with_decoder_inputs(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
    """Use the labels, shifted right by one, as the inputs of an encoder-decoder's decoder."""
    given = any(
        inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")
    )
    config: Any = getattr(model, "config", None)
    if given or labels.ndim != 2 or not getattr(config, "is_encoder_decoder", False):
        return dict(inputs)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    else:
        first, pad = config.decoder_start_token_id, config.pad_token_id
        if first is None or pad is None:
            raise InputError(
                "the decoder's inputs are made from the labels, which needs "
                f"`decoder_start_token_id` and `pad_token_id`: found {first} and {pad}; set both "
                "in config.json"
            )
        start = torch.full_like(labels[:, :1], first)
        shifted = torch.cat([start, labels[:, :-1]], 1)
        shifted = shifted.masked_fill(shifted == IGNORED, pad)
    return {**inputs, "decoder_input_ids": shifted}
