"""What `consolidate fisher` does, without the command line: read, measure, write."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch.distributed import ProcessGroup

from consolidate.chain.claims import claiming, refuse_changed
from consolidate.chain.elsewhere import Origin, open_origin, refuse_untrained
from consolidate.chain.factors import check_continued, check_structure, settled_structure
from consolidate.chain.fingerprint import Inputs
from consolidate.chain.heads import check_labels
from consolidate.chain.opening import stored_fisher, with_base
from consolidate.chain.output import bytes_of, check_output, output_bytes
from consolidate.chain.resume import KeptPass
from consolidate.chain.tasks import (
    Chain,
    Encoded,
    add_task,
    check_names_to_be,
    pending_task,
    settled_merging,
    task_name,
    with_structure,
)
from consolidate.chain.up_to_date import Output, cached, find_output, recorded_fisher
from consolidate.commands.generation import (
    check_generation,
    first_texts,
    generate_sample,
    generated_of,
    lacks_texts,
    open_source,
)
from consolidate.commands.measurement import (
    encoded_as,
    encoding_record,
    fisher_summary,
    kept_work,
    log_notes,
    measure_fisher,
    of_own_labels,
    pass_cost,
    settled_estimation,
    settled_on_texts,
)
from consolidate.data.columns import columns_of
from consolidate.data.encoding import encode, log_images
from consolidate.data.examples import Examples, subset
from consolidate.data.generation import Texts, plan_texts
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.models.adapters import load
from consolidate.models.model import Model
from consolidate.options import Columns, FisherOptions, Merging
from consolidate.results import (
    FisherDone,
    FisherDryRun,
    FisherResult,
    GenerationCost,
    MeasuredFisher,
)
from consolidate.runtime import shards
from consolidate.runtime.devices import best_device, dtype_of_name
from consolidate.runtime.distributed import (
    all_processes,
    as_one,
    from_first,
    is_first,
    shards_among,
)
from consolidate.runtime.progress import seconds_of, start_timing
from consolidate.views.output_card import renew_card
from formats.atomic import partial_path, replace_folder
from formats.checkpoint import Checkpoint, check_finite, open_checkpoint, write_checkpoint
from formats.checkpoint_files import check_link
from formats.digest import json_digest
from formats.errors import ConsolidateError, InputError, UsageError
from formats.fisher_folder import (
    LEDGER_NAME,
    StoredFisher,
    check_intact,
    read_fisher,
)
from formats.fisher_json import Generated, Ledger, TaskRecord, read_ledger
from formats.hub import FISHER, commits_of, locate
from formats.rows import file_digest

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class Plan(Inputs):
    """What a pass will do, after every refusal that needs no model."""

    options: FisherOptions
    folder: Path  # of the checkpoint
    there: Output | None  # output at the target with a record of what it was made from
    origin: Origin | None = None  # what another program trained the checkpoint from
    completes: bool = False  # the last task of the chain is the one to measure
    alone: Path | None = None  # where the Fisher goes, if neither beside its weights nor with them

    @property
    def in_place(self) -> bool:
        """Whether the Fisher is written into its own checkpoint."""
        return self.options.output_dir is None

    @property
    def output(self) -> Path:
        """The checkpoint that the Fisher is written to."""
        return self.folder if self.in_place else Path(str(self.options.output_dir))

    @property
    def target(self) -> Path:
        """The folder that is made or replaced."""
        beside = self.output / "fisher" if self.in_place else self.output
        return self.alone or beside

    @property
    def replaces(self) -> bool:
        """Whether an existing Fisher is replaced by one that has its tasks too."""
        return self.options.saving.overwrite or (
            self.in_place and (self.options.add or self.completes)
        )

    @property
    def columns(self) -> Columns:
        """The columns of the data by role."""
        return columns_of(self.options.encoding.columns, self.task_file.columns())

    @property
    def task(self) -> str:
        """The task's name."""
        others = None if self.completes else self.before
        if self.origin is not None:
            others = self.origin.stored
        return task_name(self.options.task or self.task_file.name, self.rows.name, others)

    @property
    def earlier(self) -> list[TaskRecord]:
        """The tasks before this one."""
        if self.origin is not None:
            return self.origin.stored.ledger.tasks
        return self.tasks[:-1] if self.completes else self.tasks

    def description(self, tasks: Sequence[TaskRecord]) -> dict[str, Any]:
        """Describe all that the result is made from, given the tasks before it."""
        name = task_name(self.options.task or self.task_file.name, self.rows.name, None)
        content = self.content(None) | {"fisher": [asdict(task) for task in tasks]}
        if self.origin is not None:
            content["after"] = file_digest(self.origin.stored.folder / LEDGER_NAME)
        return self.describe(self.options, content, task=name)

    def made_of(self) -> dict[str, Any]:
        """Describe what an existing output would be made from."""
        added = self.in_place and self.options.add and not self.completes
        earlier = self.earlier[:-1] if added else self.earlier  # its own task is the last
        return self.description(earlier)

    def made_from(self) -> str:
        """Give the digest of what an existing output would be made from."""
        return json_digest(self.made_of())

    def without_module(self) -> dict[str, Any]:
        """Describe the same without the module, which saved progress describes as it is loaded."""
        return {key: value for key, value in self.made_of().items() if key != "module"}

    def check_target(self) -> None:
        """Refuse an existing target that must not be replaced."""
        whole = not self.in_place
        if not whole:
            check_link(self.folder, self.folder / "fisher")  # which readers refuse
        check_output(self.target, self.source, overwrite=self.replaces, whole=whole)

    def afresh(self) -> "Plan":
        """Give the plan without a task that turned out to be measured already."""
        if not self.completes or pending_task(self.before) is not None:
            return self
        merging = settled_merging(None, self.options.merging)
        structure = settled_structure(self.options.curvature.structure, None)
        return replace(self, before=None, merging=merging, structure=structure, completes=False)


@as_one
def fisher(options: FisherOptions, *, again: bool = False) -> FisherResult:
    """Measure the Fisher diagonal of a checkpoint on a task's data and store it beside the weights.

    F_i = (1/N) Σ_x E_{y ~ p(y|x, θ)} [(∂ log p(y|x, θ)/∂θ_i)²], summed over units of each example.

    Returns:
        Folder, task, counts, and the Fisher's trace with its relative standard error by parameter;
        with `dry_run`, the estimated cost. A Fisher that is up to date is kept, and the ``status``
        is ``cached``.

    Raises:
        InputError: The checkpoint or the data are not as expected.
        UsageError: The options contradict each other or the checkpoint.
        NonFiniteError: NaN or infinity in the weights or in the Fisher.
    """
    check_generation(options)
    cut = shards_among(shard=options.parameters.shard, check=options.estimation.check)
    folder = _find_checkpoint(options)
    output = folder if options.output_dir is None else Path(options.output_dir)
    part = "fisher" if options.output_dir is None else None
    with nullcontext() if options.dry_run else claiming(output, part=part):
        again = again or lacks_texts(options.generation)
        plan = plan_fisher(options, folder, again=again)
        if (done := cached(plan.there, plan.made_from)) is not None:
            kept_work(options, plan.target, plan.without_module, 0).remove_own()
            if options.generation.save_generated is not None:
                LOG.info("%s exists, and is left as it is", options.generation.save_generated)
            return _result(plan, "cached", done.ledger, _recorded(done.ledger))
        return measure(plan.afresh(), cut)


def measure(plan: Plan, cut: ProcessGroup | None) -> FisherResult:
    """Do what a plan says, sharded among the processes of `cut`; with a dry run only estimate."""
    options, group = plan.options, all_processes()
    if not options.dry_run:
        plan.check_target()
        if is_first(group):
            _ = plan.records  # digests of what is measured, even if the files change meanwhile
    _ = plan.task  # refuse a name that the chain already has before anything is loaded
    model, encoded, module = _load(plan, cut)
    if options.dry_run:
        return _dry_run(plan, model, encoded)
    chain: Chain | None = plan.before if plan.origin is None else plan.origin.chain(model)
    needed = output_bytes(plan.source, whole=not plan.in_place)
    # Neither its weights nor its factory's file determine what the module is made of.
    of_module = {"module": module}
    work = kept_work(
        options, plan.target, lambda: plan.description(plan.earlier) | of_module, needed
    )
    found = work.start()
    start_timing()
    how: dict[str, Any] = {"task": plan.task, "seed": options.seed, "structure": plan.structure}
    examples: Examples
    generated = None
    if isinstance(encoded, Texts):
        estimation = settled_on_texts(options.estimation, model, unchanged=encoded.unchanged)
        examples, generated, kept = generate_sample(
            model,
            encoded,
            plan.rows,
            options.generation,
            estimation,
            work=work,
            found=found,
            digests=options.saving.data_digest,
            overwrite=options.saving.overwrite,
        )
        diagonal = of_own_labels(measure_fisher(model, examples, estimation, **how, kept=kept))
    else:
        examples, kept = encoded, KeptPass(work, found)
        estimation = settled_estimation(options.estimation, model, encoded)
        diagonal = measure_fisher(model, encoded, estimation, **how, kept=kept)
    result = None
    if is_first(group):
        result = _write(plan, model, examples, diagonal, chain, generated)
    result = from_first(result, group)
    work.remove()
    return result


def measure_last(
    options: FisherOptions,
    source: Checkpoint,
    before: StoredFisher,
    folder: Path,
    cut: ProcessGroup | None,
) -> StoredFisher:
    """Measure the last task of a chain, which has no Fisher, and write the Fisher to `folder`.

    One that was written there before an interruption is taken, unless that is refused.
    """
    task_file, rows = open_source(options)
    plan = Plan(
        source=source,
        before=before,
        task_file=task_file,
        rows=rows,
        merging=settled_merging(before, Merging()),
        structure=settled_structure(options.curvature.structure, before),
        options=options,
        folder=source.path,
        there=None,
        completes=True,
        alone=folder,
    )
    _measure_once(plan, cut)
    return read_fisher(folder)


def measure_self(
    options: FisherOptions, source: Checkpoint, folder: Path, cut: ProcessGroup | None
) -> None:
    """Measure a language model on texts that it generates, and write the Fisher to `folder`.

    One that was written there before an interruption is taken, unless that is refused.
    """
    check_generation(options)
    task_file, rows = open_source(options)
    plan = Plan(
        source=source,
        before=None,
        task_file=task_file,
        rows=rows,
        merging=settled_merging(None, options.merging),
        structure=_settled_structure(options, None, completes=False),
        options=options,
        folder=source.path,
        there=None,
        alone=folder,
    )
    _measure_once(plan, cut)


def _measure_once(plan: Plan, cut: ProcessGroup | None) -> None:
    if plan.options.saving.restart or not _is_written(plan):
        measure(plan, cut)


def _is_written(plan: Plan) -> bool:
    """Return whether the Fisher alone is there, whole and made from the same."""
    try:
        stored = read_fisher(plan.target)
        if stored.ledger.tasks[-1].made_from != plan.made_from():
            return False
        check_intact(stored)
    except ConsolidateError:
        return False
    LOG.info("%s was measured before the interruption", plan.task)
    return True


def _find_checkpoint(options: FisherOptions) -> Path:
    """Find the checkpoint's folder, after refusing options that contradict each other."""
    in_place = options.output_dir is None
    if options.after is not None and options.add:
        raise UsageError(
            "--after cannot be combined with --add: merge with the tasks of one checkpoint"
        )
    if in_place and options.add and options.saving.overwrite:
        raise UsageError(
            "--add cannot be combined with --overwrite: add to the Fisher or replace it"
        )
    checkpoint = options.checkpoint
    folder = locate(checkpoint, options.source.revision, without=() if options.add else FISHER)
    if in_place and (not folder.is_dir() or not Path(checkpoint).exists()):
        raise UsageError(
            f"{checkpoint} is not a local folder: name the folder to write to with --output-dir"
        )
    return folder


def plan_fisher(options: FisherOptions, folder: Path, *, again: bool = False) -> Plan:
    """Open a checkpoint, its Fisher and the data, and refuse what would fail later.

    With `again` it is not checked whether the output is up to date.
    """
    source = with_base(open_checkpoint(folder), options.source.base_model)
    output = folder if options.output_dir is None else Path(options.output_dir)
    there = None if again or options.dry_run else find_output(output)
    task_file, rows = open_source(options)
    name = task_name(options.task or task_file.name, rows.name, None)
    last = None if options.after is not None else _last_task(folder)
    # In place, one that was measured since may be up to date.
    completes = last is not None and _completes(last, name, options, again=again)
    if last is not None and not last.measured:
        if completes and options.generation.generate is not None:
            raise UsageError(
                f"{last.name} was trained on data and is measured on data, not by --generate: give "
                "--data, or another --task"
            )
        if completes:
            _refuse_merging(options, last)
        else:
            _hint_at_unmeasured(options, last, name)
    before = stored_fisher(folder / "fisher", source) if options.add or completes else None
    origin = None
    if options.after is not None:
        origin = open_origin(options.after, source, options.source.base_model)
    asked = Merging() if completes else options.merging
    chain = before if origin is None else origin.stored
    structure = _settled_structure(options, chain, completes=completes)
    plan = Plan(
        source=source,
        before=before,
        task_file=task_file,
        rows=rows,
        merging=settled_merging(chain, asked),
        structure=structure,
        options=options,
        folder=folder,
        there=there,
        origin=origin,
        completes=completes,
    )
    if origin is not None:
        refuse_untrained(origin, plan.records, source.path)
    if there is None:
        try:
            plan.check_target()
        except InputError as error:
            if not options.dry_run:
                raise
            LOG.info("without --dry-run this would be refused: %s", error)
    return plan


def _settled_structure(
    options: FisherOptions, chain: StoredFisher | None, *, completes: bool
) -> str:
    """Choose the structure, and refuse one that the chain or another option excludes."""
    structure = settled_structure(options.curvature.structure, chain)
    check_structure(structure, options.estimation, options.parameters)
    if structure == "inputs" and not completes:
        check_continued(chain, True)
    return structure


def _last_task(folder: Path) -> TaskRecord | None:
    """Give the last task of a checkpoint's ledger; None where there is no readable one."""
    try:
        return read_ledger(folder / "fisher" / LEDGER_NAME).tasks[-1]
    except ConsolidateError:
        return None


def _completes(last: TaskRecord, name: str, options: FisherOptions, *, again: bool) -> bool:
    """Return whether the task to measure is the last of the ledger, which has no Fisher yet.

    Or had none: in place, one that was measured since may be up to date.
    """
    if last.name != name or last.penalty is None:
        return False
    return not last.measured or (options.output_dir is None and not again)


def _hint_at_unmeasured(options: FisherOptions, last: TaskRecord, name: str) -> None:
    """Refuse to write another task beside a task that is not measured, unless that was asked."""
    if options.output_dir is None and not (options.add or options.saving.overwrite):
        raise InputError(
            f"{options.checkpoint}: expected data of {last.name!r}, whose Fisher was not measured, "
            f"found a task {name!r}: --task {last.name} measures it, --add adds another task"
        )


def _refuse_merging(options: FisherOptions, task: TaskRecord) -> None:
    """Refuse to merge a task that was trained otherwise than its training asked."""
    if options.merging != Merging():
        raise UsageError(
            f"--merge-rule, --gamma and --task-weight of {task.name} are those of its training: "
            "leave them out"
        )


def _recorded(ledger: Ledger) -> MeasuredFisher:
    recorded = recorded_fisher(ledger)
    assert recorded is not None  # `fisher` has written it
    return recorded


def _result(
    plan: Plan, status: Literal["done", "cached"], ledger: Ledger, fisher: MeasuredFisher
) -> FisherDone:
    return {
        "status": status,
        "checkpoint": str(plan.output),
        "fisher": str(plan.output / "fisher"),
        "commits": commits_of(plan.folder),
        "generated": generated_of(ledger),
        **encoded_as(ledger, plan.rows, plan.columns),
        **fisher,
    }


def _load(plan: Plan, cut: ProcessGroup | None) -> tuple[Model, Examples | Texts, str]:
    """Load the model, sharded among the processes of `cut`, encode the data, digest the module.

    Without data give the plan of the texts to be generated.
    """
    options, source, device = plan.options, plan.source, best_device(plan.options.source.device)
    check_finite(source.weights, plan.folder)
    pending = pending_task(plan.before) if plan.completes else None
    objective = options.source.objective or plan.task_file.objective
    if pending is not None and objective is None:
        objective = pending.objective
    model = load(
        source,
        objective=objective,
        factory=options.source.model,
        dtype=dtype_of_name(options.dtype),
        device="cpu" if cut else device,
        freeze=options.parameters.freeze,
        gradient_checkpointing=options.parameters.gradient_checkpointing,
    )
    check_names_to_be(plan.before, model)
    if pending is not None:
        _check_task(plan, pending, model, plan.columns)
    examples = _encoded(plan, model)
    if cut is not None and source.adapter is not None:
        raise UsageError(
            f"{plan.folder} is an adapter, and --shard needs a whole model: leave --shard out"
        )
    digest = json_digest(repr(model.module))  # before sharding, which renames layers
    if cut is not None:
        shards.shard(model.module, cut, device)
    return model, examples, digest


def _encoded(plan: Plan, model: Model) -> Examples | Texts:
    """Encode the data, or plan the texts to be generated."""
    options, encoding = plan.options, plan.options.encoding
    if options.generation.generate is not None:
        assert options.estimation.batch_size is not None
        return plan_texts(
            model,
            plan.rows,
            options.generation,
            max_length=encoding.max_length,
            batch_size=options.estimation.batch_size,
            seed=options.seed,
        )
    examples = encode(
        plan.rows,
        model,
        replace(encoding, columns=plan.columns),
        seed=options.seed,
        labels_needed=options.estimation.estimator == "empirical",
    )
    log_images(examples)
    return examples


def _check_task(plan: Plan, task: TaskRecord, model: Model, columns: Columns) -> None:
    """Refuse data that cannot be those that a task was trained on; report other rows."""
    if model.objective.name != task.objective:
        raise UsageError(
            f"{task.name} was trained with the objective {task.objective}, not "
            f"{model.objective.name}: leave --objective out"
        )
    remedy = f"the Fisher of {task.name} is measured on data of that task"
    check_labels(plan.rows, model, columns, remedy=remedy)
    if task.data_digest not in (None, plan.rows.digest()):
        LOG.info(
            "%s was trained on other rows (%s) than %s: its Fisher is measured on the latter",
            task.name,
            task.data,
            plan.rows.name,
        )


def _dry_run(plan: Plan, model: Model, encoded: Examples | Texts) -> FisherDryRun:
    """Estimate the cost of a pass and the sizes of its files, without headers and the ledger."""
    estimation, seed = plan.options.estimation, plan.options.seed
    generation: GenerationCost = {}
    if isinstance(encoded, Texts):
        estimation = settled_on_texts(estimation, model, unchanged=encoded.unchanged)
        examples, seconds = first_texts(model, encoded)
        generation = {"generation_seconds": seconds}
        count = len(encoded.prompts)
        cost, factors = pass_cost(
            model, examples, estimation, plan.structure, seed=seed, count=count
        )
        if estimation.estimator == "empirical":
            cost["estimator"] = "mc"
    else:
        estimation = settled_estimation(estimation, model, encoded)
        cost, factors = pass_cost(model, encoded, estimation, plan.structure, seed=seed)
    itemsize = {"float32": 4, "float64": 8}[estimation.accumulate_dtype]
    files = {"fisher.safetensors": 4 * cost["parameters"]}
    if factors:
        files["factors.safetensors"] = 4 * factors
    if not plan.in_place:
        files["model.safetensors"] = bytes_of(plan.source.weights)
    return {
        "status": "dry run",
        "task": plan.task,
        **cost,
        **generation,
        "files": files,
        "kept": {partial_path(plan.target).name: 2 * itemsize * (cost["parameters"] + factors)},
    }


def _write(
    plan: Plan,
    model: Model,
    examples: Examples,
    diagonal: FisherDiagonal,
    chain: Chain | None,
    generated: Generated | None,
) -> FisherDone:
    """Merge the task's Fisher, write it beside its weights, and return what was done."""
    options, source, target = plan.options, plan.source, plan.target
    overwrite, digests = options.saving.overwrite, options.saving.data_digest
    encoded = Encoded(generated=generated)
    if generated is None:
        encoded = encoding_record(options.encoding, plan.rows, plan.columns)
    used = subset(len(examples), options.estimation.max_examples, options.seed)
    log_notes(model, examples, diagonal, used)
    added = add_task(
        with_structure(chain, plan.structure),
        model,
        source.weights,
        diagonal,
        records=plan.records,
        name=plan.task,
        data=plan.rows.name,
        data_digest=plan.rows.digest() if digests and generated is None else None,
        made_from=json_digest(plan.description(plan.earlier)) if digests else None,
        training=None if plan.origin is None else plan.origin.training(),
        encoded=encoded,
        merging=plan.merging,
    )
    if overwrite and not plan.completes and (target / LEDGER_NAME).is_file():
        LOG.info("replacing the Fisher of %s", _task_names(target))
    with replace_folder(target, overwrite=plan.replaces or options.add) as staging:
        if plan.in_place:
            ledger = added.write(staging)
        else:
            write_checkpoint(staging, source, source.weights)
            # The card is kept except for our block: the model is the same.
            ledger = added.write(staging / "fisher")
            renew_card(staging, ledger)
        refuse_changed(plan.folder if plan.in_place else staging, plan.records, plan.folder)
    done = _result(plan, "done", ledger, fisher_summary(ledger, diagonal))
    if examples.preprocessing is not None:
        done["images"] = examples.preprocessing.describe()
    return {**done, "seconds": seconds_of("fisher")}


def _task_names(folder: Path) -> str:
    try:
        ledger = read_ledger(folder / LEDGER_NAME)
        heads = f" and the saved heads of {', '.join(ledger.heads)}" if ledger.heads else ""
        return ", ".join(task.name for task in ledger.tasks) + heads
    except ConsolidateError as error:
        return f"tasks unknown ({error})"
