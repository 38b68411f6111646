"""What the result of a command is made from, told by content: digests, options, versions."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from formats.checkpoint import CARD, Checkpoint, other_files
from formats.digest import TensorRecord, set_digest
from formats.rows import Rows, file_digest, listing_digest
from formats.task_file import TaskFile, open_task
from formats.versions import program_versions

WITHOUT_EFFECT = {"log_every", "search_plot", "save_every", "restart", "force", "overwrite"}
WITHOUT_EFFECT |= {"check", "fisher_check", "on_step"}
"""Options that cannot be seen in the result."""

# Where the result goes, and what is told by its content.
_NOT_OPTIONS = {"checkpoint", "data", "output_dir", "evaluate", "validation", "fisher", "revision"}
_NOT_OPTIONS |= {"dry_run", "base_model", "evaluate_ahead"}


def checkpoint_content(
    source: Checkpoint, ledger: Path | None, records: Mapping[str, TensorRecord]
) -> dict[str, Any]:
    """Describe a checkpoint: its tensors, its Fisher, and the files beside them but for the card.

    Whoever writes into a model card has changed nothing that a result depends on.

    Args:
        source: The checkpoint.
        ledger: That of its Fisher, which holds the digests of all that is in it.
        records: Of its weights.

    Returns:
        Digests, JSON-ready.
    """
    others = other_files(source) if source.path.is_dir() else iter(())
    files = ((file, name) for file, name in others if name != Path(CARD))
    return {
        "weights": set_digest(records),
        "fisher": None if ledger is None else file_digest(ledger),
        "files": listing_digest((name.as_posix(), file_digest(file)) for file, name in files),
    }


def data_content(spec: str | Path, split: str | None = None) -> dict[str, Any]:
    """Describe task data: name, digest, and what a task file says of it.

    Args:
        spec: As for `open_task`.
        split: Of a data set that has several.

    Returns:
        JSON-ready.
    """
    return rows_content(*open_task(spec, split=split))


def rows_content(task_file: TaskFile, rows: Rows) -> dict[str, Any]:
    """Describe task data that are open, as `data_content` does."""
    said = {key: value for key, value in asdict(task_file).items() if key != "data" and value}
    return {"name": rows.name, "digest": rows.digest(), **said}


def module_content(factory: str | None) -> str | None:
    """Give the digest of the source that a factory is in; the weights do not tell it.

    Args:
        factory: ``package.module:function``; None where transformers makes the module.
    """
    if factory is None:
        return None
    sys.path.insert(0, str(Path.cwd()))
    try:
        spec = find_spec(factory.partition(":")[0])
    except (ImportError, ValueError):
        spec = None
    finally:
        sys.path.pop(0)
    source = Path(spec.origin) if spec is not None and spec.origin else None
    return file_digest(source) if source is not None and source.is_file() else None


def options_content(options: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the options of a command, without those that name data or change nothing.

    Args:
        options: Arguments of the function beneath it, by name.

    Returns:
        JSON-ready; the same for what means the same, such as a list and a tuple.
    """
    return {
        name: plain(value)
        for name, value in options.items()
        if name not in _NOT_OPTIONS and name not in WITHOUT_EFFECT
    }


def plain(value: Any) -> Any:
    """Give the value of an option as JSON knows it."""

    def known(value: object) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {key: entry for key, entry in asdict(value).items() if entry is not None}
        if isinstance(value, torch.dtype | torch.device | Path):
            return str(value)
        raise TypeError(f"an option cannot be a {type(value).__name__}")

    return json.loads(json.dumps(value, default=known), parse_float=_number)


def versions() -> dict[str, str]:
    """Give the versions of the programs that the numbers depend on."""
    ours = ("consolidate-ewc", "torch", "transformers")
    return {name: version for name, version in program_versions().items() if name in ours}


def digest(description: Mapping[str, Any]) -> str:
    """Give the SHA-256 of a description: of its JSON without blanks, keys sorted.

    Args:
        description: JSON-ready.
    """
    text = json.dumps(description, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each entry that two descriptions do not share: its name, what it was, what it is.

    Args:
        old: One description, or an entry of one that is an object.
        new: The other one.
    """
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say in words how two descriptions differ; empty if they do not.

    Args:
        old: What was kept.
        new: What is asked for.
    """
    return "; ".join(
        f"{name.removeprefix('options.')}: {_short(then)} then, {_short(now)} now"
        for name, then, now in differences(_flat(old), _flat(new))
    )


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value  # so that 1 and 1.0 are the same option


def _flat(description: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in description.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{place}{name}.")
        else:
            flat[f"{place}{name}"] = value
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text
