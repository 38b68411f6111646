from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import consolidate
from formats.errors import UsageError
from formats.fisher_folder import read_fisher
from formats.fisher_json import Ledger
from support.chains import Tasks
from support.checkpoints import Write
from support.networks import NETWORK, make_network


def stored(folder: Path, which: str) -> dict[str, torch.Tensor]:
    files = {"weights": "model", "fisher": "fisher/fisher", "anchor": "fisher/anchor"}
    return load_file(folder / f"{files[which]}.safetensors")


def ledger_of(folder: Path) -> Ledger:
    return read_fisher(folder / "fisher").ledger


def network_of(folder: Path) -> torch.nn.Module:
    network = make_network({"sizes": [6, 8, 3]})
    network.load_state_dict(stored(folder, "weights"))
    return network


@pytest.fixture
def tasks(network_checkpoint: Path, write_task: Write, tmp_path: Path) -> Tasks:
    return Tasks(network_checkpoint, write_task, tmp_path)


def test_a_separate_chain_is_the_sum_of_its_tasks_penalties(tasks: Tasks) -> None:
    for name in "abc":
        tasks.learn(name, merge_rule="separate", task_weight=2.0)
    ledger = ledger_of(tasks.last)
    assert (ledger.merge_rule, ledger.gamma) == ("separate", 1.0)
    assert [task.weight for task in ledger.tasks] == [2.0] * 3
    assert ledger.penalty_offset > 0
    assert consolidate.verify(tasks.last)["anchor"] is not None
    explicit = [tasks.alone(name).folder.parent for name in "abc"]
    network = network_of(tasks.last)
    for strength in (0.0, 0.1, 1.0):  # at the weights, near, far
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += strength * torch.randn(parameter.shape, generator=generator)
        whole = consolidate.load_penalty(network, tasks.last, ewc_lambda=3.0)
        parts = [consolidate.load_penalty(network, at, ewc_lambda=6.0) for at in explicit]
        assert whole.value() == pytest.approx(sum(part.value() for part in parts), rel=1e-4)
        whole.add_gradient_()
        found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        network.zero_grad()
        for part in parts:
            part.add_gradient_()
        for gradient, parameter in zip(found, network.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)
        network.zero_grad()


def test_the_reported_penalty_has_the_offset(tasks: Tasks) -> None:
    for name in "ab":
        tasks.learn(name, merge_rule="separate")
    at_start = consolidate.load_penalty(network_of(tasks.last), tasks.last, ewc_lambda=10.0).value()
    offset = ledger_of(tasks.last).penalty_offset
    assert at_start > 10 * offset > 0
    result = tasks.learn("c")
    assert result["history"][0]["penalty"] == pytest.approx(at_start, rel=1e-5)


def test_the_first_task_is_anchored_at_the_weights_by_either_rule(tasks: Tasks) -> None:
    tasks.learn("a", merge_rule="separate")
    ledger = ledger_of(tasks.last)
    assert ledger.anchor is None
    assert ledger.penalty_offset == 0


def test_another_task_at_the_same_weights_moves_no_anchor(tasks: Tasks, write_task: Write) -> None:
    tasks.learn("a")
    before = stored(tasks.last, "fisher")
    data = write_task("more", seed=5)
    result = consolidate.fisher(tasks.last, data, **NETWORK, add=True, merge_rule="separate")
    assert (result["merge_rule"], result["weight"]) == ("separate", 1.0)
    ledger = ledger_of(tasks.last)
    assert (ledger.merge_rule, ledger.anchor, ledger.penalty_offset) == ("separate", None, 0)
    assert all((stored(tasks.last, "fisher")[name] >= f).all() for name, f in before.items())


def test_a_chain_keeps_its_rule_and_its_gamma(tasks: Tasks) -> None:
    tasks.learn("a", gamma=0.5)
    tasks.learn("b")
    assert (ledger_of(tasks.last).merge_rule, ledger_of(tasks.last).gamma) == ("online", 0.5)
    new = tasks.alone("b").fisher
    old = stored(tasks.folder / "a", "fisher")
    for name, values in stored(tasks.last, "fisher").items():
        torch.testing.assert_close(values, 0.5 * old[name] + new[name])
    tasks.learn("c", merge_rule="separate")
    tasks.learn("d")
    assert (ledger_of(tasks.last).merge_rule, ledger_of(tasks.last).gamma) == ("separate", 1.0)


def test_separate_goes_on_from_the_weights_of_an_online_chain(tasks: Tasks) -> None:
    tasks.learn("a")
    tasks.learn("b")
    online = tasks.last
    tasks.learn("c", merge_rule="separate")
    old, new = stored(online, "fisher"), tasks.alone("c").fisher
    before, after = stored(online, "weights"), stored(tasks.last, "weights")
    for name, anchor in stored(tasks.last, "anchor").items():
        total = old[name].double() + new[name].double()
        weighed = old[name].double() * before[name] + new[name].double() * after[name]
        held = total > 0
        torch.testing.assert_close(anchor[held], (weighed / total)[held].float())
        assert torch.equal(anchor[~held], after[name][~held])


def test_online_moves_the_anchor_of_a_separate_chain_to_the_weights(tasks: Tasks) -> None:
    tasks.learn("a")
    tasks.learn("b", merge_rule="separate")
    assert ledger_of(tasks.last).anchor is not None
    tasks.learn("c", merge_rule="online")
    ledger = ledger_of(tasks.last)
    assert (ledger.merge_rule, ledger.anchor, ledger.penalty_offset) == ("online", None, 0)
    penalty = consolidate.load_penalty(network_of(tasks.last), tasks.last, ewc_lambda=1.0)
    assert penalty.value() == 0


def test_gamma_zero_leaves_the_new_task_alone(tasks: Tasks) -> None:
    tasks.learn("a")
    tasks.learn("b", gamma=0.0)
    fisher = stored(tasks.last, "fisher")
    alone = tasks.alone("b").fisher
    assert all(torch.equal(fisher[name], alone[name]) for name in alone)
    assert [task.name for task in ledger_of(tasks.last).tasks] == ["a", "b"]


@pytest.mark.parametrize("rule", ["online", "separate"])
def test_weights_relative_to_the_first_task(tasks: Tasks, rule: str) -> None:
    tasks.learn("a", task_weight="trace", merge_rule=rule, count=40)
    tasks.learn("b", task_weight="units", freeze=["0.bias"], count=100)
    tasks.learn("c", task_weight="trace", freeze=["0.bias"])
    first, second, third = ledger_of(tasks.last).tasks
    assert first.weight == 1
    assert second.weight == 100 / 40

    def trace(fisher: Mapping[str, torch.Tensor]) -> float:
        return sum(float(f.double().sum()) for name, f in fisher.items() if name != "0.bias")

    ratio = trace(tasks.alone("a").fisher) / trace(tasks.alone("c").fisher)
    assert third.weight == pytest.approx(ratio, rel=1e-6)
    traces = [sum(layer.trace for n, layer in t.layers.items() if n != "0.bias")
              for t in (first, second, third)]  # fmt: skip
    weighed = sum(t.weight * value for t, value in zip((first, second, third), traces, strict=True))
    assert trace(stored(tasks.last, "fisher")) == pytest.approx(weighed, rel=1e-6)
    assert third.weight * traces[2] == pytest.approx(traces[0], rel=1e-6)


def test_a_task_without_a_fisher_weighs_one(tasks: Tasks) -> None:
    tasks.learn("a", freeze=["0.*"])
    result = tasks.learn("b", task_weight="trace", freeze=["2.*"])
    assert result["fisher"]["weight"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_rule": "seperate"}, "--merge-rule seperate: expected one of online, separate"),
        ({"merge_rule": "separate", "gamma": 0.9}, "--gamma 0.9 cannot be combined with"),
        ({"task_weight": -1.0}, "--task-weight -1.0: expected a finite number from 0"),
        ({"task_weight": float("inf")}, "--task-weight inf"),
        ({"task_weight": "unit"}, "--task-weight unit: expected a number, or one of units, trace"),
    ],
)
def test_merging_options_that_make_no_sense(
    tasks: Tasks, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        tasks.learn("a", **options)
    assert not (tasks.folder / "a").exists()
