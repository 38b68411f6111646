"""Chains of tasks in the experiments: one `consolidate run` each, its scores, tables and a plot."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.experiments.lib.common import Session, markdown, plain


@dataclass(frozen=True)
class Chain:
    """A run of all tasks with one penalty."""

    title: str  # the kind of penalty, without λ
    strength: float | None
    tasks: list[str]
    command: str
    run_file: str  # contents
    validation: float  # mean score of all tasks after the last, on validation rows
    scores: list[list[float]]  # R[i, j] on test rows; NaN where not measured
    acc: float
    bwt: float
    ledger: dict[str, Any]  # of the last checkpoint

    @property
    def name(self) -> str:
        """How tables and plots call it."""
        return self.title + ("" if self.strength is None else f", λ = {plain(self.strength)}")


def run_file(tables: Mapping[str, Any]) -> str:
    """Write TOML: values and tables, and under ``task`` a list of tables."""
    lines = [f"{key} = {_value(value)}" for key, value in tables.items() if _is_value(value)]
    for key, table in tables.items():
        if not _is_value(table):
            for one in table if isinstance(table, list) else [table]:
                heading = f"[[{key}]]" if isinstance(table, list) else f"[{key}]"
                lines += ["", heading, *(f"{name} = {_value(v)}" for name, v in one.items())]
    return "\n".join(lines).strip()


def _is_value(value: Any) -> bool:
    return not isinstance(value, Mapping) and not (
        isinstance(value, list) and value and isinstance(value[0], Mapping)
    )


def _value(value: Any) -> str:
    return plain(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def run_chain(
    session: Session,
    title: str,
    strength: float | None,
    tables: Mapping[str, Any],
    *,
    evaluation: Sequence[object] = (),
) -> Chain:
    """Write a run file, run it, and score its last checkpoint on the validation rows.

    All chains of an experiment have one output folder, so a first task that is learned alike in
    several of them is learned once.

    Args:
        session: Where; a task's data there are TASK-train, TASK-val and TASK-test with one suffix.
        title: The kind of penalty, without λ.
        strength: λ, for tables; it stands in `tables` too.
        tables: Of the run file, without `output-dir`.
        evaluation: Options of `consolidate evaluate`.

    Returns:
        What came of it.
    """
    words = title if strength is None else f"{title} {plain(strength)}"
    name = re.sub(r"[^a-z0-9.]+", "-", words.lower())
    content = run_file({"output-dir": "chain", **tables})
    (session.folder / f"{name}.toml").write_text(content + "\n", encoding="utf-8")
    result = session.consolidate("run", f"{name}.toml", quote=False)
    matrix = result["accuracy_matrix"]
    tasks = {task["name"]: task["data"].replace("-train", "-val") for task in tables["task"]}
    data = [word for task, path in tasks.items() for word in ("--data", f"{task}={path}")]
    last = session.folder / result["checkpoint"]
    scores = session.consolidate("evaluate", last, *evaluation, *data, quote=False)
    return Chain(
        title=title,
        strength=strength,
        tasks=matrix["tasks"],
        command=f"consolidate run {name}.toml",
        run_file=content,
        validation=sum(scores[task]["score"] for task in tasks) / len(tasks),
        scores=[[math.nan if one is None else one for one in row] for row in matrix["scores"]],
        acc=matrix["acc"]["value"],
        bwt=matrix["bwt"]["value"],
        ledger=json.loads((last / "fisher" / "fisher.json").read_text(encoding="utf-8")),
    )


def best_chains(chains: Sequence[Chain]) -> list[Chain]:
    """Choose the best strength of each kind of penalty by the validation scores."""
    kinds: dict[str, list[Chain]] = {}
    for chain in chains:
        kinds.setdefault(chain.title, []).append(chain)
    return [max(kind, key=lambda chain: chain.validation) for kind in kinds.values()]


def percent(score: float) -> str:
    """Write an accuracy as tables show it."""
    return "–" if math.isnan(score) else f"{100 * score:.2f} %"


def last_scores_table(chains: Sequence[Chain]) -> str:
    """Write the test scores after the last task, by task and their mean."""
    rows = [[one.name, *map(percent, one.scores[-1]), percent(one.acc)] for one in chains]
    return markdown(["", *chains[0].tasks, "mean"], rows)


def strengths_table(chains: Sequence[Chain]) -> str:
    """Write what every strength gave on validation and on test rows."""
    rows = [[one.name, *map(percent, (one.validation, one.acc, one.bwt))] for one in chains]
    return markdown(["", "mean, validation", "mean, test", "BWT, test"], rows)


def matrix_table(chain: Chain) -> str:
    """Write R[i, j], the test score on task j after training task i."""
    rows = [[task, *map(percent, row)] for task, row in zip(chain.tasks, chain.scores, strict=True)]
    return markdown(["after \\ on", *chain.tasks], rows)


def traces_table(chains: Sequence[Chain]) -> str:
    """Write each task's trace of the Fisher, before its weight."""
    rows = []
    for one in chains:
        traces = [sum(at["trace"] for at in t["layers"].values()) for t in one.ledger["tasks"]]
        rows.append([one.name, *(f"{trace:.3g}" for trace in traces)])
    return markdown(["", *chains[0].tasks], rows)


def plot_chains(session: Session, chains: Sequence[Chain]) -> str:
    """Draw the test accuracy on every task over the epochs of the chain, one panel a chain.

    Args:
        session: Whose report the picture belongs to.
        chains: What is drawn.

    Returns:
        The Markdown line that shows the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = 4.5 * len(chains)
    figure, axes = pyplot.subplots(
        1, len(chains), figsize=(width, 3.4), sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, chain in zip(axes[0], chains, strict=True):
        curves: dict[str, list[tuple[float, float]]] = {task: [] for task in chain.tasks}
        for i, task in enumerate(chain.ledger["tasks"]):
            epochs = {k: v for k, v in task["metrics"].items() if k.startswith("epoch")}
            for number, scores in enumerate(epochs.values(), 1):
                for name in curves.keys() & scores.keys():
                    curves[name].append((i + number / len(epochs), scores[name]["accuracy"]))
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set_title(chain.name, fontsize="medium")
        axis.set_xlabel("tasks trained")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy")
    axes[0][0].legend(fontsize="small", loc="lower left")
    picture = session.report / f"{session.name}.png"
    figure.savefig(picture, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return f"![test accuracy on every task while the chain is trained]({picture.name})"
