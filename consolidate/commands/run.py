"""What `consolidate run` does: a chain of tasks, each step made once from the same content."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from consolidate.chain.claims import claiming
from consolidate.chain.fingerprint import (
    checkpoint_content,
    data_content,
    differences,
    module_content,
    plain,
)
from consolidate.chain.opening import find_fisher
from consolidate.chain.tasks import merging_options
from consolidate.commands.finetune import finetune
from consolidate.commands.finetune_run import Recipe, check_options
from consolidate.commands.fisher import fisher
from consolidate.commands.run_options import (
    effective,
    fisher_options,
    is_data,
    measuring_options,
    option_names,
    parameters_of,
    read_options,
    without_penalty,
)
from consolidate.commands.verify import verify
from consolidate.models.factories import fresh_weights
from consolidate.training.loop import default_statistics
from consolidate.views.matrix import ledger_matrix, matrix_summary
from formats.atomic import has_content, replace_folder, write_file
from formats.checkpoint import open_checkpoint, weight_records
from formats.errors import ConsolidateError, ForgettingError, InputError, UsageError
from formats.fisher_folder import LEDGER_NAME
from formats.fisher_json import read_ledger
from formats.hub import locate
from formats.run_file import RunFile, RunTask, read_run_file
from formats.step_record import StepRecord, read_step_record, write_step_record
from formats.tensors import write_tensors

LOG = logging.getLogger("consolidate")
_PARAMETERS = parameters_of(finetune, fisher)


@dataclass(frozen=True)
class Step:
    """One checkpoint of a run.

    Attributes:
        name: That of its folder, such as ``02-news``.
        command: ``start`` makes fresh weights, ``fisher`` measures, ``finetune`` trains.
        options: Of `finetune`, by parameter name.
        task: None for the start.
        evaluate: Data to measure, by name.
        ahead: Names among them of tasks that are not learned yet.
        config: Of the start: the contents of its config.json.
        fisher: Where the Fisher is that the step starts with, if not beside the weights.
        add: Whether there is a Fisher to which a task that is only measured is added.
    """

    name: str
    command: str
    options: dict[str, Any]
    task: RunTask | None = None
    evaluate: dict[str, str] | None = None
    ahead: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    fisher: str | None = None
    add: bool = False


def run(
    path: str | Path,
    *,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    restart: bool = False,
) -> dict[str, Any]:
    """Train a chain of tasks, one after the other, skipping what is done already.

    A step is done if its checkpoint is whole and was made from the same content: the checkpoint
    before it, data, test data, options and version of this program. Times of files mean nothing.
    A step that was broken off goes on from what was kept of it, unless it is to be made from
    something else now.

    Args:
        path: The run file; docs/run.md tells what it may say.
        output_dir: The folder of all checkpoints; as the file says unless given.
        dry_run: Only say what would be done or skipped, and why.
        restart: Throw away what was kept of a step that was broken off.

    Returns:
        The steps with what was done and why, the last checkpoint, and the accuracy matrix.

    Raises:
        InputError: Something in the file, a checkpoint or the data does not fit, or a folder is in
            the way that no run has made.
        UsageError: Options contradict each other.
        NonFiniteError: As `finetune`, as is ForgettingError.
    """
    run_file = read_run_file(Path(path), option_names(_PARAMETERS))
    given = run_file.output_dir if output_dir is None else Path(output_dir)
    if given is None:
        raise UsageError(f"{path}: say where the checkpoints go: output-dir = … or --output-dir")
    # Before any step's record is written. The claim of a step is its command's.
    claim = nullcontext() if dry_run else claiming(given, part="steps")
    with claim, _importable(run_file.path.absolute().parent):
        return _run(run_file, given, dry_run=dry_run, restart=restart)


def _run(run_file: RunFile, output: Path, *, dry_run: bool, restart: bool) -> dict[str, Any]:
    start = None if run_file.start is None else locate(run_file.start, run_file.revision)
    steps = _plan(run_file, start)
    for step in steps:
        _refuse_strangers(output / step.name)
    of_data = cache(data_content)
    # All data are opened before the work.
    contents = {step.name: _content(step, of_data) for step in steps}
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
                _make(step, place, target, made_from, restart=restart)
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
    defaults = read_options(_PARAMETERS, run_file.defaults, folder, f"{where}, [defaults]")
    steps = []
    has_fisher = False
    if start is None:
        if run_file.revision is not None or run_file.fisher is not None:
            raise UsageError(f"{where}: revision and fisher are those of a start: name it")
        own = read_options(_PARAMETERS, run_file.tasks[0].options, folder, f"{where}, task 1")
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
                raise InputError(
                    f"{where}: {run_file.start} has learned a task {task.name!r} already: give "
                    "the new one another name"
                )
    tests = {task.name: task.evaluate for task in run_file.tasks if task.evaluate is not None}
    seen: list[str] = []
    for number, task in enumerate(run_file.tasks, 1):
        place = f"{where}, task {number} ({task.name})"
        own = read_options(_PARAMETERS, task.options, folder, place)
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
            if training := own.keys() - measuring_options(_PARAMETERS, own).keys():
                option = min(training).replace("_", "-")
                raise UsageError(f"{place}: {option} has no meaning with train = false")
            if first_fisher is not None:
                raise UsageError(f"{place}: with train = false a start has its Fisher beside it")
            options = measuring_options(_PARAMETERS, options)
        steps.append(
            Step(
                name=f"{number:02d}-{task.name}",
                command="finetune" if task.train else "fisher",
                options=options,
                task=task,
                evaluate=evaluate if task.train else None,
                # Fresh weights have learned nothing that other data could be of.
                ahead=tuple(
                    evaluate if start is None and not has_fisher else sorted(tests.keys() - seen)
                ),
                fisher=first_fisher,
                add=has_fisher,
            )
        )
        has_fisher = True
    return steps


def _check_training(options: Mapping[str, Any], where: str) -> None:
    """Refuse options of a later task before the first one is trained."""
    values = {**_PARAMETERS.defaults, **options}
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


def _content(step: Step, of_data: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Give what a step is made from beside the checkpoint before it, told by content."""
    options = {}
    for name, value in effective(_PARAMETERS, step.options).items():
        if is_data(_PARAMETERS, name):
            named = value if isinstance(value, Mapping) else {"": value}
            value = {key: of_data(spec) for key, spec in named.items()}
        options[name] = plain(value)
    if step.task is not None and step.command == "finetune":
        others = set(step.evaluate or ()) - {step.task.name, *step.ahead}
        options["norm_statistics"] = step.options.get("norm_statistics") or default_statistics(
            step.options.get("penalty", "ewc"), old=step.add or bool(others)
        )
    return {
        "consolidate": version("consolidate-ewc"),
        "command": step.command,
        "config": step.config,
        "module": module_content(step.options.get("model")),
        "data": step.task and of_data(step.task.data, step.options.get("split")),
        "evaluate": {name: of_data(spec) for name, spec in (step.evaluate or {}).items()},
        "options": options,
    }


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
    return checkpoint_content(source, ledger, records)


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
    for name, then, now in differences(old.get("evaluate", {}), new["evaluate"]):
        how = "is new" if then is None else "is left out" if now is None else "differs"
        yield f"the test data of {name} {how}"
    for name, then, now in differences(old.get("options", {}), new["options"]):
        option = name.replace("_", "-")
        if is_data(_PARAMETERS, name):
            yield option
        else:
            yield f"{option} ({_shown(then)} → {_shown(now)})"


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


def _make(
    step: Step, place: Path | None, target: Path, made_from: dict[str, Any], *, restart: bool
) -> None:
    """Make a step's checkpoint, then its record."""
    record = _record_path(target)
    begun = StepRecord(made_from, None)
    if read_step_record(record) != begun:
        # What was kept is of something else. And a checkpoint without its record is known as ours.
        restart = True
        write_step_record(record, begun)
    if step.task is None:
        weights = fresh_weights(
            step.options["model"], step.config or {}, int(step.options.get("seed", 0))
        )
        with claiming(target), replace_folder(target, overwrite=True) as staging:
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
            restart=restart,
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
            evaluate_ahead=step.ahead,
            fisher=step.fisher,
            restart=restart,
            **step.options,
        )
    write_step_record(record, StepRecord(made_from, _identity(target)))


def _record_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _matrix(checkpoint: Path) -> Any:
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
