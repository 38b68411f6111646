"""What `finetune` leaves and reports: the checkpoint with its Fisher and ledger, and the result."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor

from consolidate.chain.tasks import Training, add_task, with_structure
from consolidate.chain.up_to_date import recorded_fisher
from consolidate.commands.measurement_report import (
    encoded_as,
    encoding_record,
    fisher_summary,
    log_notes,
)
from consolidate.data.benchmarks import Benchmark
from consolidate.data.examples import subset
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.models.model import config_of
from consolidate.options import FinetuneOptions
from consolidate.results import Benchmark as BenchmarkResult
from consolidate.results import Budget as BudgetResult
from consolidate.results import (
    FinetuneCached,
    Finetuned,
    FinetuneDone,
    MeasuredFisher,
    TrainingStep,
)
from consolidate.results import Interpolation as InterpolationResult
from consolidate.results import Replayed as ReplayedResult
from consolidate.runtime.progress import seconds_of
from consolidate.training.forgetting import rises, scores_of
from consolidate.views.output_card import write_card
from formats.atomic import replace_folder, write_file
from formats.checkpoint import write_checkpoint
from formats.errors import ForgettingError
from formats.fisher_json import Ledger, Replayed
from formats.tensors import Overlaid

if TYPE_CHECKING:
    from consolidate.commands.finetune_interpolation import Interpolator
    from consolidate.commands.finetune_plan import Plan
    from consolidate.commands.finetune_run import Trained
    from consolidate.commands.finetune_start import Start

LOG = logging.getLogger("consolidate")


def write_output(
    plan: "Plan",
    start: "Start",
    trained: "Trained",
    diagonal: FisherDiagonal | None,
    target: Path,
    training: Training,
    statistics: str | None,
    predicted: float | None,
) -> FinetuneDone:
    """Merge the new task's Fisher, write the checkpoint, and report what was done."""
    opened, options, loaded = plan.opened, plan.options, start.model
    if diagonal is not None:
        used = subset(len(start.examples), plan.recipe.max_examples, plan.recipe.seed)
        log_notes(loaded, start.examples, diagonal, used)
    digests = options.saving.data_digest
    added = add_task(
        with_structure(start.before, opened.structure),
        loaded,
        trained.weights,
        diagonal,
        name=opened.task,
        data=opened.rows.name,
        data_digest=opened.data["digest"] if digests else None,
        made_from=plan.made_from() if digests else None,
        training=training,
        encoded=encoding_record(options.encoding, opened.rows, opened.columns),
        merging=opened.merging,
    )
    ledger, merged = added.ledger, added.merged.fisher
    once = Overlaid(trained.weights, without=loaded.layout.duplicates)
    share_moved = _share_moved(loaded.checkpoint.weights, once)
    with replace_folder(target, overwrite=options.saving.overwrite) as staging:
        write_checkpoint(staging, opened.source, trained.weights, card=not merged)
        if opened.source.adapter is None and config_of(loaded) != opened.source.config:
            write_file(staging / "config.json", json.dumps(config_of(loaded), indent=2) + "\n")
        if merged:
            ledger = added.write(staging / "fisher")
            write_card(staging, target, ledger, [opened.source], "finetune")
        else:
            LOG.info("%s has no Fisher and no ledger, as no task was measured", target)
    steps, fisher = trained.steps, None
    if diagonal is not None:
        fisher = fisher_summary(ledger, diagonal)
    done: FinetuneDone = {
        "status": "done",
        **_known(plan, target, ledger, fisher, statistics),
        "steps": steps[-1].step if steps else 0,
        "loss": steps[-1].loss if steps else None,
        "penalty_value": steps[-1].penalty if steps else None,
        "share_moved": share_moved,
        "predicted_nats": predicted,
        "task_weights": {} if start.forecast is None else start.forecast.weights(),
        "seconds": {
            "training": seconds_of("training"),
            "evaluation": seconds_of("evaluation"),
            "fisher": seconds_of("fisher"),
        },
        "history": [cast(TrainingStep, asdict(step)) for step in steps],
    }
    if start.examples.preprocessing is not None:
        done["images"] = start.examples.preprocessing.describe()
    return done


def report_cached(plan: "Plan", ledger: Ledger) -> FinetuneCached:
    """Report an output that is up to date, from its ledger."""
    source = plan.opened.source
    weights = source.weights if source.base is None else source.base.weights
    kept = any(name.rpartition(".")[2] == "running_mean" for name in weights)
    statistics = plan.recipe.norm_statistics if kept else None
    texts = plan.options.penalty.save_generated
    if texts is not None and not Path(texts).exists():
        LOG.info("--save-generated: no text is generated, as %s is up to date", plan.target)
    picture = plan.options.search.search_plot
    if picture is not None and not Path(picture).exists():
        LOG.info("--search-plot: nothing is searched, as %s is up to date", plan.target)
    if plan.options.gate.compare_none:
        LOG.info("--compare-none: nothing is trained, as %s is up to date", plan.target)
    known = _known(plan, plan.target, ledger, recorded_fisher(ledger), statistics)
    return {"status": "cached", **known}


def too_much(
    forgotten: Mapping[str, float], options: FinetuneOptions, result: FinetuneDone | FinetuneCached
) -> ForgettingError:
    """Make the error of a run that exceeds --max-forgetting; `result` says where its output is."""
    status = "cached" if result["status"] == "cached" else "forgot too much"
    losses = ", ".join(f"{name} lost {by:.4f}" for name, by in forgotten.items())
    return ForgettingError(
        f"forgot too much: {losses} in score, and --max-forgetting is "
        f"{options.gate.max_forgetting:g}\n"
        f"The output was saved in {result['checkpoint']}; nothing was written to "
        f"{options.output_dir}",
        {**result, "status": status},
    )


def trained_record(
    plan: "Plan", start: "Start", trained: "Trained", parent: str, moving: "Interpolator | None"
) -> Training:
    """Give what the ledger records of the training; `parent` is the digest of the start."""
    ewc_lambda = None if start.penalty is None else float(start.penalty.ewc_lambda)
    kind, on = plan.options.penalty.penalty, plan.opened.penalty_on
    between, kept = (None, None) if moving is None else (moving.record(), moving.kept())
    found = {n: e.record for n, e in start.evaluations.items() if isinstance(e, Benchmark)}
    digests = plan.options.saving.data_digest
    if not digests:
        found = {name: replace(record, digest=None) for name, record in found.items()}
    replayed = None
    if plan.replay is not None and start.replay is not None:
        rows = plan.replay[1]
        digest = plan.description["replay"]["digest"] if digests else None
        replayed = Replayed(rows.name, digest, float(start.replay.share))
    return Training(
        ewc_lambda=ewc_lambda,
        penalty=kind,
        penalty_on=on,
        parent=parent,
        metrics=trained.metrics,
        interpolation=between,
        replayed=replayed,
        budget=kept,
        benchmarks=found or None,
    )


def _known(
    plan: "Plan",
    target: Path,
    ledger: Ledger,
    fisher: MeasuredFisher | None,
    statistics: str | None,
) -> Finetuned:
    """Report a fine-tuning run from its ledger, now or later."""
    task, protecting = ledger.tasks[-1], plan.opened.protecting
    between, replayed = task.interpolation, task.replayed
    of_base = [] if protecting is None else [old.name for old in protecting.ledger.tasks]
    return {
        "checkpoint": str(target),
        "commits": plan.opened.commits(),
        **encoded_as(ledger, plan.opened.rows, plan.opened.columns),
        "penalty": str(task.penalty),
        "penalty_on": task.penalty_on,
        "ewc_lambda": task.ewc_lambda,
        "norm_statistics": statistics,
        "interpolation": None if between is None else cast(InterpolationResult, asdict(between)),
        "replayed": None if replayed is None else cast(ReplayedResult, asdict(replayed)),
        "budget": None if task.budget is None else cast(BudgetResult, asdict(task.budget)),
        "metrics": task.metrics,
        "benchmarks": cast(dict[str, BenchmarkResult], asdict(task)["benchmarks"] or {}),
        "forgotten": scores_of(task.metrics, plan.old_tasks),
        "measured_nats": rises(
            task.metrics.get("before", {}),
            task.metrics.get("after", {}),
            [*plan.old_tasks, *of_base],
        ),
        "fisher": None if fisher is None else {"folder": str(target / "fisher"), **fisher},
    }


def _share_moved(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> float:
    there = [name for name in end if name in start]  # a fresh output layer was nowhere
    moved = sum(int((start[name] != end[name].cpu()).count_nonzero()) for name in there)
    return moved / max(1, sum(start[name].numel() for name in there))
