"""R, ACC, BWT and forgetting against numbers worked out by hand and against numpy in float64."""

import numpy as np
import pytest

from consolidate.training.accuracy_matrix import Mean, Metrics, Point, accuracy_matrix, score


def accuracies(**values: float) -> dict[str, dict[str, float]]:
    return {task: {"loss": 9.0, "accuracy": value} for task, value in values.items()}


def chain(matrix: list[list[float]]) -> dict[str, Metrics]:
    names = "abcdefgh"[: len(matrix)]
    return {
        name: {"after": accuracies(**dict(zip(names, row, strict=True)))}
        for name, row in zip(names, matrix, strict=True)
    }


def test_three_tasks_by_hand() -> None:
    matrix = accuracy_matrix(chain([[0.9, 0.2, 0.1], [0.95, 0.8, 0.2], [0.6, 0.7, 0.85]]))
    assert matrix.tasks == ["a", "b", "c"]
    assert matrix.scores[1] == [0.95, 0.8, 0.2]
    assert matrix.start == [None, None, None]
    assert matrix.acc().value == pytest.approx((0.6 + 0.7 + 0.85) / 3)
    assert matrix.bwt().value == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    # task a was at its best after b was learned, not after a
    assert matrix.forgetting().value == pytest.approx(((0.95 - 0.6) + (0.8 - 0.7)) / 2)


@pytest.mark.parametrize("tasks", [2, 5, 8])
def test_any_matrix_against_the_formulas(tasks: int) -> None:
    r = np.random.default_rng(tasks).random((tasks, tasks))
    matrix = accuracy_matrix(chain(r.tolist()))
    earlier = np.arange(tasks - 1)
    assert matrix.acc().value == pytest.approx(r[-1].mean(), rel=1e-12)
    assert matrix.bwt().value == pytest.approx((r[-1] - np.diag(r))[earlier].mean(), rel=1e-12)
    forgotten = r[:-1].max(0) - r[-1]
    assert matrix.forgetting().value == pytest.approx(forgotten[earlier].mean(), rel=1e-12)


def test_one_task_has_nothing_to_forget() -> None:
    matrix = accuracy_matrix(chain([[0.5]]))
    assert matrix.acc() == Mean(0.5, 1, 1)
    assert matrix.bwt() == matrix.forgetting() == Mean(None, 0, 0)


def test_what_was_not_measured_is_left_out_and_counted() -> None:
    matrix = accuracy_matrix(
        {
            "a": {"after": accuracies(a=0.9)},
            "b": {"after": accuracies(b=0.8)},
            "c": {"after": accuracies(a=0.5, c=0.7, other=0.1)},
        }
    )
    assert matrix.scores == [[0.9, None, None], [None, 0.8, None], [0.5, None, 0.7]]
    assert matrix.acc() == Mean(pytest.approx(0.6), 2, 3)
    assert matrix.bwt() == Mean(pytest.approx(-0.4), 1, 2)
    assert matrix.forgetting() == Mean(pytest.approx(0.4), 1, 2)
    nothing = accuracy_matrix({"a": {}, "b": {}})
    assert nothing.acc() == Mean(None, 0, 2)
    assert nothing.forgetting() == Mean(None, 0, 1)


def test_a_task_that_was_only_measured_has_the_row_that_the_next_one_began_with() -> None:
    matrix = accuracy_matrix(
        {"a": {}, "b": {"before": accuracies(a=0.9, b=0.1), "after": accuracies(a=0.7, b=0.8)}}
    )
    assert matrix.scores == [[0.9, 0.1], [0.7, 0.8]]
    assert matrix.start == [None, None]
    assert matrix.bwt().value == pytest.approx(-0.2)


def test_the_start_is_what_the_first_task_found() -> None:
    first = {"before": accuracies(a=0.1, b=0.2), "after": accuracies(a=0.9)}
    assert accuracy_matrix({"a": first, "b": {}}).start == [0.1, 0.2]


def test_the_score_is_the_accuracy_or_minus_the_loss() -> None:
    assert score({"loss": 2.0, "accuracy": 0.5, "score": 0.5}) == 0.5
    assert score({"loss": 2.0, "perplexity": 7.4, "score": -2.0}) == -2.0
    assert score({"score": 3.0}) == 3.0
    assert score({}) is None


def test_the_points_of_the_curves() -> None:
    matrix = accuracy_matrix(
        {
            "a": {"before": accuracies(a=0.1), "after": accuracies(a=0.9)},
            "b": {
                "before": accuracies(a=0.9, x=0.0),
                "step 2": accuracies(a=0.8, b=0.3),
                "epoch 1": accuracies(a=0.0),
                "step 4": accuracies(b=0.6),
            },
        }
    )
    assert matrix.points == [
        Point("b", 0, {"a": 0.9}),
        Point("b", 2, {"a": 0.8, "b": 0.3}),
        Point("b", 4, {"b": 0.6}),
    ]
