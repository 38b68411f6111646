"""A task whose Fisher is not measured when it is trained, and one that was trained elsewhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import consolidate
from consolidate.api import evaluate, finetune, fisher, report, show, verify
from consolidate.views.summary import show_markdown, show_text
from formats import fisher_json
from formats.errors import InputError, UsageError
from formats.fisher_folder import read_fisher
from formats.fisher_json import read_ledger
from formats.task_file import open_task
from support import loopback_hub
from support.checkpoints import Write, first_task, write_clusters
from support.command_line import MODEL, run
from support.faults import Killed, break_off, kill_after
from support.folders import contents, fisher_of
from support.loopback_hub import TOKEN, Hub
from support.networks import FAST, NETWORK, SIZES, make_network
from support.together import ended, started

COMMON = {"ewc_lambda": 10.0, "epochs": 2, **FAST}
WAYS: dict[str, dict[str, Any]] = {
    "online": {"merge_rule": "online", "gamma": 0.5, "task_weight": 0.5},
    "separate": {"merge_rule": "separate", "task_weight": "units"},
    "by trace": {"task_weight": "trace"},
    "an adapter, merged": {"lora_rank": 2, "lora_targets": ["0"]},
    "in between": {"interpolate": 0.5, "merge_rule": "separate"},
}


@pytest.fixture(scope="module")
def learned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    return first_task(folder, write_clusters(folder, "a"), epochs=5, **FAST)


@pytest.fixture(scope="module")
def unmeasured_once(learned_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that checkpoint and its data, which `unmeasured` copies."""
    folder = tmp_path_factory.mktemp("unmeasured")
    b, out = write_clusters(folder, "b", seed=1), folder / "unmeasured"
    finetune(learned_once, b, output_dir=out, no_fisher=True, **COMMON)
    return folder


@pytest.fixture
def unmeasured(unmeasured_once: Path, tmp_path: Path) -> Path:
    """A checkpoint that has learned task b after a, without its Fisher."""
    return shutil.copytree(unmeasured_once, tmp_path, dirs_exist_ok=True) / "unmeasured"


@pytest.mark.parametrize("way", WAYS)
def test_measured_later_is_byte_for_byte_measured_at_once(
    learned: Path, write_task: Write, tmp_path: Path, way: str
) -> None:
    b, c = write_task("b", seed=1), write_task("c", seed=2)
    options = {**COMMON, "data_digest": False}
    finetune(learned, b, output_dir=tmp_path / "b", **options, **WAYS[way])
    finetune(tmp_path / "b", c, output_dir=tmp_path / "c", **options)
    later = finetune(learned, b, output_dir=tmp_path / "b0", no_fisher=True, **options, **WAYS[way])
    assert later["fisher"] is None
    finetune(tmp_path / "b0", c, output_dir=tmp_path / "c0", measure={"b": b}, **options)
    assert contents(tmp_path / "c0") == contents(tmp_path / "c")
    assert (tmp_path / "b0/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()
    assert not list(tmp_path.glob(".*measured*"))
    assert verify(learned, tmp_path / "b0", tmp_path / "c0")["tasks"] == ["a"]


def test_what_is_recorded_of_a_task_that_is_not_measured(
    learned: Path, unmeasured: Path, tmp_path: Path, write_task: Write
) -> None:
    stored, before = read_fisher(unmeasured / "fisher"), read_fisher(learned / "fisher")
    assert stored.anchor is not None
    weights = load_file(learned / "model.safetensors")
    for name in before.fisher:
        assert torch.equal(stored.fisher[name], before.fisher[name])
        assert torch.equal(stored.anchor[name], weights[name])
    ledger = json.loads((unmeasured / "fisher/fisher.json").read_text())
    assert ledger["version"] == 2
    task = ledger["tasks"][1]
    nothing = ("examples", "units", "estimator", "mc_samples")
    assert [task[name] for name in nothing] == [None] * 4
    assert (task["name"], task["penalty"], task["ewc_lambda"]) == ("b", "ewc", 10.0)
    assert task["data_digest"]
    assert "weight_by" not in task
    summary = show(unmeasured)
    assert "not measured" in show_text(summary)
    assert " 0 examples" not in show_text(summary)
    assert show_markdown(summary)
    card = (unmeasured / "README.md").read_text()
    assert "| b | not measured | – |" in card
    page = tmp_path / "r.html"
    report(unmeasured, output=page)
    assert "<dd>not measured</dd>" in page.read_text()
    assert verify(learned, unmeasured)["tasks"] == ["a"]
    b = write_task("b", seed=1)
    again = finetune(learned, b, output_dir=unmeasured, no_fisher=True, **COMMON)
    assert (again["status"], again["fisher"]) == ("cached", None)


def test_an_older_reader_refuses_it_by_its_version(
    unmeasured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher_json, "VERSIONS", (1, 1))
    with pytest.raises(InputError, match=r"found 2; try a newer release of consolidate"):
        read_ledger(unmeasured / "fisher/fisher.json")


def test_what_the_weight_is_computed_by_is_kept_until_it_is_measured(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b, out = write_task("b", seed=1), tmp_path / "out"
    finetune(learned, b, output_dir=out, no_fisher=True, task_weight="trace", **COMMON)
    place = out / "fisher/fisher.json"
    assert read_ledger(place).tasks[1].weight_by == "trace"
    fisher(out, b, task="b", **NETWORK)
    with pytest.raises(UsageError, match="the last task of the ledger, b, was measured already"):
        finetune(out, b, output_dir=tmp_path / "x", task="c", measure={"b": b}, **COMMON)
    task = read_ledger(place).tasks[1]
    assert (task.weight_by, task.measured) == (None, True)
    assert task.weight not in (0.0, 1.0)
    ledger = json.loads(place.read_text())
    ledger["tasks"][1]["weight_by"] = "trace"
    place.write_text(json.dumps(ledger))
    with pytest.raises(InputError, match=r"weight_by"):
        read_ledger(place)


def test_training_goes_on_without_it_and_says_so(
    learned: Path, unmeasured: Path, write_task: Write, tmp_path: Path, caplog: Any
) -> None:
    c, out = write_task("c", seed=2), tmp_path / "out"
    with caplog.at_level("INFO", "consolidate"):
        result = finetune(unmeasured, c, output_dir=out, **COMMON)
    said = "b has no Fisher, so the penalty does not protect it: --measure b=DATA measures it first"
    assert caplog.messages.count(said) == 1
    assert result["history"][0]["penalty"] > 0  # around the weights of a
    ledger = read_fisher(out / "fisher").ledger
    assert [task.measured for task in ledger.tasks] == [True, False, True]
    with pytest.raises(
        UsageError, match="b: the task can no longer be measured, as c came after it"
    ):
        finetune(out, c, output_dir=tmp_path / "x", task="d", measure={"b": c}, **COMMON)
    assert verify(learned, unmeasured, out)["tasks"] == ["a"]


def test_twice_in_a_row(unmeasured: Path, write_task: Write, tmp_path: Path) -> None:
    b, c = write_task("b", seed=1), write_task("c", seed=2)
    finetune(unmeasured, c, output_dir=tmp_path / "none", no_fisher=True, **COMMON)
    ledger = read_fisher(tmp_path / "none/fisher").ledger
    assert [task.measured for task in ledger.tasks] == [True, False, False]
    options = {"no_fisher": True, "measure": {"b": b}, "fisher_max_examples": 30, **COMMON}
    finetune(unmeasured, c, output_dir=tmp_path / "both", **options)
    ledger = read_fisher(tmp_path / "both/fisher").ledger
    assert [task.examples for task in ledger.tasks] == [60, 30, None]
    fisher(tmp_path / "both", c, **NETWORK)
    assert verify(unmeasured, tmp_path / "both")["tasks"] == ["a", "b"]


@pytest.mark.parametrize(
    ("measure", "error", "message"),
    [
        ({"x": "b"}, UsageError, "--measure x: expected b, the task that was not measured"),
        ({"a": "a"}, UsageError, "--measure a: expected b, the task that was not measured"),
        ({"b": "b", "a": "a"}, UsageError, "--measure a: expected one task"),
        (
            {"b": "named"},
            InputError,
            r"model lacks the labels 7.*: the Fisher of b is measured on data",
        ),
        ({"b": "missing"}, InputError, "missing"),
    ],
)
def test_only_the_last_task_can_be_measured_on_its_own_data(
    unmeasured: Path,
    write_task: Write,
    tmp_path: Path,
    measure: dict[str, str],
    error: type[Exception],
    message: str,
) -> None:
    write_task("c", seed=2)
    inputs = np.zeros((4, 6), np.float32)
    np.savez(tmp_path / "named.npz", inputs=inputs, labels=np.array([0, 1, 2, 7]))
    named = {name: tmp_path / f"{data}.npz" for name, data in measure.items()}
    with pytest.raises(error, match=message):
        finetune(
            unmeasured, tmp_path / "c.npz", output_dir=tmp_path / "out", measure=named, **COMMON
        )
    assert not (tmp_path / "out").exists()


def test_other_rows_are_reported(
    unmeasured: Path, write_task: Write, tmp_path: Path, caplog: Any
) -> None:
    c, other = write_task("c", seed=2), write_task("other", seed=1, count=20)
    with caplog.at_level("INFO", "consolidate"):
        finetune(unmeasured, c, output_dir=tmp_path / "out", measure={"b": other}, **COMMON)
    assert any("b was trained on other rows (b.npz) than other.npz" in m for m in caplog.messages)
    assert read_fisher(tmp_path / "out/fisher").ledger.tasks[1].data == "other.npz"


@pytest.mark.parametrize("way", ["fisher", "finetune"])
def test_it_is_measured_on_rows_without_labels(
    unmeasured: Path, write_task: Write, tmp_path: Path, way: str
) -> None:
    c, bare, out = write_task("c", seed=2), tmp_path / "bare.npz", tmp_path / "out"
    np.savez(bare, inputs=np.load(tmp_path / "b.npz")["inputs"])
    if way == "finetune":
        finetune(unmeasured, c, output_dir=out, measure={"b": bare}, **COMMON)
        assert read_fisher(out / "fisher").ledger.tasks[1].measured
        return
    with pytest.raises(InputError, match="expected a column 'label' or 'labels'"):
        fisher(unmeasured, bare, task="b", estimator="empirical", **NETWORK)
    fisher(unmeasured, bare, task="b", output_dir=out, **NETWORK)
    fisher(unmeasured, tmp_path / "b.npz", task="b", **NETWORK)
    for name, values in fisher_of(unmeasured).items():
        torch.testing.assert_close(fisher_of(out)[name], values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("stated", [True, False])
def test_its_data_have_a_split_of_their_own(
    unmeasured: Path, write_task: Write, tmp_path: Path, stated: bool
) -> None:
    b, c, folder = write_task("b", seed=1), write_task("c", seed=2), tmp_path / "both"
    finetune(unmeasured, c, output_dir=tmp_path / "whole", measure={"b": b}, **COMMON)
    for name, data in {"old": b, "new": c}.items():
        (folder / name).mkdir(parents=True)
        shutil.copy(data, folder / name)
    task = tmp_path / "b.toml"
    task.write_text(f'data = "{folder.name}"\nsplit = "old"\n')
    measure = {"b": task if stated else b}
    finetune(
        unmeasured, folder, output_dir=tmp_path / "out", split="new", measure=measure, **COMMON
    )
    assert fisher_of(tmp_path / "out").keys() == fisher_of(tmp_path / "whole").keys()
    for name, values in fisher_of(tmp_path / "whole").items():
        assert torch.equal(fisher_of(tmp_path / "out")[name], values)


def test_a_first_task_gives_a_plain_checkpoint(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, caplog: Any
) -> None:
    a, out = write_task("a"), tmp_path / "out"
    options = {"penalty": "none", "epochs": 1, "no_fisher": True, **FAST}
    with caplog.at_level("INFO", "consolidate"):
        result = finetune(network_checkpoint, a, output_dir=out, evaluate={"a": a}, **options)
    assert f"{out} has no Fisher and no ledger, as no task was measured" in caplog.messages
    assert result["fisher"] is None
    assert result["metrics"]["after"] == evaluate(out, {"a": a}, **NETWORK)
    assert sorted(contents(out)) == ["LICENSE", "config.json", "model.safetensors"]
    with pytest.raises(InputError, match="has no ledger: measure its first task"):
        finetune(out, a, output_dir=tmp_path / "x", measure={"a": a}, **options)
    with pytest.raises(InputError, match="is not empty"):
        finetune(network_checkpoint, a, output_dir=out, **options)
    fisher(out, a, **NETWORK)
    assert verify(out)["tasks"] == ["a"]


@pytest.mark.parametrize("way", ["in the pass", "in the training"])
def test_killed_anywhere_it_resumes_to_the_same_bytes(
    unmeasured: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
    way: str,
) -> None:
    b, c = write_task("b", seed=1), write_task("c", seed=2)
    monkeypatch.setattr(consolidate.estimation.compensated_sums, "FOLDED_BATCHES", 8)
    options = {**COMMON, "measure": {"b": b}, "save_every_minutes": 0, "fisher_batch_size": 2}
    finetune(unmeasured, c, output_dir=tmp_path / "whole", **options)
    if way == "in the pass":
        kill_after(monkeypatch, 40)
    else:
        break_off(monkeypatch, 3)
    with pytest.raises(Killed):
        finetune(unmeasured, c, output_dir=tmp_path / "killed", **options)
    with caplog.at_level("INFO", "consolidate"):
        finetune(unmeasured, c, output_dir=tmp_path / "killed", **options)
    expected = {
        "in the pass": "resuming after 32 of 60 examples",
        "in the training": "b was measured before the interruption",
    }
    assert expected[way] in caplog.messages
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".killed*"))


def test_saved_progress_of_the_pass_is_discarded_when_asked(
    unmeasured: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    b, c = write_task("b", seed=1), write_task("c", seed=2)
    options = {**COMMON, "measure": {"b": b}, "output_dir": tmp_path / "out"}
    break_off(monkeypatch, 3)
    with pytest.raises(Killed):
        finetune(unmeasured, c, **options)
    assert (tmp_path / ".out.measured/fisher.json").is_file()
    with caplog.at_level("INFO", "consolidate"):
        finetune(unmeasured, c, restart=True, **options)
    assert "b was measured before the interruption" not in caplog.messages
    assert not (tmp_path / ".out.measured").exists()


def test_a_chain_measures_later_or_not_at_all(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    for seed, name in enumerate("abc"):
        write_task(name, seed=seed)
    file = tmp_path / "tasks.toml"
    settings = 'optimizer = "adam"\nlearning-rate = 0.01\newc-lambda = 10\nfisher-estimator = "mc"'
    head = f'start = "start"\noutput-dir = "chain"\n[defaults]\nmodel = "{MODEL[1]}"\n{settings}\n'
    tasks = [
        '[[task]]\nname = "a"\ndata = "a.npz"\n',
        '[[task]]\nname = "b"\ndata = "b.npz"\nno-fisher = true\n',
        '[[task]]\nname = "c"\ndata = "c.npz"\nno-fisher = true\nmeasure = {b = "b.npz"}\n',
    ]
    file.write_text(head + "".join(tasks))
    result = consolidate.run(file)
    ledger = read_fisher(tmp_path / "chain/03-c/fisher").ledger
    assert [task.estimator for task in ledger.tasks] == ["mc", "mc", None]
    steps = [tmp_path / "chain" / step for step in ("01-a", "02-b", "03-c")]
    assert verify(*steps)["tasks"] == ["a"]
    assert [step["status"] for step in result["steps"]] == ["done"] * 3
    assert [step["status"] for step in consolidate.run(file)["steps"]] == ["skipped"] * 3
    bare = head.replace("chain", "bare").replace("ewc-lambda", "no-fisher = true\newc-lambda")
    file.write_text(bare + "".join(tasks[:1]))
    assert consolidate.run(file)["accuracy_matrix"] is None
    assert not (tmp_path / "bare/01-a/fisher").exists()
    assert [step["status"] for step in consolidate.run(file)["steps"]] == ["skipped"]


def test_fisher_measures_the_task_that_has_none(
    learned: Path, unmeasured: Path, write_task: Write, tmp_path: Path
) -> None:
    b, c = write_task("b", seed=1), write_task("c", seed=2)
    finetune(learned, b, output_dir=tmp_path / "once", **COMMON)
    with pytest.raises(UsageError, match="of b are those of its training: leave them out"):
        fisher(unmeasured, b, gamma=0.5, **NETWORK)
    with pytest.raises(InputError, match="expected data of 'b', whose Fisher was not measured"):
        fisher(unmeasured, c, **NETWORK)
    out = tmp_path / "apart"
    for _, status in enumerate(("done", "cached")):
        assert fisher(unmeasured, b, output_dir=out, **NETWORK)["status"] == status
    for _, status in enumerate(("done", "cached")):
        assert fisher(unmeasured, b, **NETWORK)["status"] == status
    once = contents(tmp_path / "once")
    for folder in (out, unmeasured):
        found = contents(folder)
        assert found.keys() == once.keys()
        assert found["fisher/fisher.safetensors"] == once["fisher/fisher.safetensors"]
        assert verify(learned, folder)["tasks"] == ["a"]
    with pytest.raises(InputError, match="already exists"):
        fisher(unmeasured, b, seed=1, **NETWORK)
    with pytest.raises(UsageError, match="the ledger already has a task 'b'"):
        fisher(unmeasured, b, seed=1, add=True, **NETWORK)
    assert verify(unmeasured)["tasks"] == ["a", "b"]
    fisher(unmeasured, b, seed=1, overwrite=True, **NETWORK)  # b alone, as ever
    assert verify(unmeasured)["tasks"] == ["b"]


def test_a_trained_task_is_measured_again_at_other_weights_on_request(
    unmeasured: Path, write_task: Write
) -> None:
    weights = load_file(unmeasured / "model.safetensors")
    save_file({n: w + 1 for n, w in weights.items()}, unmeasured / "model.safetensors")
    b = write_task("b", seed=1)
    with pytest.raises(InputError, match=r"does not belong to the weights.*; --overwrite leaves"):
        fisher(unmeasured, b, **NETWORK)
    fisher(unmeasured, b, overwrite=True, **NETWORK)
    assert verify(unmeasured)["tasks"] == ["b"]


def test_a_copy_without_the_earlier_tasks_is_reported(
    learned: Path, write_task: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    b = write_task("b", seed=1)
    caplog.set_level("INFO", "consolidate")
    fisher(learned, b, output_dir=tmp_path / "both", add=True, **NETWORK)
    assert "--add keeps" not in caplog.text
    fisher(learned, b, output_dir=tmp_path / "alone", **NETWORK)
    assert "the output's Fisher is that of b alone: --add keeps that of a too" in caplog.text
    assert verify(tmp_path / "both")["tasks"] == ["a", "b"]
    assert verify(tmp_path / "alone")["tasks"] == ["b"]


def test_of_the_hub_too_the_earlier_tasks_stay(
    unmeasured: Path, write_task: Write, tmp_path: Path, hub: Hub
) -> None:
    hub.put("me/last", unmeasured)
    write_task("b", seed=1)
    words = ("fisher", "me/last", "--data", "b.npz", "--output-dir", "out", *MODEL)
    code, _, err = loopback_hub.run(tmp_path, *words, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert code == 0, err
    assert verify(tmp_path / "out")["tasks"] == ["a", "b"]


def test_models_with_a_task_that_is_not_measured_are_not_merged(
    learned: Path, unmeasured: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"the Fisher of 'b' was not measured, so merging"):
        consolidate.merge([learned, unmeasured], output_dir=tmp_path / "out")


@pytest.mark.parametrize("option", ["fisher_estimator", "fisher_max_examples"])
def test_options_of_a_pass_need_a_pass(
    learned: Path, write_task: Write, tmp_path: Path, option: str
) -> None:
    value = {"fisher_estimator": "mc", "fisher_max_examples": 3}[option]
    flag = option.replace("_", "-")
    with pytest.raises(UsageError, match=f"--{flag} cannot be combined with --no-fisher"):
        finetune(
            learned,
            write_task("b"),
            output_dir=tmp_path / "out",
            no_fisher=True,
            **{option: value},
            **COMMON,
        )


def test_the_command_line(
    capsys: pytest.CaptureFixture[str], learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b, c, out = write_task("b", seed=1), write_task("c", seed=2), tmp_path / "out"
    words = (*MODEL, "--ewc-lambda", "1")
    code, printed, _ = run(
        capsys, "finetune", learned, "--data", b, "--output-dir", out, *words, "--no-fisher",
        "--metrics", tmp_path / "m.json",
    )  # fmt: skip
    assert code == 0
    assert "The Fisher of the new task was not measured" in printed.splitlines()
    assert "steps" in json.loads((tmp_path / "m.json").read_text())
    code, printed, err = run(
        capsys, "finetune", out, "--data", c, "--output-dir", tmp_path / "next", *words,
        "--measure", f"b={b}", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(printed)["fisher"]["task"] == "c"


def trained_elsewhere(folder: Path, from_: Path, data: Path, labels: int = 3) -> Path:
    """Train the network in a loop of one's own, and save it as a checkpoint."""
    weights = load_file(from_ / "model.safetensors")
    network = make_network({"sizes": [6, 8, labels]})
    kept = {name: values for name, values in weights.items() if labels == 3 or name[0] == "0"}
    network.load_state_dict(kept, strict=labels == 3)
    penalty = consolidate.load_penalty(network, from_, ewc_lambda=10.0) if labels == 3 else None
    tensors = open_task(data)[1].tensors
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            network(tensors["inputs"]), tensors["labels"] % labels
        )
        loss.backward()
        if penalty is not None:
            penalty.add_gradient_()
        optimizer.step()
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    config = {"sizes": [6, 8, labels], "num_labels": labels}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def headed_network(config: dict[str, Any]) -> torch.nn.Module:
    """Make the network with as many outputs as a head has."""
    return make_network({"sizes": [6, 8, config["num_labels"]]})


@pytest.mark.parametrize("rule", ["online", "separate"])
def test_what_was_trained_elsewhere_continues_the_chain(
    learned: Path, write_task: Write, tmp_path: Path, rule: str
) -> None:
    b, c = write_task("b", seed=1), write_task("c", seed=2)
    ours = tmp_path / "ours"
    finetune(learned, b, output_dir=ours, merge_rule=rule, **COMMON)
    theirs = tmp_path / "theirs"
    shutil.copytree(ours, theirs, ignore=shutil.ignore_patterns("fisher", "README.md"))
    out = tmp_path / "out"
    options = {"after": learned, "merge_rule": rule, **NETWORK}
    for status in ("done", "cached"):
        assert fisher(theirs, b, output_dir=out, **options)["status"] == status
    for status in ("done", "cached"):
        assert fisher(theirs, b, **options)["status"] == status
    for folder in (out, theirs):
        for name in ("fisher", "anchor")[: 1 + (rule == "separate")]:
            file = f"fisher/{name}.safetensors"
            assert (folder / file).read_bytes() == (ours / file).read_bytes()
        assert (folder / "fisher/anchor.safetensors").exists() == (rule == "separate")
        assert verify(learned, folder)["later"][0]["descends_by"] == "weights"
    task = read_fisher(out / "fisher").ledger.tasks[1]
    assert (task.penalty, task.ewc_lambda) == ("unknown", None)
    assert "trained elsewhere" in show_text(show(out))
    finetune(out, c, output_dir=tmp_path / "last", **COMMON)
    assert verify(learned, out, tmp_path / "last")["tasks"] == ["a"]


def test_a_new_head_from_elsewhere_keeps_the_old_one(
    learned: Path, write_task: Write, tmp_path: Path, caplog: Any
) -> None:
    a, b, out = write_task("a"), write_task("b", seed=1), tmp_path / "out"
    two = write_task("two", seed=1)
    content = dict(np.load(two))
    np.savez(two, inputs=content["inputs"], labels=content["labels"] % 2)
    trained = trained_elsewhere(tmp_path / "trained", learned, b, labels=2)
    factory = {"model": "support.networks:make_network"}
    with caplog.at_level("INFO", "consolidate"):
        fisher(trained, two, after=learned, output_dir=out, **factory)
    assert any("the head of a is saved in fisher/heads" in m for m in caplog.messages)
    stored = read_fisher(out / "fisher")
    head, old = stored.heads["a"], load_file(learned / "model.safetensors")
    assert all(torch.equal(head[name], old[name]) for name in ("2.weight", "2.bias"))
    alone = tmp_path / "alone"
    fisher(trained, two, output_dir=alone, **factory)
    assert torch.equal(fisher_of(out)["2.weight"], fisher_of(alone)["2.weight"])
    assert not torch.equal(fisher_of(out)["0.weight"], fisher_of(alone)["0.weight"])
    assert verify(learned, out)["tasks"] == ["a"]
    scores = evaluate(out, {"a": a, "two": two}, model=f"{__name__}:headed_network")
    assert scores.keys() == {"a", "two"}
    network = make_network({"sizes": SIZES})
    network.load_state_dict({**load_file(out / "model.safetensors"), **head})
    rows = open_task(a)[1].tensors
    loss = torch.nn.functional.cross_entropy(network(rows["inputs"]), rows["labels"])
    assert scores["a"]["loss"] == pytest.approx(loss.item())


def test_what_cannot_have_been_trained_from_it_is_refused(
    learned: Path, network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    b = write_task("b", seed=1)
    trained = trained_elsewhere(tmp_path / "trained", learned, b)
    options = {"output_dir": tmp_path / "out", **NETWORK}
    with pytest.raises(UsageError, match="--after cannot be combined with --add"):
        fisher(trained, b, after=learned, add=True, **options)
    with pytest.raises(InputError, match="found no Fisher there"):
        fisher(trained, b, after=network_checkpoint, **options)
    with pytest.raises(InputError, match=r"has the weights of .*use --add without --after"):
        fisher(learned, b, after=learned, **options)
    with pytest.raises(UsageError, match="the ledger already has a task 'a'"):
        fisher(trained, b, after=learned, task="a", **options)
    wide = tmp_path / "wide"
    shutil.copytree(trained, wide)
    (wide / "config.json").write_text(json.dumps({"sizes": [6, 9, 3]}))
    grown = {**make_network({"sizes": [6, 9, 3]}).state_dict()}
    save_file(grown, wide / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"'0.bias' has shape \[9\], not \[8\]"):
        fisher(wide, b, after=learned, **options)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "trained/fisher").exists()


def scaled_network(config: dict[str, Any]) -> torch.nn.Sequential:
    """A network whose last layer has no row for each outcome."""
    return torch.nn.Sequential(*make_network(config), torch.nn.LayerNorm(3))


def test_another_shape_is_named_where_no_head_is_found(tmp_path: Path, write_task: Write) -> None:
    folders = [tmp_path / "old", tmp_path / "wide"]
    for folder, sizes in zip(folders, ([6, 8, 3], [6, 9, 3]), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"sizes": sizes}))
        weights = scaled_network({"sizes": sizes}).state_dict()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    old, wide = folders
    own: dict[str, Any] = {"model": f"{__name__}:scaled_network"}
    fisher(old, write_task("a"), **own)
    with pytest.raises(InputError, match=r"'0.bias' has shape \[9\], not \[8\]"):
        fisher(wide, write_task("b", seed=1), after=old, output_dir=tmp_path / "out", **own)


def test_a_loop_of_ones_own_continues_the_chain(
    learned: Path, unmeasured: Path, write_task: Write, tmp_path: Path
) -> None:
    b = write_task("b", seed=1)
    trained = trained_elsewhere(tmp_path / "trained", learned, b)
    fisher(trained, b, after=learned, output_dir=tmp_path / "out", batch_size=16, **NETWORK)
    tensors = open_task(b)[1].tensors
    batches = [*zip(tensors["inputs"].split(16), tensors["labels"].split(16), strict=True)]

    def measured(folder: Path) -> tuple[torch.nn.Module, Any]:
        network = make_network({"sizes": [6, 8, 3]})
        network.load_state_dict(load_file(folder / "model.safetensors"))
        return network, consolidate.fisher_diagonal(network, batches, "softmax")

    known = {"task": "b", "objective": "classification"}
    network, diagonal = measured(trained)
    with pytest.raises(UsageError, match="already has a task 'a'"):
        consolidate.store_fisher(
            network, trained, diagonal, after=learned, task="a", objective="classification"
        )
    ledger = consolidate.store_fisher(network, trained, diagonal, after=learned, **known)
    assert [task.name for task in ledger.tasks] == ["a", "b"]
    one, other = fisher_of(trained), fisher_of(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert verify(learned, trained)["tasks"] == ["a"]
    network, diagonal = measured(unmeasured)
    consolidate.store_fisher(network, unmeasured, diagonal, **known)
    assert verify(learned, unmeasured)["later"][0]["tasks"] == ["a", "b"]
    assert read_fisher(unmeasured / "fisher").anchor is None


@pytest.mark.parametrize("more", [(), ("--shard",)], ids=["whole", "sharded"])
def test_several_processes(
    learned: Path, unmeasured: Path, write_task: Write, tmp_path: Path, more: tuple[str, ...]
) -> None:
    b, c = write_task("b", seed=1), write_task("c", seed=2)
    words = [
        "finetune", str(unmeasured), "--data", str(c), "--output-dir", str(tmp_path / "two"),
        *MODEL, "--ewc-lambda", "10", "--learning-rate", "0.01", "--device", "cpu",
        "--measure", f"b={b}", "--batch-size", "8", *more,
    ]  # fmt: skip
    log = tmp_path / "log"
    codes = ended(started(2, words, log))
    assert codes == [0, 0], log.read_text()
    options = {"ewc_lambda": 10.0, "learning_rate": 0.01, "batch_size": 16, **NETWORK}
    finetune(unmeasured, c, output_dir=tmp_path / "one", measure={"b": b}, **options)
    one, two = (fisher_of(tmp_path / name) for name in ("one", "two"))
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, rtol=1e-4, atol=1e-7)
    assert verify(learned, unmeasured, tmp_path / "two")["tasks"] == ["a"]
    assert not list(tmp_path.glob(".two*"))


def test_a_folder_of_the_users_own_beside_the_output_stays(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    own = tmp_path / ".out.measured"
    own.mkdir()
    (own / "notes.txt").write_text("mine")
    finetune(learned, write_task("b"), output_dir=tmp_path / "out", **COMMON)
    assert (own / "notes.txt").read_text() == "mine"
