"""A chain of tasks by one command: what is done, what is skipped, and the same bytes each way."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

import consolidate
import consolidate.commands.run
from consolidate.api import verify
from consolidate.commands import finetune_run
from formats.atomic import claimed, claimed_in_place, partial_path
from formats.errors import ForgettingError, InputError, UsageError
from formats.fisher_folder import read_fisher
from formats.step_record import StepRecord
from support import tiny_models
from support.checkpoints import Write, write_clusters
from support.command_line import finished, launched
from support.command_line import run as run_cli
from support.faults import Killed, break_off
from support.folders import contents, flip

TASKS = """
output-dir = "out"

[config]
sizes = [6, 8, 3]

[defaults]
model = "support.networks:make_network"
optimizer = "adam"
learning-rate = 0.01
epochs = 3
ewc-lambda = 10
"""
TASK = """
[[task]]
name = "{name}"
data = "{name}.npz"
evaluate = "{name}-test.npz"
"""


def write_run_file(folder: Path) -> Path:
    """A run file of three tasks for `make_network`, and their data."""
    text = TASKS
    for seed, name in enumerate("abc"):
        write_clusters(folder, name, seed=seed)
        write_clusters(folder, f"{name}-test", seed=seed, count=20)
        text += TASK.format(name=name)
    path = folder / "tasks.toml"
    path.write_text(text)
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A run file of three tasks for `make_network`, made afresh."""
    return write_run_file(tmp_path)


@pytest.fixture(scope="module")
def done_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file and what its run has written, which `done` copies."""
    folder = tmp_path_factory.mktemp("done")
    consolidate.run(write_run_file(folder))
    return folder


@pytest.fixture
def done(done_once: Path, tmp_path: Path) -> Path:
    """The file of a run that is done."""
    return shutil.copytree(done_once, tmp_path, dirs_exist_ok=True) / "tasks.toml"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {step["step"]: step["status"] for step in result["steps"]}


def reasons(result: dict[str, Any]) -> dict[str, str]:
    return {step["step"]: step["reason"] for step in result["steps"] if step["reason"]}


def test_three_tasks_from_nothing(tasks: Path, tmp_path: Path) -> None:
    result = consolidate.run(tasks)
    assert statuses(result) == dict.fromkeys(["00-start", "01-a", "02-b", "03-c"], "done")
    last = tmp_path / "out" / "03-c"
    assert result["checkpoint"] == str(last)
    assert verify(last)["tasks"] == ["a", "b", "c"]
    ledger = read_fisher(last / "fisher").ledger
    assert [(t.penalty, t.ewc_lambda) for t in ledger.tasks] == [
        ("none", None),
        ("ewc", 10.0),
        ("ewc", 10.0),
    ]
    matrix = result["accuracy_matrix"]
    assert matrix == consolidate.show(last)["accuracy_matrix"]
    measured = [[score is not None for score in row] for row in matrix["scores"]]
    assert measured == [[True, False, False], [True, True, False], [True, True, True]]
    assert matrix["scores"][2] == [
        consolidate.evaluate(
            last, tmp_path / f"{n}-test.npz", model="support.networks:make_network"
        )[f"{n}-test"]["score"]
        for n in "abc"
    ]
    assert json.loads((last / "config.json").read_text()) == {"sizes": [6, 8, 3]}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        name for step in statuses(result) for name in (step, f"{step}.json")
    )


def test_the_second_run_does_nothing_and_times_mean_nothing(done: Path, tmp_path: Path) -> None:
    before = contents(tmp_path / "out")
    written = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*.safetensors")}
    for file in [done, *tmp_path.glob("*.npz")]:
        os.utime(file, (1, 1))
    result = consolidate.run(done)
    assert set(statuses(result).values()) == {"skipped"}
    assert result["accuracy_matrix"]["tasks"] == ["a", "b", "c"]
    assert contents(tmp_path / "out") == before
    assert {f: f.stat().st_mtime_ns for f in written} == written


def test_where_nothing_is_to_be_done_no_space_is_needed(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    edit(tasks, '"c-test.npz"\n', '"c-test.npz"\ntrain = false\n')
    consolidate.run(tasks)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5))
    for dry_run in (True, False):
        assert reasons(consolidate.run(tasks, dry_run=dry_run)) == {}
    assert "would be refused" not in caplog.text
    shutil.rmtree(tmp_path / "out" / "03-c")
    with pytest.raises(InputError, match="not enough disk space"):
        consolidate.run(tasks)


def test_the_folder_of_a_script_stays_first(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tasks.parent)
    before = [*sys.path]
    consolidate.run(tasks, dry_run=True)
    assert sys.path == before


def test_a_changed_lambda_does_again_what_comes_after_it(done: Path, tmp_path: Path) -> None:
    edit(done, '"b-test.npz"\n', '"b-test.npz"\newc-lambda = 30\n')
    before = contents(tmp_path / "out")
    dry = consolidate.run(done, dry_run=True)
    assert contents(tmp_path / "out") == before
    assert (dry["status"], dry["accuracy_matrix"]) == ("dry run", None)
    assert reasons(dry) == {
        "02-b": "changed: ewc-lambda 10 → 30",
        "03-c": "changed: checkpoint it starts from",
    }
    made = consolidate.run(done)
    assert reasons(made) == reasons(dry)
    assert statuses(made) == {
        "00-start": "skipped",
        "01-a": "skipped",
        "02-b": "done",
        "03-c": "done",
    }
    consolidate.run(done, output_dir=tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert contents(tmp_path / "out") != before


def test_running_statistics_follow_the_first_task_alone(tasks: Path, tmp_path: Path) -> None:
    text = tasks.read_text().replace(
        "support.networks:make_network", "support.networks:normed_network"
    )
    text = text.replace('"b.npz"', '"b.npz"\npenalty = "none"').replace("[6, 8, 3]", "[]")
    tasks.write_text(text + '[evaluate]\nmore = "c.npz"\n')
    consolidate.run(tasks)
    steps = ("00-start", "01-a", "02-b", "03-c")
    found = [load_file(tmp_path / "out" / step / "model.safetensors") for step in steps]
    means = [weights["1.running_mean"].tolist() for weights in found]
    assert means[0] == [0.0] * 8 != means[1] == means[2] == means[3]


RECORD = Path("out", "03-c.json")


def unfinish(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"made": None}))


CHANGES: dict[str, tuple[Callable[[Path, Write], object], dict[str, str]]] = {
    "data": (
        lambda folder, write: write("b", seed=9),
        {"02-b": "changed: data", "03-c": "changed: checkpoint it starts from"},
    ),
    "test data": (
        lambda folder, write: write("c-test", seed=9),
        {"03-c": "changed: test data of c"},
    ),
    "an option back to its default": (
        lambda folder, write: edit(folder / "tasks.toml", '"c.npz"', '"c.npz"\nepochs = 1'),
        {"03-c": "changed: epochs 3 → 1"},
    ),
    "an option that is not seen in the checkpoint": (
        lambda folder, write: edit(folder / "tasks.toml", "epochs", "log-every = 1\nepochs"),
        {},
    ),
    "a default that is written out": (
        lambda folder, write: edit(folder / "tasks.toml", "epochs", "seed = 0\nepochs"),
        {},
    ),
    "what running statistics do unless it is said": (
        lambda folder, write: edit(
            folder / "tasks.toml", '"c.npz"', '"c.npz"\nnorm-statistics = "frozen"'
        ),
        {},
    ),
    "running statistics": (
        lambda folder, write: edit(
            folder / "tasks.toml", '"c.npz"', '"c.npz"\nnorm-statistics = "update"'
        ),
        {"03-c": "changed: norm-statistics frozen → update"},
    ),
    "the config": (
        lambda folder, write: edit(folder / "tasks.toml", "[6, 8, 3]", "[6, 9, 3]"),
        {
            "00-start": "changed: config",
            **dict.fromkeys(["01-a", "02-b", "03-c"], "changed: checkpoint it starts from"),
        },
    ),
    "a checkpoint that is gone": (
        lambda folder, write: shutil.rmtree(folder / "out" / "03-c"),
        {"03-c": "its checkpoint is missing"},
    ),
    "a Fisher that is gone": (
        lambda folder, write: shutil.rmtree(folder / "out" / "03-c" / "fisher"),
        {"03-c": "its checkpoint was changed"},
    ),
    "a record that is not finished": (
        lambda folder, write: unfinish(folder / RECORD),
        {"03-c": "not finished"},
    ),
    "another version": (
        lambda folder, write: edit(folder / RECORD, '"torch": "', '"torch": "9.'),
        {"03-c": f"changed: version of torch 9.{version('torch')} → {version('torch')}"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_a_change_concerns(done: Path, tmp_path: Path, write_task: Write, case: str) -> None:
    change, expected = CHANGES[case]
    change(tmp_path, write_task)
    assert reasons(consolidate.run(done, dry_run=True)) == expected
    assert reasons(consolidate.run(done)) == expected
    assert reasons(consolidate.run(done)) == {}


def test_files_that_were_added_to_a_step_are_not_lost(done: Path, tmp_path: Path) -> None:
    added = tmp_path / "out" / "02-b" / "eval.json"
    added.write_text("{}")
    for _ in range(2):
        with pytest.raises(InputError, match="02-b has files that were added or changed"):
            consolidate.run(done)
        assert added.read_text() == "{}"
        edit(done, "epochs = 3", "epochs = 2")  # the step is to be made again anyway
        with pytest.raises(InputError, match="02-b has files that were added or changed"):
            consolidate.run(done)
        edit(done, "epochs = 2", "epochs = 3")
    weights = added.with_name("model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])  # damaged besides
    with pytest.raises(InputError, match="02-b has files that were added or changed"):
        consolidate.run(done)
    weights.write_bytes(whole)
    added.unlink()
    consolidate.run(done)
    card = added.with_name("README.md")
    written = card.read_text()
    card.write_text(written + "Mine.\n")
    assert reasons(consolidate.run(done)) == {}
    edit(done, "epochs = 3", "epochs = 2")
    with pytest.raises(InputError, match="02-b has files that were added or changed"):
        consolidate.run(done)
    assert card.read_text() == written + "Mine.\n"
    edit(done, "epochs = 2", "epochs = 3")
    assert reasons(consolidate.run(done)).keys() == {"01-a"}


def test_files_that_were_added_to_a_step_are_not_lost_after_a_stop_either(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(done, "epochs = 3", "epochs = 2")
    break_off(monkeypatch, 5)
    with pytest.raises(Killed):
        consolidate.run(done)
    added = tmp_path / "out" / "01-a" / "eval.json"
    added.write_text("{}")
    for _ in range(2):
        with pytest.raises(InputError, match="01-a has files that were added or changed"):
            consolidate.run(done)
    added.unlink()

    # Of a checkpoint that is in place and not recorded yet, the card is new.
    whole = consolidate.commands.run.write_step_record

    def killed(path: Path, record: StepRecord) -> None:
        if path.name == "01-a.json" and record.made is not None:
            raise Killed
        whole(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(consolidate.commands.run, "write_step_record", killed)
        with pytest.raises(Killed):
            consolidate.run(done)
    assert reasons(consolidate.run(done))["01-a"] == "not finished"
    consolidate.run(done, output_dir=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_task_after_the_first_is_never_left_without_its_penalty(
    tasks: Path, tmp_path: Path
) -> None:
    edit(tasks, '"a-test.npz"', '"a-test.npz"\nno-fisher = true')
    with pytest.raises(UsageError, match=r"task 2 \(b\): no task before it has a Fisher"):
        consolidate.run(tasks)
    assert not (tmp_path / "out").exists()
    text = tasks.read_text().replace("\nno-fisher = true", "")
    tasks.write_text(text.replace("epochs = 3", 'epochs = 3\npenalty = "l2"\nno-fisher = true'))
    consolidate.run(tasks)
    protected = [load_file(tmp_path / f"out/{s}/model.safetensors") for s in ("01-a", "02-b")]
    edit(tasks, "ewc-lambda = 10", "ewc-lambda = 1e-6")
    consolidate.run(tasks)
    free = [load_file(tmp_path / f"out/{s}/model.safetensors") for s in ("01-a", "02-b")]
    assert all(protected[0][name].equal(free[0][name]) for name in free[0])  # has no penalty
    moved = [
        sum(float((b[name] - a[name]).square().sum()) for name in a) for a, b in (protected, free)
    ]
    assert moved[0] < 0.5 * moved[1]


def test_a_limit_on_forgetting_is_one_without_a_penalty_too(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    model = {"model": "support.networks:make_network"}
    old = write_task("old")
    consolidate.finetune(
        network_checkpoint, old, output_dir=tmp_path / "learned", epochs=20, penalty="none",
        optimizer="adam", learning_rate=0.01, **model,
    )  # fmt: skip
    write_task("a", seed=1)
    head = TASKS.replace("[config]\nsizes = [6, 8, 3]\n", "").replace("epochs = 3", "epochs = 30")
    head = head.replace("ewc-lambda = 10", "ewc-lambda = 10\nmax-forgetting = 0.01")
    (tmp_path / "tasks.toml").write_text(
        'start = "learned"\n' + head + '[evaluate]\nold = "old.npz"\n'
        '[[task]]\nname = "a"\ndata = "a.npz"\npenalty = "none"\n'
    )
    with pytest.raises(ForgettingError, match="old"):
        consolidate.run(tmp_path / "tasks.toml")


def test_a_flipped_bit_is_found_and_made_good(done: Path, tmp_path: Path) -> None:
    before = contents(tmp_path / "out")
    flip(tmp_path / "out" / "02-b" / "model.safetensors")
    result = consolidate.run(done)
    assert list(reasons(result)) == ["02-b"]  # what follows starts from the same content again
    assert "its checkpoint is damaged" in reasons(result)["02-b"]
    assert contents(tmp_path / "out") == before
    os.truncate(tmp_path / "out" / "02-b" / "model.safetensors", 100)
    assert "its checkpoint is damaged" in reasons(consolidate.run(done))["02-b"]
    assert contents(tmp_path / "out") == before


KILLED = """
import os, signal
from pathlib import Path
from support.networks import make_network

def network(config):
    module = make_network(config)
    steps = []

    def count(module, inputs):
        steps.append(module.training)
        if sum(steps) == 6 and config["sizes"] and Path("kill").exists():
            Path("kill").unlink()
            os.kill(os.getpid(), signal.{signal})

    module.register_forward_pre_hook(count)
    return module
"""


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("SIGKILL", -signal.SIGKILL),
        pytest.param("SIGINT", 130, marks=pytest.mark.slow),
        ("SIGTERM", 143),
    ],
)
def test_stopped_in_the_middle_it_goes_on_to_the_same_bytes(
    tasks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, sent: str, code: int
) -> None:
    module = f"killed_by_{sent.lower()}"
    (tmp_path / f"{module}.py").write_text(KILLED.format(signal=sent))
    edit(tasks, "support.networks:make_network", f"{module}:network")
    consolidate.run(tasks)
    edit(tasks, '"b-test.npz"\n', '"b-test.npz"\nepochs = 4\n')
    consolidate.run(tasks, output_dir=tmp_path / "whole")
    (tmp_path / "kill").touch()
    stopped, _, err = finished(launched("run", "tasks.toml", cwd=tmp_path))
    assert stopped == code
    assert not (tmp_path / "kill").exists()
    if code > 0:
        assert "stopped in 02-b: the steps before it are complete" in err
        assert "Traceback" not in err
    assert partial_path(tmp_path / "out" / "02-b").exists() == (code > 0)
    with caplog.at_level("INFO", "consolidate"):
        assert statuses(consolidate.run(tasks)) == {
            "00-start": "skipped",
            "01-a": "skipped",
            "02-b": "done",
            "03-c": "done",
        }
    assert ("resuming from step 6 of" in caplog.text) == (code > 0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("changed", [False, True])
def test_a_step_that_was_broken_off_goes_on_unless_it_is_another(
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changed: bool,
) -> None:
    edit(tasks, "epochs = 3", "epochs = 3\nsave-every-minutes = 0")
    break_off(monkeypatch, 5)
    with pytest.raises(Killed):
        consolidate.run(tasks)
    if changed:
        edit(tasks, "epochs = 3", "epochs = 2")
    caplog.set_level("INFO", "consolidate")
    result = consolidate.run(tasks)
    assert ("resuming from step 5 of 12" in caplog.text) != changed
    assert reasons(result)["01-a"] == "not finished"
    consolidate.run(tasks, output_dir=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_tiny_bert_from_a_measured_start(tmp_path: Path) -> None:
    config = tiny_models.bert_config(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    start = tiny_models.save(
        tmp_path / "start",
        transformers.BertForSequenceClassification,
        config,
        tiny_models.word_tokenizer(),
    )
    for task, column in (("cats", "body"), ("dogs", "text"), ("rain", "text")):
        rows = [
            {column: t, "label": ("no", "yes")[i % 2]} for i, t in enumerate(tiny_models.CORPUS)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{task}.jsonl").write_text(text)
    (tmp_path / "cats.toml").write_text(
        'data = "cats.jsonl"\ntext-column = "body"\n'.replace("-", "_")
    )
    (tmp_path / "tasks.toml").write_text(
        """
        start = "start"
        output-dir = "out"

        [defaults]
        ewc-lambda = 10
        learning-rate = 1e-3
        max-steps = 3
        batch-size = 2
        max-forgetting = 5.0
        evaluate-every = 2

        [[task]]
        name = "cats"
        data = "cats.toml"
        evaluate = "cats.toml"
        train = false

        [[task]]
        name = "dogs"
        data = "dogs.jsonl"
        evaluate = "dogs.jsonl"
        text-column = "text"

        [[task]]
        name = "rain"
        data = "rain.jsonl"
        """
    )
    first = consolidate.run(tmp_path / "tasks.toml")
    assert list(statuses(first)) == ["01-cats", "02-dogs", "03-rain"]
    matrix = first["accuracy_matrix"]
    measured = [[score is not None for score in row] for row in matrix["scores"]]
    assert measured == [[True, True, False]] * 3  # the first row is what dogs found before
    assert [p["step"] for p in matrix["points"]] == [0, 2, 3, 0, 2, 3]
    assert not (start / "fisher").exists()
    weights = [load_file(tmp_path / f / "model.safetensors") for f in ("start", "out/01-cats")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert reasons(consolidate.run(tmp_path / "tasks.toml")) == {}
    edit(tmp_path / "start" / "tokenizer_config.json", "{", '{"a": 1, ')
    again = consolidate.run(tmp_path / "tasks.toml", dry_run=True)
    assert reasons(again)["01-cats"] == "changed: checkpoint it starts from"


def pet_texts(path: Path, *labels: str) -> None:
    rows = [
        {"text": text, "label": labels[i % len(labels)]}
        for i, text in enumerate(tiny_models.CORPUS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("start", "heads", "refused"),
    [
        ("classifier", ("keep", "keep"), True),
        ("classifier", ("extend", "keep"), True),
        ("classifier", ("new", "keep"), True),
        ("classifier", ("keep", "extend"), False),
        ("classifier", ("keep", "new"), False),
        ("bare", ("keep", "keep"), True),
        ("bare", ("keep", "new"), False),
        ("numbered", ("keep", "keep"), False),  # without names it is found when its turn comes
    ],
)
def test_labels_that_a_later_head_lacks_are_refused_before_any_training(
    tmp_path: Path, start: str, heads: tuple[str, str], refused: bool
) -> None:
    named = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    config = tiny_models.bert_config(**(named if start == "classifier" else {}))
    kind = "BertModel" if start == "bare" else "BertForSequenceClassification"
    model = getattr(transformers, kind)
    tiny_models.save(tmp_path / "start", model, config, tiny_models.word_tokenizer())
    pet_texts(tmp_path / "cats.jsonl", "no", "yes")
    pet_texts(tmp_path / "dogs.jsonl", "no", "perhaps")
    (tmp_path / "tasks.toml").write_text(
        f"""
        start = "start"
        output-dir = "out"

        [defaults]
        objective = "sequence-classification"
        ewc-lambda = 10
        max-steps = 1

        [[task]]
        name = "cats"
        data = "cats.jsonl"
        head = "{heads[0]}"

        [[task]]
        name = "dogs"
        data = "dogs.jsonl"
        head = "{heads[1]}"
        """
    )
    if not refused:
        assert consolidate.run(tmp_path / "tasks.toml", dry_run=True)["status"] == "dry run"
        return
    with pytest.raises(
        InputError, match=r"task 2 \(dogs\): .*lacks the labels perhaps.*--head new"
    ):
        consolidate.run(tmp_path / "tasks.toml")
    assert not (tmp_path / "out" / "01-cats").exists()


def test_a_start_with_a_fisher_and_test_data_of_its_own_task(
    tasks: Path, tmp_path: Path, network_checkpoint: Path, write_task: Write
) -> None:
    consolidate.fisher(
        network_checkpoint, write_task("old", seed=7), model="support.networks:make_network"
    )
    edit(tasks, "[config]\nsizes = [6, 8, 3]\n", '[evaluate]\nold = "old.npz"\n')
    edit(tasks, "\noutput-dir", '\nstart = "start"\noutput-dir')
    edit(tasks, '"c-test.npz"\n', '"c-test.npz"\ntrain = false\n')
    result = consolidate.run(tasks)
    assert list(statuses(result)) == ["01-a", "02-b", "03-c"]
    ledger = read_fisher(tmp_path / "out" / "03-c" / "fisher").ledger
    assert [(t.name, t.penalty) for t in ledger.tasks] == [
        ("old", None),
        ("a", "ewc"),
        ("b", "ewc"),
        ("c", None),
    ]
    assert result["accuracy_matrix"]["tasks"] == ["old", "a", "b", "c"]
    assert result["accuracy_matrix"]["scores"][1][0] is not None
    edit(tasks, '[evaluate]\nold = "old.npz"\n', "")
    edit(tasks, 'name = "a"', 'name = "old"')
    with pytest.raises(InputError, match="already has a task 'old': give"):
        consolidate.run(tasks)


REFUSED: dict[str, tuple[str, str, type[Exception], str]] = {
    "no output folder": ('output-dir = "out"', "", UsageError, "no folder for the checkpoints"),
    "nothing to begin with": (
        'model = "support.networks:make_network"', "", UsageError, "no model to start from",
    ),
    "a third task's typo in a value": (
        '"c-test.npz"\n', '"c-test.npz"\noptimizer = "adamm"\n', UsageError,
        r"task 3 \(c\): --optimizer adamm",
    ),
    "a third task with a strength and no penalty": (
        '"c-test.npz"\n', '"c-test.npz"\npenalty = "none"\newc-lambda = 1\n', UsageError,
        r"task 3 \(c\): --ewc-lambda cannot be combined with --penalty none",
    ),
    "a third task's merge rule": (
        '"c-test.npz"\n', '"c-test.npz"\nmerge-rule = "sum"\n', UsageError,
        r"task 3 \(c\): --merge-rule sum",
    ),
    "a third task without its data": (
        'data = "c.npz"', 'data = "d.npz"', InputError,
        r"tasks\.toml, task 3 \(c\): data: .*d\.npz does not exist",
    ),
    "test data that are missing": (
        '"c-test.npz"', '"d-test.npz"', InputError,
        r"task 3 \(c\): evaluate: .*d-test\.npz does not exist",
    ),
    "epochs where nothing is trained": (
        '"c-test.npz"\n', '"c-test.npz"\ntrain = false\nepochs = 2\n', UsageError,
        "epochs cannot be combined with train = false",
    ),
    "a revision of nothing": (
        "[config]", 'revision = "x"\n[config]', UsageError, "revision and fisher need a start",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_step(tasks: Path, tmp_path: Path, case: str) -> None:
    old, new, kind, message = REFUSED[case]
    edit(tasks, old, new)
    with pytest.raises(kind, match=message):
        consolidate.run(tasks)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('data = "c.npz"', 'data = "c.toml"', r"task 3 \(c\): data: .*gone\.npz does not exist"),
        ('data = "c.npz"', 'data = "c.csv"', r"task 3 \(c\): data: .*c\.csv does not exist"),
        ('name = "c"', 'name = "a"', "task 3 and task 1 are both named 'a'"),
    ],
)
def test_missing_data_are_refused_before_anything_is_read(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    (tmp_path / "c.toml").write_text('data = "gone.npz"')
    edit(tasks, old, new)
    for name in ("locate", "data_content"):
        monkeypatch.delattr(consolidate.commands.run, name)
    with pytest.raises(InputError, match=message):
        consolidate.run(tasks)


def test_a_folder_that_no_run_has_made_is_kept(tasks: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "02-b" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for dry_run in (True, False):
        with pytest.raises(InputError, match="02-b already exists and was not made by"):
            consolidate.run(tasks, dry_run=dry_run)
    assert contents(tmp_path / "out") == {"02-b/mine.txt": b"mine"}


def test_a_dry_run_lists_a_finished_step_once(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    code, text, err = run_cli(capsys, "run", done, "--dry-run")
    assert (code, err) == (0, "")
    assert text.count("01-a  skipped\n") == 1


def test_a_dry_run_knows_in_which_dtype_float16_is_measured(
    tasks: Path, network_checkpoint: Path, write_task: Write
) -> None:
    weights = load_file(network_checkpoint / "model.safetensors")
    narrow = {name: values.half() for name, values in weights.items()}
    save_file(narrow, network_checkpoint / "model.safetensors", {"format": "pt"})
    edit(tasks, "[config]\nsizes = [6, 8, 3]\n", "")
    edit(tasks, "\noutput-dir", '\nstart = "start"\noutput-dir')
    tasks.write_text(tasks.read_text().replace("[[task]]\n", "[[task]]\ntrain = false\n"))
    consolidate.run(tasks)
    write_task("b", seed=7)
    assert reasons(consolidate.run(tasks, dry_run=True)) == {
        "02-b": "changed: data",
        "03-c": "changed: checkpoint it starts from",
    }


def test_the_command_line(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, err = run_cli(capsys, "run", tasks, "--dry-run")
    assert (code, err) == (0, "")
    assert "01-a  to be done: not made before\n" in text
    assert text.endswith("Dry run: nothing was done.\n")
    code, text, err = run_cli(capsys, "run", tasks, "--output-dir", tmp_path / "other")
    assert code == 0
    assert "02-b, step 3 of 4: not made before" in err
    assert "after \\ on       a       b       c" in text
    assert text.endswith(f"last checkpoint: {tmp_path / 'other' / '03-c'}\n")
    code, text, _ = run_cli(capsys, "run", tasks, "--output-dir", tmp_path / "other")
    assert text.endswith(
        "Nothing to do: all 4 steps are up to date. To repeat a step, delete its folder in "
        f"{tmp_path / 'other'}.\n"
    )
    code, text, _ = run_cli(capsys, "run", tasks, "--output-dir", tmp_path / "other", "--json")
    assert statuses(json.loads(text))["03-c"] == "skipped"
    edit(tasks, "epochs", "epoch")
    code, _, err = run_cli(capsys, "run", tasks)
    assert code == 3
    assert "[defaults]: unknown key 'epoch'; did you mean epochs?" in err


def test_a_second_run_of_the_same_chain_is_refused(tasks: Path, tmp_path: Path) -> None:
    with (
        claimed_in_place(tmp_path / "out", "steps"),
        pytest.raises(InputError, match="is in use by process"),
    ):
        consolidate.run(tasks, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with claimed(tmp_path / "out" / "01-a"), pytest.raises(InputError, match="in use"):
        consolidate.run(tasks, output_dir=tmp_path / "out")
    assert consolidate.run(tasks, output_dir=tmp_path / "out")["status"] == "done"


def test_a_step_that_was_made_and_not_recorded_is_not_made_again(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the process was killed between putting a checkpoint in place and its record."""
    before = contents(tmp_path / "out")
    unfinish(tmp_path / RECORD)
    monkeypatch.delattr(finetune_run, "training_steps")
    assert reasons(consolidate.run(done)) == {"03-c": "not finished"}
    assert contents(tmp_path / "out") == before
