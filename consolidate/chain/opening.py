"""Open a checkpoint with what belongs to it: its base, its Fisher, its tasks."""

from dataclasses import replace
from pathlib import Path

from consolidate.models.adapters import check_plain
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
    check_plain(source.adapter, source.path)
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
