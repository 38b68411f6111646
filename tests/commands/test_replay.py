"""`finetune --replay`: the rows that a run trains on, against loops that are written out."""

import json
import shutil
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import consolidate
from consolidate.data.replay import check_alike
from consolidate.data.tensors import TensorExamples
from consolidate.options import Columns
from consolidate.training.loop import APART, data_order
from consolidate.views.summary import show_text
from formats.data import open_data
from formats.errors import InputError, UsageError
from formats.fisher_folder import read_fisher
from support import tiny_models
from support.checkpoints import Write, normed
from support.faults import Killed, break_off, killed_and_resumed
from support.folders import contents
from support.networks import FAST, NETWORK, make_network
from support.together import ended, started

PLAIN = {**NETWORK, "optimizer": "sgd", "learning_rate": 0.1, "penalty": "none"}


def permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def rows_trained_on(count: int, old: int, per_ten: int, epochs: int, seed: int) -> list[list[Any]]:
    """The rows of each epoch: of every ten in succession so many are old, by long division."""
    orders = islice(data_order(count, seed), epochs)
    place, used, found = 0, 0, []
    for order in orders:
        rows: list[Any] = []
        for row in order:
            while (place + 1) * per_ten // 10 > place * per_ten // 10:
                order_of_old = permutation(old, (seed + (used // old + 1) * APART) % 2**63)
                rows.append(("old", order_of_old[used % old]))
                place, used = place + 1, used + 1
            rows.append(("new", row))
            place += 1
        found.append(rows)
    return found


def reference(
    start: Path, data: dict[str, Path], epochs: list[list[Any]], size: int, ewc_lambda: float = 0
) -> dict[str, torch.Tensor]:
    """SGD in float64 on these rows, `size` at a time, an epoch's last batch with what is left."""
    network = make_network({"sizes": [6, 8, 3]}).double()
    weights = load_file(start / "model.safetensors")
    network.load_state_dict(weights)
    rows = {name: open_data(path).tensors for name, path in data.items()}
    fisher = {}
    if ewc_lambda:
        stored = read_fisher(start / "fisher").fisher
        fisher = {name: stored[name].double() for name in stored}
    for epoch in epochs:
        for first in range(0, len(epoch), size):
            batch = epoch[first : first + size]
            inputs = torch.stack([rows[name]["inputs"][i] for name, i in batch]).double()
            labels = torch.stack([rows[name]["labels"][i] for name, i in batch])
            loss = cross_entropy(network(inputs), labels)
            for name, parameter in network.named_parameters():
                if ewc_lambda:
                    apart = (parameter - weights[name].double()) ** 2
                    loss = loss + ewc_lambda / 2 * (fisher[name] * apart).sum()
            network.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
    return network.state_dict()


@pytest.mark.parametrize(
    ("share", "batch_size", "accumulation", "ewc_lambda"),
    [(None, 16, 1, 0), (0.3, 8, 2, 5.0), (0.7, 5, 1, 0)],
)
def test_it_trains_on_the_rows_of_a_loop_that_is_written_out(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    share: float | None,
    batch_size: int,
    accumulation: int,
    ewc_lambda: float,
) -> None:
    data = {"old": write_task("old", count=5), "new": write_task("new", seed=1, count=37)}
    options: dict[str, Any] = {**PLAIN, "epochs": 3, "seed": 4, "batch_size": batch_size}
    if ewc_lambda:
        consolidate.fisher(network_checkpoint, data["old"], **NETWORK)
        options |= {"penalty": "ewc", "ewc_lambda": ewc_lambda}
    result = consolidate.finetune(
        network_checkpoint,
        data["new"],
        output_dir=tmp_path / "out",
        replay=data["old"],
        replay_share=share,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    epochs = rows_trained_on(37, 5, 1 if share is None else round(10 * share), 3, 4)
    size = batch_size * accumulation
    assert result["steps"] == sum(-(-len(rows) // size) for rows in epochs)
    replayed = sum(name == "old" for rows in epochs for name, _ in rows)
    assert replayed == sum(map(len, epochs)) * (share or 0.1) // 1
    expected = reference(network_checkpoint, data, epochs, size, ewc_lambda)
    for name, values in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-4, atol=1e-5)
    assert result["replayed"] == {
        "data": "old.npz",
        "data_digest": open_data(data["old"]).digest(),
        "share": share or 0.1,
    }


def test_max_steps_counts_all_rows_and_every_batch_keeps_its_size(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    data = {"old": write_task("old", count=5), "new": write_task("new", seed=1, count=40)}
    result = consolidate.finetune(
        network_checkpoint,
        data["new"],
        output_dir=tmp_path / "out",
        replay=data["old"],
        replay_share=0.5,
        max_steps=7,
        batch_size=10,
        **PLAIN,
    )
    assert result["steps"] == 7
    epochs = [rows[:80] for rows in rows_trained_on(40, 5, 5, 1, 0)]
    expected = reference(network_checkpoint, data, [epochs[0][:70]], 10)
    for name, values in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-4, atol=1e-5)


WAYS: dict[str, dict[str, Any]] = {
    "accumulated": {"gradient_accumulation_steps": 3, "norm_statistics": "update"},
    "adapter": {"lora_rank": 2, "lora_targets": ["last"], "max_examples": 50},
    "interpolated": {"interpolate": "auto", "norm_statistics": "update", "batch_size": 10},
    "searched": {"ewc_lambda": [1, 10]},
    "compared": {"compare_none": True, "max_steps": 9},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_killed_resumes_to_the_same_bytes(
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    old, new = write_task("old"), write_task("new", seed=1, count=70)
    start = normed(tmp_path / "normed", old)
    options: dict[str, Any] = {**FAST, "model": "support.networks:Network", "epochs": 2}
    options |= {"ewc_lambda": 10.0, "save_every_minutes": 0, "evaluate": {"old": write_task("t")}}
    options |= {"replay": write_task("rows", count=7), "replay_share": 0.3, **WAYS[way]}
    options |= {"validation": {"old": write_task("v")}} if way == "searched" else {}
    whole = consolidate.finetune(start, new, output_dir=tmp_path / "whole", **options)
    command = partial(consolidate.finetune, start, new, output_dir=tmp_path / "killed", **options)
    kills = [partial(break_off, monkeypatch, step, saved=True) for step in (1, 3, 4)]
    resumed = killed_and_resumed(command, tmp_path / "killed", caplog, *kills)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert resumed["history"] == whole["history"]
    assert not list(tmp_path.glob(".killed*"))


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_with_batches_twice_as_large(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, sharded: bool
) -> None:
    old, new = write_task("old", count=9), write_task("new", seed=1, count=37)
    options = {**PLAIN, "epochs": 2, "replay": old, "replay_share": 0.4}
    consolidate.finetune(
        network_checkpoint, new, output_dir=tmp_path / "one", batch_size=12, **options
    )
    words = f"finetune {network_checkpoint} --data {new} --output-dir {tmp_path}/two --epochs 2"
    words += f" --batch-size 6 --model {NETWORK['model']} --penalty none --optimizer sgd"
    words += f" --learning-rate 0.1 --replay {old} --replay-share 0.4 --device cpu"
    words += " --shard" * sharded
    log = tmp_path / "log"
    assert ended(started(2, words.split(), log)) == [0, 0], log.read_text()
    for name in ("model", "fisher/fisher"):
        one, two = (load_file(tmp_path / at / f"{name}.safetensors") for at in ("one", "two"))
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


def test_it_is_recorded_shown_and_up_to_date(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = write_task("old"), write_task("new", seed=1)
    consolidate.fisher(network_checkpoint, old, **NETWORK)
    options: dict[str, Any] = {**FAST, "ewc_lambda": 1.0, "replay": old, "replay_share": 0.25}

    def run(**changes: Any) -> Any:
        return consolidate.finetune(
            network_checkpoint, new, output_dir=tmp_path / "out", **{**options, **changes}
        )

    first = run()
    assert (first["status"], run()["status"]) == ("done", "cached")
    assert run()["replayed"] == first["replayed"]
    content = json.loads((tmp_path / "out" / "fisher" / "fisher.json").read_text())
    assert content["version"] == 2
    digest = open_data(old).digest()
    recorded = {"data": "old.npz", "data_digest": digest, "share": 0.25}
    assert content["tasks"][1]["replayed"] == recorded
    assert "replayed" not in content["tasks"][0]
    assert "ewc, λ = 1, 25% replay of old.npz" in show_text(consolidate.show(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "25% replay of old.npz" in card
    assert "of old, new, what was replayed for new, which can confirm" in card
    report = tmp_path / "report.html"
    consolidate.report(tmp_path / "out", output=report)
    assert "25% replay of old.npz" in report.read_text()
    assert consolidate.verify(tmp_path / "out")["tasks"] == ["old", "new"]

    # Other rows under the same name are another run, and so is another share.
    break_off(monkeypatch, 2)
    with pytest.raises(Killed):
        run(overwrite=True, replay_share=0.5, save_every_minutes=0)
    write_task("old", seed=8)
    with pytest.raises(InputError, match=r"changed: replayed data\)"):
        run(overwrite=True, replay_share=0.5)
    with pytest.raises(InputError, match=r"replayed data; replay-share 0.5 → 0.25"):
        run(overwrite=True)
    again = run(overwrite=True, restart=True, data_digest=False)
    assert again["status"] == "done"
    assert again["replayed"] == {"data": "old.npz", "data_digest": None, "share": 0.25}


def test_a_step_of_a_run_is_done_again_where_what_it_replays_changes(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    for seed, name in enumerate(("a", "b")):
        write_task(name, seed=seed)
    tasks = [{"name": "a", "data": "a.npz"}, {"name": "b", "data": "b.npz", "replay": "a.npz"}]
    lines = [f'start = "{network_checkpoint}"', 'output-dir = "out"', "[defaults]"]
    lines += [f'model = "{NETWORK["model"]}"', "ewc-lambda = 1.0"]
    for task in tasks:
        lines += ["[[task]]", *(f'{key} = "{value}"' for key, value in task.items())]
    (tmp_path / "tasks.toml").write_text("\n".join(lines))
    options: dict[str, Any] = {"output_dir": tmp_path / "out"}
    made = consolidate.run(tmp_path / "tasks.toml", **options)
    assert [step["status"] for step in made["steps"]] == ["done", "done"]
    ledger = read_fisher(tmp_path / "out" / "02-b" / "fisher").ledger
    assert [None if t.replayed is None else t.replayed.data for t in ledger.tasks] == [
        None,
        "a.npz",
    ]
    assert ledger.tasks[1].ewc_lambda == 1.0
    write_task("a", seed=5)
    planned = consolidate.run(tmp_path / "tasks.toml", dry_run=True, **options)
    assert planned["steps"][1]["reason"].endswith("replayed data")


def test_texts_are_padded_and_masked_as_in_one_batch(tmp_path: Path) -> None:
    start = tiny_models.save(
        tmp_path / "start",
        transformers.GPT2LMHeadModel,
        tiny_models.gpt2_config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        tiny_models.byte_tokenizer(pad_token="<|endoftext|>"),
    )
    long, short = tiny_models.CORPUS[4], tiny_models.CORPUS[1]
    (tmp_path / "new.jsonl").write_text(f"{json.dumps({'text': short})}\n")
    (tmp_path / "old.jsonl").write_text(f"{json.dumps({'body': long})}\n")
    (tmp_path / "old.toml").write_text('data = "old.jsonl"\ntext_column = "body"\n')
    both = "".join(f"{json.dumps({'text': text})}\n" for text in (short, long))
    (tmp_path / "both.jsonl").write_text(both)
    options: dict[str, Any] = {"penalty": "none", "optimizer": "sgd", "learning_rate": 0.1}
    options |= {"no_fisher": True}
    # One new row, an old one and a new one: of the second epoch, which is a batch of both.
    replayed = consolidate.finetune(
        start,
        tmp_path / "new.jsonl",
        output_dir=tmp_path / "replayed",
        replay=tmp_path / "old.toml",
        replay_share=0.5,
        epochs=2,
        **options,
    )
    assert replayed["steps"] == 2
    consolidate.finetune(
        start, tmp_path / "new.jsonl", output_dir=tmp_path / "first", task="first", **options
    )
    consolidate.finetune(
        tmp_path / "first", tmp_path / "both.jsonl", output_dir=tmp_path / "second", **options
    )
    one, two = (load_file(tmp_path / at / "model.safetensors") for at in ("second", "replayed"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("role", ["evaluate", "replay"])
def test_texts_beside_prompts_and_completions(tmp_path: Path, role: str) -> None:
    start = tiny_models.save(
        tmp_path / "start",
        transformers.GPT2LMHeadModel,
        tiny_models.gpt2_config(),
        tiny_models.byte_tokenizer(pad_token="<|endoftext|>"),
    )
    new, old = {"question": "One?", "answer": "Two."}, {"body": "Three."}
    (tmp_path / "new.jsonl").write_text(f"{json.dumps(new)}\n")
    (tmp_path / "old.jsonl").write_text(f"{json.dumps(old)}\n")
    (tmp_path / "old.toml").write_text('data = "old.jsonl"\ntext_column = "body"\n')
    given: Any = tmp_path / "old.toml"
    found = consolidate.finetune(
        start, tmp_path / "new.jsonl", output_dir=tmp_path / "out", penalty="none", no_fisher=True,
        columns=Columns(prompt="question", completion="answer"), max_steps=1,
        **{role: given if role == "replay" else {"old": given}},
    )  # fmt: skip
    assert found["steps"] == 1


def test_names_of_columns_are_for_the_data_that_have_them(tmp_path: Path) -> None:
    start = tiny_models.save(
        tmp_path / "start",
        transformers.GPT2LMHeadModel,
        tiny_models.gpt2_config(),
        tiny_models.byte_tokenizer(pad_token="<|endoftext|>"),
    )
    new, old = tmp_path / "new.jsonl", tmp_path / "old.jsonl"
    new.write_text(json.dumps({"question": "One?", "answer": "Two."}))
    old.write_text(json.dumps({"text": "Three."}))
    columns = Columns(prompt="question", completion="answer")
    options: Any = {"penalty": "none", "no_fisher": True, "max_steps": 1, "evaluate": {"old": old}}
    found = consolidate.finetune(
        start, new, output_dir=tmp_path / "out", columns=columns, **options
    )
    assert found["metrics"]["after"]["old"]["perplexity"] > 0
    both = {"new": new, "old": old}
    assert set(consolidate.evaluate(start, both, columns=columns)) == set(both)
    wrong = Columns(prompt="question", completion="answer", text="body")
    with pytest.raises(InputError, match=r"old\.jsonl: expected a column 'body'"):
        consolidate.evaluate(start, both, columns=wrong)
    with pytest.raises(InputError, match=r"old\.jsonl: expected a column 'body'"):
        consolidate.finetune(start, new, output_dir=tmp_path / "b", columns=wrong, **options)
    with pytest.raises(InputError, match=r"old\.jsonl: expected a column 'question'"):
        consolidate.evaluate(start, {"old": old}, columns=columns)


def other_columns(path: Path) -> Path:
    np.savez(path, features=np.zeros((3, 6), "float32"), labels=np.zeros(3, "int64"))
    return path


def wider(path: Path) -> Path:
    np.savez(path, inputs=np.zeros((3, 7), "float32"), labels=np.zeros(3, "int64"))
    return path


def another_label(path: Path) -> Path:
    np.savez(path, inputs=np.zeros((3, 6), "float32"), labels=np.array([0, 3, 1]))
    return path


def empty(path: Path) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (other_columns, r"found 'features', 'labels'; name the column with --inputs-column"),
        (wider, r"the model does not accept inputs of shape \[1, 7\]"),
        (another_label, r"found .*3: replay rows with the labels of this head"),
        (empty, "found none|empty"),
        (lambda path: path.with_name("none.npz"), "does not exist"),
    ],
)
def test_rows_that_cannot_be_replayed(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, write: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        consolidate.finetune(
            network_checkpoint,
            write_task("new"),
            output_dir=tmp_path / "out",
            replay=write(tmp_path / "other.npz"),
            **PLAIN,
        )


def test_rows_that_make_no_batch_with_the_new_ones() -> None:
    def examples(width: int, targets: torch.Tensor) -> TensorExamples:
        return TensorExamples(torch.zeros(3, width), targets, torch.float32)

    one, two = torch.zeros(3), torch.zeros(3, 2)
    check_alike(examples(4, one), examples(4, one), "old.npz", "new.npz")
    for other in (examples(5, one), examples(4, two), examples(4, one.long())):
        with pytest.raises(InputError, match=r"old\.npz: expected rows like those of new\.npz \("):
            check_alike(examples(4, one), other, "old.npz", "new.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay": None, "replay_share": 0.2}, "--replay-share needs --replay"),
        ({"replay_share": 0.0}, "--replay-share 0.0: expected a number above 0 to below 0.99"),
        ({"replay_share": 1.0}, "--replay-share 1.0: expected a number above 0 to below 0.99"),
        ({"replay_share": float("nan")}, "--replay-share nan: expected a number above 0"),
        ({"head": "new"}, "--replay cannot be combined with --head new, which has no output"),
        (
            {"penalty": "l2", "ewc_lambda": [1, 2], "validation": {"new": "old.npz"}},
            "cannot be chosen on training or --evaluate data",
        ),
        ({"replay": "new.npz"}, "expected rows of earlier tasks, found the new task's"),
        (
            {"replay": "copy.npz"},
            r"copy\.npz: expected rows of earlier tasks, found the new task's",
        ),
        ({"replay": "lm-eval:piqa"}, "is a benchmark, which is only for evaluation"),
    ],
)
def test_what_contradicts_replay(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    write_task("old")
    shutil.copy(write_task("new", seed=1), tmp_path / "copy.npz")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        consolidate.finetune(
            network_checkpoint,
            "new.npz",
            output_dir=tmp_path / "out",
            **{**PLAIN, "replay": tmp_path / "old.npz", **options},
        )
    assert not (tmp_path / "out").exists()


def test_test_data_that_are_replayed_are_reported(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = write_task("old"), write_task("new", seed=1)
    caplog.set_level("INFO", "consolidate")
    consolidate.finetune(
        network_checkpoint, new, output_dir=tmp_path / "out", replay=old, evaluate={"old": old},
        **PLAIN,
    )  # fmt: skip
    assert "these rows are replayed, so the score is too high" in caplog.text
    assert (
        "10% of the rows trained on are replayed: 6 in the first epoch, from 60; it takes 5 "
        "steps, 4 without" in caplog.text
    )
