"""What `consolidate evaluate` does, without the command line: evaluate a checkpoint on tasks."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import cast

from consolidate.chain.heads import models_of_tasks
from consolidate.chain.opening import check_base, with_base
from consolidate.commands.task_metrics import evaluate_all
from consolidate.data.benchmarks import Benchmark, open_benchmark
from consolidate.data.columns import columns_of, of_rows
from consolidate.data.encoding import encode, log_images
from consolidate.data.examples import Examples
from consolidate.models.adapters import load
from consolidate.models.model import Model
from consolidate.options import EvaluateOptions
from consolidate.results import Benchmark as BenchmarkResult
from consolidate.results import EvaluateResult
from consolidate.runtime.devices import best_device, dtype_of_name
from formats.atomic import recover
from formats.benchmark import benchmark_task, data_name
from formats.checkpoint import Checkpoint, check_finite, open_checkpoint
from formats.checkpoint_files import check_link
from formats.errors import InputError, UsageError
from formats.fisher_folder import (
    LEDGER_NAME,
    StoredFisher,
    check_belongs,
    check_intact,
    read_fisher,
)
from formats.fisher_json import Ledger, read_ledger
from formats.hub import VALUES, locate
from formats.rows import Rows
from formats.task_file import TaskFile, open_task

LOG = logging.getLogger("consolidate")


def evaluate(options: EvaluateOptions) -> EvaluateResult:
    """Evaluate a checkpoint on each task: loss, and accuracy or perplexity.

    Returns:
        The metrics of each task, by name.

    Raises:
        InputError: Something in the checkpoint or the data does not fit.
        UsageError: No dataset is given.
        NonFiniteError: NaN or infinity in the weights.
    """
    given = options.data
    data = dict(given) if isinstance(given, Mapping) else {data_name(given): given}
    if not data:
        raise UsageError("data: expected at least one dataset, such as {NAME: DATA}, found none")
    source, stored = _opened(options)
    benchmarks = {
        name: open_benchmark(spec, limit=options.benchmark_limit, seed=options.seed)
        for name, spec in data.items()
        if benchmark_task(spec) is not None
    }
    rows = {name: spec for name, spec in data.items() if name not in benchmarks}
    opened = {name: open_task(spec, split=options.encoding.split) for name, spec in rows.items()}
    objectives = (task_file.objective for task_file, _ in opened.values() if task_file.objective)
    load_as = partial(
        load,
        objective=options.source.objective or next(objectives, None),
        factory=options.source.model,
        dtype=dtype_of_name(options.dtype),
        device=best_device(options.source.device),
    )
    model = load_as(source)
    with_heads: dict[str, Model] = {}
    if stored is not None:
        tasks = {name: options.task or name for name in data}
        _note_unknown_tasks(tasks, stored, options.task)
        with_heads = models_of_tasks(load_as, model, stored, tasks)
    for name, benchmark in benchmarks.items():
        benchmark.check(with_heads.get(name, model))
    known = {column for _, rows in opened.values() for column in rows.columns}
    encoded = {
        name: _encode(rows, with_heads.get(name, model), task_file, options, known)
        for name, (task_file, rows) in opened.items()
    }
    log_images(*encoded.values())
    tests: dict[str, Examples | Benchmark] = {**encoded, **benchmarks}
    tests = {name: tests[name] for name in data}
    metrics = evaluate_all(model, tests, with_heads, options.batch_size)
    of_data = (note for examples in encoded.values() for note in examples.notes_on())
    for note in [*model.notes, *of_data]:
        LOG.info("%s", note)
    result: EvaluateResult = {name: dict(values) for name, values in metrics.items()}
    for name, benchmark in benchmarks.items():
        result[name]["benchmark"] = cast(BenchmarkResult, asdict(benchmark.record))
    return result


def _opened(options: EvaluateOptions) -> tuple[Checkpoint, StoredFisher | None]:
    """Open the checkpoint, and its Fisher folder if that has saved heads."""
    checkpoint, revision = options.checkpoint, options.source.revision
    folder = locate(checkpoint, revision, without=VALUES)
    at = folder / "fisher" / LEDGER_NAME
    recover(at.parent)
    check_link(at.parent, at)
    ledger = read_ledger(at) if at.parent.is_dir() else None
    if ledger is not None and ledger.heads:
        folder = locate(checkpoint, revision)  # saved heads need the whole folder
    source = with_base(open_checkpoint(folder), options.source.base_model)
    if ledger is not None:
        check_base(ledger, folder / "fisher", source)
    check_finite(source.weights, folder)
    return source, _stored_heads(folder / "fisher", ledger, source, options.task)


def _encode(
    rows: Rows, model: Model, task_file: TaskFile, options: EvaluateOptions, known: Collection[str]
) -> Examples:
    given = options.encoding.columns
    if model.objective.language:
        given = of_rows(given, rows, known)
    columns = columns_of(given, task_file.columns())
    return encode(rows, model, replace(options.encoding, columns=columns), seed=options.seed)


def _note_unknown_tasks(tasks: Mapping[str, str], stored: StoredFisher, task: str | None) -> None:
    """Log which datasets are evaluated with the head in the weights for lack of a task."""
    known = {record.name for record in stored.ledger.tasks}
    for name in [name for name in tasks if task is None and name not in known]:
        LOG.info(
            "%s is not a task of the ledger and is evaluated with the head in the weights; --task "
            "selects the saved head of an earlier task (%s)",
            name,
            ", ".join(stored.heads),
        )


def _stored_heads(
    folder: Path, ledger: Ledger | None, source: Checkpoint, task: str | None
) -> StoredFisher | None:
    """Open the Fisher folder if it has saved heads, and check these and the weights against it."""
    if ledger is None:
        if task is not None:
            raise InputError(
                f"{folder} does not exist, so it has no task {task!r}: leave --task out"
            )
        return None
    names = [record.name for record in ledger.tasks]
    if task is not None and task not in names:
        raise InputError(
            f"{folder / LEDGER_NAME}: --task {task}: expected one of {', '.join(names)}"
        )
    if not ledger.heads:
        return None
    stored = read_fisher(folder)
    check_belongs(stored, source.weights, str(source.path))
    check_intact(stored, kinds=("head",))
    return stored
