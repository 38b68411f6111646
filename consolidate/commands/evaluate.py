"""What `consolidate evaluate` does, without the command line: a checkpoint measured on tasks."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from consolidate.chain.heads import models_of_tasks
from consolidate.chain.opening import check_base, with_base
from consolidate.commands.task_metrics import evaluate_all
from consolidate.data.columns import Columns, columns_of
from consolidate.data.encoding import encode
from consolidate.models.adapters import load
from consolidate.runtime.devices import best_device
from formats.checkpoint import Checkpoint, check_finite, open_checkpoint
from formats.checkpoint_files import check_link
from formats.errors import InputError
from formats.fisher_folder import (
    LEDGER_NAME,
    StoredFisher,
    check_belongs,
    check_intact,
    read_fisher,
)
from formats.fisher_json import Ledger, read_ledger
from formats.hub import VALUES, locate
from formats.task_file import open_task

LOG = logging.getLogger("consolidate")


def evaluate(
    checkpoint: str | Path,
    data: str | Path | Mapping[str, str | Path],
    *,
    task: str | None = None,
    objective: str | None = None,
    model: str | None = None,
    columns: Columns | None = None,
    split: str | None = None,
    max_length: int | None = None,
    pack: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    base_model: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Measure a checkpoint on each task: loss, and accuracy or perplexity.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        data: A file, a folder, a data set on the Hub, or a ``task.toml``; several by task name.
            Where the name is that of a task of the ledger whose output layer was put aside, that
            layer is used.
        task: The task of the ledger whose output layer is used for all data.
        objective: What is predicted; the architecture's own unless given.
        model: ``package.module:factory`` for a model that transformers does not know.
        columns: Where the inputs and labels are in the data.
        split: Of a data set that has several.
        max_length: Tokens after which a text is truncated.
        pack: Fill sequences of `max_length` with consecutive texts (language modelling).
        batch_size: Examples run at a time.
        seed: Of the masks of a masked language model.
        device: Such as ``cpu`` or ``cuda``; the best there is unless given.
        dtype: Of the weights; as stored unless given.
        revision: Of a checkpoint on the Hub.
        base_model: Of a checkpoint that is an adapter of peft: a folder or a repository. The one
            that its config names unless given, if that is a folder here.

    Returns:
        The metrics of each task, by name.

    Raises:
        InputError: Something in the checkpoint or the data does not fit.
        NonFiniteError: NaN or infinity in the weights.
    """
    folder = locate(checkpoint, revision, without=VALUES)
    if (ledger := _ledger(folder / "fisher")) is not None and ledger.heads:
        folder = locate(checkpoint, revision)  # heads are opened with the rest of the folder
    source = with_base(open_checkpoint(folder), base_model)
    if ledger is not None:
        check_base(ledger, folder / "fisher", source)
    check_finite(source.weights, folder)
    if not isinstance(data, Mapping):
        data = {Path(data).stem: data}
    stored = _stored_heads(folder / "fisher", ledger, source, task)
    tasks = {} if stored is None else {name: task or name for name in data}
    if stored is not None:
        known = {record.name for record in stored.ledger.tasks}
        for name in [name for name in tasks if task is None and name not in known]:
            LOG.info(
                "%s is no task of the ledger: it is measured with the output layer in the weights, "
                "and with that of an earlier task where --task names one (%s)",
                name,
                ", ".join(stored.heads),
            )
    opened = {name: open_task(spec, split=split) for name, spec in data.items()}
    load_as = partial(
        load,
        objective=objective or next((f.objective for f, _ in opened.values() if f.objective), None),
        factory=model,
        dtype=dtype,
        device=best_device(device),
    )
    loaded = load_as(source)
    with_heads = {} if stored is None else models_of_tasks(load_as, loaded, stored, tasks)
    encoded = {
        name: encode(
            rows,
            with_heads.get(name, loaded),
            columns=columns_of(columns, task_file.columns()),
            max_length=max_length,
            pack=pack,
            seed=seed,
        )
        for name, (task_file, rows) in opened.items()
    }
    metrics = evaluate_all(loaded, encoded, batch_size=batch_size, with_heads=with_heads)
    for note in [
        *loaded.notes,
        *(note for examples in encoded.values() for note in examples.notes()),
    ]:
        LOG.info("%s", note)
    return metrics


def _ledger(folder: Path) -> Ledger | None:
    path = folder / LEDGER_NAME
    check_link(folder, path)
    return read_ledger(path) if path.is_file() else None


def _stored_heads(
    folder: Path, ledger: Ledger | None, source: Checkpoint, task: str | None
) -> StoredFisher | None:
    """Open the Fisher folder if there are heads in it, and compare them and the weights with it."""
    if ledger is None:
        if task is not None:
            raise InputError(f"{folder} is not there, so nothing is known of the task {task!r}")
        return None
    names = [record.name for record in ledger.tasks]
    if task is not None and task not in names:
        raise InputError(
            f"{folder / LEDGER_NAME} has no task {task!r}; its tasks are {', '.join(names)}"
        )
    if not ledger.heads:
        return None
    stored = read_fisher(folder)
    check_belongs(stored, source.weights, str(source.path))
    check_intact(stored, kinds=("head",))
    return stored
