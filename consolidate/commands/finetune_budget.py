"""λ that `finetune --budget` sets during the training, by what held-out rows of old tasks lose."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from consolidate.commands.finetune_nats import quadratic
from consolidate.commands.finetune_run import run_length
from consolidate.commands.task_metrics import evaluate_all
from consolidate.data.examples import Part
from consolidate.options import Recipe
from consolidate.runtime import signals
from consolidate.runtime.distributed import all_processes, place_in
from consolidate.training.budget import (
    Measured,
    first_strength,
    is_due,
    next_strength,
    rows_measured,
)
from consolidate.training.loop import Step
from formats.errors import NonFiniteError
from formats.partial_work import StoredWork

if TYPE_CHECKING:
    from consolidate.commands.finetune_start import Start

LOG = logging.getLogger("consolidate")


class Controller:
    """Sets the penalty's λ after steps at which old tasks are measured; resumes from its state.

    λ is 0 until one of them has lost more than the budget, in the rows that were measured.
    """

    def __init__(
        self, budget: float, start: "Start", recipe: Recipe, found: StoredWork | None
    ) -> None:
        """Divide the held-out rows, each part for a measurement; `found` is of the same work."""
        assert start.penalty is not None  # the plan has refused by now
        self._budget, self._penalty = budget, start.penalty
        self._start, self._batch_size = start, recipe.batch_size
        self._steps = run_length(start, recipe)
        rows = recipe.step_examples(place_in(all_processes())[1])
        self._parts = {
            name: [Part(data, part) for part in rows_measured(len(data), self._steps, rows)]
            for name, data in start.held_out.items()
        }
        state = None if found is None else found.state.get("budget")
        self.state: dict[str, Any] = dict(state or {})  # JSON-ready

    @property
    def measured(self) -> list[Measured]:
        """What was found so far, since λ was first set."""
        return [Measured(**one) for one in self.state["measured"]]

    def begin(self) -> None:
        """Measure all parts and the penalty before the first step; give the penalty its λ."""
        if not self.state:
            # One measurement; several processes stop together after it.
            with signals.waiting(all_processes() is not None), torch.random.fork_rng():
                before = {
                    name: [self._loss(name, part) for part in range(len(parts))]
                    for name, parts in self._parts.items()
                }
            self.state.update(before=before, squares=quadratic(self._penalty), last=0, measured=[])
        self._take_strength()

    def after_step(self, steps: Sequence[Step]) -> None:
        """Measure and set λ where that is due after the last step, and was not done."""
        step, measured = len(steps), self.state["measured"]
        if step <= self.state["last"] or step == self._steps:
            return
        if is_due(step, self._steps, begun=bool(measured)):
            try:
                with signals.waiting(all_processes() is not None), torch.random.fork_rng():
                    lost = max(self._lost().values())
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"step {step}, old tasks of --validation: {error}; lower --learning-rate, or "
                    "use --max-grad-norm"
                ) from error
            if (strength := self._strength(steps, lost)) is not None:
                measured.append(asdict(Measured(step, lost, strength)))
                LOG.info("step %d: %+.4g nats of old loss, λ = %.3g", step, lost, strength)
            self.state["count"] = self.state.get("count", 0) + 1
        self.state["last"] = step
        self._take_strength()

    def _strength(self, steps: Sequence[Step], lost: float) -> float | None:
        if measured := self.measured:
            return next_strength(measured[-1], measured[0].ewc_lambda, lost, self._budget)
        if lost <= self._budget:
            return None
        squares = quadratic(self._penalty) - self.state["squares"]
        return first_strength([step.loss for step in steps], squares)

    def _take_strength(self) -> None:
        measured = self.state["measured"]
        self._penalty.ewc_lambda = measured[-1]["ewc_lambda"] if measured else 0.0

    def _lost(self) -> dict[str, float]:
        """Measure the next part of each old task."""
        count, lost = self.state.get("count", 0), {}
        for name, parts in self._parts.items():
            part = count % len(parts)
            lost[name] = self._loss(name, part) - self.state["before"][name][part]
        return lost

    def _loss(self, name: str, part: int) -> float:
        examples = {name: self._parts[name][part]}
        found = evaluate_all(self._start.model, examples, self._start.with_heads, self._batch_size)
        return found[name]["loss"]
