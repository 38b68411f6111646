"""A search for λ around fine-tuning: the candidates are trained, measured and reported."""

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from consolidate.chain.resume import KeptWork
from consolidate.commands.finetune_choice import HeldOut, SearchPlan
from consolidate.commands.finetune_nats import quadratic
from consolidate.commands.finetune_run import descend, run_length
from consolidate.commands.finetune_weights import take_stored_values
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.options import Recipe
from consolidate.results import LambdaSearch
from consolidate.results import Trial as TrialResult
from consolidate.runtime.distributed import all_processes, dealt, is_first
from consolidate.training.evaluation import copies_of, divergence, put_back
from consolidate.training.forgetting import beyond, forgetting
from consolidate.training.lambda_search import (
    More,
    Rule,
    Trial,
    at_an_end,
    best_mean,
    coarse_to_fine,
    grid,
    largest,
    more_by_gain,
    more_by_limit,
    more_by_mean,
    smallest,
)
from consolidate.views.charts import write_picture
from consolidate.views.search_figures import search_charts
from formats.errors import NonFiniteError
from formats.partial_work import StoredWork

if TYPE_CHECKING:
    from consolidate.commands.finetune_plan import Plan
    from consolidate.commands.finetune_start import Start

LOG = logging.getLogger("consolidate")


def searched(
    plan: "Plan", start: "Start", work: KeptWork, found: StoredWork | None
) -> LambdaSearch | None:
    """Search for λ, plot the search, and give the penalty its λ; None where λ was given.

    Candidates that were trained before an interruption are not trained again.
    """
    if plan.search is None or start.penalty is None:
        return None
    search: LambdaSearch | None = None if found is None else found.state.get("search")
    if search is None:
        trials = [] if found is None else list(found.state.get("trials", []))

        def keep(trial: Trial) -> None:
            trials.append(asdict(trial))
            work.keep({}, {"trials": trials}, "search")

        with torch.random.fork_rng():  # the run that follows must not see that there was a search
            search = search_lambda(
                plan.search,
                start,
                plan.recipe,
                done=[Trial(**trial) for trial in trials],
                keep=keep,
            )
    start.penalty.ewc_lambda = float(search["ewc_lambda"])
    plot = plan.options.search.search_plot
    if plot is not None and is_first(work.group):
        write_picture(Path(plot), search_charts(search))
    return search


def search_lambda(
    plan: SearchPlan,
    start: "Start",
    recipe: Recipe,
    *,
    done: Collection[Trial],
    keep: Callable[[Trial], None],
) -> LambdaSearch:
    """Train the candidates from the same start, measure them, and choose one.

    The model's values are restored. `done` are trials of the same search, which was interrupted;
    `keep` is called with each new one.
    """
    search = _Search(plan, start, recipe)
    known = {(trial.ewc_lambda, trial.steps): trial for trial in done}

    def trial(strength: float, length: int) -> Trial:
        if (found := known.get((strength, length))) is None:
            keep(found := search.trial(strength, length))
        return found

    steps, (rule, more) = run_length(search.start, recipe), search.rules()
    if isinstance(plan.strengths, str):
        trials = coarse_to_fine(
            trial,
            rule,
            more,
            steps,
            begin=2 if plan.rule == "best-mean" else 1,
            reference=plan.rule == "largest",
        )
    else:
        trials = grid(trial, plan.strengths, steps)
    whole = [trial for trial in trials if trial.steps == steps]
    chosen = rule(whole)
    _report_choice(plan, chosen, whole)
    taken = sum(trial.steps for trial in trials)
    return {
        "ewc_lambda": chosen.ewc_lambda,
        "select": plan.rule,
        "max_forgetting": plan.max_forgetting,
        "measured": search.held.described(
            "no old data, so the penalty and the outputs' KL stand for forgetting"
        ),
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
            "full_runs": taken / max(1, run_length(start, recipe)),
            "seconds": sum(trial.seconds for trial in trials),
        },
    }


class _Search:
    """A search, with what was measured at the start."""

    def __init__(self, plan: SearchPlan, start: "Start", recipe: Recipe) -> None:
        """Hold out data of the new task where none is given, and measure the start."""
        assert start.penalty is not None  # a search is refused without one
        self.plan, self.recipe, self.penalty = plan, recipe, start.penalty
        self.held = HeldOut(plan, start, recipe.seed)
        self.start = replace(start, examples=self.held.examples)
        self.values = copies_of(start.model.module)
        self.before = self.held.measure(recipe.batch_size)

    def train(self, steps: int) -> None:
        """Train as `finetune` would, for some steps with a schedule of their own."""
        warmup = round(self.recipe.warmup_steps * steps / run_length(self.start, self.recipe))
        shortened = replace(self.recipe, max_steps=steps, warmup_steps=warmup, log_every=steps)
        descend(self.start, shortened, lambda *when: None)
        if self.start.frozen is None:  # else the weights are what they were, the adapter is float32
            take_stored_values(self.start.model)

    def trial(self, strength: float, length: int) -> Trial:
        """Train a candidate for `length` steps, measure it, and restore the start."""
        began = time.monotonic()
        penalty = self.penalty
        penalty.ewc_lambda = strength
        metrics = lost = squares = moved = None
        try:
            self.train(length)
            squares = quadratic(penalty)
            if not math.isfinite(squares):
                raise NonFiniteError(f"the penalty is {squares}")
            metrics = self.held.measure(self.recipe.batch_size)
            if self.plan.old:
                lost = max(forgetting(self.before, metrics, self.plan.old).values())
            else:
                moved = self.moved()
        except NonFiniteError as error:
            squares = None
            LOG.info("λ = %g diverged: %s", strength, error)
        put_back(self.start.model.module, self.values)
        if metrics is not None:
            scores = ", ".join(f"{name} {found['score']:.4f}" for name, found in metrics.items())
            LOG.info("λ = %g, %d steps: %s", strength, length, scores)
        seconds = time.monotonic() - began
        return Trial(strength, length, metrics, lost, squares, moved, seconds)

    def rules(self) -> tuple[Rule, More]:
        """Give what chooses among whole runs, and what asks for further ones."""
        plan = self.plan
        if plan.rule == "best-mean":
            return best_mean, more_by_mean
        if plan.rule == "smallest":
            limit = plan.max_forgetting or 0.0
            least = partial(smallest, max_forgetting=limit)
            return least, partial(more_by_limit, max_forgetting=limit)
        gain: dict[str, Any] = {"task": plan.new, "before": self.before[plan.new]["score"]}
        return partial(largest, **gain), partial(more_by_gain, **gain)

    def moved(self) -> float:
        """Measure how far the outputs on the new task's held-out inputs have moved."""
        model, examples, group = self.start.model, self.held.of_new, all_processes()
        order = dealt(examples.longest_first(), self.recipe.batch_size, group)
        return divergence(
            model.module,
            self.values,
            examples.batches(self.recipe.batch_size, order=order),
            get_likelihood(model.objective.likelihood),
            group,
        )


def _report_choice(plan: SearchPlan, chosen: Trial, whole: Sequence[Trial]) -> None:
    limit = plan.max_forgetting if plan.rule == "smallest" else None
    if limit is not None and beyond({"": chosen.forgetting or 0.0}, limit):
        LOG.info("no λ that was tried keeps forgetting within %g: the largest is used", limit)
    elif at_an_end(chosen.ewc_lambda, whole):
        strengths = [trial.ewc_lambda for trial in whole]
        at = "largest" if chosen.ewc_lambda == max(strengths) else "smallest"
        further = "larger" if at == "largest" else "smaller"
        LOG.info(
            "the chosen λ = %g is the %s of those trained for all steps: a %s one may be better",
            chosen.ewc_lambda,
            at,
            further,
        )
