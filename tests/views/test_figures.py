"""Figures hold the ledger's numbers, and only those that are known."""

import sys
from pathlib import Path
from typing import Any

import pytest

from consolidate.api import show
from consolidate.views.charts import Bars, HeatMap, Lines
from consolidate.views.figures import Figure, figures, in_order, layers
from consolidate.views.search_figures import search_charts
from formats.fisher_json import TaskRecord, read_ledger
from support import report_checkpoints as checkpoints


def drawn(folder: Path) -> dict[str, Figure]:
    summary = show(folder, top=sys.maxsize)
    ledger = read_ledger(folder / "fisher" / "fisher.json")
    found = figures(ledger, summary["parameters"], summary["accuracy_matrix"])
    return {figure.name: figure for figure in found}


def cells(figure: Figure) -> list[str]:
    chart = figure.chart
    if isinstance(chart, Bars):
        pairs = zip(chart.rows, chart.values, strict=True)
        return [f"{name}: {chart.write(value)}" for name, value in pairs]
    assert isinstance(chart, HeatMap)
    return [
        f"{name}, {column}: {'–' if value is None else chart.write(value)}"
        for name, row in zip(chart.rows, chart.values, strict=True)
        for column, value in zip(chart.columns, row, strict=True)
    ]


def test_the_figures_of_a_chain(tmp_path: Path) -> None:
    found = drawn(checkpoints.chain(tmp_path / "model"))
    names = ["matrix", "curves", "tradeoff", "between", "protection", "added", "overlap"]
    assert list(found) == names
    assert found["matrix"].header == ["after learning", "on a", "on b", "on c"]
    assert found["matrix"].rows == [
        ["a", "0.900", "0.100", "–"],
        ["b", "0.700", "0.800", "–"],
        ["c", "0.600", "–", "0.950"],
    ]
    assert "After the last one: a 0.600, c 0.950" in found["matrix"].chart.description
    assert found["curves"].rows[1] == ["b", "epoch 1", "0.800", "0.600", "–"]
    assert "a from 0.900 to 0.600" in found["curves"].chart.description
    assert found["tradeoff"].rows == [
        ["b", "before", "0.100", "0.900"],
        ["b", "epoch 1", "0.600", "0.800"],
        ["b", "epoch 2", "0.800", "0.700"],
        ["b", "after", "0.800", "0.700"],
    ]
    (curves, way) = (found[name].chart for name in ("curves", "tradeoff"))
    assert isinstance(curves, Lines)
    assert isinstance(way, Lines)
    assert way.lines[0].points == [(0.1, 0.9), (0.6, 0.8), (0.8, 0.7), (0.8, 0.7)]
    colors = {line.name: line.color for line in curves.lines}
    assert way.lines[0].color == colors["b"] == 1  # a task has one colour
    assert found["between"].header == ["learning", "α", "on b", "on c"]
    assert found["between"].rows[1] == ["c", "0.5", "0.700", "0.875"]
    assert "After learning c, α = 0.5 was chosen of 2" in found["between"].chart.description
    protection = {row[0]: row[1:] for row in found["protection"].rows}
    assert list(protection) == ["0.weight", "0.bias", "2.weight"]  # as in the weights
    assert protection["0.bias"] == ["12", "33.3%", "2", "2"]
    added = {row[0]: row[1:] for row in found["added"].rows}
    assert added["0.bias"] == ["1", "20", "0"]  # w Σ F
    assert cells(found["added"])[3:6] == ["0.bias, a: 1", "0.bias, b: 20", "0.bias, c: 0"]
    assert found["overlap"].header == ["parameter", "b", "c"]
    assert found["overlap"].rows[0] == ["0.weight", "0.25", "0.75"]


def test_the_mean_on_earlier_tasks_is_over_those_that_were_always_measured(tmp_path: Path) -> None:
    before, after = checkpoints.on(a=0.9, b=0.7, c=0.1), checkpoints.on(a=0.5, c=0.8)
    tasks = [
        *(checkpoints.task(name) for name in "ab"),
        checkpoints.task("c", metrics={"after": after, "step 2": after, "before": before}),
        checkpoints.task("d", metrics={"after": checkpoints.on(d=0.5)}),
    ]
    found = drawn(checkpoints.write(tmp_path / "m", tasks, ["w"]))["tradeoff"]
    assert found.rows == [
        ["c", "before", "0.100", "0.900"],
        ["c", "after", "0.800", "0.500"],
        ["c", "step 2", "0.800", "0.500"],
    ]


def test_one_task_that_was_only_measured(tmp_path: Path) -> None:
    names = ["w"]
    only = checkpoints.task("only", layers=checkpoints.layers(names, 1.0))
    assert list(drawn(checkpoints.write(tmp_path / "m", [only], names))) == ["protection", "added"]


def test_a_ledger_without_layers_and_a_fisher_of_nothing(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "m", [checkpoints.task("only")], ["w"], values=0.0)
    found = drawn(folder)
    assert list(found) == ["protection"]
    assert found["protection"].rows == [["w", "0", "–", "0", "0"]]


def test_layers_that_a_task_did_not_have_are_left_open(tmp_path: Path) -> None:
    tasks = [
        checkpoints.task("a", layers=checkpoints.layers(["old"], 1.0)),
        checkpoints.task("b", layers=checkpoints.layers(["new"], 1.0)),
    ]
    found = drawn(checkpoints.write(tmp_path / "m", tasks, ["new", "old"]))
    assert found["added"].rows == [["old", "1", "–"], ["new", "–", "1"]]


def test_losses_are_scores_below_zero(tmp_path: Path) -> None:
    own = checkpoints.task(
        "a", metrics={"before": {"a": {"loss": 12.5}}, "after": {"a": {"loss": 0.5}}}
    )
    found = drawn(checkpoints.write(tmp_path / "m", [own], ["w"]))
    assert found["matrix"].rows == [["(start)", "-12.5"], ["a", "-0.500"]]
    assert found["curves"].rows == [["a", "before", "-12.5"], ["a", "after", "-0.500"]]


def test_hundreds_of_layers_are_taken_by_module(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.{part}.weight" for i in range(40) for part in ("q", "k", "mlp.up")]
    tasks: list[TaskRecord] = [
        checkpoints.task("a", layers=checkpoints.layers(names, 1.0)),
        checkpoints.task("b", layers=checkpoints.layers(names, 1.0, 0.5)),
    ]
    tasks[1].layers["model.layers.0.k.weight"].overlap = 1.0
    found = drawn(checkpoints.write(tmp_path / "m", tasks, names))
    assert len(found["protection"].rows) == 120
    assert cells(found["protection"])[0] == "model.layers.0: 36"  # 6 values each of 1, 2 and 3
    assert cells(found["added"])[0] == "model.layers.0, a: 6"
    # Weighed by the traces 1, 2 and 3: (1 · 0.5 + 2 · 1 + 3 · 0.5) / 6.
    assert cells(found["overlap"])[0] == "model.layers.0, b: 0.67"


def test_groups_of_parameters() -> None:
    assert layers(["a.w", "a.b"], 2) == {"a.w": ["a.w"], "a.b": ["a.b"]}
    names = ["a.0.w", "a.0.b", "a.1.w", "b.w"]
    assert layers(names, 3) == {"a.0": names[:2], "a.1": names[2:3], "b.w": names[3:]}
    assert layers(names, 2) == {"a": names[:3], "b": names[3:]}
    flat = [f"w{i}" for i in range(13)]
    assert layers(flat, 3) == {"w0": ["w0"], "w1": ["w1"], "(11 more)": flat[2:]}


@pytest.mark.parametrize(("count", "rows"), [(12, 12), (48, 48), (126, 126)])
def test_a_stack_of_layers_stays_a_stack(count: int, rows: int) -> None:
    names = [f"model.layers.{i}.{part}.weight" for i in range(count) for part in "abcdefgh"]
    found = layers(["model.embed.weight", *names, "head.weight"], 50)
    assert len(found) == rows + 2
    assert found["model.layers.0"] == names[:8]


@pytest.mark.parametrize("count", [3, 60])
def test_many_tasks(tmp_path: Path, count: int) -> None:
    names = ["w"]
    tasks = [
        checkpoints.task(
            f"t{i}",
            layers=checkpoints.layers(names, 1.0, 0.5 if i else None),
            metrics={"after": checkpoints.on(**{f"t{j}": 0.5 for j in range(i + 1)})},
        )
        for i in range(count)
    ]
    found = drawn(checkpoints.write(tmp_path / "m", tasks, names))
    assert len(found["matrix"].rows) == len(found["added"].header) - 1 == min(count, 40)
    assert found["matrix"].rows[-1][0] == f"t{count - 1}"


def test_parameters_that_no_task_lists_come_last(tmp_path: Path) -> None:
    only = checkpoints.task("a", layers=checkpoints.layers(["z"], 1.0))
    folder = checkpoints.write(tmp_path / "m", [only], ["a", "z"])
    assert in_order(read_ledger(folder / "fisher" / "fisher.json")) == ["z", "a"]


def search(*, old: bool) -> dict[str, Any]:
    def trial(strength: float, steps: int, new: float) -> dict[str, Any]:
        metrics = {"new": {"score": new}} | ({"old": {"score": 1 - new}} if old else {})
        return {
            "ewc_lambda": strength,
            "steps": steps,
            "metrics": metrics,
            "penalty_per_lambda": 0.1,
        }

    return {
        "trials": [
            trial(1.0, 10, 0.2),
            trial(10.0, 80, 0.5),
            trial(0.0, 80, 0.9),
            {"ewc_lambda": 100.0, "steps": 80, "metrics": None, "penalty_per_lambda": None},
        ],
        "new_task": "new",
        "old_tasks": ["old"] if old else [],
        "ewc_lambda": 10.0,
    }


@pytest.mark.parametrize("old", [True, False])
def test_a_search_is_drawn_by_its_whole_runs(old: bool) -> None:
    scores, trade = search_charts(search(old=old))
    assert isinstance(scores, Lines)
    assert isinstance(trade, Lines)
    assert scores.ticks == [(0.0, "0"), (1.0, "1e1"), (2.0, "1e2")]
    curves = {line.name: line.points for line in scores.lines}
    assert list(curves) == [*(["old"] if old else []), "new", "chosen: 10"]
    assert curves["new"] == [(0.0, 0.9), (1.0, 0.5)]
    assert [x for x, _ in curves["chosen: 10"]] == [1.0, 1.0]
    (curve,) = trade.lines
    assert curve.points == [(0.9, pytest.approx(0.1)), (0.5, 0.5 if old else 0.1)]
    assert curve.notes == ["0", "10 (chosen)"]
