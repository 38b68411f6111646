"""Batches of examples, and what a model makes of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consolidate.estimation.likelihoods import IGNORED
from formats.errors import InputError


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples, with their indices in the data set."""

    number: int  # of the batch, and of its first example, in the order of reading
    first: int
    inputs: Any
    labels: Tensor
    indices: Sequence[int]

    def __len__(self) -> int:
        return self.labels.shape[0]

    def rows(self, first: int, last: int) -> "Batch":
        """Return a batch of the examples from first on, up to but without last."""
        some = slice(first, last)

        def take(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or (tensor.shape[0] == 1 and len(self) != 1):
                return tensor
            if tensor.shape[0] != len(self):
                raise InputError(
                    f"An input has shape {tuple(tensor.shape)} in a batch of {len(self)} labels: "
                    "its first size must be the number of examples, or 1 where they share it."
                )
            return tensor[some]

        inputs, labels, indices = _map(take, self.inputs), self.labels[some], self.indices[some]
        return Batch(self.number, self.first + first, inputs, labels, indices)

    def example(self, i: int) -> "Batch":
        """Return a batch of example i alone."""
        return self.rows(i, i + 1)


def out_of_memory(error: BaseException) -> bool:
    """Return whether a device, or the system, had no memory left for a tensor."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in words)
    )


class HookError(Exception):
    """A hook of ours raised while a model ran: no error of the model's, nor of its inputs."""


@contextmanager
def own_errors() -> Iterator[None]:
    """Tell errors of our code inside a model's run from the model's.

    Torch's RuntimeErrors about its tensors, which may be of any kind, count as the model's.
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


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and each of its modules back in its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
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

    The model never sees the labels, except that an encoder-decoder's inputs are made from them
    where they are not given. What it cannot take is refused with the inputs' shapes.
    """
    try:
        if isinstance(inputs, Mapping):
            outputs = model(**_with_decoder_inputs(model, inputs, labels))
        else:
            outputs = model(*(inputs if isinstance(inputs, tuple | list) else [inputs]))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if out_of_memory(error):
            raise
        raise InputError(
            f"The model cannot take {_described(inputs)}: {type(error).__name__}: {error}"
        ) from error
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits", outputs)
    elif not isinstance(outputs, Tensor):
        outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"The model returned {type(outputs).__name__}; expected a tensor, or `logits` in it."
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
    """Give an encoder-decoder the labels, one to the right, as its decoder's inputs."""
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
                "The decoder's inputs are made from the labels, for which config.json must have "
                f"`decoder_start_token_id` and `pad_token_id`; they are {first} and {pad}."
            )
        start = torch.full_like(labels[:, :1], first)
        shifted = torch.cat([start, labels[:, :-1]], 1)
        shifted = shifted.masked_fill(shifted == IGNORED, pad)
    return {**inputs, "decoder_input_ids": shifted}
