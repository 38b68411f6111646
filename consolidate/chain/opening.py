"""Open a checkpoint with what belongs to it: its base, its Fisher, its tasks."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from formats.checkpoint import ADAPTER_CONFIG, Checkpoint, open_checkpoint, weight_records
from formats.digest import set_digest
from formats.errors import InputError, UsageError
from formats.fisher_folder import (
    LEDGER_NAME,
    StoredFisher,
    check_belongs,
    check_intact,
    read_fisher,
)
from formats.fisher_json import Ledger
from formats.hub import FISHER, locate

# By what an adapter is more than W + s B A, or not of the base model's own W.
_OTHER = {
    "use_dora": "DoRA scales W + s B A by columns",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "use_qalora": "QA-LoRA pools its inputs",
    "arrow_config": "Arrow routes between adapters",
    "alora_invocation_tokens": "aLoRA acts on a part of the text",
    "velora_config": "VeLoRA compresses what goes into A",
    "monteclora_config": "MonteCLoRA samples its weights",
    "kasa_config": "KaSA has singular values of its own and cuts those of W",
    "lora_bias": "lora_bias adds a bias",
    "target_parameters": "target_parameters changes tensors that are no layer's weight",
    "layer_replication": "layer_replication repeats layers of the base model",
    "trainable_token_indices": "trainable_token_indices replaces rows of the embedding",
    "megatron_config": "Megatron's layers are parallel ones",
}
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change W at the start


def stored_fisher(folder: Path, source: Checkpoint) -> StoredFisher:
    """Read a Fisher folder after comparing every byte of it and of its weights with its ledger."""
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: run `consolidate fisher` first")
    stored = read_fisher(folder)
    check_belongs(stored, source.weights, str(source.path))
    check_kind(stored, source)
    check_base(stored.ledger, folder, source)
    check_intact(stored)
    return stored


def find_fisher(checkpoint: Path, elsewhere: str | Path | None) -> Path | None:
    """Find the Fisher folder that was named, or the one beside the weights, if there is one."""
    if elsewhere is None:
        beside = checkpoint / "fisher"
        return beside if beside.is_dir() else None
    folder = locate(elsewhere, only=FISHER)
    for candidate in (folder / "fisher", folder):
        if (candidate / "fisher.json").is_file():
            return candidate
    raise InputError(f"{elsewhere} holds no Fisher: neither fisher/fisher.json nor fisher.json")


def check_base(ledger: Ledger, folder: Path, source: Checkpoint) -> None:
    """Refuse an adapter's base model that is not the one its Fisher was measured with."""
    if source.base is None:
        return
    found = set_digest(weight_records(source.base.weights))
    if found != ledger.base:
        raise InputError(
            f"{folder / LEDGER_NAME} was measured on a base model with the digest "
            f"{str(ledger.base)[:12]}…, and {source.base.path} has {found[:12]}…: name the "
            "right one with --base-model"
        )


def check_kind(stored: StoredFisher, source: Checkpoint) -> None:
    """Refuse the Fisher of an adapter for a whole model, and of a whole model for an adapter."""
    if (stored.ledger.base is None) != (source.adapter is None):
        kinds = ("a whole model", "an adapter")
        raise InputError(
            f"{stored.folder / LEDGER_NAME} is of {kinds[stored.ledger.base is not None]}, and "
            f"{source.path} is {kinds[source.adapter is not None]}"
        )


def with_base(source: Checkpoint, base_model: str | Path | None) -> Checkpoint:
    """Open the base model of a checkpoint that is an adapter: the one given, or that it names."""
    if source.adapter is None:
        if base_model is not None:
            raise UsageError(f"{source.path} is no adapter, so it has no --base-model")
        return source
    _check_plain(source.adapter, source.path)
    if base_model is None and (base_model := named_base(source)) is None:
        named = source.adapter.get("base_model_name_or_path")
        raise InputError(
            f"{source.path / ADAPTER_CONFIG} names {named!r} as its base model, which is no "
            "folder here: name the base model with --base-model"
        )
    base = open_checkpoint(locate(base_model, without=FISHER))
    if base.adapter is not None:
        raise InputError(f"{base.path}, the base model of {source.path}, is an adapter itself")
    return replace(source, base=base, config=base.config)


def named_base(source: Checkpoint) -> str | None:
    """Give the base model that an adapter's config names, if that is there."""
    named = (source.adapter or {}).get("base_model_name_or_path")
    return named if isinstance(named, str) and named and Path(named).exists() else None


def _check_plain(config: Mapping[str, Any], path: Path) -> None:
    """Refuse an adapter that is not W + s B A."""
    where = path / ADAPTER_CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{where}: peft_type is {kind!r}, and only adapters of LORA are supported")
    for option, why in _OTHER.items():
        if config.get(option):
            raise InputError(f"{where}: {option} is set, so it is not plain LoRA ({why})")
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias is {config['bias']!r}, and only 'none' is supported")
    if (start := config.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise InputError(
            f"{where}: init_lora_weights is {start!r}, which changes the base model's weights too; "
            "convert the adapter to plain LoRA with peft first"
        )
