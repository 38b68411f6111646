"""The matrix as data, table, CSV and plot, by itself and through `show`."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from consolidate.api import show
from consolidate.training.accuracy_matrix import AccuracyMatrix, accuracy_matrix
from consolidate.views.charts import image
from consolidate.views.figures import score_figures
from consolidate.views.matrix import ledger_matrix, matrix_summary, means_text, write_matrix_csv
from consolidate.views.summary import matrix_text, show_text
from formats.errors import InputError, UsageError
from formats.fisher_json import ledger_bytes, read_ledger
from support import report_checkpoints as checkpoints

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def on(**values: float) -> dict[str, dict[str, float]]:
    return {name: {"accuracy": value} for name, value in values.items()}


@pytest.fixture
def matrix() -> AccuracyMatrix:
    return accuracy_matrix(
        {
            "a": {"before": on(a=0.125), "step 3": on(a=0.5), "after": on(a=0.9)},
            "b": {
                "before": on(a=0.9, b=0.1),
                "step 2": on(a=0.8, b=0.6),
                "step 4": on(a=0.75, b=0.7),
                "after": on(a=0.75, b=0.7),
            },
        }
    )


def test_the_summary_is_json_and_the_table_is_its_numbers(matrix: AccuracyMatrix) -> None:
    summary = json.loads(json.dumps(matrix_summary(matrix), allow_nan=False))
    assert summary["scores"] == [[0.9, None], [0.75, 0.7]]
    assert summary["bwt"] == {"value": pytest.approx(-0.15), "terms": 1, "of": 1}
    assert summary["points"][1] == {"task": "a", "step": 3, "scores": {"a": 0.5}}
    assert matrix_text(summary).splitlines() == [
        "after \\ on       a       b",
        "(start)     0.1250       –",
        "a           0.9000       –",
        "b           0.7500  0.7000",
        "ACC 0.7250, BWT -0.1500, forgetting 0.1500",
    ]


def test_a_mean_over_a_part_says_so() -> None:
    matrix = accuracy_matrix({"a": {"after": on(a=1.0)}, "b": {}, "c": {"after": on(c=0.5)}})
    text = matrix_text(matrix_summary(matrix))
    assert text.endswith("ACC 0.5000 (over 1 of 3), BWT –, forgetting –")
    assert "start" not in text


def test_csv_is_in_the_order_of_time(matrix: AccuracyMatrix, tmp_path: Path) -> None:
    write_matrix_csv(tmp_path / "r.csv", matrix)
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["training", "when", "a", "b"],
        ["a", "before", "0.125", ""],
        ["a", "step 3", "0.5", ""],
        ["a", "after", "0.9", ""],
        ["b", "step 2", "0.8", "0.6"],
        ["b", "step 4", "0.75", "0.7"],
        ["b", "after", "0.75", "0.7"],
    ]


def test_plots_are_images_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    folder = checkpoints.chain(tmp_path / "model")
    for name in ("r.png", "again.png", "r.svg", "again.SVG"):
        show(folder, plot=tmp_path / name)
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
    assert (tmp_path / "r.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert (tmp_path / "r.svg").read_bytes() == (tmp_path / "again.SVG").read_bytes()
    ledger = read_ledger(folder / "fisher" / "fisher.json")
    known = ledger_matrix(ledger)
    assert known is not None
    charts = [figure.chart for figure in score_figures(ledger, matrix_summary(known))]
    heading = means_text(matrix_summary(known))
    assert heading in (tmp_path / "r.svg").read_text()
    assert (tmp_path / "r.svg").read_bytes() == image(charts, "svg", heading=heading)  # a report's


def test_a_plot_of_many_tasks_says_which(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(41)]
    tasks = [checkpoints.task(name, metrics={"after": checkpoints.on(t0=0.5)}) for name in names]
    folder = checkpoints.write(tmp_path / "model", tasks, ["w"])
    with caplog.at_level("INFO", "consolidate"):
        show(folder, plot=tmp_path / "r.svg")
    assert "the plot shows the last 40 of 41 tasks" in caplog.text


def test_what_cannot_be_written_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.chain(tmp_path / "model")
    with pytest.raises(UsageError, match=r"r\.pdf: the name must end in \.png or \.svg"):
        show(folder, plot=tmp_path / "r.pdf")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file is not a writable folder"):
        show(folder, csv=tmp_path / "file" / "r.csv")
    with pytest.raises(InputError, match="is a folder; name a file"):
        show(folder, csv=tmp_path)
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\ngood,1\n")
    with pytest.raises(InputError, match="already exists and is not an accuracy matrix"):
        show(folder, csv=rows)
    for _ in range(2):  # its own is replaced
        show(folder, csv=tmp_path / "none" / "r.csv")
    assert (tmp_path / "none" / "r.csv").exists()
    monkeypatch.setattr("consolidate.views.charts.find_spec", lambda name: None)
    for name in ("r.png", "r.svg"):
        with pytest.raises(UsageError, match=r"pip install 'consolidate-ewc\[plot\]'"):
            show(tmp_path / "nothing is there", plot=tmp_path / name)


def test_show_prints_and_writes_the_matrix(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "unsharded", tmp_path / "model"))
    with pytest.raises(InputError, match="has no scores on its tasks") as caught:
        empty: Any = show(folder, csv=tmp_path / "r.csv")
    assert "--evaluate TASK=DATA" in str(caught.value)
    assert not (tmp_path / "r.csv").exists()
    empty = show(folder)
    assert empty["accuracy_matrix"] is None
    ledger = read_ledger(folder / "fisher" / "fisher.json")
    name = ledger.tasks[0].name
    ledger.tasks[0].metrics = {"before": on(**{name: 0.25}), "after": on(**{name: 0.75})}
    (folder / "fisher" / "fisher.json").write_bytes(ledger_bytes(ledger))
    made = tmp_path / "made" / "for it"
    found = show(folder, csv=made / "r.csv", plot=made / "r.png")
    assert found["accuracy_matrix"]["scores"] == [[0.75]]
    assert "ACC 0.7500, BWT –, forgetting –" in show_text(found)
    assert f"{name},after,0.75" in (made / "r.csv").read_text()
    assert (made / "r.png").stat().st_size > 1000
