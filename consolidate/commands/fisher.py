"""What `consolidate fisher` does, without the command line: read, measure, write."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch.distributed import ProcessGroup

from consolidate.chain.claims import claiming, refuse_changed
from consolidate.chain.fitted_chain import Chain, pending_task
from consolidate.chain.heads import check_labels
from consolidate.chain.output import bytes_of, measured_folder, output_bytes
from consolidate.chain.resume import KeptPass
from consolidate.chain.tasks import Encoded, add_task, check_names_to_be, with_structure
from consolidate.chain.up_to_date import cached, recorded_fisher
from consolidate.commands.fisher_plan import Plan, find_checkpoint, plan_alone, plan_fisher
from consolidate.commands.generation import first_texts, generate_sample, generated_of, has_texts
from consolidate.commands.generation_options import check_generation, lacks_texts
from consolidate.commands.measurement import (
    kept_work,
    measure_fisher,
    of_own_labels,
    settled_estimation,
    settled_on_texts,
)
from consolidate.commands.measurement_report import (
    encoded_as,
    encoding_record,
    fisher_summary,
    log_notes,
)
from consolidate.commands.pass_cost import pass_cost
from consolidate.data.columns import lacks_labels
from consolidate.data.encoding import encode, log_images
from consolidate.data.examples import Examples, subset
from consolidate.data.text_plan import TextPlan, plan_texts
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.models.adapters import load
from consolidate.models.model import Model
from consolidate.options import Estimation, FisherOptions
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
from formats.checkpoint import Checkpoint, check_finite, write_checkpoint
from formats.digest import json_digest
from formats.errors import ConsolidateError, InputError, UsageError
from formats.fisher_folder import LEDGER_NAME, StoredFisher, check_intact, read_fisher
from formats.fisher_json import Generated, Ledger, TaskRecord, read_ledger
from formats.hub import commits_of

LOG = logging.getLogger("consolidate")


@as_one
def fisher(options: FisherOptions, *, again: bool = False) -> FisherResult:
    """Measure the Fisher of a checkpoint on a task's data and store it beside the weights.

    F_i = (1/N) Σ_x E_{y ~ p(y|x, θ)} [(∂ log p(y|x, θ)/∂θ_i)²], summed over units of each example;
    with `generate` on texts that a language model writes itself, with `structure="inputs"` also
    matrices of the layers' inputs.

    Returns:
        Folder, task, counts, and the Fisher's trace with its relative standard error by parameter;
        with `dry_run`, the estimated cost. A Fisher that is up to date is kept, and the ``status``
        is ``cached``.

    Raises:
        InputError: The checkpoint or the data are not as expected.
        UsageError: The options contradict each other or the checkpoint.
        NonFiniteError: NaN or infinity in the weights or in the Fisher.
    """
    if options.estimation.batch_size is None:
        estimation = replace(options.estimation, batch_size=Estimation.batch_size)
        options = replace(options, estimation=estimation)
    check_generation(options)
    cut = shards_among(shard=options.parameters.shard, check=options.estimation.check)
    folder = find_checkpoint(options)
    output = folder if options.output_dir is None else Path(options.output_dir)
    part = "fisher" if options.output_dir is None else None
    with nullcontext() if options.dry_run else claiming(output, part=part):
        again = again or (not options.dry_run and lacks_texts(options.generation))
        plan = plan_fisher(options, folder, again=again)
        done = cached(plan.there, plan.made_from)
        if done is not None and has_texts(options, done.ledger):
            kept_work(options, plan.target, plan.without_module, 0).remove_own()
            recorded = recorded_fisher(done.ledger)
            assert recorded is not None  # `fisher` has written it
            return _result(plan, "cached", done.ledger, recorded)
        return measure(plan.afresh(), cut)


def measure(plan: Plan, cut: ProcessGroup | None) -> FisherResult:
    """Do what a plan says, sharded among the processes of `cut`; with a dry run only estimate."""
    options, group = plan.options, all_processes()
    if not options.dry_run:
        plan.check_target()
        if is_first(group):
            _ = plan.records  # digests of what is measured, even if the files change meanwhile
            if options.saving.data_digest:
                _ = plan.data
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
    estimation = _settled(plan, model, encoded)
    examples: Examples
    generated = None
    if isinstance(encoded, TextPlan):
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
    else:
        examples, kept = encoded, KeptPass(work, found)
    diagonal = measure_fisher(
        model,
        examples,
        estimation,
        task=plan.task,
        seed=options.seed,
        structure=plan.structure,
        kept=kept,
    )
    if generated is not None:
        diagonal = of_own_labels(diagonal)
    result = None
    if is_first(group):
        result = _write(plan, model, examples, diagonal, chain, generated)
    result = from_first(result, group)
    work.remove()
    return result


def measure_alone(
    options: FisherOptions,
    source: Checkpoint,
    before: StoredFisher | None,
    target: Path,
    cut: ProcessGroup | None,
) -> Path:
    """Measure the Fisher that a training into `target` needs first, in a folder beside it.

    What was written there before an interruption is taken, unless that is refused, or its texts
    are gone.

    Raises:
        InputError: A training that began from another measurement has saved its progress.
    """
    folder, progress = measured_folder(target), partial_path(target)
    plan, fresh = plan_alone(options, source, before, folder), options.saving.restart
    if not fresh and _is_written(plan):
        if not lacks_texts(options.generation):
            return folder
    elif not fresh and folder.exists() and progress.exists():
        raise InputError(
            f"{progress} holds saved progress of a run that began with another measurement of "
            f"{plan.task}: start that command again, or discard it with --restart"
        )
    measure(plan, cut)
    return folder


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


def _load(plan: Plan, cut: ProcessGroup | None) -> tuple[Model, Examples | TextPlan, str]:
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
        _check_task(plan, pending, model)
    examples = _encoded(plan, model)
    if cut is not None and source.adapter is not None:
        raise UsageError(
            f"{plan.folder} is an adapter, and --shard needs a whole model: leave --shard out"
        )
    digest = json_digest(repr(model.module))  # before sharding, which renames layers
    if cut is not None:
        shards.shard(model.module, cut, device)
    return model, examples, digest


def _encoded(plan: Plan, model: Model) -> Examples | TextPlan:
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


def _check_task(plan: Plan, task: TaskRecord, model: Model) -> None:
    """Refuse data that cannot be those that a task was trained on; report other rows."""
    if model.objective.name != task.objective:
        raise UsageError(
            f"{task.name} was trained with the objective {task.objective}, not "
            f"{model.objective.name}: leave --objective out"
        )
    remedy = f"the Fisher of {task.name} is measured on data of that task"
    if not lacks_labels(plan.rows, plan.columns, model.objective.name):
        check_labels(plan.rows, model, plan.columns, remedy=remedy)
    if task.data_digest not in (None, plan.data["digest"]):
        LOG.info(
            "%s was trained on other rows (%s) than %s: its Fisher is measured on the latter",
            task.name,
            task.data,
            plan.rows.name,
        )


def _settled(plan: Plan, model: Model, encoded: Examples | TextPlan) -> Estimation:
    """Settle how a plan's data, or texts that are yet to be generated, are measured."""
    asked = plan.options.estimation
    if isinstance(encoded, TextPlan):
        return settled_on_texts(asked, model, unchanged=encoded.unchanged)
    return settled_estimation(asked, model, encoded)


def _dry_run(plan: Plan, model: Model, encoded: Examples | TextPlan) -> FisherDryRun:
    """Estimate the cost of a pass and the sizes of its files, without headers and the ledger."""
    estimation = _settled(plan, model, encoded)
    generation: GenerationCost = {}
    examples: Examples
    count = None
    if isinstance(encoded, TextPlan):
        examples, generation = first_texts(model, encoded)
        count = encoded.count
    else:
        examples = encoded
    cost, factors = pass_cost(
        model, examples, estimation, plan.structure, seed=plan.options.seed, count=count
    )
    if generation and estimation.estimator == "empirical":
        cost["estimator"] = "mc"  # as `of_own_labels` names it
    itemsize = {"float32": 4, "float64": 8}[estimation.accumulate_dtype]
    files = {"fisher.safetensors": 4 * cost["parameters"]}
    if factors:
        files["factors.safetensors"] = 4 * factors
    if not plan.in_place:
        stem = "model" if plan.source.adapter is None else "adapter_model"
        files[f"{stem}.safetensors"] = bytes_of(plan.source.weights)
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
    most, shuffled = options.estimation.max_examples, options.estimation.tolerance is not None
    drawn = subset(len(examples), most, options.seed, shuffled=shuffled)
    log_notes(model, examples, diagonal, drawn[: diagonal.examples])
    added = add_task(
        with_structure(chain, plan.structure),
        model,
        source.weights,
        diagonal,
        records=plan.records,
        name=plan.task,
        data=plan.rows.name,
        data_digest=plan.data["digest"] if digests and generated is None else None,
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
