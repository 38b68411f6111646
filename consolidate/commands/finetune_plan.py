"""What a fine-tuning run is about to do: its checkpoint, Fisher and data opened and checked."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from consolidate.chain.factors import (
    check_continued,
    check_structure,
    factors_of,
    settled_structure,
)
from consolidate.chain.fingerprint import Inputs
from consolidate.chain.opening import find_fisher, stored_fisher, with_base
from consolidate.chain.output import check_output, failed_folder
from consolidate.chain.tasks import settled_merging, task_name
from consolidate.chain.up_to_date import Output, find_output
from consolidate.commands.finetune_choice import (
    InterpolationPlan,
    SearchPlan,
    check_budget,
    check_held_out,
    plan_search,
    same_data,
)
from consolidate.commands.finetune_options import is_search
from consolidate.commands.generation_options import TASK
from consolidate.data.columns import columns_of
from consolidate.models.architectures import lacks_head
from consolidate.models.lora import Lora
from consolidate.models.objectives import settled_objective
from consolidate.options import Columns, FinetuneOptions, Recipe
from consolidate.training.forgetting import check_compared, check_gate
from consolidate.training.loop import default_statistics
from formats.atomic import is_mount, unreplaced
from formats.benchmark import benchmark_task
from formats.checkpoint import Checkpoint, check_finite, open_checkpoint
from formats.digest import json_digest
from formats.errors import InputError, UsageError
from formats.fisher_folder import LEDGER_NAME, StoredFisher
from formats.hub import FISHER, VALUES, commits_of, find_local, locate
from formats.rows import Rows
from formats.task_file import TaskFile, open_task

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class Opened(Inputs):
    """What a run reads, checked before anything is loaded."""

    protecting: StoredFisher | None  # what the penalty is made of: the chain's, or the base model's
    penalty_on: str | None  # "adapter" or "merged" where an adapter is trained with a penalty
    task: str
    objective: str | None
    columns: Columns
    to_measure: tuple[str, ...] = ()  # what --protect-self measures before the rest is planned

    @property
    def has_fisher(self) -> bool:
        """Whether the penalty has a Fisher, or will have."""
        return self.protecting is not None or bool(self.to_measure)

    @property
    def uses_factors(self) -> bool:
        """Whether the penalty, if it is of the Fisher, is made of its factors."""
        stored = factors_of(self.protecting) is not None
        return self.structure == "inputs" and (stored or bool(self.to_measure))

    @property
    def old_tasks(self) -> list[str]:
        """The names of the tasks of the chain so far."""
        return [*(task.name for task in self.tasks), *self.to_measure]

    def commits(self) -> dict[str, str]:
        """Give the commits of what came from the Hub."""
        return commits_of(self.source.path, None if self.before is None else self.before.folder)


@dataclass(frozen=True)
class Plan:
    """What a run will do, after every check that needs no model."""

    options: FinetuneOptions
    opened: Opened
    recipe: Recipe  # with `norm_statistics` settled
    evaluate: dict[str, str | Path]
    validation: dict[str, str | Path]
    search: SearchPlan | None
    interpolation: InterpolationPlan | None
    lora: Lora | None
    there: Output | None  # the output at the target, with what it was made from
    replay: tuple[TaskFile, Rows] | None = None
    measured: StoredFisher | None = None  # the chain with its last task measured by this run

    @property
    def before(self) -> StoredFisher | None:
        """The chain that the new task is merged with."""
        return self.measured or self.opened.before

    @property
    def target(self) -> Path:
        """Where the new checkpoint goes."""
        return Path(self.options.output_dir)

    @property
    def benchmarks(self) -> dict[str, str | Path]:
        """The benchmarks to evaluate on, by name."""
        named = self.evaluate.items()
        return {name: data for name, data in named if benchmark_task(data) is not None}

    @property
    def old_tasks(self) -> list[str]:
        """What may not be forgotten: the tasks of the chain so far, and other benchmarks."""
        known = [*self.opened.old_tasks, self.opened.task]
        return [*known[:-1], *(name for name in self.benchmarks if name not in known)]

    @cached_property
    def description(self) -> dict[str, Any]:
        """All that the result depends on, JSON-ready."""
        options, opened, own = self.options, self.opened, self.options.penalty.protect_self
        content = opened.content(
            None if opened.before is None or own else opened.before.folder / LEDGER_NAME,
            None if opened.protecting is opened.before else opened.protecting,
        )
        if own:  # the Fisher follows from the rest, before it is measured too
            content["fisher"] = {"protect_self": own}
        statistics = self.recipe.norm_statistics
        return opened.describe(options, content, task=opened.task, norm_statistics=statistics)

    def made_from(self) -> str:
        """Give the digest of the description."""
        return json_digest(self.description)

    def check_target(self) -> None:
        """Refuse a target that is in the way, or the folder for a run that forgets too much."""
        source, overwrite = self.opened.source, self.options.saving.overwrite
        check_output(self.target, source, overwrite=overwrite, whole=True)
        if self.options.gate.max_forgetting is None:
            return
        if is_mount(self.target.resolve()):
            raise InputError(
                f"{self.target} is a mount point, and --max-forgetting saves a failed run beside "
                "the output: choose a folder inside it"
            )
        try:
            check_output(failed_folder(self.target), source, overwrite=overwrite, whole=True)
        except InputError as error:
            raise type(error)(f"--max-forgetting cannot save a failed run: {error}") from None


def plan_finetune(options: FinetuneOptions, *, again: bool = False) -> Plan:
    """Open checkpoint, Fisher and data, and refuse what would fail later.

    With `again` an output that is up to date does not count; with a dry run none does.
    """
    adapter, recipe, target = options.adapter, options.recipe, Path(options.output_dir)
    lora = None
    if adapter.lora_rank is not None:
        lora = Lora(adapter.lora_rank, adapter.lora_targets, adapter.lora_alpha)
    there = None if again or options.dry_run else find_output(target)
    place = target if there is None and not options.dry_run else None
    opened = unreplaced(Path(options.checkpoint), lambda: _open(options, lora, place))
    _check_structure(options, opened)
    if opened.penalty_on == "merged" and recipe.penalty_step == "proximal":
        raise UsageError(
            "--penalty-step proximal cannot be combined with the penalty on merged weights, which "
            "is not separable in A and B: use gradient"
        )
    old, evaluate = opened.old_tasks, dict(options.gate.evaluate or {})
    if recipe.norm_statistics is None:
        base = opened.source.base
        base_has_fisher = base is not None and find_fisher(base.path, None) is not None
        something_old = bool(old or evaluate.keys() - {opened.task} or base_has_fisher)
        statistics = default_statistics(options.penalty.penalty, old=something_old)
        recipe = replace(recipe, norm_statistics=statistics)
    _note_unnamed_tests(evaluate, opened)
    validation, max_forgetting = dict(options.search.validation or {}), options.gate.max_forgetting
    search, interpolation = None, _plan_interpolation(options, opened)
    if is_search(options):
        search = plan_search(
            options.search, max_forgetting=max_forgetting, new=opened.task, ledger=old
        )
    _check_measure(options, opened)
    if options.gate.compare_none:
        check_compared(old, evaluate)
    replay = _open_replay(options, opened, evaluate)
    replayed = options.replaying.replay
    others = [options.data, *evaluate.values(), *([] if replayed is None else [replayed])]
    check_held_out(validation, other_data=others, new=opened.task, ledger=old)
    if options.search.budget is not None:
        check_budget(validation, new=opened.task, ledger=old)
    plan = Plan(
        options=options,
        opened=opened,
        recipe=recipe,
        evaluate=evaluate,
        validation=validation,
        search=search,
        interpolation=interpolation,
        lora=lora,
        there=there,
        replay=replay,
    )
    if max_forgetting is not None:
        if not set(old) & set(evaluate):  # whatever benchmarks there are
            evaluate |= {name: validation[name] for name in old if name in validation}
        check_gate(plan.old_tasks, evaluate)
    return plan


def _note_unnamed_tests(evaluate: Mapping[str, str | Path], opened: Opened) -> None:
    """Log which test data are of no task of the ledger: nothing says what they had before."""
    known = {*opened.old_tasks, opened.task}
    found = [n for n, data in evaluate.items() if n not in known and benchmark_task(data) is None]
    if opened.old_tasks and found:
        LOG.info(
            "--evaluate: %s: not in the ledger (%s): name test data by their task, as in %s=DATA",
            ", ".join(found),
            ", ".join(opened.old_tasks),
            opened.old_tasks[0],
        )


def _check_structure(options: FinetuneOptions, opened: Opened) -> None:
    """Refuse a structure that the Fisher lacks, and what cannot be combined with it."""
    structure = opened.structure
    check_structure(structure, options.estimation, options.parameters, prefix="fisher-")
    of_fisher = options.penalty.penalty == "ewc" and opened.has_fisher
    if options.curvature.structure == "inputs" and of_fisher and not opened.uses_factors:
        assert opened.protecting is not None
        raise InputError(
            f"{opened.protecting.folder} has no factors, which --structure inputs needs: measure "
            "it again with `consolidate fisher --structure inputs`, or leave --structure out"
        )
    if structure == "inputs":
        check_continued(opened.before)
    if of_fisher and opened.uses_factors and options.recipe.penalty_step == "proximal":
        raise UsageError(
            "--penalty-step proximal cannot be combined with --structure inputs, whose penalty is "
            "not separable: use gradient, or give --structure diagonal"
        )


def _check_measure(options: FinetuneOptions, opened: Opened) -> None:
    """Refuse to measure any task but the last, if it was not measured."""
    if not options.measuring.measure:
        return
    name, *others = options.measuring.measure
    if others:
        raise UsageError(f"--measure {others[0]}: expected one task, the last of the ledger")
    if opened.before is None:
        raise InputError(
            f"--measure {name}: {opened.source.path} has no ledger: measure its first task with "
            "`consolidate fisher`"
        )
    last = opened.tasks[-1]
    if last.name == name and not last.measured:
        return
    records = {task.name: task for task in opened.tasks}
    if name in records and not records[name].measured:
        why = f"the task can no longer be measured, as {last.name} came after it"
    elif last.measured:
        why = f"the last task of the ledger, {last.name}, was measured already"
    else:
        raise UsageError(f"--measure {name}: expected {last.name}, the task that was not measured")
    raise UsageError(f"--measure {name}: {why}: leave --measure out")


def _open_replay(
    options: FinetuneOptions, opened: Opened, evaluate: Mapping[str, str | Path]
) -> tuple[TaskFile, Rows] | None:
    """Open the rows that are replayed, if any; report test data that are trained on this way."""
    data = options.replaying.replay
    if data is None:
        return None
    task_file, rows = open_task(data)
    if same_data(data, options.data) or _same_rows(task_file, rows, opened):
        raise UsageError(f"--replay {data}: expected rows of earlier tasks, found the new task's")
    for name, tested in evaluate.items():
        if same_data(data, tested):
            LOG.info(
                "--evaluate %s=%s: these rows are replayed, so the score is too high", name, tested
            )
    return task_file, rows


def _same_rows(task_file: TaskFile, rows: Rows, opened: Opened) -> bool:
    """Return whether rows have the content of the new task's, and no other columns are named."""
    named = task_file.columns().items()
    return (
        len(rows) == len(opened.rows)  # which is sooner known
        and rows.digest() == opened.rows.digest()
        and all(getattr(opened.columns, role) == name for role, name in named)
    )


def _plan_interpolation(options: FinetuneOptions, opened: Opened) -> InterpolationPlan | None:
    """Plan which α is taken, or how it is chosen; None where nothing is interpolated."""
    alpha, method = options.interpolating.interpolate, options.interpolating.interpolation
    budget = options.search.budget
    if alpha is None and budget is None:
        return None
    if method == "fisher" and not opened.old_tasks:
        raise InputError(
            f"--interpolation fisher needs the Fisher of earlier tasks, and {opened.source.path} "
            "has none: run `consolidate fisher` first, or leave it out"
        )
    held_out = options.search.validation or {}
    old = [name for name in opened.old_tasks if name in held_out]
    chosen = None if isinstance(alpha, str) else alpha
    return InterpolationPlan(chosen, method, opened.task, old, budget)


def _open(options: FinetuneOptions, lora: Lora | None, target: Path | None) -> Opened:
    """Open what is read; refuse a target that is in the way as early as possible."""
    penalty, asked_source = options.penalty, options.source
    kind, fisher = penalty.penalty, penalty.fisher
    folder = locate(
        options.checkpoint, asked_source.revision, without=() if fisher is None else FISHER
    )
    source = open_checkpoint(folder)
    if source.adapter is not None and fisher is not None:  # beside it, its own tasks go on
        folder = locate(options.checkpoint, asked_source.revision)
    penalty_on = _penalty_on(options, source, lora)
    needed = penalty_on == "merged" and kind == "ewc" and fisher is None
    source = with_base(source, asked_source.base_model, without=() if needed else VALUES)
    if target is not None:
        check_output(target, source, overwrite=options.saving.overwrite, whole=True)
    of_base = source.base is not None and penalty_on == "merged"
    stored_at = find_fisher(folder, None if of_base else fisher)
    before = None if stored_at is None else stored_fisher(stored_at, source)
    protecting, where = before, (folder, options.checkpoint)
    at = f" --revision {asked_source.revision}" if asked_source.revision else ""
    if of_base and kind == "ewc":
        assert source.base is not None
        place = find_fisher(source.base.path, fisher)
        protecting = None if place is None else stored_fisher(place, source.base)
        where = (source.base.path, asked_source.base_model or source.base.path)
        at = ""
    objective = asked_source.objective
    to_measure = () if penalty.protect_self is None else (TASK,)
    if protecting is None and kind == "ewc" and not to_measure:
        if asked_source.model is None:
            _check_head(source, objective)
        itself = ""
        if _generates(source):
            itself = ", or measure it on texts it generates with --protect-self N"
        to = "" if find_local(where[1]).is_dir() else " --output-dir DIR"
        kind_of_task = str(objective or settled_objective(source.config))
        # Those of tokens say which of them count, and texts have none.
        of_tokens = kind_of_task.endswith(("-lm", "token-classification"))
        labels = "" if of_tokens else " (labels are not needed)"
        raise InputError(
            f"{where[0]} holds no Fisher: run `consolidate fisher {where[1]}{at} --data "
            f"OLD_DATA{to}` first{labels}, or name one with --fisher{itself}; without old data: "
            "--penalty l2, or --penalty none --interpolate auto"
        )
    merging = settled_merging(before, options.merging)
    task_file, rows = open_task(options.data, split=options.encoding.split)
    task = task_name(options.task or task_file.name, rows.name, before)
    check_finite(source.weights, folder)  # reads them all
    return Opened(
        source=source,
        before=before,
        protecting=protecting,
        penalty_on=penalty_on,
        task_file=task_file,
        rows=rows,
        task=task,
        objective=objective or task_file.objective,
        columns=columns_of(options.encoding.columns, task_file.columns()),
        merging=merging,
        structure=settled_structure(options.curvature.structure, before or protecting),
        to_measure=to_measure,
    )


def _check_head(source: Checkpoint, objective: str | None) -> None:
    """Refuse a model of transformers without a head, such as a bare encoder."""
    kind = (source.config.get("architectures") or [None])[0]
    if objective is not None and lacks_head(source, objective):
        raise InputError(
            f"{source.path} has no head for {objective} yet: train a first task with --penalty none"
        )
    if objective is None and kind and settled_objective(source.config) is None:
        raise InputError(
            f"{source.path} is a {kind}, which has no head for a task yet: train a first task with "
            "--penalty none --objective NAME"
        )


def _generates(source: Checkpoint) -> bool:
    """Return whether a checkpoint's config names a causal language model."""
    classes = source.config.get("architectures") or ()
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes)


def _penalty_on(options: FinetuneOptions, source: Checkpoint, lora: Lora | None) -> str | None:
    """Decide which weights are penalized where an adapter is trained."""
    given, kind = options.penalty.penalty_on, options.penalty.penalty
    if lora is not None and source.adapter is not None:
        raise UsageError(f"{source.path} is an adapter already: leave --lora-rank out")
    if lora is None and source.adapter is None:
        if given is not None:
            raise UsageError(
                f"--penalty-on {given} is for adapters: use it with --lora-rank, or with a "
                "checkpoint that is an adapter"
            )
        return None
    if kind == "none":
        if given is not None:
            raise UsageError("--penalty-on cannot be combined with --penalty none: leave it out")
        return None
    if given == "adapter" and lora is not None and kind == "ewc":
        raise UsageError(
            "--penalty-on adapter needs the Fisher of an adapter, and a fresh one has none: start "
            "from an adapter that `consolidate fisher` has measured, or use --penalty-on merged"
        )
    own = source.adapter is not None and find_fisher(source.path, None) is not None
    return given or ("adapter" if own else "merged")
