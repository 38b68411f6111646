import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import consolidate
from consolidate.api import evaluate, finetune, merge, verify
from consolidate.views import summary
from formats.checkpoint import open_checkpoint
from formats.data import open_data
from formats.errors import InputError, UsageError
from formats.fisher_folder import read_fisher
from support import tiny_models

MODEL = {"model": f"{__name__}:headed_network"}
FAST = {**MODEL, "optimizer": "adam", "learning_rate": 0.01, "epochs": 3}
HEAD = ("2.bias", "2.weight")
TRUNK = ("0.bias", "0.weight")


def headed_network(config: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, config["num_labels"]))


def head_first(config: dict[str, Any]) -> nn.Module:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, config["num_labels"])
            self.norm = nn.LayerNorm(8)
            self.body = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.out(self.norm(self.body(x)))
            return made

    network = Network()
    network.add_module("last", nn.LayerNorm(8))  # which nothing runs through
    return network


def tied_network(config: dict[str, Any]) -> nn.Module:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Linear(6, 6, bias=False)
            self.out = nn.Linear(6, 6)
            self.out.weight = self.emb.weight

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.out(torch.tanh(self.emb(x)))
            return made

    return Network()


@pytest.fixture
def start(tmp_path: Path) -> Path:
    folder = tmp_path / "start"
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = headed_network({"num_labels": 2})
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"num_labels": 2}))
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[..., Path]:
    """Write clusters whose labels are these numbers, as Split MNIST has pairs of digits."""

    def write(*labels: int, count: int = 60) -> Path:
        random = np.random.default_rng(labels)
        chosen = random.integers(0, len(labels), count)
        centres = random.normal(size=(len(labels), 6)) * 2
        inputs = centres[chosen] + random.normal(size=(count, 6))
        path = tmp_path / f"t{'-'.join(map(str, labels))}.npz"
        np.savez(path, inputs=inputs.astype(np.float32), labels=np.array(labels)[chosen])
        return path

    return write


def test_a_tied_head_is_kept(pairs: Callable[..., Path], tmp_path: Path) -> None:
    start = tmp_path / "tied"
    start.mkdir()
    weights = tied_network({}).state_dict()
    del weights["out.weight"]
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    tied = {**FAST, "model": f"{__name__}:tied_network"}
    data = pairs(0, 1, 5)
    consolidate.fisher(start, data, task="a", model=tied["model"])
    out = tmp_path / "out"
    finetune(start, pairs(2, 3), task="b", output_dir=out, ewc_lambda=1, head="keep", **tied)
    assert not torch.equal(weights_of(out)["emb.weight"], weights["emb.weight"])
    with pytest.raises(InputError, match="cannot be separated"):
        finetune(out, data, output_dir=tmp_path / "new", ewc_lambda=1, head="new", **tied)
    with pytest.raises(InputError, match="a number from 0 to 5"):
        finetune(start, pairs(6, 7), task="c", output_dir=tmp_path / "c", ewc_lambda=1, **tied)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def fisher_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "fisher" / "fisher.safetensors")


def head_of(folder: Path, task: str) -> dict[str, Tensor]:
    return load_file(folder / "fisher" / "heads" / f"{task}.safetensors")


def loss_of(weights: dict[str, Tensor], data: Path, labels: list[int]) -> float:
    """The loss by hand, in float64; row i of the head is labels[i]."""
    columns = open_data(data).tensors
    x = columns["inputs"].double()
    hidden = torch.tanh(x @ weights["0.weight"].double().T + weights["0.bias"].double())
    outputs = hidden @ weights["2.weight"].double().T + weights["2.bias"].double()
    ids = torch.tensor([labels.index(label) for label in columns["labels"].tolist()])
    return float(cross_entropy(outputs, ids))


@pytest.mark.parametrize("rule", ["online", "separate"])
def test_a_chain_with_a_head_per_task(
    start: Path, pairs: Callable[..., Path], tmp_path: Path, rule: str
) -> None:
    data = {"a": pairs(0, 1), "b": pairs(2, 3), "c": pairs(4, 5, 6)}
    labels = {"a": [0, 1], "b": [2, 3], "c": [4, 5, 6]}
    consolidate.fisher(start, data["a"], task="a", merge_rule=rule, **MODEL)
    before, folders, results = start, [start], {}
    for task in "bc":
        out = tmp_path / task
        results[task] = finetune(
            before, data[task], task=task, output_dir=out, ewc_lambda=10.0, head="new",
            evaluate=data if task == "c" else {"a": data["a"]}, **FAST,
        )  # fmt: skip
        verify(out)
        before = out
        folders.append(out)
    for task, folder, later in zip("ab", folders, folders[1:], strict=False):
        kept = head_of(later, task)
        assert set(kept) == set(HEAD)
        assert all(torch.equal(kept[name], weights_of(folder)[name]) for name in HEAD)
    last = folders[-1]
    assert all(torch.equal(head_of(last, "a")[n], weights_of(start)[n]) for n in HEAD)
    assert json.loads((last / "config.json").read_text()) == {
        "num_labels": 3,
        "id2label": {"0": "4", "1": "5", "2": "6"},
        "label2id": {"4": 0, "5": 1, "6": 2},
    }
    # Every task with its own head on the trunk as it is now.
    metrics = evaluate(last, data, **MODEL)
    for task in "abc":
        own = weights_of(last) | (head_of(last, task) if task != "c" else {})
        assert metrics[task]["loss"] == pytest.approx(loss_of(own, data[task], labels[task]))
        assert results["c"]["metrics"]["after"][task] == pytest.approx(metrics[task])
    with pytest.raises(InputError, match="expected one of the model's 3 labels, 4, 5, 6"):
        evaluate(last, {"other": data["a"]}, **MODEL)
    forced = evaluate(last, {"other": data["a"]}, task="a", **MODEL)
    assert forced["other"] == metrics["a"]
    start_of_b = loss_of(weights_of(folders[1]) | head_of(folders[1], "a"), data["a"], [0, 1])
    assert results["c"]["metrics"]["before"]["a"]["loss"] == pytest.approx(start_of_b)
    # The trunk's Fisher is the sum of all tasks', the head's the last one's alone.
    ledger = read_fisher(last / "fisher").ledger
    for name in (*TRUNK, *HEAD):
        traces = [task.layers[name].trace for task in ledger.tasks]
        expected = sum(traces) if name in TRUNK else traces[-1]
        assert fisher_of(last)[name].sum().item() == pytest.approx(expected, rel=1e-5)
        overlaps = [task.layers[name].overlap for task in ledger.tasks]
        assert all((o is not None) == (name in TRUNK) for o in overlaps[1:])
    if rule == "separate":
        anchor = load_file(last / "fisher" / "anchor.safetensors")
        assert all(torch.equal(anchor[n], weights_of(last)[n]) for n in HEAD)
    text = summary.show_text(consolidate.show(last))
    assert "saved heads: a, b; head in the weights: c" in text


def test_the_penalty_stays_the_sum_of_the_tasks(
    start: Path, pairs: Callable[..., Path], tmp_path: Path
) -> None:
    """Two tasks share a head before it is put aside, so its part of the penalty is not zero."""
    data = [pairs(0, 1), pairs(1, 0), pairs(2, 3)]
    options = {"ewc_lambda": 1.0, **FAST}
    consolidate.fisher(start, data[0], task="a", merge_rule="separate", **MODEL)
    finetune(start, data[1], task="b", output_dir=tmp_path / "b", **options)
    finetune(tmp_path / "b", data[2], task="c", output_dir=tmp_path / "c", head="new", **options)
    for task in "ab":
        assert all(
            torch.equal(head_of(tmp_path / "c", task)[n], weights_of(tmp_path / "b")[n])
            for n in HEAD
        )
    theta = [weights_of(folder) for folder in (start, tmp_path / "b", tmp_path / "c")]
    fishers = [fisher_of(start)]
    fishers.append({n: fisher_of(tmp_path / "b")[n] - fishers[0][n] for n in fishers[0]})
    now = [theta[2] | {n: theta[1][n] for n in HEAD}] * 2
    expected = sum(
        0.5 * float((f[n].double() * (at[n].double() - mu[n].double()) ** 2).sum())
        for f, at, mu in zip(fishers, now, theta[:2], strict=True)
        for n in f
    )
    stored = read_fisher(tmp_path / "c" / "fisher")
    assert stored.anchor is not None
    value = stored.ledger.penalty_offset + sum(
        0.5 * float((stored.fisher[n].double() * (theta[2][n] - stored.anchor[n]) ** 2).sum())
        for n in stored.fisher
    )
    assert value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("penalty", "measured"), [("ewc", True), ("l2", True), ("l2", False)])
def test_a_fresh_head_is_free_and_the_trunk_is_held(
    start: Path, pairs: Callable[..., Path], tmp_path: Path, penalty: str, measured: bool
) -> None:
    if measured:
        consolidate.fisher(start, pairs(0, 1), task="a", **MODEL)
    result = finetune(
        start, pairs(2, 3), output_dir=tmp_path / "b", head="new", penalty=penalty,
        ewc_lambda=1e8, penalty_step="proximal", **FAST,
    )  # fmt: skip
    old, new = weights_of(start), weights_of(tmp_path / "b")
    for name in TRUNK:
        torch.testing.assert_close(new[name], old[name], atol=1e-4, rtol=0)
    assert result["history"][-1]["loss"] < result["history"][0]["loss"]
    again = finetune(
        start, pairs(2, 3), output_dir=tmp_path / "again", head="new", penalty=penalty,
        ewc_lambda=1e8, penalty_step="proximal", **FAST,
    )  # fmt: skip
    assert again["history"] == result["history"]


def test_heads_of_one_seed_begin_apart(
    start: Path, pairs: Callable[..., Path], tmp_path: Path
) -> None:
    consolidate.fisher(start, pairs(0, 1), task="a", **MODEL)
    heads = [weights_of(start)["2.weight"]]
    before = start
    for task, labels in (("b", (2, 3)), ("c", (4, 5))):
        finetune(
            before, pairs(*labels), task=task, output_dir=tmp_path / task, head="new",
            ewc_lambda=1.0, learning_rate=1e-9, max_steps=1, **MODEL,
        )  # fmt: skip
        before = tmp_path / task
        heads.append(weights_of(before)["2.weight"])
    for i, head in enumerate(heads):
        assert all((head - other).abs().max() > 0.01 for other in heads[:i])


def test_the_trace_of_another_head_is_not_common(
    start: Path, pairs: Callable[..., Path], tmp_path: Path
) -> None:
    consolidate.fisher(start, pairs(0, 1), task="a", **MODEL)
    finetune(
        start, pairs(2, 3), task="b", output_dir=tmp_path / "b", head="new", ewc_lambda=1.0,
        task_weight="trace", **FAST,
    )  # fmt: skip
    first, second = read_fisher(tmp_path / "b" / "fisher").ledger.tasks
    sums = [sum(task.layers[name].trace for name in TRUNK) for task in (first, second)]
    assert second.weight == pytest.approx(sums[0] / sums[1])


@pytest.mark.parametrize("rule", ["online", "separate"])
def test_extending_holds_old_rows_and_frees_new_ones(
    start: Path, pairs: Callable[..., Path], tmp_path: Path, rule: str
) -> None:
    old_data, new_data = pairs(0, 1), pairs(1, 2)
    consolidate.fisher(start, old_data, task="a", merge_rule=rule, **MODEL)
    row = np.load(new_data)["labels"].tolist().index(2) + 1
    with pytest.raises(
        InputError,
        match=rf"t1-2\.npz, row {row}, column 'labels': the model lacks the labels 2: "
        "expected some of 0, 1, found 1, 2: ",
    ):
        finetune(start, new_data, output_dir=tmp_path / "b", ewc_lambda=1.0, **FAST)
    finetune(
        start, new_data, task="b", output_dir=tmp_path / "b", head="extend", ewc_lambda=1e8,
        penalty_step="proximal", **FAST,
    )  # fmt: skip
    old, new = weights_of(start), weights_of(tmp_path / "b")
    assert new["2.weight"].shape == (3, 8)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_labels"] == 3
    held = fisher_of(start)["2.weight"] > 1e-6
    torch.testing.assert_close(new["2.weight"][:2][held], old["2.weight"][held], atol=1e-3, rtol=0)
    ledger = read_fisher(tmp_path / "b" / "fisher").ledger
    merged, first = fisher_of(tmp_path / "b"), fisher_of(start)
    for name in HEAD:
        trace = ledger.tasks[1].layers[name].trace
        grown = merged[name].clone()
        grown[:2] -= first[name]
        assert grown.sum().item() == pytest.approx(trace, rel=1e-3)
    assert not (tmp_path / "b" / "fisher" / "heads").exists()
    metrics = evaluate(tmp_path / "b", {"a": old_data}, **MODEL)
    assert metrics["a"]["loss"] == pytest.approx(loss_of(new, old_data, [0, 1, 2]))


def test_an_extended_head_that_is_put_aside_knows_all_its_labels(
    start: Path, pairs: Callable[..., Path], tmp_path: Path
) -> None:
    old_data = pairs(0, 1)
    consolidate.fisher(start, old_data, task="a", **MODEL)
    before = start
    for task, labels, head in (("b", (1, 2), "extend"), ("c", (7, 9), "new")):
        finetune(
            before, pairs(*labels), task=task, output_dir=tmp_path / task, head=head,
            ewc_lambda=1.0, **FAST,
        )  # fmt: skip
        before = tmp_path / task
    own = weights_of(before) | head_of(before, "a")
    metrics = evaluate(before, {"a": old_data}, **MODEL)
    assert metrics["a"]["loss"] == pytest.approx(loss_of(own, old_data, [0, 1, 2]))


def test_which_layer_is_the_head_can_be_said(pairs: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "start"
    folder.mkdir()
    config = {"num_labels": 2}
    network = head_first(config)
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"model": f"{__name__}:head_first", "head": "new", "ewc_lambda": 1.0}
    consolidate.fisher(folder, pairs(0, 1), task="a", model=options["model"])
    with pytest.raises(UsageError, match=r"is last \(last.weight, last.bias\).*--head-parameters"):
        finetune(folder, pairs(2, 3), output_dir=tmp_path / "b", **options)
    with pytest.raises(UsageError, match="matches no parameter"):
        finetune(
            folder, pairs(2, 3), output_dir=tmp_path / "b", head_parameters=["oot.*"], **options
        )
    finetune(
        folder, pairs(2, 3, 4), output_dir=tmp_path / "b", head_parameters=["out.*"], **options
    )
    assert set(head_of(tmp_path / "b", "a")) == {"out.bias", "out.weight"}
    assert weights_of(tmp_path / "b")["out.bias"].shape == (3,)


def test_a_head_that_no_task_uses_is_not_kept(
    start: Path, pairs: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"head": "new", "penalty": "none", **FAST}
    with caplog.at_level("INFO", logger="consolidate"):
        finetune(start, pairs(2, 3), task="b", output_dir=tmp_path / "b", **options)
    assert "the old head is not saved" in caplog.text
    assert not read_fisher(tmp_path / "b" / "fisher").heads
    with pytest.raises(UsageError, match="cannot be combined with --head keep"):
        finetune(
            start, pairs(0, 1), output_dir=tmp_path / "c", head_parameters=["2.*"], ewc_lambda=1.0,
            **MODEL,
        )  # fmt: skip
    consolidate.fisher(tmp_path / "b", pairs(2, 3), overwrite=True, **MODEL)


def test_a_factory_of_a_fixed_width_is_refused(
    network_checkpoint: Path, pairs: Callable[..., Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"model": "support.networks:make_network"}
    consolidate.fisher(network_checkpoint, pairs(0, 1, 2), task="a", **options)
    with pytest.raises(InputError, match=r"2 outputs \(4, 7\), found 3: put num_labels"):
        finetune(
            network_checkpoint, pairs(4, 7), output_dir=tmp_path / "b", head="new", ewc_lambda=1.0,
            **options,
        )  # fmt: skip
    assert not (tmp_path / "b").exists()


def test_an_evaluation_of_an_unknown_task_is_refused(
    start: Path, pairs: Callable[..., Path]
) -> None:
    data = pairs(0, 1)
    with pytest.raises(InputError, match="fisher does not exist, so it has no task 'a'"):
        evaluate(start, data, task="a", **MODEL)
    consolidate.fisher(start, data, task="a", **MODEL)
    with pytest.raises(InputError, match=r"--task b: expected one of a$"):
        evaluate(start, data, task="b", **MODEL)
    (start / "fisher" / "fisher.json").unlink()  # which would tell of saved heads
    with pytest.raises(InputError, match=r"fisher\.json: expected the ledger, found no regular"):
        evaluate(start, data, **MODEL)


def test_a_damaged_head_is_refused(start: Path, pairs: Callable[..., Path], tmp_path: Path) -> None:
    consolidate.fisher(start, pairs(0, 1), task="a", **MODEL)
    out = tmp_path / "b"
    finetune(start, pairs(2, 3), output_dir=out, head="new", ewc_lambda=1.0, **FAST)
    file = out / "fisher" / "heads" / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    for command in (
        lambda: evaluate(out, {"a": pairs(0, 1)}, **MODEL),
        lambda: verify(out),
        lambda: finetune(
            out, pairs(4, 5), output_dir=tmp_path / "c", head="new", ewc_lambda=1.0, **FAST
        ),
    ):
        with pytest.raises(InputError, match=r"heads/?.*a"):
            command()


def test_another_task_can_be_added_where_heads_are(
    start: Path, pairs: Callable[..., Path], tmp_path: Path
) -> None:
    consolidate.fisher(start, pairs(0, 1), task="a", **MODEL)
    out = tmp_path / "b"
    finetune(start, pairs(2, 3), task="b", output_dir=out, head="new", ewc_lambda=1.0, **FAST)
    kept = head_of(out, "a")
    consolidate.fisher(out, pairs(3, 2), task="more", add=True, **MODEL)
    assert all(torch.equal(head_of(out, "a")[name], kept[name]) for name in kept)
    stored = read_fisher(out / "fisher")
    assert [task.name for task in stored.ledger.tasks] == ["a", "b", "more"]
    assert list(stored.heads) == ["a"]
    assert stored.ledger.tasks[2].layers["2.weight"].overlap is not None


def texts(path: Path, *labels: Any) -> Path:
    nouns = ("cat", "dog", "day", "rain", "mat", "homework")
    rows = [
        {"text": f"the {noun} sat on {word}", "label": label}
        for noun in nouns
        for word, label in zip(("what", "again", "nobody"), labels, strict=False)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return tiny_models.save(
        tmp_path / "start",
        transformers.BertForSequenceClassification,
        tiny_models.bert_config(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}),
        tiny_models.word_tokenizer(),
    )


def test_a_classifier_of_transformers_gets_new_and_wider_heads(
    classifier: Path, tmp_path: Path
) -> None:
    old = texts(tmp_path / "old.jsonl", "good", "bad")  # another order than the model's ids
    topics = texts(tmp_path / "topics.jsonl", "sport", "news", "art")
    more = texts(tmp_path / "more.jsonl", "art", "travel")
    consolidate.fisher(classifier, old, task="old")
    first = evaluate(classifier, {"old": old})["old"]
    with pytest.raises(
        InputError,
        match=r"topics\.jsonl, row 1 \(line 1\), column 'label': the model lacks the labels art, "
        r"news, sport: expected some of .*, found art, news, sport:",
    ):
        finetune(classifier, topics, output_dir=tmp_path / "b", ewc_lambda=1.0)
    finetune(
        classifier, topics, task="topics", output_dir=tmp_path / "b", head="new", ewc_lambda=1.0,
        evaluate={"old": old},
    )  # fmt: skip
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    assert loaded.config.id2label == {0: "art", 1: "news", 2: "sport"}
    kept = head_of(tmp_path / "b", "old")
    assert set(kept) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(kept[name], weights_of(classifier)[name]) for name in kept)
    assert list(weights_of(tmp_path / "b")) == list(weights_of(classifier))
    again = evaluate(tmp_path / "b", {"old": old})["old"]
    assert again["loss"] == pytest.approx(first["loss"], abs=0.05)
    finetune(
        tmp_path / "b", more, task="more", output_dir=tmp_path / "c", head="extend",
        ewc_lambda=1.0, evaluate={"old": old, "topics": topics},
    )  # fmt: skip
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["id2label"] == {"0": "art", "1": "news", "2": "sport", "3": "travel"}
    assert weights_of(tmp_path / "c")["classifier.weight"].shape == (4, 16)
    verify(tmp_path / "c")


def test_a_head_of_more_parameters_than_one_that_was_saved(
    start: Path, pairs: Callable[..., Path], tmp_path: Path
) -> None:
    data = pairs(0, 1)
    consolidate.fisher(start, data, task="a", **MODEL)
    options: dict[str, Any] = {"ewc_lambda": 10.0, "head": "new", **FAST}
    finetune(start, pairs(2, 3), task="b", output_dir=tmp_path / "b", **options)
    finetune(
        tmp_path / "b", pairs(4, 5), task="c", output_dir=tmp_path / "c",
        head_parameters=["0.*", "2.*"], **options,
    )  # fmt: skip
    one, two = (evaluate(tmp_path / at, {"a": data}, **MODEL)["a"] for at in "bc")
    assert one == two
    assert head_of(tmp_path / "c", "a").keys() == head_of(tmp_path / "c", "b").keys()


def test_what_would_lose_the_earlier_tasks_is_refused(
    start: Path, pairs: Callable[..., Path], tmp_path: Path
) -> None:
    consolidate.fisher(start, pairs(0, 1), task="a", freeze=["0.*"], **MODEL)
    with pytest.raises(UsageError, match="--no-fisher: the Fisher so far covers the old head"):
        finetune(
            start, pairs(2, 3), task="b", output_dir=tmp_path / "b", ewc_lambda=1.0, head="new",
            no_fisher=True, **FAST,
        )  # fmt: skip


def test_an_adapter_on_the_place_of_a_saved_head_is_refused(
    start: Path, pairs: Callable[..., Path], tmp_path: Path
) -> None:
    a, b = pairs(0, 1), pairs(2, 3)
    consolidate.fisher(start, a, task="a", **MODEL)
    options: dict[str, Any] = {"ewc_lambda": 10.0, "evaluate": {"a": a}, **FAST}
    finetune(start, b, task="b", output_dir=tmp_path / "b", head="new", **options)
    options |= {"lora_rank": 1, "lora_targets": ["2"], "output_dir": tmp_path / "c"}
    with pytest.raises(UsageError, match="would also change the saved head of a"):
        finetune(tmp_path / "b", b, task="c", **options)
    finetune(tmp_path / "b", b, task="c", **options | {"lora_targets": ["0"]})


def test_heads_of_tasks_with_different_objectives(tmp_path: Path) -> None:
    config = tiny_models.bert_config(num_labels=2)
    kind = transformers.BertForSequenceClassification  # with a pooler, which the other lacks
    folder = tiny_models.save(tmp_path / "start", kind, config, tiny_models.word_tokenizer())
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text('{"text": "the cat", "label": 0}\n{"text": "a dog", "label": 1}\n')
    new.write_text('{"tokens": ["a", "dog"], "labels": ["O", "X"]}\n')
    consolidate.fisher(folder, old, task="old")
    first = evaluate(folder, {"old": old})["old"]
    options: dict[str, Any] = {"objective": "token-classification", "head": "new"}
    options |= {"ewc_lambda": 1.0, "max_steps": 1, "learning_rate": 1e-9, "evaluate": {"old": old}}
    found = finetune(folder, new, task="new", output_dir=tmp_path / "out", **options)
    assert found["metrics"]["after"]["old"]["loss"] == pytest.approx(first["loss"], rel=1e-4)


@pytest.mark.parametrize("objective", ["multi-label", "regression", "token-classification"])
def test_other_objectives_get_heads(tmp_path: Path, objective: str) -> None:
    cls = {"token-classification": transformers.BertForTokenClassification}.get(
        objective, transformers.BertForSequenceClassification
    )
    config = tiny_models.bert_config(num_labels=2)
    folder = tiny_models.save(tmp_path / "start", cls, config, tiny_models.word_tokenizer())
    rows: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
        "multi-label": (
            [{"text": "the cat", "labels": [0, 1]}, {"text": "a dog", "labels": [1, 1]}],
            [{"text": "the mat", "labels": [0, 1, 1]}, {"text": "a day", "labels": [0, 0, 0]}],
        ),
        "regression": (
            [{"text": "the cat", "label": [0.5, 1.0]}, {"text": "a dog", "label": [1.0, 2.0]}],
            [{"text": "the mat", "label": 0.3}, {"text": "a day", "label": 0.7}],
        ),
        "token-classification": (
            [{"tokens": ["the", "cat"], "labels": [0, 1]}],
            [{"tokens": ["a", "dog"], "labels": ["O", "X"]}],
        ),
    }
    files = {}
    for name, lines in zip(("old", "new"), rows[objective], strict=True):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in lines))
    consolidate.fisher(folder, files["old"], objective=objective)
    out = tmp_path / "out"
    result = finetune(
        folder, files["new"], output_dir=out, objective=objective, head="new", ewc_lambda=1.0,
        evaluate=files,
    )  # fmt: skip
    kept = head_of(out, "old")
    assert all(torch.equal(kept[name], weights_of(folder)[name]) for name in kept)
    width = {"multi-label": 3, "regression": 1, "token-classification": 2}[objective]
    assert weights_of(out)["classifier.weight"].shape == (width, 16)
    found = evaluate(out, files, objective=objective)
    for name in files:
        assert found[name] == pytest.approx(result["metrics"]["after"][name])


def test_names_that_transformers_fills_in_are_said_to_be_none(tmp_path: Path) -> None:
    kind, start = transformers.BertForSequenceClassification, tmp_path / "start"
    tiny_models.save(start, kind, tiny_models.bert_config(), tiny_models.word_tokenizer())
    named = texts(tmp_path / "named.jsonl", "LABEL_1", "LABEL_0")
    options: dict[str, Any] = {"output_dir": tmp_path / "b", "penalty": "none"}
    with pytest.raises(InputError, match=r"of 0, 1, found LABEL_0, LABEL_1: .*count as none.*head"):
        finetune(start, named, **options)
    with pytest.raises(InputError, match="of 0, 1, found 7, 8: --head new"):
        finetune(start, texts(tmp_path / "numbers.jsonl", 7, 8), **options)


def test_one_label_makes_no_classifier(classifier: Path, tmp_path: Path) -> None:
    consolidate.fisher(classifier, texts(tmp_path / "old.jsonl", "good", "bad"), task="old")
    with pytest.raises(UsageError, match="at least two labels, found 1"):
        finetune(
            classifier, texts(tmp_path / "one.jsonl", "x"), output_dir=tmp_path / "b", head="new",
            ewc_lambda=1.0,
        )  # fmt: skip


def test_the_head_in_half_precision_stays_so(classifier: Path, tmp_path: Path) -> None:
    half = tiny_models.save(
        tmp_path / "half",
        transformers.BertForSequenceClassification,
        tiny_models.bert_config(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}),
        tiny_models.word_tokenizer(),
        torch.bfloat16,
    )
    consolidate.fisher(half, texts(tmp_path / "old.jsonl", "good", "bad"), task="old")
    for head in ("new", "extend"):
        out = tmp_path / head
        finetune(
            half, texts(tmp_path / "t.jsonl", "x", "y"), output_dir=out, head=head, ewc_lambda=1.0
        )
        assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.bfloat16}


def test_new_tokens_widen_the_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_models.save(
        tmp_path / "start",
        transformers.GPT2LMHeadModel,
        tiny_models.gpt2_config(),
        tiny_models.byte_tokenizer(),
    )
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in tiny_models.CORPUS))
    consolidate.fisher(folder, data, task="old", max_length=8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new>", "<more>"])
    tokenizer.save_pretrained(folder)
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps({"text": "<new> cat <more>"}) + "\n")
    with pytest.raises(InputError, match=f"token ids below {rows}.*found {rows + 1}"):
        evaluate(folder, {"new": new})
    out = tmp_path / "out"
    with caplog.at_level("INFO", logger="consolidate"):
        finetune(folder, new, output_dir=out, ewc_lambda=1.0, learning_rate=1e-3)
    assert f"{rows + 2} tokens, the embedding {rows} rows" in caplog.text
    embedding = weights_of(out)["transformer.wte.weight"]
    assert embedding.shape[0] == rows + 2
    fisher = fisher_of(out)["transformer.wte.weight"]
    assert fisher.shape == embedding.shape
    assert (fisher[rows:] > 0).any()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.vocab_size == rows + 2
    assert torch.equal(loaded.lm_head.weight, embedding)
    verify(out)
    assert "loss" in evaluate(out, {"new": new})["new"]


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "MarianMTModel"])
def test_new_tokens_widen_the_bias_of_encoder_decoders(tmp_path: Path, name: str) -> None:
    kind, tokenizer = getattr(transformers, name), tiny_models.word_tokenizer()
    rows = len(tokenizer)
    config = kind.config_class(
        vocab_size=rows, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=40,
        decoder_start_token_id=0, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        forced_eos_token_id=3,
    )  # fmt: skip
    folder = tiny_models.save(tmp_path / "start", kind, config, tokenizer)
    bias = torch.arange(rows).float()[None]
    weights = {**load_file(folder / "model.safetensors"), "final_logits_bias": bias}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    old, new, out = (tmp_path / name for name in ("old.jsonl", "new.jsonl", "out"))
    old.write_text(json.dumps({"prompt": "the cat", "completion": "a dog"}) + "\n")
    consolidate.fisher(folder, old, task="old", estimator="empirical")
    tokenizer.add_tokens(["<new>", "<more>"])
    tokenizer.save_pretrained(folder)
    new.write_text(json.dumps({"prompt": "<new> cat", "completion": "a <more>"}) + "\n")
    finetune(folder, new, output_dir=out, ewc_lambda=1.0, fisher_estimator="empirical")
    loaded = kind.from_pretrained(out)
    assert torch.equal(loaded.final_logits_bias, nn.functional.pad(bias, (0, 2)))
    made = tokenizer(["a <more>"], return_tensors="pt")["input_ids"]
    assert loaded(input_ids=made, labels=made).loss.isfinite()
    verify(out)


def test_models_with_heads_are_joined_or_refused(
    start: Path, pairs: Callable[..., Path], tmp_path: Path
) -> None:
    consolidate.fisher(start, pairs(0, 1), task="a", **MODEL)
    options: dict[str, Any] = {"ewc_lambda": 1.0, **FAST}
    base = tmp_path / "base"
    finetune(start, pairs(2, 3), task="b", output_dir=base, head="new", **options)
    for task in "cd":
        finetune(base, pairs(3, 2), task=task, output_dir=tmp_path / task, **options)
    joined = tmp_path / "joined"
    merge([tmp_path / "c", tmp_path / "d"], base=base, output_dir=joined)
    assert list(read_fisher(joined / "fisher").heads) == ["a"]
    assert all(torch.equal(head_of(joined, "a")[n], weights_of(start)[n]) for n in HEAD)
    finetune(base, pairs(8, 9), task="e", output_dir=tmp_path / "e", head="new", **options)
    with pytest.raises(InputError, match=r"labels are 2, 3 in .* and 8, 9 in"):
        merge([tmp_path / "c", tmp_path / "e"], base=base, output_dir=tmp_path / "x")
    for task in "fg":
        finetune(base, pairs(8, 9), task=task, output_dir=tmp_path / task, head="new", **options)
    with pytest.raises(InputError, match=r"the head of b is saved in .* but in use in the base"):
        merge([tmp_path / "f", tmp_path / "g"], base=base, output_dir=tmp_path / "x")


def test_numbers_are_names_where_the_labels_are_numbers(
    start: Path, pairs: Callable[..., Path]
) -> None:
    (start / "config.json").write_text(
        json.dumps({"num_labels": 2, "id2label": {"0": "7", "1": "3"}})
    )
    data = pairs(3, 7)
    found = evaluate(start, {"x": data}, **MODEL)["x"]["loss"]
    assert found == pytest.approx(loss_of(weights_of(start), data, [7, 3]))
    with pytest.raises(InputError, match=r"expected one of the model's 2 labels, 7, 3, found 0$"):
        evaluate(start, {"x": pairs(0, 3)}, **MODEL)
    assert open_checkpoint(start).config["num_labels"] == 2


def test_a_search_measures_old_tasks_with_their_own_heads(
    start: Path, pairs: Callable[..., Path], tmp_path: Path
) -> None:
    a, b = pairs(0, 1), pairs(2, 3)
    consolidate.fisher(start, a, task="a", **MODEL)
    held = tmp_path / "held.npz"
    held.write_bytes(a.read_bytes())
    new = tmp_path / "new.npz"
    new.write_bytes(b.read_bytes())
    found = finetune(
        start, b, task="b", output_dir=tmp_path / "b", head="new", ewc_lambda=[1.0, 100.0],
        validation={"a": held, "b": new}, **FAST,
    )  # fmt: skip
    trial = next(t for t in found["lambda_search"]["trials"] if t["chosen"])
    assert trial["metrics"] == evaluate(tmp_path / "b", {"a": a, "b": b}, **MODEL)
