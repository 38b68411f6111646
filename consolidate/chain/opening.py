"""Open a checkpoint with what belongs to it: its base, its Fisher, its tasks."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from consolidate.chain.factor_consistency import check_factors
from formats.atomic import recover, unreplaced
from formats.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    open_checkpoint,
    read_beside,
    weight_records,
)
from formats.digest import set_digest
from formats.errors import InputError, UsageError
from formats.fisher_folder import (
    LEDGER_NAME,
    StoredFisher,
    check_belongs,
    check_fisher_values,
    check_intact,
    read_fisher,
)
from formats.fisher_json import Ledger
from formats.hub import FISHER, find_local, locate
from formats.wording import few, shown

LOG = logging.getLogger("consolidate")

# What makes an adapter more than W + s B A with the base model's own W, by option.
_OTHER = {
    "use_dora": "DoRA scales W + s B A by columns",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "use_qalora": "QA-LoRA pools its inputs",
    "arrow_config": "Arrow routes between adapters",
    "alora_invocation_tokens": "aLoRA acts on a part of the text",
    "velora_config": "VeLoRA compresses the inputs of A",
    "monteclora_config": "MonteCLoRA samples its weights",
    "kasa_config": "KaSA adds singular values and truncates those of W",
    "lora_bias": "lora_bias adds a bias",
    "target_parameters": "target_parameters adapts tensors other than layer weights",
    "layer_replication": "layer_replication repeats layers of the base model",
    "trainable_token_indices": "trainable_token_indices replaces rows of the embedding",
    "megatron_config": "Megatron's layers are parallel",
}
_IRRELEVANT_KEYS = (
    *("_attn_implementation", "_commit_hash", "_from_model_config", "_name_or_path"),
    *("architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "finetuning_task"),
    *("gradient_checkpointing", "id2label", "initializer_range", "label2id", "name_or_path"),
    *("num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type"),
    *("return_dict", "task_specific_params", "tokenizer_class", "torch_dtype"),
    *("transformers_version", "unsloth_fixed", "unsloth_version", "use_cache"),
)
"""Keys of config.json that are known not to change what the weights compute."""
_DROPOUT = ("dropout", "pdrop", "drop_path")  # parts of keys that do not either
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change W at the start


def stored_fisher(folder: Path, source: Checkpoint) -> StoredFisher:
    """Read a Fisher folder after comparing every byte of it and of its weights with its ledger."""
    stored = read_fisher(folder)
    check_belongs(stored, source.weights, str(source.path))
    _compare_configs(folder, source)
    check_kind(stored, source)
    check_base(stored.ledger, folder, source)
    check_intact(stored)
    check_fisher_values(stored)
    check_factors(stored)  # a negative eigenvalue would push the weights away
    return stored


def _compare_configs(folder: Path, source: Checkpoint) -> None:
    """Warn where the config.json beside a Fisher from elsewhere has the weights compute otherwise.

    No error, as a key that a model does not use may differ, or be absent for its default.
    """
    if folder.name != "fisher" or folder.parent.resolve() == source.path.resolve():
        return
    beside = read_beside(folder.parent, "config.json")
    there, here = _computing(beside), _computing(source.config)
    if not there or not here:
        return
    other = [
        f"{key} {' there, '.join(shown(c[key]) if key in c else 'absent' for c in (there, here))}"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]
    if other:
        LOG.warning(
            "the config.json beside the Fisher, in %s, differs from that in %s: %s here: if the "
            "model computes something else now, measure again with `consolidate fisher`",
            folder.parent,
            source.path,
            few(other, 4),
        )


def _computing(config: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Give what may change what the weights compute, by its keys at every depth."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if value is None or key in _IRRELEVANT_KEYS or any(word in key for word in _DROPOUT):
            continue
        # transformers 5 has them in a mapping, which those before have not.
        if key == "rope_parameters" and isinstance(value, dict):
            found |= _computing({k: v for k, v in value.items() if v != "default"}, at)
        elif isinstance(value, dict):
            found |= _computing(value, f"{at}{key}.")
        else:
            found[at + key] = value
    return found


def with_fisher(path: Path) -> tuple[Checkpoint, StoredFisher]:
    """Open a checkpoint and the Fisher beside it, both old or both new if it is being replaced."""

    def read() -> tuple[Checkpoint, StoredFisher]:
        source = open_checkpoint(path)
        return source, stored_fisher(path / "fisher", source)

    return unreplaced(path, read)


def find_fisher(checkpoint: Path, elsewhere: str | Path | None) -> Path | None:
    """Find the Fisher folder that was named, or the one beside the weights, if there is one."""
    if elsewhere is None:
        beside = checkpoint / "fisher"
        recover(beside)
        return beside if beside.is_dir() else None
    folder = locate(elsewhere, only=(*FISHER, "config.json"))  # which is compared
    recover(folder / "fisher")
    for candidate in (folder / "fisher", folder):
        if (candidate / "fisher.json").is_file():
            return candidate
    raise InputError(
        f"{elsewhere}: no Fisher found: expected fisher/fisher.json or fisher.json; run "
        "`consolidate fisher` first, or name another folder"
    )


def check_base(ledger: Ledger, folder: Path, source: Checkpoint) -> None:
    """Refuse an adapter's base model that is not the one its Fisher was measured with."""
    if source.base is None:
        return
    found = set_digest(weight_records(source.base.weights))
    if found != ledger.base:
        raise InputError(
            f"{folder / LEDGER_NAME} was measured on another base model: expected the digest "
            f"{str(ledger.base)[:12]}…, found {found[:12]}… in {source.base.path}: name the right "
            "one with --base-model"
        )


def check_kind(stored: StoredFisher, source: Checkpoint) -> None:
    """Refuse the Fisher of an adapter for a whole model, and of a whole model for an adapter."""
    if (stored.ledger.base is None) != (source.adapter is None):
        kinds = ("a whole model", "an adapter")
        raise InputError(
            f"{stored.folder / LEDGER_NAME}: expected the Fisher of "
            f"{kinds[source.adapter is not None]} for {source.path}, found that of "
            f"{kinds[stored.ledger.base is not None]}: run `consolidate fisher`"
        )


def with_base(
    source: Checkpoint, base_model: str | Path | None, *, without: Sequence[str] = FISHER
) -> Checkpoint:
    """Open the base model of an adapter: the one given, else the one its config names.

    `without` are patterns of files that are not fetched from a repository.
    """
    if source.adapter is None:
        if base_model is not None:
            raise UsageError(f"{source.path} is not an adapter: leave --base-model out")
        return source
    _check_plain(source.adapter, source.path)
    if base_model is None and (base_model := named_base(source)) is None:
        named = source.adapter.get("base_model_name_or_path")
        raise InputError(
            f"{source.path / ADAPTER_CONFIG}: the base model {named!r} is not a local folder: name "
            "the base model with --base-model"
        )
    base = open_checkpoint(locate(base_model, without=without))
    if base.adapter is not None:
        raise InputError(
            f"{source.path}: expected a whole model as the base model, found an adapter, "
            f"{base.path}: name the right one with --base-model"
        )
    return replace(source, base=base, config=base.config)


def named_base(source: Checkpoint) -> str | None:
    """Give the base model that an adapter's config names, if it exists."""
    named = (source.adapter or {}).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    # Absolute, as a config does not mean somebody's home by a ~.
    return named if find_local(Path(named).absolute()).exists() else None


def _check_plain(config: Mapping[str, Any], path: Path) -> None:
    """Refuse an adapter that is not W + s B A."""
    where = path / ADAPTER_CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{where}: expected peft_type 'LORA', found {kind!r}: use a LoRA adapter")
    for option, why in _OTHER.items():
        if config.get(option):
            raise InputError(
                f"{where}: expected plain LoRA, found {option} ({why}): use a plain LoRA adapter"
            )
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{where}: expected bias 'none', found {config['bias']!r}: use an adapter without"
        )
    if (start := config.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise InputError(
            f"{where}: init_lora_weights is {start!r}, which also changes the base model's "
            "weights: convert the adapter to plain LoRA with peft first"
        )
