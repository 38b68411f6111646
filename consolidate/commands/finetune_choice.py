"""What λ and α are chosen by: the plans of both searches, and the data held out for them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consolidate.commands.task_metrics import evaluate_all
from consolidate.data.examples import Examples, hold_out
from consolidate.options import Search
from consolidate.training.lambda_search import choose_rule
from consolidate.views.charts import check_picture
from formats.benchmark import benchmark_task
from formats.errors import UsageError
from formats.task_file import read_task_file

if TYPE_CHECKING:
    from consolidate.commands.finetune_start import Start


@dataclass(frozen=True)
class SearchPlan:
    """What a search will try and how it will choose, checked before the work."""

    strengths: Sequence[float] | str  # λs, or "auto"
    rule: str
    max_forgetting: float | None
    new: str
    old: list[str]  # tasks of the ledger that are measured


@dataclass(frozen=True)
class InterpolationPlan:
    """How far the weights go from the start to what was trained."""

    alpha: float | None  # None: chosen on held-out data
    method: str  # plain, or fisher
    new: str
    old: list[str]  # tasks of the ledger with held-out data
    budget: float | None = None  # in nats, that α keeps; None: α is given, or chosen by scores


def plan_search(
    asked: Search, *, max_forgetting: float | None, new: str, ledger: Sequence[str]
) -> SearchPlan:
    """Refuse what would fail later; `ledger` are the old tasks."""
    strengths: Any = asked.ewc_lambda
    validation = asked.validation or {}
    rule = choose_rule(
        asked.select, old=ledger, validation=validation, max_forgetting=max_forgetting
    )
    if asked.search_plot is not None:
        check_picture("--search-plot", Path(asked.search_plot), (".png", ".svg", ".pdf"))
    return SearchPlan(strengths, rule, max_forgetting, new, [n for n in ledger if n in validation])


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
            + (", ".join(ledger) or "the checkpoint has none; run `consolidate fisher` on it first")
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
        raise UsageError(
            "--budget needs earlier tasks, and the checkpoint has no ledger: run `consolidate "
            "fisher` on it first, or leave --budget out"
        )
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


def same_data(one: str | Path, other: str | Path) -> bool:
    """Return whether two names are of the same file, folder or repository."""
    return _place(one) == _place(other)


def _place(data: str | Path) -> str:
    """Name what data are read from; a task file names it, and maybe a split of it."""
    path = Path(data)
    if path.suffix.lower() == ".toml" and path.is_file():
        task_file = read_task_file(path)
        return " ".join(filter(None, (_place(task_file.data), task_file.split)))
    return str(path.resolve()) if path.exists() else str(data)


class HeldOut:
    """The data that λ or α is chosen by, and what they leave of the new task's to train on."""

    def __init__(self, plan: SearchPlan | InterpolationPlan, start: "Start", seed: int) -> None:
        """Take what --validation has, and of the new task's data a part where it has none.

        A budget is one of earlier tasks: the new one is trained on whole.
        """
        self._plan, self._start = plan, start
        self.examples, self.tasks = start.examples, dict(start.held_out)
        self._given = plan.new in self.tasks
        if not self._given and not (isinstance(plan, InterpolationPlan) and plan.budget):
            self.examples, self.tasks[plan.new] = hold_out(start.examples, seed)

    @property
    def of_new(self) -> Examples:
        """What the new task is measured on."""
        return self.tasks[self._plan.new]

    def measure(self, batch_size: int) -> dict[str, dict[str, float]]:
        """Evaluate the model as it is now."""
        return evaluate_all(self._start.model, self.tasks, self._start.with_heads, batch_size)

    def described(self, without_old: str) -> str:
        """Report what the choice is based on, ending in `without_old` where no task is old."""
        where = "of --validation" if self._given else "held out of the training data"
        new = f"{self._plan.new} on {len(self.of_new):,} examples {where}"
        old = ", ".join(self._plan.old)
        return f"{old} on --validation, {new}" if old else f"{new}; {without_old}"
