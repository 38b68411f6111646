"""Weights between the start and the end of fine-tuning: α as given, or chosen by scores."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from consolidate.chain.resume import KeptPass, KeptWork
from consolidate.commands.finetune_choice import HeldOut
from consolidate.commands.finetune_run import rows_of
from consolidate.commands.finetune_weights import UNMOVED, take_stored_values
from consolidate.data.examples import subset
from consolidate.ewc.interpolation import fisher_share, interpolated
from consolidate.options import Recipe
from consolidate.results import AlphaSearch
from consolidate.runtime import signals
from consolidate.runtime.distributed import all_processes, shares
from consolidate.training.budget import largest_kept, next_alpha
from consolidate.training.forgetting import forgetting, rises
from consolidate.training.lambda_search import Candidate, best_mean, largest
from consolidate.training.loop import remeasure_statistics, with_statistics
from consolidate.training.state import values_of
from formats.errors import ForgettingError, NonFiniteError
from formats.fisher_json import Budget, CurvePoint, Interpolation
from formats.partial_work import StoredWork

if TYPE_CHECKING:
    from consolidate.commands.finetune_choice import InterpolationPlan
    from consolidate.commands.finetune_start import Start

LOG = logging.getLogger("consolidate")

GRID = tuple(i / 10 for i in range(1, 11))
"""The α that are tried; 1 is what was trained."""

_FISHER = "fisher/"

Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Trial(Candidate):
    """One α, with what was measured of the weights there."""

    alpha: float
    metrics: Metrics | None
    forgetting: float | None

    @property
    def protection(self) -> float:
        """The smaller α, the closer to the start."""
        return 1 / self.alpha


class Interpolator:
    """Puts θ_α = μ + α (θ − μ) in place of what was trained, and chooses α where none was given.

    With a budget it is the largest α at which no old task has lost more nats of loss.
    Frozen parameters are where they began, so they stay. A fresh head and new rows are as trained.
    Running statistics that follow the data are measured again at each α < 1.
    """

    def __init__(
        self,
        plan: "InterpolationPlan",
        start: "Start",
        recipe: Recipe,
        measure: Callable[..., Mapping[str, Tensor]],
        found: StoredWork | None,
    ) -> None:
        """Hold data of the new task out where α is chosen and none are given.

        `measure` is `measure_fisher` on the new task's examples, with task and kept left to give;
        `found` is saved progress of the same work.
        """
        self.plan, self._start, self._recipe = plan, start, recipe
        self._pass, self._found = measure, found
        state = None if found is None else found.state.get("interpolation")
        self.state = {"trials": [], **(state or {})}  # JSON-ready
        self._fisher: dict[str, Tensor] = {}  # F at θ, by the module's names
        self._scale = 1.0  # of F
        self._held = HeldOut(plan, start, recipe.seed) if self.chooses else None
        self.examples = start.examples if self._held is None else self._held.examples

    @property
    def chooses(self) -> bool:
        """Whether α is to be chosen."""
        return self.plan.alpha is None

    def measure_start(self) -> None:
        """Measure the held-out data before the first step, where α is chosen on them."""
        if self.chooses and "before" not in self.state:
            self.state["before"] = self._measure()

    def apply(
        self, work: KeptWork, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]
    ) -> None:
        """Give the model θ_α, choosing α first where it is not given.

        `tensors` and `saved` are the progress at the end of training, saved while α is chosen.
        """
        alpha = self.plan.alpha
        if self.plan.method == "fisher":
            self._measure_fisher(work, tensors, saved)
            tensors = {**tensors, **{f"{_FISHER}{n}": f for n, f in self._fisher.items()}}
        module = self._start.model.module
        measures = self._recipe.norm_statistics == "update" and with_statistics(module)
        values = values_of(module, frozen=False) if alpha is None or measures else {}
        trained = {name: tensor.clone() for name, tensor in values.items()}
        kept = {**tensors, **{name: t for name, t in trained.items() if name in tensors}}
        try:
            if alpha is None:
                # Several processes stop together, after an α or a measurement.
                with signals.waiting(all_processes() is not None):
                    while (one := self._next()) is not None:
                        self.state["trials"].append(asdict(self._trial(one)))
                        for name, tensor in values_of(module, frozen=False).items():
                            tensor.copy_(trained[name])
                        work.settle()
                        if work.due:
                            work.keep(kept, saved, "interpolation")
                        work.stop_if_asked(f"after α = {one:g}")
                alpha = self._choose([Trial(**trial) for trial in self.state["trials"]])
            with signals.waiting(not trained):  # no copy to save at a stop
                self._move(alpha)
        except signals.STOPS as stop:
            if trained and work.can_keep(stop):
                work.keep(kept, saved, "interpolation")
            raise
        self.state["alpha"] = alpha

    def record(self) -> Interpolation | None:
        """Give what the ledger records; None where a budget left the weights as trained."""
        curve = []
        if self.plan.budget is not None and self.state["alpha"] == 1:
            return None
        if self.chooses:
            points = [(t["alpha"], t["metrics"]) for t in self.state["trials"]]
            if not any(alpha == 0 for alpha, _ in points):
                points.append((0.0, self.state["before"]))
            curve = [
                CurvePoint(alpha, {name: values["score"] for name, values in metrics.items()})
                for alpha, metrics in sorted(points, key=lambda point: point[0])
                if metrics is not None
            ]
        return Interpolation(self.state["alpha"], self.plan.method, curve)

    def kept(self) -> Budget | None:
        """Give the budget and what old tasks lost of it, as the ledger records it."""
        if self.plan.budget is None:
            return None
        [chosen] = [one for one in self.state["trials"] if one["alpha"] == self.state["alpha"]]
        lost = rises(self.state["before"], chosen["metrics"], self.plan.old)
        return Budget(self.plan.budget, lost)

    def search(self) -> AlphaSearch | None:
        """Give the search as a result; None where α was given, or follows from a budget."""
        if self._held is None or self.plan.budget is not None:
            return None
        trials = [Trial(**trial) for trial in self.state["trials"]]
        return {
            "alpha": self.state["alpha"],
            "rule": "best-mean" if self.plan.old else "kept-gain",
            "measured": self._held.described("no old data"),
            "new_task": self.plan.new,
            "old_tasks": self.plan.old,
            "before": self.state["before"],
            "trials": [
                {
                    "alpha": trial.alpha,
                    "metrics": trial.metrics,
                    "forgetting": trial.forgetting,
                    "mean": trial.mean if trial.metrics else None,
                    "chosen": trial.alpha == self.state["alpha"],
                }
                for trial in trials
            ],
        }

    def _next(self) -> float | None:
        """Give the next α to measure; None once there are enough.

        With a budget α = 0 is the last: new outputs are as trained there too, and old tasks that
        share them can lose by it.
        """
        if self.plan.budget is not None:
            tried = self._tried()
            alpha = next_alpha(tried)
            kept = any(keeps for _, keeps in tried)
            if alpha is not None or kept or not self._start.fresh or tried[-1][0] == 0:
                return alpha
            return 0.0
        return next(iter(GRID[len(self.state["trials"]) :]), None)

    def _tried(self) -> list[tuple[float, bool]]:
        """Give each α that was measured, with whether no old task lost more than the budget."""
        before, budget = self.state["before"], self.plan.budget
        assert budget is not None
        return [
            (one["alpha"], lost is not None and max(lost.values()) <= budget)
            for one in self.state["trials"]
            for lost in [one["metrics"] and rises(before, one["metrics"], self.plan.old)]
        ]

    def _choose(self, trials: Sequence[Trial]) -> float:
        if all(trial.metrics is None for trial in trials):
            raise NonFiniteError(
                "training diverged: no α has a finite loss on held-out data; lower "
                "--learning-rate or --ewc-lambda"
            )
        if self.plan.budget is not None:
            tried = self._tried()
            if not any(keeps for _, keeps in tried):
                raise self._over_budget(trials)
            alpha = largest_kept(tried)
            LOG.info("α = %g is the largest of %d within the budget", alpha, len(trials))
            return alpha
        if self.plan.old:
            chosen = best_mean(trials)
        else:
            before = self.state["before"][self.plan.new]["score"]
            chosen = largest(trials, task=self.plan.new, before=before)
        LOG.info("α = %g chosen of %d", chosen.alpha, len(trials))
        return chosen.alpha

    def _over_budget(self, trials: Sequence[Trial]) -> ForgettingError:
        """Make the error of a run that keeps the budget nowhere on the way."""
        closest = min((t for t in trials if t.metrics is not None), key=lambda t: t.alpha)
        assert closest.metrics is not None
        return ForgettingError(
            f"{self.plan.new} cannot be learned within --budget {self.plan.budget:g}: even with "
            f"α = {closest.alpha:g} of the way from the start, {self._described(closest.metrics)}\n"
            "Nothing was written: raise --budget, or lower --learning-rate"
        )

    def _trial(self, alpha: float) -> Trial:
        """Measure the weights at α as they would be stored."""
        self._move(alpha)
        metrics = lost = None
        try:
            metrics = self._measure()
        except NonFiniteError as error:
            LOG.info("α = %g: %s", alpha, error)
        if metrics is not None:
            if self.plan.old:
                lost = max(forgetting(self.state["before"], metrics, self.plan.old).values())
            LOG.info("α = %g: %s", alpha, self._described(metrics))
        return Trial(alpha, metrics, lost)

    def _described(self, metrics: Metrics) -> str:
        """Write what α is chosen by: scores, or what old tasks lost of a budget."""
        if self.plan.budget is None:
            return ", ".join(f"{name} {found['score']:.4f}" for name, found in metrics.items())
        lost = rises(self.state["before"], metrics, self.plan.old)
        return ", ".join(f"{name} {nats:+.4g} nats" for name, nats in lost.items())

    def _measure(self) -> Metrics:
        assert self._held is not None  # α is chosen
        with torch.random.fork_rng():  # a module may draw in eval mode too; training must not see
            return self._held.measure(self._recipe.batch_size)

    @torch.no_grad()
    def _move(self, alpha: float) -> None:
        """Put θ_α, as it will be stored, in place of θ; α = 1 leaves everything as trained."""
        if alpha == 1:
            self._round()
            return
        model = self._start.model
        layout, stored = model.layout, model.checkpoint.weights
        for name, parameter in model.module.named_parameters():
            files = layout.file_names(name) if parameter.requires_grad else []
            first_new = min(
                (n for f in files if (n := self._start.fresh.get(f)) is not None), default=None
            )
            if files and first_new != 0:
                start = layout.to_module({file: stored[file] for file in files})[name]
                share = self._share(name, files, alpha)
                moved = interpolated(start, parameter, share, first_new=first_new)
                parameter.copy_(moved)
        self._round()
        if self._recipe.norm_statistics == "update" and with_statistics(model.module):
            remeasure_statistics(model.module, self._batches(), all_processes())
            self._round()

    def _measure_fisher(
        self, work: KeptWork, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]
    ) -> None:
        """Measure F at the trained weights, on what the new task's Fisher is measured on."""
        start, found, before = self._start, self._found, self._start.before
        assert before is not None  # the plan has refused by now
        at_end = found if found is not None and UNMOVED in found.state else None
        kept = {} if at_end is None else at_end.tensors
        self._fisher = {
            n.removeprefix(_FISHER): t for n, t in kept.items() if n.startswith(_FISHER)
        }
        if not self._fisher:
            task = f"{self.plan.new}, before interpolation"
            kept_pass = KeptPass(work, at_end, tensors, saved)
            diagonal = self._pass(task=task, kept=kept_pass, structure="diagonal")
            self._fisher = {name: values.cpu() for name, values in diagonal.items()}
        layout = start.model.layout
        both = [n for n in self._fisher if all(f in before.fisher for f in layout.file_names(n))]
        files = dict.fromkeys(file for name in both for file in layout.file_names(name))
        old = math.fsum(float(before.fisher[file].double().sum()) for file in files)
        new = math.fsum(float(self._fisher[name].double().sum()) for name in both)
        self._scale = old / new if old > 0 and new > 0 else 1.0

    def _share(self, name: str, files: Sequence[str], alpha: float) -> float | Tensor:
        """Give the share of θ in a parameter: one for each weight where both Fishers are known."""
        before = self._start.before
        if name not in self._fisher or before is None:
            return alpha
        if any(file not in before.fisher for file in files):
            return alpha
        old = self._start.model.layout.to_module({file: before.fisher[file] for file in files})
        return fisher_share(old[name], self._fisher[name], alpha, scale=self._scale)

    def _round(self) -> None:
        take_stored_values(self._start.model)

    def _batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield this process's share of what was trained on, in random order."""
        recipe, count = self._recipe, len(self.examples)
        _, mixture, both = rows_of(replace(self._start, examples=self.examples), recipe)
        order = subset(count, recipe.max_examples, recipe.seed, shuffled=True)
        for part in shares(mixture.mixed(order, 0), recipe.batch_size, all_processes()):
            if part:
                yield both.collate(part)
