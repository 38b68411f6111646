"""What `consolidate run` does: a chain of tasks, each step made once from the same inputs."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from consolidate.chain.claims import claiming
from consolidate.chain.fingerprint import (
    asked,
    changes,
    checkpoint_content,
    data_content,
    module_content,
    versions,
)
from consolidate.chain.opening import find_fisher, named_base
from consolidate.chain.tasks import settled_merging
from consolidate.chain.up_to_date import find_output
from consolidate.commands.finetune import finetune
from consolidate.commands.finetune_options import check_options
from consolidate.commands.finetune_plan import plan_finetune
from consolidate.commands.fisher import fisher
from consolidate.commands.fisher_plan import plan_fisher
from consolidate.commands.run_labels import check_labels_of_run
from consolidate.commands.run_options import (
    OF_COMMAND,
    OPTIONS,
    fisher_options,
    of_training,
    read_options,
    without_estimation,
    without_penalty,
)
from consolidate.commands.verify import verify
from consolidate.data.benchmark_files import benchmark_content
from consolidate.fields import gather
from consolidate.models.factories import fresh_weights
from consolidate.options import FinetuneOptions, FisherOptions, RunOptions, VerifyOptions
from consolidate.results import RunResult, RunStep
from consolidate.training.loop import default_statistics
from consolidate.views.matrix import ledger_matrix, matrix_summary
from formats.atomic import has_content, replace_folder, write_file
from formats.benchmark import benchmark_task
from formats.checkpoint import CARD, Checkpoint, open_checkpoint, weight_records
from formats.digest import json_digest
from formats.errors import ConsolidateError, ForgettingError, InputError, UsageError
from formats.fisher_folder import LEDGER_NAME
from formats.fisher_json import read_ledger
from formats.hub import locate
from formats.rows import file_digest
from formats.run_file import RunFile, read_run_file
from formats.step_record import StepRecord, read_step_record, write_step_record
from formats.task_file import looks_like_hub_id, open_task, read_task_file
from formats.tensors import write_tensors

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class Fresh:
    """New weights for a chain to start from: what makes them."""

    factory: str
    config: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class Step:
    """One checkpoint of a run: where it goes, and how it is made."""

    target: Path
    makes: Fresh | FisherOptions | FinetuneOptions

    @property
    def name(self) -> str:
        """The name of the folder, such as ``02-news``."""
        return self.target.name

    @property
    def record(self) -> Path:
        """The file beside the folder that records what it was made from."""
        return self.target.with_name(f"{self.name}.json")


def run(options: RunOptions) -> RunResult:
    """Train a chain of tasks, one after the other, skipping the steps that are up to date.

    A step is up to date if its checkpoint is intact and was made from the same content: the
    checkpoint before it, data, test data, options and versions of programs. Times of files are
    ignored. An interrupted step resumes from its saved progress, unless its inputs changed.

    Returns:
        The steps with their status and the reason, the last checkpoint, and the accuracy matrix.

    Raises:
        InputError: The run file, a checkpoint or the data are not as expected, or a step's folder
            exists that no run has made.
        UsageError: Options contradict each other.
        NonFiniteError, ForgettingError: As for `finetune`.
    """
    run_file = read_run_file(Path(options.path), tuple(OPTIONS), OF_COMMAND)
    given = options.output_dir or run_file.output_dir
    if given is None:
        raise UsageError(
            f"{options.path}: no folder for the checkpoints: set output-dir there, or --output-dir"
        )
    output = Path(given)
    # Before any step's record is written. The claim of a step is its command's.
    claim = nullcontext() if options.dry_run else claiming(output, part="steps")
    with claim, _importable(run_file.path.absolute().parent):
        return _run(run_file, output, dry_run=options.dry_run, restart=options.restart)


def _run(run_file: RunFile, output: Path, *, dry_run: bool, restart: bool) -> RunResult:
    _check_data(run_file)
    start = None if run_file.start is None else locate(run_file.start, run_file.revision)
    steps = _plan(run_file, start, output)
    for step in steps:
        if has_content(step.target) and read_step_record(step.record) is None:
            raise InputError(
                f"{step.target} already exists and was not made by `consolidate run`: move it "
                "away, or choose another output folder"
            )
    if start is not None:
        _check_labels(run_file, start, steps)
    content_of = cache(data_content)
    wanted = {step.name: _asked(step, content_of) for step in steps}  # opens all data
    done: list[RunStep] = []
    undone = False
    for number, step in enumerate(steps, 1):
        described = wanted[step.name] if undone else _description(step, wanted[step.name])
        reason = _reason(step, described)
        if reason is None and not dry_run:  # the result of a dry run lists the steps
            LOG.info("%s: skipped, up to date", step.name)
        elif not dry_run:
            LOG.info("%s, step %d of %d: %s", step.name, number, len(steps), reason)
            try:
                _make(step, described, restart=restart)
            except ForgettingError:
                raise  # the same command would only forget again
            except BaseException:  # Ctrl-C and SIGTERM too
                LOG.info(
                    "stopped in %s: the steps before it are complete, and the same command resumes "
                    "with it",
                    step.name,
                )
                raise
        undone = undone or (dry_run and reason is not None)
        status: Any = "skipped" if reason is None else "to be done" if dry_run else "done"
        at = str(step.target)
        done.append({"step": step.name, "checkpoint": at, "reason": reason, "status": status})
    last = steps[-1].target
    ledger = last / "fisher" / LEDGER_NAME  # of a chain without any Fisher there is none
    known = ledger.is_file() and not undone
    matrix = ledger_matrix(read_ledger(ledger)) if known else None
    return {
        "status": "dry run" if dry_run else "done",
        "output_dir": str(output),
        "steps": done,
        "checkpoint": str(last),
        "accuracy_matrix": None if matrix is None else matrix_summary(matrix),
    }


def _check_data(run_file: RunFile) -> None:
    """Refuse data that do not exist before anything is downloaded or read."""
    where = run_file.path
    places = {f"{where}, [evaluate], {name}": data for name, data in run_file.evaluate.items()}
    for number, task in enumerate(run_file.tasks, 1):
        at = _place(run_file, number)
        places |= {f"{at}: data": task.data, f"{at}: evaluate": task.evaluate or ""}
    for place, data in places.items():
        with _located(place):
            if benchmark_task(data) is not None and not place.endswith(": data"):
                benchmark_content(data)  # refuses what is not there
            elif data and _is_missing(data):
                open_task(data)  # refuses it, with the names that are near


def _check_labels(run_file: RunFile, start: Path, steps: Sequence[Step]) -> None:
    """Refuse labels that a head will lack before the first task is trained."""
    source = open_checkpoint(start)
    if source.adapter is not None:
        return  # its config has no labels
    tasks = {
        _place(run_file, number): step.makes
        for number, step in enumerate(steps, 1)  # with a start, a step is a task
        if isinstance(step.makes, FinetuneOptions)
    }
    check_labels_of_run(source, tasks, _located)


def _place(run_file: RunFile, number: int) -> str:
    """Name the place of a task, counted from 1, in its run file."""
    return f"{run_file.path}, task {number} ({run_file.tasks[number - 1].name})"


def _is_missing(data: str) -> bool:
    """Whether data can only be a local file or folder, and do not exist."""
    if Path(data).suffix.lower() == ".toml" and Path(data).expanduser().is_file():
        data = read_task_file(Path(data).expanduser()).data
    path = Path(data).expanduser()
    may_be_on_hub = looks_like_hub_id(data) and path.suffix.lower() != ".toml"
    return not (path.exists() or may_be_on_hub)


def _plan(run_file: RunFile, start: Path | None, output: Path) -> list[Step]:
    """Give the steps in order, after all checks that are possible beforehand."""
    where, folder = str(run_file.path), run_file.path.parent
    with _located(f"{where}, [defaults]"):
        defaults = read_options(run_file.defaults, folder)
    steps, has_fisher, place = [], False, start
    if start is None:
        place = output / "00-start"
        steps.append(Step(place, _fresh(run_file, defaults)))
    else:
        has_fisher = _has_fisher(run_file, start)
    tests = {task.name: task.evaluate for task in run_file.tasks if task.evaluate is not None}
    seen: list[str] = []
    for number, task in enumerate(run_file.tasks, 1):
        at = _place(run_file, number)
        with _located(at):
            own = read_options(task.options, folder)
        seen.append(task.name)
        fisher_at = run_file.fisher if number == 1 else None
        evaluate = run_file.evaluate | {name: tests[name] for name in seen if name in tests}
        target = output / f"{number:02d}-{task.name}"
        free = own.get("penalty", "ewc" if has_fisher or number > 1 else "none") == "none"
        values = _values_of(own, defaults, free=free, has_fisher=has_fisher)
        if not evaluate:
            values.pop("evaluate_every", None)
        if free and not has_fisher and start is None and evaluate.keys() - {task.name}:
            # New weights know nothing that other test data could measure.
            values.setdefault("norm_statistics", default_statistics("none", old=False))
        given = {"checkpoint": place, "data": task.data, "output_dir": target, "task": task.name}
        options = gather(FinetuneOptions, values | given | {"overwrite": True})
        if task.train:
            gate = replace(options.gate, evaluate=dict(evaluate))
            penalty = replace(options.penalty, fisher=fisher_at)
            options = replace(options, gate=gate, penalty=penalty)
            with _located(at):  # refused before the first task is trained
                if penalty.penalty == "ewc" and not has_fisher:
                    raise UsageError(
                        "no task before it has a Fisher, which the penalty needs: leave no-fisher "
                        'out of them, or set penalty to "l2" or "none"'
                    )
                check_options(options)
                settled_merging(None, options.merging)
            steps.append(Step(target, options))
        else:
            if training := of_training(own):
                raise UsageError(
                    f"{at}: {min(training)} cannot be combined with train = false: leave it out"
                )
            if fisher_at is not None:
                raise UsageError(
                    f"{at}: train = false cannot be combined with fisher: leave it out, and name a "
                    "start with its own Fisher"
                )
            steps.append(Step(target, fisher_options(options, add=has_fisher)))
        trained_only = task.train and bool(values.get("no_fisher"))
        has_fisher, place = has_fisher or not trained_only, target
    return steps


def _values_of(
    own: Mapping[str, Any], defaults: Mapping[str, Any], *, free: bool, has_fisher: bool
) -> dict[str, Any]:
    """Combine a task's own options with those defaults that apply to it.

    Args:
        own: Its options.
        defaults: Those of all tasks.
        free: Whether it is trained without a penalty.
        has_fisher: Whether there is a Fisher before it.
    """
    kept = {"max_forgetting"} if has_fisher else set()  # there is something to forget
    if has_fisher and {**defaults, **own}.get("interpolate") == "auto":
        kept.add("validation")
    values = {**(without_penalty(defaults, keep=kept) if free else defaults), **own}
    measures = values.get("measure") or values.get("interpolation") == "fisher"
    if values.get("no_fisher") and not measures:
        return without_estimation(values, kept=own)
    return values


def _fresh(run_file: RunFile, defaults: Mapping[str, Any]) -> Fresh:
    """Describe the new weights that a run without a start begins with."""
    where, folder = str(run_file.path), run_file.path.parent
    if run_file.revision is not None or run_file.fisher is not None:
        raise UsageError(f"{where}: revision and fisher need a start: set start, or leave them out")
    with _located(_place(run_file, 1)):
        options = {**defaults, **read_options(run_file.tasks[0].options, folder)}
    if "model" not in options:
        raise UsageError(
            f"{where}: no model to start from: set start to a checkpoint, or model to a factory "
            "(PACKAGE.MODULE:FACTORY)"
        )
    return Fresh(options["model"], run_file.config or {}, options.get("seed", 0))


def _has_fisher(run_file: RunFile, start: Path) -> bool:
    """Return whether a start has a Fisher, or its base model; refuse one with a task of the run."""
    stored_at = find_fisher(start, run_file.fisher)
    if stored_at is None and (base := named_base(open_checkpoint(start))) is not None:
        return find_fisher(Path(base), None) is not None
    known = [t.name for t in read_ledger(stored_at / LEDGER_NAME).tasks] if stored_at else []
    for task in run_file.tasks:
        if task.name in known:
            raise InputError(
                f"{run_file.path}: the start {run_file.start} already has a task {task.name!r}: "
                "give the new one another name"
            )
    return stored_at is not None


@contextmanager
def _located(place: str) -> Iterator[None]:
    """Begin error messages with the place in the run file."""
    try:
        yield
    except (InputError, UsageError) as error:
        raise type(error)(f"{place}: {error}") from error


def _asked(step: Step, content_of: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Describe a step as far as known before the previous step is made."""
    makes = step.makes
    if isinstance(makes, Fresh):
        return {
            "command": "start",
            "versions": versions(),
            "config": makes.config,
            "module": module_content(makes.factory),
            "options": {"model": makes.factory, "seed": makes.seed},
        }
    return asked(makes, content_of(makes.data, makes.encoding.split), content_of)


def _description(step: Step, wanted: dict[str, Any]) -> dict[str, Any]:
    """Describe everything that a step is made from."""
    makes = step.makes
    # As a dry run, which does not check the target: that may be up to date.
    if isinstance(makes, FinetuneOptions):
        return plan_finetune(replace(makes, dry_run=True), again=True).description
    if isinstance(makes, FisherOptions):
        plan = plan_fisher(replace(makes, dry_run=True), Path(makes.checkpoint), again=True)
        return plan.description(plan.tasks)
    return wanted


def _identity(checkpoint: Path) -> dict[str, Any]:
    """Give the digests of a checkpoint: its tensors, its Fisher, and the files beside them.

    Those of the tensors are taken from the ledger, which `verify` checks.
    """
    source = open_checkpoint(checkpoint)
    stored_at = find_fisher(checkpoint, None)
    if stored_at is None:
        return checkpoint_content(source, None, weight_records(source.weights))
    ledger = stored_at / LEDGER_NAME
    return checkpoint_content(source, ledger, read_ledger(ledger).weights)


def _card_digest(checkpoint: Path) -> str | None:
    card = checkpoint / CARD
    return file_digest(card) if card.is_file() else None


def _reason(step: Step, described: Mapping[str, Any]) -> str | None:
    """Say why a step has to be done; None if it is up to date."""
    record = read_step_record(step.record)
    if record is None:
        return "not made before"
    if record.made is None:
        return "not finished"
    changed = [changes(record.made_from, described)]
    if "checkpoint" in record.made_from and "checkpoint" not in described:
        changed.insert(0, "checkpoint it starts from")  # a step before it is made again
    if any(changed):
        return f"changed: {'; '.join(filter(None, changed))}"
    if not has_content(step.target):
        return "its checkpoint is missing"
    try:
        if find_fisher(step.target, None) is not None:
            verify(VerifyOptions((step.target,)))
        found = _identity(step.target)
        if any(record.made.get(key) != value for key, value in found.items()):  # the card may
            return "its checkpoint was changed"
    except ConsolidateError as error:
        return f"its checkpoint is damaged: {error}"
    return None


def _make(step: Step, described: dict[str, Any], *, restart: bool) -> None:
    """Make a step's checkpoint, then its record."""
    record = read_step_record(step.record)
    unfinished = StepRecord(described, None, _replaced(step, record))
    # A step that was stopped just before it was recorded as made has nothing left to do.
    again = record is not None and record.made is not None
    if record != unfinished:
        # Saved progress has other inputs. And the record marks a checkpoint as made by a run.
        restart = True
        write_step_record(step.record, unfinished)
    makes = step.makes
    if isinstance(makes, Fresh):
        weights = fresh_weights(makes.factory, makes.config, makes.seed)
        with claiming(step.target), replace_folder(step.target, overwrite=True) as staging:
            write_tensors(staging, weights, metadata={"format": "pt"})
            write_file(staging / "config.json", json.dumps(makes.config, indent=2) + "\n")
    elif isinstance(makes, FisherOptions):
        fisher(replace(makes, saving=replace(makes.saving, restart=restart)), again=again)
    else:
        finetune(replace(makes, saving=replace(makes.saving, restart=restart)), again=again)
    made = _identity(step.target) | {"card": _card_digest(step.target)}
    write_step_record(step.record, StepRecord(described, made))


def _replaced(step: Step, record: StepRecord | None) -> dict[str, Any] | None:
    """Give what is recorded of the output to replace; refuse one with files that were added."""
    earlier = None if record is None else record.made or record.replaces
    if record is None or earlier is None or not has_content(step.target):
        return earlier
    try:
        found, damaged = _identity(step.target), False
    except ConsolidateError:
        found, damaged = checkpoint_content(Checkpoint(step.target, {}, {}), None, {}), True
    if record.made is None and not damaged:  # interrupted, perhaps after the output was replaced
        output, asked_for = find_output(step.target), json_digest(record.made_from)
        other = found["weights"] != earlier["weights"]
        if other if output is None else output.made_from == asked_for:
            return None
    card = _card_digest(step.target)
    if found["files"] != earlier["files"] or card != earlier.get("card", card):
        raise InputError(
            f"{step.target} has files that were added or changed since the step was made, and "
            "would be lost: move them away, or delete the folder"
        )
    return earlier


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Make modules beside the run file importable, after all other places."""
    absent = str(folder) not in sys.path  # where the folder of a script comes first
    if absent:
        sys.path.append(str(folder))
    try:
        yield
    finally:
        if absent:
            sys.path.remove(str(folder))
