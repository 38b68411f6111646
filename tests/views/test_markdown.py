from consolidate.training.accuracy_matrix import accuracy_matrix
from consolidate.views.markdown import escaped
from consolidate.views.matrix import matrix_summary, matrix_table
from consolidate.views.summary import show_markdown


def scores(**values: float) -> dict[str, dict[str, float]]:
    return {task: {"accuracy": value, "loss": 1.0} for task, value in values.items()}


MATRIX = matrix_summary(
    accuracy_matrix(
        {
            "a_b": {"after": scores(a_b=0.75)},
            "c": {"before": scores(a_b=0.75, c=0.25), "after": scores(a_b=0.5, c=1.0)},
        }
    )
)


def test_escaping_leaves_plain_names_alone() -> None:
    assert escaped("zahlen-2.0") == "zahlen-2.0"
    assert escaped("a_b|c") == r"a\_b\|c"


def test_the_matrix_is_a_table() -> None:
    assert matrix_table(MATRIX).splitlines() == [
        r"| after ↓ on → | a\_b | c |",
        "| --- | --- | --- |",
        r"| a\_b | 0.7500 | – |",
        "| c | 0.5000 | 1.0000 |",
        "",
        "ACC 0.7500, BWT -0.2500, forgetting 0.2500.",
    ]


def test_a_checkpoint_without_scores_says_so() -> None:
    summary = {
        "checkpoint": "a <b>",
        "tasks": [{"name": "c"}],
        "accuracy_matrix": None,
        "side_by_side": [],
    }
    assert show_markdown(summary) == (
        "### a &lt;b&gt;\n\nTasks: c.\n\nNo scores on its tasks were measured."
    )
    text = show_markdown(summary | {"accuracy_matrix": MATRIX})
    assert text.endswith(f"Tasks: c.\n\n{matrix_table(MATRIX)}")
