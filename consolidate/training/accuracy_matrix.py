"""The accuracy matrix of a chain of tasks, and measures of forgetting."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

Scores = Mapping[str, Mapping[str, float]]  # name of what was evaluated -> metric -> value
Metrics = Mapping[str, Scores]  # before, step N, epoch N, after -> scores


@dataclass(frozen=True)
class Mean:
    """A mean over those of its terms that were measured; None where none was."""

    value: float | None
    terms: int  # that were measured
    of: int


@dataclass(frozen=True)
class Point:
    """Scores after `step` optimizer steps of a task; step 0 is before the first."""

    task: str
    step: int
    scores: dict[str, float]  # by the name of the task or benchmark they are on


@dataclass(frozen=True)
class AccuracyMatrix:
    """R[i, j], the score on task j after training task i, T × T; None where not measured."""

    tasks: list[str]  # in the order in which they were learned
    scores: list[list[float | None]]  # R, row by row
    start: list[float | None]  # the scores before the first task was learned, (T,)
    points: list[Point]  # the curves over training steps, in the order of time
    # of benchmarks that are no tasks, by name: the score at the start and after each task, (T + 1,)
    benchmarks: dict[str, list[float | None]] = field(default_factory=dict)

    def acc(self) -> Mean:
        """Return the average accuracy, ACC = (1/T) Σ_j R[T, j] (Lopez-Paz & Ranzato 2017)."""
        return _mean(self.scores[-1])

    def bwt(self) -> Mean:
        """Return the backward transfer; below 0 where earlier tasks were forgotten.

        BWT = (1/(T − 1)) Σ_{j<T} (R[T, j] − R[j, j]), Lopez-Paz & Ranzato 2017.
        """
        return _mean(
            _difference(self.scores[-1][j], self.scores[j][j]) for j in range(len(self.tasks) - 1)
        )

    def forgetting(self) -> Mean:
        """Return the average forgetting; below 0 where earlier tasks were improved.

        F = (1/(T − 1)) Σ_{j<T} (max_{i<T} R[i, j] − R[T, j]), Chaudhry et al. 2018, the largest
        taken of the rows where task j was measured. A benchmark that is no task is a term too,
        with the start among its rows.
        """
        return _mean(self.forgotten().values())

    def forgotten(self) -> dict[str, float | None]:
        """Return the terms of `forgetting` by task or benchmark, the last task left out."""
        terms = {}
        columns = {task: [row[j] for row in self.scores] for j, task in enumerate(self.tasks[:-1])}
        for name, scores in {**columns, **self.benchmarks}.items():
            best = max((score for score in scores[:-1] if score is not None), default=None)
            terms[name] = _difference(best, scores[-1])
        return terms


def accuracy_matrix(
    metrics: Mapping[str, Metrics], benchmarks: Collection[str] = ()
) -> AccuracyMatrix:
    """Arrange the metrics of a ledger: a task's row holds its metrics under `after`.

    A task that was only measured has no `after`: its row is what the next one found `before`.
    """
    tasks, measured = list(metrics), list(metrics.values())

    def on(name: str, scores: Scores) -> float | None:
        return score(scores[name]) if name in scores else None

    times = [measured[0].get("before", {})]
    for own, following in zip(measured, [*measured[1:], {}], strict=True):
        times.append(own.get("after") or following.get("before", {}))
    others = [name for name in dict.fromkeys(benchmarks) if name not in metrics]
    start, *rows = [[on(name, scores) for name in tasks] for scores in times]
    on_others = {name: [on(name, scores) for scores in times] for name in others}
    return AccuracyMatrix(tasks, rows, start, _points(metrics, {*tasks, *others}), on_others)


def score(values: Mapping[str, float]) -> float | None:
    """Give the score among the metrics of one evaluation: the accuracy, else minus the loss."""
    if "score" in values:
        return values["score"]
    if "accuracy" in values:
        return values["accuracy"]
    return -values["loss"] if "loss" in values else None


def _points(metrics: Mapping[str, Metrics], names: Collection[str]) -> list[Point]:
    points = []
    for task, times in metrics.items():
        if not any(when.startswith("step ") for when in times):
            continue
        for when, scores in times.items():
            if when == "before" or when.startswith("step "):
                step = 0 if when == "before" else int(when.removeprefix("step "))
                found = {name: score(v) for name, v in scores.items() if name in names}
                known = {name: value for name, value in found.items() if value is not None}
                points.append(Point(task, step, known))
    return points


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _mean(terms: Iterable[float | None]) -> Mean:
    every = list(terms)
    measured = [term for term in every if term is not None]
    value = math.fsum(measured) / len(measured) if measured else None
    return Mean(value, len(measured), len(every))
