"""What holds `--json` against its schema finds what is missing, new or of another type."""

import json

import pytest

from consolidate.cli import cli
from consolidate.results import RESULTS
from scripts import write_docs
from support.json_schema import PATH, check_json

REPORT = {"checkpoint": "a", "commits": {}, "report": "r.html", "plots": [], "tasks": ["a"]}
FAILED = {"status": "failed", "exit_code": 3, "error": "no"}


def test_the_schema_is_what_the_types_of_the_results_give() -> None:
    assert PATH.read_text(encoding="utf-8") == write_docs.json_schema()


def test_each_command_has_its_result() -> None:
    assert set(RESULTS) == {"failed", *cli.commands}
    assert set(json.loads(PATH.read_text(encoding="utf-8"))["$defs"]) >= set(RESULTS)


def test_what_fits_passes() -> None:
    check_json("report", REPORT)
    check_json("report", FAILED)
    check_json("evaluate", {"a": {"loss": 1.5, "perplexity": None}})


@pytest.mark.parametrize(
    ("command", "value", "fault"),
    [
        ("report", {k: v for k, v in REPORT.items() if k != "tasks"}, "report lacks 'tasks'"),
        ("report", REPORT | {"size": 1}, "report has a 'size'"),
        ("report", REPORT | {"tasks": [1]}, r"report.tasks\[0\] is 1, not string"),
        ("report", REPORT | {"commits": {"user/model": None}}, "commits.user/model is None"),
        ("report", REPORT | {"commits": {}, "plots": None}, "report.plots is None, not array"),
        ("report", FAILED | {"exit_code": 0}, "failed.exit_code is 0, not one of"),
        ("evaluate", {"a": {"loss": True}}, "evaluate.a.loss is True, not number or null"),
        ("fisher", {"status": "done"}, "fisher lacks"),
    ],
)
def test_what_does_not_fit_is_named(command: str, value: dict[str, object], fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        check_json(command, value)
