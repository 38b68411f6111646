"""What `consolidate run` does: a chain of tasks, each step made once from the same content."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from consolidate.chain import find_fisher, merging_options
from consolidate.commands import fisher
from consolidate.descent import Recipe, check_options
from consolidate.finetuning import finetune
from consolidate.hub import locate
from consolidate.inspection import ledger_matrix, verify
from consolidate.matrix_views import matrix_summary
from consolidate.models import fresh_weights
from consolidate.task_options import (
    DEFAULTS,
    OPTION_NAMES,
    effective,
    fisher_options,
    is_data,
    measuring_options,
    read_options,
    without_penalty,
)
from formats.atomic import has_content, replace_folder, write_file
from formats.checkpoint import open_checkpoint, other_files, weight_records
from formats.digest import set_digest
from formats.errors import ConsolidateError, ForgettingError, InputError, UsageError
from formats.fisher_folder import LEDGER_NAME
from formats.ledger import read_ledger
from formats.rows import file_digest, listing_digest
from formats.run_file import RunFile, RunTask, read_run_file
from formats.step_record import StepRecord, read_step_record, write_step_record
from formats.task_file import open_task
from formats.tensors import write_tensors

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class Step:
    """One checkpoint of a run.

    Attributes:
        name: That of its folder, such as ``02-news``.
        command: ``start`` makes fresh weights, ``fisher`` measures, ``finetune`` trains.
        options: Of `finetune`, by parameter name.
        task: None for the start.
        evaluate: Data to measure, by name.
        config: Of the start: the contents of its config.json.
        fisher: Where the Fisher is that the step starts with, if not beside the weights.
        add: Whether there is a Fisher to which a task that is only measured is added.
    """

    name: str
    command: str
    options: dict[str, Any]
    task: RunTask | None = None
    evaluate: dict[str, str] | None = None
    config: dict[str, Any] | None = None
    fisher: str | None = None
    add: bool = False


def run(
    path: str | Path, *, output_dir: str | Path | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Train a chain of tasks, one after the other, skipping what is done already.

    A step is done if its checkpoint is whole and was made from the same content: the checkpoint
    before it, data, test data, options and version of this program. Times of files mean nothing.

    Args:
        path: The run file; docs/run.md tells what it may say.
        output_dir: The folder of all checkpoints; as the file says unless given.
        dry_run: Only say what would be done or skipped, and why.

    Returns:
        The steps with what was done and why, the last checkpoint, and the accuracy matrix.

    Raises:
        InputError: Something in the file, a checkpoint or the data does not fit, or a folder is in
            the way that no run has made.
        UsageError: Options contradict each other.
        NonFiniteError: As `finetune`, as is ForgettingError.
    """
    run_file = read_run_file(Path(path), OPTION_NAMES)
    given = run_file.output_dir if output_dir is None else Path(output_dir)
    if given is None:
        raise UsageError(f"{path}: say where the checkpoints go: output-dir = … or --output-dir")
    with _importable(run_file.path.absolute().parent):
        return _run(run_file, given, dry_run=dry_run)


def _run(run_file: RunFile, output: Path, *, dry_run: bool) -> dict[str, Any]:
    start = None if run_file.start is None else locate(run_file.start, run_file.revision)
    steps = _plan(run_file, start)
    for step in steps:
        _refuse_strangers(output / step.name)
    data_content = cache(_data_content)
    # All data are opened before the work.
    contents = {step.name: _content(step, data_content) for step in steps}
    before = None if start is None else _identity(start, run_file.fisher)
    place, done = start, []
    anew = False
    for number, step in enumerate(steps, 1):
        target = output / step.name
        made_from = {"checkpoint": "anew" if anew else before, **contents[step.name]}
        reason = _reason(target, made_from)
        done.append({"step": step.name, "checkpoint": str(target), "reason": reason})
        if reason is None:
            done[-1]["status"] = "skipped"
            LOG.info("%s: skipped, it is done", step.name)
        elif dry_run:
            done[-1]["status"] = "to be done"
            anew = True
        else:
            LOG.info("%s, step %d of %d: %s", step.name, number, len(steps), reason)
            with _saying_how_to_go_on(step.name):
                _make(step, place, target, made_from)
            done[-1]["status"] = "done"
        if not anew:
            before = _identity(target)
        place = target
    return {
        "status": "dry run" if dry_run else "done",
        "output_dir": str(output),
        "steps": done,
        "checkpoint": str(place),
        "accuracy_matrix": None if anew else _matrix(output / steps[-1].name),
    }


def _plan(run_file: RunFile, start: Path | None) -> list[Step]:
    """Give the steps in their order, after all that can be checked beforehand."""
    where = str(run_file.path)
    folder = run_file.path.parent
    defaults = read_options(run_file.defaults, folder, f"{where}, [defaults]")
    steps = []
    has_fisher = False
    if start is None:
        if run_file.revision is not None or run_file.fisher is not None:
            raise UsageError(f"{where}: revision and fisher are those of a start: name it")
        own = read_options(run_file.tasks[0].options, folder, f"{where}, task 1")
        options = {k: v for k, v in (defaults | own).items() if k in ("model", "seed")}
        if "model" not in options:
            raise UsageError(
                f"{where}: there is nothing to begin with: name a checkpoint as start, or a "
                "factory that makes the module as model"
            )
        steps.append(Step("00-start", "start", options, config=run_file.config or {}))
    else:
        stored_at = find_fisher(start, run_file.fisher)
        has_fisher = stored_at is not None
        known = [t.name for t in read_ledger(stored_at / LEDGER_NAME).tasks] if stored_at else []
        for task in run_file.tasks:
            if task.name in known:
                raise InputError(f"{where}: {run_file.start} has learned a task {task.name!r}")
    tests = {task.name: task.evaluate for task in run_file.tasks if task.evaluate is not None}
    seen: list[str] = []
    for number, task in enumerate(run_file.tasks, 1):
        place = f"{where}, task {number} ({task.name})"
        own = read_options(task.options, folder, place)
        seen.append(task.name)
        first_fisher = run_file.fisher if number == 1 else None
        free = own.get("penalty", "ewc" if has_fisher else "none") == "none"
        options = (without_penalty(defaults) if free else defaults) | own
        evaluate = run_file.evaluate | {
            name: data for name, data in tests.items() if run_file.evaluate_ahead or name in seen
        }
        if not evaluate:
            options.pop("evaluate_every", None)
        if task.train:
            _check_training(options, place)
        else:
            if training := own.keys() - measuring_options(own).keys():
                option = min(training).replace("_", "-")
                raise UsageError(f"{place}: {option} has no meaning with train = false")
            if first_fisher is not None:
                raise UsageError(f"{place}: with train = false a start has its Fisher beside it")
            options = measuring_options(options)
        steps.append(
            Step(
                name=f"{number:02d}-{task.name}",
                command="finetune" if task.train else "fisher",
                options=options,
                task=task,
                evaluate=evaluate if task.train else None,
                fisher=first_fisher,
                add=has_fisher,
            )
        )
        has_fisher = True
    return steps


def _check_training(options: Mapping[str, Any], where: str) -> None:
    """Refuse options of a later task before the first one is trained."""
    values = {**DEFAULTS, **options}
    recipe = Recipe(**{field.name: values[field.name] for field in fields(Recipe)})
    try:
        check_options(
            values["penalty"],
            values["ewc_lambda"],
            values["penalty_dtype"],
            values["penalty_device"],
            recipe,
        )
        merging_options(None, *(values[name] for name in ("merge_rule", "gamma", "task_weight")))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _content(step: Step, data_content: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Give what a step is made from beside the checkpoint before it, told by content."""
    options = {}
    for name, value in effective(step.options).items():
        if is_data(name):
            named = value if isinstance(value, Mapping) else {"": value}
            value = {key: data_content(spec) for key, spec in named.items()}
        options[name] = json.loads(json.dumps(value, default=_plain))
    return {
        "consolidate": version("consolidate-ewc"),
        "command": step.command,
        "config": step.config,
        "module": _module_content(step.options.get("model")),
        "data": step.task and data_content(step.task.data, step.options.get("split")),
        "evaluate": {name: data_content(spec) for name, spec in (step.evaluate or {}).items()},
        "options": options,
    }


def _data_content(spec: str, split: str | None = None) -> dict[str, Any]:
    task_file, rows = open_task(spec, split=split)
    said = {key: value for key, value in asdict(task_file).items() if key != "data" and value}
    return {"name": rows.name, "digest": rows.digest(), **said}


def _module_content(factory: str | None) -> str | None:
    """Give the digest of the source that a factory is in; the weights do not tell it."""
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


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: entry for key, entry in asdict(value).items() if entry is not None}
    if isinstance(value, torch.dtype):
        return str(value)
    raise TypeError(f"an option cannot be a {type(value).__name__}")


def _identity(checkpoint: Path, elsewhere: str | None = None) -> dict[str, Any]:
    """Give the digests of a checkpoint: its tensors, its Fisher, and the files beside them.

    The ledger holds those of all tensors; whether they are so is for `verify` to say.
    """
    source = open_checkpoint(checkpoint)
    stored_at = find_fisher(checkpoint, elsewhere)
    ledger = None if stored_at is None else stored_at / LEDGER_NAME
    if ledger is None or elsewhere is not None:
        records = weight_records(source.weights)
    else:
        records = read_ledger(ledger).weights
    files = other_files(source) if source.path.is_dir() else iter(())
    return {
        "weights": set_digest(records),
        "fisher": None if ledger is None else file_digest(ledger),
        "files": listing_digest((name.as_posix(), file_digest(file)) for file, name in files),
    }


def _reason(target: Path, made_from: Mapping[str, Any]) -> str | None:
    """Say why a step is to be done; None where it is done."""
    record = read_step_record(_record_path(target))
    if record is None:
        return "it is new"
    if record.made is None:
        return "it was begun and not finished"
    if changes := list(_changes(record.made_from, made_from)):
        return f"changed: {', '.join(changes)}"
    if not has_content(target):
        return "its checkpoint is gone"
    try:
        if find_fisher(target, None) is not None:
            verify(target)
        if _identity(target) != record.made:
            return "its checkpoint is not what was made"
    except ConsolidateError as error:
        return f"its checkpoint is damaged: {error}"
    return None


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    words = {
        "checkpoint": "the checkpoint before it",
        "consolidate": "the version of consolidate",
        "command": "whether it is trained",
        "config": "the config",
        "module": "the source of the module",
        "data": "its data",
    }
    for key, what in words.items():
        if old.get(key) != new.get(key):
            yield what
    for name, then, now in _differences(old.get("evaluate", {}), new["evaluate"]):
        how = "is new" if then is None else "is left out" if now is None else "differs"
        yield f"the test data of {name} {how}"
    for name, then, now in _differences(old.get("options", {}), new["options"]):
        option = name.replace("_", "-")
        if is_data(name):
            yield option
        else:
            yield f"{option} ({_shown(then)} → {_shown(now)})"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def _shown(value: Any) -> str:
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _refuse_strangers(target: Path) -> None:
    """Refuse a folder that no run has made, before anything is done."""
    if has_content(target) and read_step_record(_record_path(target)) is None:
        raise InputError(
            f"{target} is there, and no run has made it: move it away, or choose another output "
            "folder"
        )


def _make(step: Step, place: Path | None, target: Path, made_from: dict[str, Any]) -> None:
    """Make a step's checkpoint, then its record."""
    record = _record_path(target)
    if not record.exists():  # so that a checkpoint that stands without its record is known as ours
        write_step_record(record, StepRecord(made_from, None))
    if step.task is None:
        weights = fresh_weights(
            step.options["model"], step.config or {}, int(step.options.get("seed", 0))
        )
        with replace_folder(target, overwrite=True) as staging:
            write_tensors(staging, weights, metadata={"format": "pt"})
            write_file(staging / "config.json", json.dumps(step.config, indent=2) + "\n")
    elif step.command == "fisher":
        assert place is not None
        fisher(
            place,
            step.task.data,
            task=step.task.name,
            output_dir=target,
            overwrite=True,
            add=step.add,
            **fisher_options(step.options),
        )
    else:
        assert place is not None
        finetune(
            place,
            step.task.data,
            task=step.task.name,
            output_dir=target,
            overwrite=True,
            evaluate=step.evaluate,
            fisher=step.fisher,
            **step.options,
        )
    write_step_record(record, StepRecord(made_from, _identity(target)))


def _record_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _matrix(checkpoint: Path) -> dict[str, Any] | None:
    matrix = ledger_matrix(read_ledger(checkpoint / "fisher" / LEDGER_NAME))
    return None if matrix is None else matrix_summary(matrix)


@contextmanager
def _saying_how_to_go_on(step: str) -> Iterator[None]:
    try:
        yield
    except ForgettingError:
        raise  # the same command would only forget again
    except BaseException:  # Ctrl-C and SIGTERM too
        LOG.info(
            "stopped in %s: what was done before it is kept, and the same command goes on with it",
            step,
        )
        raise


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a factory be found beside the run file, after all other places."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
