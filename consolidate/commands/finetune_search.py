"""A search for λ around a fine-tuning: what is held out, trained, measured and reported."""

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from consolidate.commands.task_metrics import evaluate_all
from consolidate.data.examples import Examples, hold_out
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.ewc.low_rank_penalty import MergedPenalty
from consolidate.ewc.penalty import Penalty
from consolidate.models.model import Model
from consolidate.results import LambdaSearch
from consolidate.results import Trial as TrialResult
from consolidate.runtime.distributed import dealt
from consolidate.training.evaluation import divergence
from consolidate.training.forgetting import beyond, forgetting
from consolidate.training.lambda_search import (
    Trial,
    at_an_end,
    by_least,
    by_mean,
    by_most,
    check_strengths,
    choose_rule,
    coarse_to_fine,
    grid,
)
from consolidate.views.search_plot import check_plot
from formats.errors import NonFiniteError, UsageError

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class Plan:
    """What a search will try and how it will choose, checked before the work."""

    strengths: Sequence[float] | str  # λs, or "auto"
    rule: str
    max_forgetting: float | None
    new: str
    old: list[str]  # tasks of the ledger that are measured


@dataclass(frozen=True)
class Subject:
    """What is trained again and again; a search leaves it as it was."""

    model: Model
    penalty: Penalty | MergedPenalty
    examples: Examples  # of the new task
    held_out: Mapping[str, Examples]
    with_heads: Mapping[str, Model]  # what old tasks with a head of their own are measured with
    train: Callable[[Examples, int], None]  # from the present values, for some steps
    length: Callable[[Examples], int]  # the steps of a whole run


def plan_search(
    strengths: Any,
    *,
    choose: str | None,
    max_forgetting: float | None,
    validation: Mapping[str, str | Path],
    other_data: Collection[str | Path],
    new: str,
    ledger: Sequence[str],
    plot: str | Path | None,
) -> Plan:
    """Refuse what would fail later or would choose by data that it should not see.

    Args:
        strengths: λs, or ``auto``.
        choose: The rule asked for.
        max_forgetting: What an old task may lose.
        validation: The held-out data by name.
        other_data: The training data and those of the evaluations.
        new: The new task's name.
        ledger: The names of the old tasks.
        plot: The file that was asked for.

    Returns:
        The plan.

    Raises:
        UsageError: The options do not fit together, or data are given twice.
        InputError: The plot cannot be written.
    """
    check_strengths(strengths)
    rule = choose_rule(choose, old=ledger, validation=validation, max_forgetting=max_forgetting)
    if unknown := [name for name in validation if name not in (*ledger, new)]:
        raise UsageError(
            f"--validation {unknown[0]}: expected the new task, {new}, or one that the ledger "
            f"holds{': ' if ledger else ''}{', '.join(ledger)}"
        )
    others = {_place(data) for data in other_data}
    if twice := [name for name, data in validation.items() if _place(data) in others]:
        raise UsageError(
            f"--validation {twice[0]}={validation[twice[0]]}: λ cannot be chosen by data that are "
            "trained on or evaluated on: hold other rows out"
        )
    if plot is not None:
        check_plot(Path(plot))
    return Plan(strengths, rule, max_forgetting, new, [n for n in ledger if n in validation])


def search_lambda(
    plan: Plan,
    subject: Subject,
    *,
    batch_size: int,
    seed: int,
    group: ProcessGroup | None = None,
    done: Collection[Trial] = (),
    keep: Callable[[Trial], None] = lambda trial: None,
) -> LambdaSearch:
    """Train the candidates from the same start, measure them, and choose one.

    Args:
        plan: What to try and how to choose.
        subject: What is trained; it comes back with the values it had, its penalty with the λ that
            was chosen.
        batch_size: Of the evaluations.
        seed: Of what is held out.
        group: The processes that share the batches; all choose alike.
        done: What was trained in a search of the same that was broken off.
        keep: Called with each trial after it.

    Returns:
        ``ewc_lambda``, the rule and what it looked at, ``before``, the trials and the cost.

    Raises:
        NonFiniteError: Training diverged with every candidate.
        InputError: There is too little data to hold some out.
    """
    model, held_out, new = subject.model, dict(subject.held_out), plan.new
    examples, split = subject.examples, new not in held_out
    if split:
        examples, held_out[new] = hold_out(examples, seed)
    values = _values(model.module)
    measure = partial(
        evaluate_all,
        model,
        held_out,
        batch_size=batch_size,
        with_heads=subject.with_heads,
        group=group,
    )
    before = measure()
    steps = subject.length(examples)
    likelihood = get_likelihood(model.objective.likelihood)

    known = {(trial.ewc_lambda, trial.steps): trial for trial in done}

    def trial(strength: float, length: int) -> Trial:
        if (found := known.get((strength, length))) is not None:
            return found
        began = time.monotonic()
        subject.penalty.ewc_lambda = strength
        metrics = lost = squares = moved = None
        try:
            subject.train(examples, length)
            subject.penalty.ewc_lambda = 1.0
            squares = subject.penalty.value()
            if not math.isfinite(squares):
                raise NonFiniteError(f"the penalty is {squares}")
            metrics = measure()
            if plan.old:
                lost = max(forgetting(before, metrics, plan.old).values())
            else:
                order = dealt(range(len(held_out[new])), batch_size, group)
                batches = held_out[new].batches(batch_size, order=order)
                moved = divergence(model.module, values, batches, likelihood, group)
        except NonFiniteError as error:
            squares = None
            LOG.info("λ = %g diverged: %s", strength, error)
        _restore(model.module, values)
        made = Trial(strength, length, metrics, lost, squares, moved, time.monotonic() - began)
        if metrics is not None:
            scores = ", ".join(f"{name} {found['score']:.4f}" for name, found in metrics.items())
            LOG.info("λ = %g, %d steps: %s", strength, length, scores)
        keep(made)
        return made

    if plan.rule == "mean":
        rule: Callable[[Sequence[Trial]], Trial] = by_mean
    elif plan.rule == "least":
        rule = partial(by_least, max_forgetting=plan.max_forgetting or 0.0)
    else:
        rule = partial(by_most, task=new, before=before[new]["score"])
    if isinstance(plan.strengths, str):
        trials = coarse_to_fine(trial, rule, steps, reference=plan.rule == "most")
    else:
        trials = grid(trial, plan.strengths, steps)
    whole = [trial for trial in trials if trial.steps == steps]
    chosen = rule(whole)
    subject.penalty.ewc_lambda = chosen.ewc_lambda
    _tell(plan, chosen, whole)
    taken = sum(trial.steps for trial in trials)
    return {
        "ewc_lambda": chosen.ewc_lambda,
        "choose": plan.rule,
        "max_forgetting": plan.max_forgetting,
        "measured": _measured(plan, split, len(held_out[new])),
        "new_task": new,
        "old_tasks": plan.old,
        "before": before,
        "trials": [
            cast(
                TrialResult,
                asdict(trial)
                | {"mean": trial.mean if trial.metrics else None, "chosen": trial is chosen},
            )
            for trial in trials
        ],
        "cost": {
            "runs": len(trials),
            "steps": taken,
            "full_runs": taken / max(1, subject.length(subject.examples)),
            "seconds": sum(trial.seconds for trial in trials),
        },
    }


def _measured(plan: Plan, split: bool, count: int) -> str:
    """Say what the choice has looked at."""
    source = "held out of the training data" if split else "of --validation"
    new = f"{plan.new} on {count:,} examples {source}"
    if plan.old:
        return f"{', '.join(plan.old)} on --validation, {new}"
    return f"{new}; no old data, so the penalty and the outputs' KL stand for forgetting"


def _tell(plan: Plan, chosen: Trial, whole: Sequence[Trial]) -> None:
    limit = plan.max_forgetting
    if plan.rule == "least" and limit is not None and beyond({"": chosen.forgetting or 0.0}, limit):
        LOG.info("no λ that was tried keeps forgetting to %g: the largest is taken", limit)
    elif at_an_end(chosen.ewc_lambda, whole):
        LOG.info("λ = %g is at an end of what was tried: look beyond it", chosen.ewc_lambda)


def _place(data: str | Path) -> str:
    path = Path(data)
    return str(path.resolve()) if path.exists() else str(data)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(module).items()}


@torch.no_grad()
def _restore(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in _tensors(module).items():
        tensor.copy_(values[name])
