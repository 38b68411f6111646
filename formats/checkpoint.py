"""Checkpoints on disk: a folder or a bare file, its weights by name, and everything beside them."""

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.atomic import recover, unreplaced
from formats.checkpoint_files import check_link, read_index, read_json, real_path
from formats.digest import TensorRecord, tensor_record
from formats.disk_errors import explain_full_disk
from formats.errors import InputError, NonFiniteError
from formats.pickles import PICKLE_SUFFIXES, open_pickle
from formats.tensors import MAX_SHARD_SIZE, dtype_of, extremes, open_tensors, write_tensors

ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
"""A model card, as the Hub shows it."""
_KINDS = f"a file that ends in .safetensors, {', '.join(PICKLE_SUFFIXES)}"
# What transformers' Trainer, accelerate and peft write beside the weights.
_NOT_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|training_args|rng_state|random_states|sampler|adapter_model).*"
)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_OF_THE_OLD_WEIGHTS = re.compile(
    r".*\.safetensors(\.index\.json)?"
    r"|pytorch_model.*\.bin(\.index\.json)?"
    r"|tf_model.*\.h5(\.index\.json)?|flax_model.*\.msgpack(\.index\.json)?|rust_model\.ot"
    r"|(optimizer|scheduler|scaler|rng_state|random_states).*\.(pt|pth|bin|pkl)"
    r"|checkpoint-\d+|fisher|\.git|\.gitignore|\.cache|(\..*)?\.consolidate-.*|lost\+found"
)
_PACKED = re.compile(
    r"(.*\.)?(qweight|qzeros|SCB|absmax|quant_map|weight_packed|weight_scale_inv)"
    r"|.*quant_state\..*"
)


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint, whose weights are read on access.

    `path` is a folder or a bare file; `config` is empty without a ``config.json``; `files` are the
    weights and their index. `adapter` is the ``adapter_config.json`` of a peft adapter, None for a
    whole model; `base` is the adapter's base model, once that is known.
    """

    path: Path
    weights: Mapping[str, Tensor]
    config: dict[str, Any]
    files: tuple[Path, ...] = ()
    adapter: dict[str, Any] | None = None
    base: "Checkpoint | None" = None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, reading only the headers of its weights where the format allows.

    A killed run's replacement of the folder is completed or rolled back first.
    """
    return unreplaced(path, lambda: _open(path))


def _open(path: Path) -> Checkpoint:
    try:
        recover(path)
        if not path.exists():
            raise InputError(f"{path} does not exist; check the path")
        is_folder = path.is_dir()
        if not is_folder and path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
            raise InputError(
                f"{path} is not a checkpoint: expected a folder or {_KINDS}, found "
                f"{path.suffix or 'no suffix'}"
            )
        files = _weight_files(path) if is_folder else (path,)
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    config = read_beside(path, "config.json") if is_folder else {}
    last = files[-1]
    of_adapter = is_folder and last.name in _ADAPTERS
    adapter = read_beside(path, ADAPTER_CONFIG) if of_adapter else None
    if is_folder and not of_adapter:
        _check_alone(path, last.name, config)
    stem, is_safetensors, _ = last.name.partition(".safetensors")
    weights: Mapping[str, Tensor]
    weights = open_tensors(path, stem) if is_safetensors else open_pickle(last)
    if not weights:
        raise InputError(f"{last} contains no tensors; save the checkpoint again")
    _refuse_quantized(path, weights, config)
    return Checkpoint(path, weights, config, files, adapter)


def _check_alone(folder: Path, name: str, config: Mapping[str, Any]) -> None:
    """Refuse weights with which transformers would load others, or others in their place."""
    adapter = next((at for at in _ADAPTERS if (folder / at).exists()), None)
    if adapter is not None and (folder / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{folder} has {name} and an adapter, {adapter}, which transformers adds to it: move "
            f"one of them elsewhere, the adapter with its {ADAPTER_CONFIG}"
        )
    named = config.get("transformers_weights")
    if named is not None:
        raise InputError(
            f"{folder}/config.json: transformers_weights is {named!r}, which no output would have: "
            "load and save the model with transformers, which writes the usual names"
        )


def is_fisher_alone(folder: Path) -> bool:
    """Return whether a folder contains ``fisher/`` and no weights, as a repository may."""
    if not (folder / "fisher" / "fisher.json").is_file():
        return False
    weights = (".safetensors", *PICKLE_SUFFIXES)
    names = [entry.name.removesuffix(".index.json") for entry in folder.iterdir()]
    return not any(name.endswith(weights) for name in names)


def weight_records(weights: Mapping[str, Tensor]) -> dict[str, TensorRecord]:
    """Digest every tensor, one at a time."""
    return {name: tensor_record(weights[name]) for name in weights}


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights with a NaN or an infinity, naming the first such tensor."""
    for name in weights:
        tensor = weights[name]
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if not all(map(math.isfinite, extremes(tensor))):
            bad = tensor.numel() - int(torch.isfinite(tensor).count_nonzero())
            raise NonFiniteError(
                f"{path}: tensor {name!r} has {bad} of {tensor.numel()} values NaN or infinite; "
                "use a checkpoint from before the training diverged"
            )


def write_checkpoint(
    staging: Path, source: Checkpoint, weights: Mapping[str, Tensor], *, card: bool = True
) -> None:
    """Write weights and, beside them, all of the source's folder but `_OF_THE_OLD_WEIGHTS`.

    The model card, which describes the source's weights, is copied where `card` is true.
    """
    alone = source.adapter is not None  # peft reads an adapter from one file
    write_tensors(
        staging,
        weights,
        stem="adapter_model" if alone else "model",
        metadata={"format": "pt"},
        max_shard_size=2**63 - 1 if alone else MAX_SHARD_SIZE,
    )
    if not source.path.is_dir():
        return
    others = [(file, name) for file, name in other_files(source) if card or name != Path(CARD)]
    try:
        sizes = sum(file.stat().st_size for file, _ in others)
        with explain_full_disk(staging, sizes):
            for file, name in others:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, staging / name)
    except PermissionError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def other_files(source: Checkpoint) -> Iterator[tuple[Path, Path]]:
    """Yield each file that `write_checkpoint` copies beside the weights, and its name there."""
    root = source.path
    used = {file.name for file in source.files}
    for entry in sorted(root.iterdir()):
        if entry.name not in used and not _OF_THE_OLD_WEIGHTS.fullmatch(entry.name):
            yield from _files_below(root, entry, frozenset())


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Find the one model in a folder: its file, or its shards followed by the index."""
    file = check_link(folder, folder / _model_name(folder))
    if not file.name.endswith(".index.json"):
        return (file,)
    return *(folder / name for name in sorted(set(read_index(file).values()))), file


def _model_name(folder: Path) -> str:
    """Name the usual file or index, else the only safetensors model, else pickle, else adapter."""
    for standard in ("model.safetensors", "pytorch_model.bin"):
        for name in (f"{standard}.index.json", standard):
            if os.path.lexists(folder / name):
                return name
    names = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_file() and not _NOT_WEIGHTS.fullmatch(entry.name)
    )
    for suffixes in ((".safetensors",), PICKLE_SUFFIXES):
        of_shards = tuple(f"{suffix}.index.json" for suffix in suffixes)
        models = [name for name in names if name.endswith(of_shards)]
        models = models or [name for name in names if name.endswith(suffixes)]
        if len(models) > 1:
            raise InputError(
                f"{folder}: expected one model, found {len(models)} ({', '.join(models[:5])}"
                f"{', …' if len(models) > 5 else ''}); move all but one "
                "elsewhere: a weights file that is given by itself is read without config.json"
            )
        if models:
            return models[0]
    if (folder / ADAPTER_CONFIG).exists():
        for name in _ADAPTERS:
            if (folder / name).exists():
                return name
        raise InputError(
            f"{folder} has an {ADAPTER_CONFIG}, but no {' or '.join(_ADAPTERS)}; save the adapter "
            "again"
        )
    there = sorted(entry.name for entry in folder.iterdir())
    found = ", ".join(there[:8]) + (", …" if len(there) > 8 else "") if there else "nothing"
    raise InputError(
        f"{folder} contains no model: expected model.safetensors, its index or {_KINDS}, "
        f"found {found}"
    )


def read_beside(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a checkpoint's folder; empty where there is none."""
    path = folder / name
    return read_json(check_link(folder, path)) if os.path.lexists(path) else {}


_UNQUANTIZED = "have no gradients; use the checkpoint from before quantization"


def quantized_by(config: Mapping[str, Any]) -> str | None:
    """Say by which key a ``config.json`` has quantized weights; None if it has none."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            return f"quantized weights (by the {key} in config.json) {_UNQUANTIZED}"
    return None


def _refuse_quantized(path: Path, weights: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    if (why := quantized_by(config)) is not None:
        raise InputError(f"{path}: {why}")
    for name in weights:
        dtype = dtype_of(weights, name)
        narrow = dtype.itemsize == 1 and dtype != torch.bool
        is_weight = dtype.is_floating_point or name.rpartition(".")[2].startswith("weight")
        if _PACKED.fullmatch(name) or (narrow and is_weight):
            found = str(dtype).removeprefix("torch.")
            raise InputError(
                f"{path}: quantized weights (tensor {name!r} is {found}) {_UNQUANTIZED}"
            )


def _files_below(root: Path, entry: Path, above: frozenset[Path]) -> Iterator[tuple[Path, Path]]:
    check_link(root, entry)
    real = real_path(entry)
    if real in above or real == real_path(root):
        raise InputError(f"{entry} is a link to a folder that contains it; remove the link")
    if entry.is_file():
        yield entry, entry.relative_to(root)
    elif entry.is_dir():
        for child in sorted(entry.iterdir()):
            yield from _files_below(root, child, above | {real})
