"""A report shows the search for λ that a fine-tuning reported, and no other."""

import json
from pathlib import Path
from typing import Any

import pytest

from consolidate.api import finetune, report
from consolidate.views.search_figures import search_charts, search_figures
from formats.errors import InputError, NonFiniteError
from support import report_checkpoints as checkpoints
from support.checkpoints import Write
from support.command_line import MODEL, run


def test_the_search_of_a_real_finetune(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b, first = write_task("a"), write_task("b", seed=1), tmp_path / "first"
    finetune(network_checkpoint, a, output_dir=first, penalty="none", model=MODEL[1])
    code, out, _ = run(
        capsys, "finetune", first, "--data", b, "--output-dir", tmp_path / "m", *MODEL,
        "--ewc-lambda", "1,10", "--validation", f"a={write_task('held')}", "--json",
    )  # fmt: skip
    assert code == 0
    result = tmp_path / "result.json"
    result.write_text(out)
    search = json.loads(out)["lambda_search"]
    code, out, _ = run(
        capsys, "report", tmp_path / "m", "--search", result, "--output", tmp_path / "r.html",
        "--plots", tmp_path / "p",
    )  # fmt: skip
    assert (code, out.splitlines()[0]) == (0, str(tmp_path / "r.html"))
    page = (tmp_path / "r.html").read_text()
    assert page.count('<section id="search') == 2
    for trial in search["trials"]:
        scores = [f"{trial['metrics'][task]['score']:.4f}" for task in "ab"]
        cells = [*scores, f"{trial['mean']:.4g}", f"{trial['forgetting']:.4g}"]
        row = "".join(f"<td>{cell}</td>" for cell in [str(trial["steps"]), *cells])
        assert f'<th scope="row">{trial["ewc_lambda"]:g}</th>{row}' in page
    charts = [figure.chart for figure in search_figures(search)]
    assert charts == search_charts(search)  # those of --search-plot
    names = {path.name for path in (tmp_path / "p").iterdir()}
    assert {"search.svg", "search.png", "search-tradeoff.svg", "search-tradeoff.png"} <= names

    monkeypatch.setattr("consolidate.views.charts.find_spec", lambda name: None)
    report(tmp_path / "m", output=tmp_path / "r.html", search=result)
    bare = (tmp_path / "r.html").read_text()
    assert "<img" not in bare
    assert bare.count("<td>selected</td>") == page.count("<td>selected</td>") == 1

    monkeypatch.undo()
    report(tmp_path / "m", output=tmp_path / "r.html", plots=tmp_path / "p")
    assert "<td>selected</td>" not in (tmp_path / "r.html").read_text()
    assert not (tmp_path / "p" / "search.svg").exists()


def changed(**search: Any) -> dict[str, Any]:
    return {"lambda_search": checkpoints.SEARCH["lambda_search"] | search}


TRIALS = checkpoints.SEARCH["lambda_search"]["trials"]
REFUSED: dict[str, tuple[str, str]] = {
    "no JSON": ("λ = 10", "is not valid JSON: .*; give what `consolidate finetune --json` wrote"),
    "NaN": ('{"lambda_search": NaN}', "NaN is not a JSON number"),
    "two keys": ('{"a": 1, "a": 2}', "the key 'a' appears twice"),
    "deep": ("[" * 200_000, "is not valid JSON"),
    "a list": ("[]", "expected an object with `lambda_search`, found none"),
    "no search": ('{"status": "cached"}', "one that was up to date reports no search"),
    "no object": ('{"lambda_search": 3}', r"\$.lambda_search: expected an object, found 3"),
    "another task": (
        json.dumps(changed()).replace('"b"', '"d"'),
        "selected λ = 10 for 'd', but model has the tasks a, b, c; give the result of the finetune",
    ),
    "another λ": (
        json.dumps(changed(ewc_lambda=1.0, trials=[TRIALS[0] | {"chosen": True}])),
        "selected λ = 1 for 'b', but model learned it with 10; give the result",
    ),
    "a task without λ": (
        json.dumps(changed(new_task="c")).replace('"b"', '"c"'),
        "selected λ = 10 for 'c', but model learned it without a λ",
    ),
    "no trials": (json.dumps(changed(trials=[])), "expected one run of full length .* found 0"),
    "nothing chosen": (json.dumps(changed(trials=TRIALS[:1])), "that was chosen, with λ = 10"),
    "two chosen": (json.dumps(changed(trials=[*TRIALS, *TRIALS])), "found 2"),
    "no score": (
        json.dumps(changed(old_tasks=["a", "z"])),
        r"trials\[0\]: expected a score on 'z', found none",
    ),
    "no penalty": (
        json.dumps(changed(trials=[TRIALS[1] | {"penalty_per_lambda": None}])),
        r"trials\[0\]: expected a penalty per λ, found null",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_search_of_this_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    folder, result = checkpoints.chain(tmp_path / "model"), tmp_path / "result.json"
    text, message = REFUSED[name]
    result.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"--search .*result.json.*{message}"):
        report(folder, output=tmp_path / "r.html", plots=tmp_path / "p", search=result)
    assert not (tmp_path / "r.html").exists()
    assert not (tmp_path / "p").exists()


def test_files_that_cannot_be_read_and_numbers_out_of_range(tmp_path: Path) -> None:
    folder = checkpoints.chain(tmp_path / "model")
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            report(folder, output=tmp_path / "r.html", search=path)
    result = tmp_path / "result.json"
    result.write_text(json.dumps(changed()).replace("10.0", "1e999"))
    with pytest.raises(NonFiniteError, match="expected a finite number, found inf"):
        report(folder, output=tmp_path / "r.html", search=result)
    assert not (tmp_path / "r.html").exists()


def test_metrics_that_were_not_finite_and_candidates_that_diverged(tmp_path: Path) -> None:
    folder, result = checkpoints.chain(tmp_path / "model"), tmp_path / "result.json"
    unscored = TRIALS[0] | {"ewc_lambda": 1e3, "metrics": None, "penalty_per_lambda": None}
    metrics = {name: {"score": 0.5, "perplexity": None} for name in "ab"}
    content = changed(trials=[*TRIALS, unscored, TRIALS[0] | {"metrics": metrics}])
    result.write_text(json.dumps(content))
    report(folder, output=tmp_path / "r.html", search=result)
    assert "<td>diverged</td>" in (tmp_path / "r.html").read_text()
