"""Describe what a result is made from, by content: digests, options, versions."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from consolidate.data.benchmark_files import benchmark_content
from consolidate.fields import flat_options, value_of
from consolidate.options import FinetuneOptions, FisherOptions, Merging
from consolidate.runtime.devices import best_device
from consolidate.runtime.distributed import all_processes, place_in
from formats.benchmark import benchmark_task
from formats.checkpoint import CARD, Checkpoint, other_files, weight_records
from formats.digest import TensorRecord, set_digest
from formats.fisher_folder import LEDGER_NAME, StoredFisher
from formats.fisher_json import TaskRecord
from formats.rows import Rows, file_digest, listing_digest
from formats.task_file import TaskFile, open_task
from formats.versions import program_versions

SETTLED = (
    *("task", "norm_statistics", "device", "dtype", "merge_rule", "gamma", "structure"),
    "processes",
)
"""Options that are known only once the checkpoint is open, and the number of processes."""
UNLESS_DEFAULT = ("check", "fisher_check")
"""Options that are described only where they are given, as older results do not have them."""


def checkpoint_content(
    source: Checkpoint, ledger: Path | None, records: Mapping[str, TensorRecord]
) -> dict[str, Any]:
    """Describe a checkpoint: its tensors, its Fisher, and the other files except the model card.

    No result depends on the card.
    """
    others = other_files(source) if source.path.is_dir() else iter(())
    files = ((file, name) for file, name in others if name != Path(CARD))
    return {
        "weights": set_digest(records),
        "fisher": None if ledger is None else file_digest(ledger),
        "files": listing_digest((name.as_posix(), file_digest(file)) for file, name in files),
    }


@dataclass(frozen=True)
class Inputs:
    """What a task's Fisher is measured from: a checkpoint, the chain so far, and the data."""

    source: Checkpoint
    before: StoredFisher | None  # the chain so far
    task_file: TaskFile
    rows: Rows
    merging: Merging
    structure: str  # of what is measured

    @property
    def tasks(self) -> list[TaskRecord]:
        """The tasks of the chain so far."""
        return [] if self.before is None else self.before.ledger.tasks

    @cached_property
    def records(self) -> dict[str, TensorRecord]:
        """Digests of the weights; those of a ledger have been compared with them."""
        if self.before is not None:
            return self.before.ledger.weights
        return weight_records(self.source.weights)

    @cached_property
    def data(self) -> dict[str, Any]:
        """The description of the task's data, as they are when it is first asked for."""
        return rows_content(self.task_file, self.rows)

    def content(self, ledger: Path | None, of_base: StoredFisher | None = None) -> dict[str, Any]:
        """Describe checkpoint and base model by content, each with its ledger where it counts."""
        content, base = checkpoint_content(self.source, ledger, self.records), self.source.base
        if base is not None:
            records = weight_records(base.weights) if of_base is None else of_base.ledger.weights
            at = None if of_base is None else of_base.folder / LEDGER_NAME
            content["base"] = checkpoint_content(base, at, records)
        return content

    def describe(
        self,
        options: FisherOptions | FinetuneOptions,
        checkpoint: Mapping[str, Any],
        **settled: Any,
    ) -> dict[str, Any]:
        """Describe all that a result is made from: the options and the checkpoint.

        With the values of SETTLED; the kind of the device counts, not its number.
        """
        wanted = asked(options, self.data)
        settled["device"] = best_device(options.source.device).type
        settled["processes"] = place_in(all_processes())[1]
        settled |= {"merge_rule": self.merging.merge_rule, "gamma": self.merging.gamma}
        settled["structure"] = self.structure
        assert settled.keys() <= set(SETTLED)
        return {**wanted, "checkpoint": checkpoint, "options": wanted["options"] | plain(settled)}


def data_content(spec: str | Path, split: str | None = None) -> dict[str, Any]:
    """Describe task data: name, digest, and the fields of the task file."""
    return rows_content(*open_task(spec, split=split))


def rows_content(task_file: TaskFile, rows: Rows) -> dict[str, Any]:
    """Describe opened task data, as `data_content` does."""
    stated = {key: value for key, value in asdict(task_file).items() if key != "data" and value}
    return {"name": rows.name, "digest": rows.digest(), **rows.beside_digest(), **stated}


def asked(
    options: FisherOptions | FinetuneOptions,
    data: dict[str, Any],
    content_of: Callable[..., dict[str, Any]] = data_content,
) -> dict[str, Any]:
    """Describe what a command was asked to do, as far as known without the checkpoint."""
    flats = [flat for flat in flat_options(type(options)) if not flat.option.python_only]
    replay = options.replaying.replay if isinstance(options, FinetuneOptions) else None
    named = {flat.name: value_of(options, flat) or {} for flat in flats if flat.names_data}
    return {
        "command": "fisher" if isinstance(options, FisherOptions) else "finetune",
        "versions": versions(),
        "data": data,
        **{
            role: {
                name: content_of(spec) if benchmark_task(spec) is None else benchmark_content(spec)
                for name, spec in specs.items()
            }
            for role, specs in named.items()
        },
        "replay": None if replay is None else content_of(replay),
        "module": module_content(options.source.model),
        "options": {
            flat.name: plain(value_of(options, flat))
            for flat in flats
            if flat.option.changes_result
            and flat.name not in SETTLED
            and (flat.name not in UNLESS_DEFAULT or value_of(options, flat) != flat.default)
        },
    }


def module_content(factory: str | None) -> str | None:
    """Give the digest of a factory's source file, which the weights do not determine."""
    if factory is None:
        return None
    sys.path.insert(0, str(Path.cwd()))
    try:
        spec = find_spec(factory.partition(":")[0])
    except Exception:  # of the package's own code; loading the module says what it is
        spec = None
    finally:
        sys.path.pop(0)
    source = Path(spec.origin) if spec is not None and spec.origin else None
    return file_digest(source) if source is not None and source.is_file() else None


def plain(value: Any) -> Any:
    """Give the value of an option as JSON types."""

    def known(value: object) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {key: entry for key, entry in asdict(value).items() if entry is not None}
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"an option cannot be a {type(value).__name__}")

    return json.loads(json.dumps(value, default=known), parse_float=_number)


def versions() -> dict[str, str]:
    """Give the versions of the programs that the numbers depend on."""
    ours = ("consolidate-ewc", "torch", "transformers")
    return {name: version for name, version in program_versions().items() if name in ours}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """List how two descriptions differ, in the keys that the new one has; empty if they agree."""
    return "; ".join(_changes(old, new))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key, what in _IN_WORDS.items():
        if key in new and old.get(key) != new[key]:
            yield what
    for key, what in _NAMED_DATA.items():
        for name, then, now in _differences(old.get(key, {}), new.get(key, {})):
            how = " added" if then is None else " removed" if now is None else ""
            yield f"{what} of {name}{how}"
    for name, then, now in _differences(old.get("versions", {}), new["versions"]):
        yield f"version of {name} {then} → {now}"
    for name, *values in _differences(old.get("options", {}), new["options"]):
        if name in new["options"] or name in UNLESS_DEFAULT:
            then, now = ("default" if value is None else value for value in values)
            yield f"{name.replace('_', '-')} {then} → {now}"


_IN_WORDS = {
    "checkpoint": "checkpoint it starts from",
    "command": "trained or only measured",
    "config": "config",
    "module": "source of the module",
    "data": "data",
    "replay": "replayed data",
}


_NAMED_DATA = {
    "evaluate": "test data",
    "validation": "validation data",
    "measure": "data to measure",
}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value  # so that 1 and 1.0 are the same option
