"""What ledgers tell has to fit together: each task, the traces of Λ, and the descent."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from consolidate.api import show
from consolidate.chain.consistency import contradictions, descent, side_by_side, side_by_side_text
from consolidate.views.card import model_card
from consolidate.views.card_text import Subject
from consolidate.views.figures import score_figures
from consolidate.views.matrix import ledger_matrix, matrix_summary
from consolidate.views.summary import show_text
from formats.digest import TensorRecord, set_digest
from formats.fisher_json import LayerRecord, Ledger, TaskRecord, read_ledger
from support.report_checkpoints import write


def record(digit: str = "0", dtype: str = "F32") -> dict[str, TensorRecord]:
    return {"w": TensorRecord(dtype, (2,), digit * 64)}


def task(name: str, trace: float = 1.0, **changes: Any) -> TaskRecord:
    fields: dict[str, Any] = {
        "objective": "classification",
        "likelihood": "softmax",
        "labels": None,
        "unit": "example",
        "examples": 3,
        "units": 3,
        "estimator": "exact",
        "mc_samples": None,
        "seed": 0,
        "layers": {"w": LayerRecord(trace)},
    }
    return TaskRecord(name=name, **(fields | changes))


def ledger(*tasks: TaskRecord, digit: str = "0", dtype: str = "F32", **changes: Any) -> Ledger:
    return Ledger(list(tasks), weights=record(digit), fisher=record(dtype=dtype), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": 4}, "has 4 units in 3 examples"),
        ({"mc_samples": 2}, "gives mc_samples with the estimator exact"),
        ({"estimator": "mc"}, "gives no mc_samples with the estimator mc"),
        ({"ewc_lambda": 1.0}, "gives ewc_lambda, but was trained without a penalty"),
        ({"penalty": "none", "ewc_lambda": 1.0}, "gives ewc_lambda, but"),
        ({"penalty": "ewc"}, "gives no ewc_lambda with the penalty ewc"),
        ({"penalty_on": "merged"}, "gives penalty_on merged, but was trained without a penalty"),
        ({"parent": "a" * 64}, "gives a parent, but was only measured"),
        ({"layers": {"w": LayerRecord(1.0), "v": LayerRecord(1.0)}}, "trace for 'v', which has no"),
    ],
)
def test_fields_of_a_task_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    lines = contradictions(ledger(task("a", **changes)), {"w": 1.0})
    assert [message in line for line in lines] == [True]
    assert "the task 'a'" in lines[0]


def test_tasks_whose_fields_fit_pass() -> None:
    for changes in (
        {"unit": "token", "units": 40},
        {"estimator": "batched", "mc_samples": 1},
        {"penalty": "none", "parent": "a" * 64},
        {"penalty": "l2", "ewc_lambda": 0.0},
        {"penalty": "something else"},
    ):
        assert contradictions(ledger(task("a", **changes)), {"w": 1.0}) == []


@pytest.mark.parametrize(
    ("changes", "least", "most"),
    [
        ({}, 14.0, 15.0),  # the first may have been faded by an earlier γ, the others not
        ({"gamma": 0.5}, 8.0, 15.0),
        ({"merge_rule": "separate"}, 8.0, 15.0),
        ({"heads": {"a": record()}}, 8.0, 15.0),
    ],
)
def test_the_trace_lies_between_what_its_tasks_give(
    changes: dict[str, Any], least: float, most: float
) -> None:
    chain = ledger(task("a", 1.0), task("b", 3.0, weight=2.0), task("c", 8.0), **changes)
    for trace in (least, most, least * (1 - 1e-7), most * (1 + 1e-7)):
        assert contradictions(chain, {"w": trace}) == []
    for trace in (0.0, least * 0.98, most * 1.02):
        (line,) = contradictions(chain, {"w": trace})
        assert f"'w': expected a trace of {least:g} to {most:g} from " in line
        assert line.endswith(f"found {trace:.6g}")


def test_of_two_tasks_the_trace_is_known() -> None:
    chain = ledger(task("a", 1.0), task("b", 3.0))
    assert contradictions(chain, {"w": 4.0}) == []
    assert "expected a trace of 4 from" in contradictions(chain, {"w": 3.9})[0]
    # In float32 too, as the first may have been fetched in bfloat16.
    assert contradictions(chain, {"w": 3.99}) == []
    alone = ledger(task("a", 4.0))
    assert contradictions(alone, {"w": 3.99})
    rounded = ledger(task("a", 4.0), dtype="BF16")
    assert contradictions(rounded, {"w": 3.99}) == []
    assert contradictions(rounded, {"w": 3.9})


def test_tasks_without_traces_are_not_held_against_the_fisher() -> None:
    assert contradictions(ledger(task("a", layers={})), {"w": 7.0}) == []


def test_a_task_that_was_not_measured_adds_nothing() -> None:
    nothing = {"examples": None, "units": None, "estimator": None, "penalty": "none", "layers": {}}
    chain = ledger(task("a", 1.0), task("b", 3.0), task("c", **nothing))
    assert contradictions(chain, {"w": 4.0}) == []
    assert "expected a trace of 3 to 4 from" in contradictions(chain, {"w": 4.1})[0]
    faded = ledger(task("a", 1.0), task("c", **nothing), gamma=0.5)
    assert contradictions(faded, {"w": 0.5}) == []


def test_descent() -> None:
    first = ledger(task("a"))
    parent = set_digest(record())
    trained = task("b", penalty="ewc", ewc_lambda=1.0, parent=parent)
    second = ledger(task("a"), trained, digit="1")
    third = ledger(*second.tasks, replace(trained, name="c", parent="b" * 64), digit="2")
    assert descent(first, second) == ("weights", [])
    assert descent(first, third) == ("weights", [])  # what came after is for others to say
    assert second.weights != first.weights
    (line,) = descent(second, third)[1]
    assert line.startswith(f"the task 'c' was trained from the weights {'b' * 12}…, ")
    assert line.endswith(f"not from {set_digest(second.weights)[:12]}…")
    assert descent(second, first) == ("tasks", ["the task 'b' is missing"])
    other = ledger(task("a", seed=1), trained)
    assert descent(first, other) == ("tasks", ["the record of the task 'a' differs"])
    assert descent(first, ledger(task("x"), trained))[1] == ["task 1: expected 'a', found 'x'"]


def test_a_renaming_may_order_the_layers_otherwise() -> None:
    layers = [LayerRecord(1.0), LayerRecord(2.0, 0.5)]
    one = ledger(task("a", layers=dict(zip("wv", layers, strict=True))))
    other = ledger(task("a", layers=dict(zip("yx", layers[::-1], strict=True))))
    assert descent(one, other) == ("weights", [])
    for layers in (
        [LayerRecord(2.0, 0.5), LayerRecord(1.0)],
        [LayerRecord(1.0, 0.5), LayerRecord(2)],
    ):
        swapped = ledger(task("a", layers=dict(zip("wv", layers, strict=True))))
        assert descent(one, swapped)[1] == ["the record of the task 'a' differs"]


def test_descent_without_a_parent() -> None:
    first = ledger(task("a"))
    unknown = task("b", penalty="ewc", ewc_lambda=1.0)
    assert descent(first, ledger(task("a"), unknown, digit="1")) == ("tasks", [])
    assert descent(first, ledger(task("a"), task("b"))) == ("weights", [])
    for later in (ledger(task("a"), digit="1"), ledger(task("a"), task("b"), digit="1")):
        assert descent(first, later) == (
            "weights",
            ["the weights differ, although no task was trained"],
        )
    trained = replace(unknown, parent=set_digest(record()))
    assert descent(first, ledger(task("a"), task("m"), trained, digit="1")) == ("weights", [])


def test_tasks_of_the_same_weights_were_learned_side_by_side(tmp_path: Path) -> None:
    start, other = "a" * 64, "b" * 64
    chain = ledger(task("old"), task("a", penalty="none", parent=start), task("new"))
    assert side_by_side(chain) == []
    assert side_by_side_text([]) == ""
    merged = [
        task("old"),
        *(task(name, penalty="none", parent=start, metrics=on(name)) for name in ("a", "b")),
        task("a2", penalty="none", parent=other),
    ]
    assert side_by_side(ledger(*merged)) == [["a", "b"]]
    folder = write(tmp_path / "model", merged, ["w"])
    note = "Trained in parallel from the same weights, then merged: a, b. Their rows are of"
    assert note in show_text(show(folder))
    found = read_ledger(folder / "fisher" / "fisher.json")
    matrix = ledger_matrix(found)
    assert matrix is not None
    (figure, *_) = score_figures(found, matrix_summary(matrix))
    assert note in figure.note
    assert note in model_card(None, found, Subject("user/model", {}))


def on(name: str) -> dict[str, dict[str, dict[str, float]]]:
    return {"after": {name: {"accuracy": 0.5}}}
