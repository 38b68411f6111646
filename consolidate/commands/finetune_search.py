"""A search for λ around fine-tuning: what is held out, trained, measured and reported."""

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed import ProcessGroup

from consolidate.commands.task_metrics import evaluate_all
from consolidate.data.examples import Examples, hold_out
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.ewc.penalty import WeightPenalty
from consolidate.models.model import Model
from consolidate.options import Search
from consolidate.results import LambdaSearch
from consolidate.results import Trial as TrialResult
from consolidate.runtime.distributed import dealt
from consolidate.training.evaluation import divergence, tensors_of
from consolidate.training.forgetting import beyond, forgetting
from consolidate.training.lambda_search import (
    Trial,
    at_an_end,
    best_mean,
    choose_rule,
    coarse_to_fine,
    grid,
    largest,
    more_by_gain,
    more_by_limit,
    more_by_mean,
    smallest,
)
from consolidate.views.charts import check_picture
from formats.benchmark import benchmark_task
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
    """What the candidates are trained from; a search restores it."""

    model: Model
    penalty: WeightPenalty
    examples: Examples  # of the new task
    held_out: Mapping[str, Examples]
    with_heads: Mapping[str, Model]  # to measure old tasks with their own heads
    train: Callable[[Examples, int], None]  # from the present values, for some steps
    length: Callable[[Examples], int]  # the steps of a whole run


def plan_search(
    asked: Search, *, max_forgetting: float | None, new: str, ledger: Sequence[str]
) -> Plan:
    """Refuse what would fail later; `ledger` are the old tasks."""
    strengths: Any = asked.ewc_lambda
    validation = asked.validation or {}
    rule = choose_rule(
        asked.select, old=ledger, validation=validation, max_forgetting=max_forgetting
    )
    if asked.search_plot is not None:
        check_picture("--search-plot", Path(asked.search_plot), (".png", ".svg", ".pdf"))
    return Plan(strengths, rule, max_forgetting, new, [n for n in ledger if n in validation])


def check_held_out(
    validation: Mapping[str, str | Path],
    *,
    other_data: Collection[str | Path],
    new: str,
    ledger: Sequence[str],
) -> None:
    """Refuse to choose λ or α on data that are trained on or evaluated on, or of unknown tasks."""
    for name, data in validation.items():
        if benchmark_task(data) is not None:
            raise UsageError(
                f"--validation {name}={data}: λ and α are chosen on rows, not on a benchmark: name "
                "it with --evaluate"
            )
    if unknown := [name for name in validation if name not in (*ledger, new)]:
        raise UsageError(
            f"--validation {unknown[0]}: expected the new task, {new}, or a task of the ledger: "
            f"{', '.join(ledger) or 'there is none'}"
        )
    others = {_place(data) for data in other_data}
    if twice := [name for name, data in validation.items() if _place(data) in others]:
        raise UsageError(
            f"--validation {twice[0]}={validation[twice[0]]}: λ and α cannot be chosen on "
            "training or --evaluate data: hold out other rows"
        )


def check_budget(validation: Collection[str], *, new: str, ledger: Sequence[str]) -> None:
    """Refuse a budget for which no earlier task will be measured; `ledger` are their names."""
    if not ledger:
        raise UsageError("--budget needs earlier tasks, and the checkpoint has no ledger")
    if not set(ledger) & set(validation):
        raise UsageError(
            "--budget needs held-out rows of an earlier task: give --validation NAME=DATA, where "
            f"NAME is one of {', '.join(ledger)}"
        )
    if new in validation:
        raise UsageError(
            f"--validation {new}: --budget measures earlier tasks only, and {new} is the new one: "
            "leave it out"
        )


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

    The subject's values are restored, and its penalty gets the λ that was chosen. `done` are trials
    of the same search, which was interrupted; `keep` is called with each new one.
    """
    search = _Search(plan, subject, batch_size, seed, group)
    known = {(trial.ewc_lambda, trial.steps): trial for trial in done}

    def trial(strength: float, length: int) -> Trial:
        if (found := known.get((strength, length))) is None:
            keep(found := search.trial(strength, length))
        return found

    steps, rule = subject.length(search.examples), search.rule()
    if isinstance(plan.strengths, str):
        trials = coarse_to_fine(
            trial,
            rule,
            search.more(),
            steps,
            begin=2 if plan.rule == "best-mean" else 1,
            reference=plan.rule == "largest",
        )
    else:
        trials = grid(trial, plan.strengths, steps)
    whole = [trial for trial in trials if trial.steps == steps]
    chosen = rule(whole)
    subject.penalty.ewc_lambda = chosen.ewc_lambda
    _tell(plan, chosen, whole)
    taken = sum(trial.steps for trial in trials)
    return {
        "ewc_lambda": chosen.ewc_lambda,
        "select": plan.rule,
        "max_forgetting": plan.max_forgetting,
        "measured": search.measured(),
        "new_task": plan.new,
        "old_tasks": plan.old,
        "before": search.before,
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


@dataclass
class _Search:
    """A search, with what was measured at the start."""

    plan: Plan
    subject: Subject
    batch_size: int
    seed: int
    group: ProcessGroup | None

    def __post_init__(self) -> None:
        """Hold out data of the new task where none is given, and measure the start."""
        self.examples, self.held_out = self.subject.examples, dict(self.subject.held_out)
        if self.plan.new not in self.held_out:
            self.examples, self.held_out[self.plan.new] = hold_out(self.examples, self.seed)
        tensors = tensors_of(self.subject.model.module)
        self.values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.before = self.measure()

    def measure(self) -> dict[str, dict[str, float]]:
        return evaluate_all(
            self.subject.model,
            self.held_out,
            batch_size=self.batch_size,
            with_heads=self.subject.with_heads,
            group=self.group,
        )

    def trial(self, strength: float, length: int) -> Trial:
        """Train a candidate for `length` steps, measure it, and restore the start."""
        began = time.monotonic()
        penalty = self.subject.penalty
        penalty.ewc_lambda = strength
        metrics = lost = squares = moved = None
        try:
            self.subject.train(self.examples, length)
            penalty.ewc_lambda = 1.0
            squares = penalty.value()
            if not math.isfinite(squares):
                raise NonFiniteError(f"the penalty is {squares}")
            metrics = self.measure()
            if self.plan.old:
                lost = max(forgetting(self.before, metrics, self.plan.old).values())
            else:
                moved = self.moved()
        except NonFiniteError as error:
            squares = None
            LOG.info("λ = %g diverged: %s", strength, error)
        with torch.no_grad():
            for name, tensor in tensors_of(self.subject.model.module).items():
                tensor.copy_(self.values[name])
        if metrics is not None:
            scores = ", ".join(f"{name} {found['score']:.4f}" for name, found in metrics.items())
            LOG.info("λ = %g, %d steps: %s", strength, length, scores)
        seconds = time.monotonic() - began
        return Trial(strength, length, metrics, lost, squares, moved, seconds)

    def rule(self) -> Callable[[Sequence[Trial]], Trial]:
        plan = self.plan
        if plan.rule == "best-mean":
            return best_mean
        if plan.rule == "smallest":
            return partial(smallest, max_forgetting=plan.max_forgetting or 0.0)
        return partial(largest, task=plan.new, before=self.before[plan.new]["score"])

    def more(self) -> Callable[[Sequence[Trial]], int]:
        """Give what asks for further whole runs."""
        plan = self.plan
        if plan.rule == "best-mean":
            return more_by_mean
        if plan.rule == "smallest":
            return partial(more_by_limit, max_forgetting=plan.max_forgetting or 0.0)
        return partial(more_by_gain, task=plan.new, before=self.before[plan.new]["score"])

    def measured(self) -> str:
        """Report what the choice is based on."""
        name, old, count = self.plan.new, self.plan.old, len(self.held_out[self.plan.new])
        given = name in self.subject.held_out
        new = f"{name} on {count:,} examples "
        new += "of --validation" if given else "held out of the training data"
        if old:
            return f"{', '.join(old)} on --validation, {new}"
        return f"{new}; no old data, so the penalty and the outputs' KL stand for forgetting"

    def moved(self) -> float:
        """Measure how far the outputs on the new task's held-out inputs have moved."""
        model, examples = self.subject.model, self.held_out[self.plan.new]
        order = dealt(examples.longest_first(), self.batch_size, self.group)
        return divergence(
            model.module,
            self.values,
            examples.batches(self.batch_size, order=order),
            get_likelihood(model.objective.likelihood),
            self.group,
        )


def _tell(plan: Plan, chosen: Trial, whole: Sequence[Trial]) -> None:
    limit = plan.max_forgetting if plan.rule == "smallest" else None
    if limit is not None and beyond({"": chosen.forgetting or 0.0}, limit):
        LOG.info("no λ that was tried keeps forgetting to %g: the largest is taken", limit)
    elif at_an_end(chosen.ewc_lambda, whole):
        strengths = [trial.ewc_lambda for trial in whole]
        at = "largest" if chosen.ewc_lambda == max(strengths) else "smallest"
        further = "larger" if at == "largest" else "smaller"
        LOG.info(
            "λ = %g, which was chosen, is the %s of those trained for all steps: a %s one may be "
            "better",
            chosen.ewc_lambda,
            at,
            further,
        )


def same_data(one: str | Path, other: str | Path) -> bool:
    """Return whether two names are of the same file, folder or repository."""
    return _place(one) == _place(other)


def _place(data: str | Path) -> str:
    path = Path(data)
    return str(path.resolve()) if path.exists() else str(data)
