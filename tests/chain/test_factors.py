"""The matrices of a chain: merged by either rule, dropped where a layer has a new head."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import consolidate
from consolidate.api import finetune, fisher
from consolidate.ewc.block_penalty import BlockPenalty
from formats.errors import InputError, UsageError
from formats.fisher_folder import StoredFisher, read_fisher, write_fisher
from formats.fisher_json import Block, needed_version
from support.chains import Tasks
from support.checkpoints import Write
from support.folders import contents
from support.networks import FAST, NETWORK, SIZES, make_network

BLOCKS = {f"{i}.weight.R": Block("R", (1,), (f"{i}.weight", f"{i}.bias")) for i in (0, 2)}


@pytest.fixture
def tasks(network_checkpoint: Path, write_task: Write, tmp_path: Path) -> Tasks:
    return Tasks(network_checkpoint, write_task, tmp_path, structure="inputs")


def factors(stored: StoredFisher) -> dict[str, Tensor]:
    assert stored.factors is not None
    return dict(stored.factors.items())


def penalty_of(stored: StoredFisher, module: nn.Module) -> BlockPenalty:
    """The penalty of a folder, of a module with the names of its file."""
    weights = load_file(stored.folder.parent / "model.safetensors")
    ledger = stored.ledger
    offset = ledger.penalty_offset if ledger.factor_offset is None else ledger.factor_offset
    return BlockPenalty(
        module,
        dict(stored.fisher.items()),
        dict(stored.anchor.items()) if stored.anchor else weights,
        factors=factors(stored),
        blocks=ledger.blocks or {},
        factor_anchor=dict(stored.factor_anchor.items()) if stored.factor_anchor else weights,
        ewc_lambda=2.0,
        offset=offset,
    )


def moved(checkpoint: Path, strength: float) -> nn.Module:
    network = make_network({"sizes": SIZES})
    network.load_state_dict(load_file(checkpoint / "model.safetensors"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += strength * torch.randn(parameter.shape, generator=generator)
    return network


def test_a_first_task_has_the_factors_of_its_layers(tasks: Tasks) -> None:
    result = tasks.learn("a")
    stored = tasks.stored
    assert stored.ledger.blocks == BLOCKS
    assert needed_version(stored.ledger) == 2
    assert (stored.factor_anchor, stored.ledger.factor_offset) == (None, None)
    for name, matrix in factors(stored).items():
        covered = BLOCKS[name].parameters
        trace = sum(float(stored.fisher[at].double().sum()) for at in covered)
        assert float(matrix.trace()) == pytest.approx(trace, rel=1e-5)
    assert result["fisher"]["structure"] == "inputs"
    assert result["fisher"]["factors"] == {"layers": 2, "bytes": 4 * (7 * 7 + 9 * 9)}


def test_online_sums_the_factors(tasks: Tasks) -> None:
    tasks.learn("a", gamma=0.5)
    before = factors(tasks.stored)
    tasks.learn("b", task_weight=2.0)
    alone, stored = factors(tasks.alone("b")), tasks.stored
    for name, matrix in factors(stored).items():
        torch.testing.assert_close(matrix, 0.5 * before[name] + 2 * alone[name])
    assert (stored.factor_anchor, stored.ledger.factor_offset) == (None, None)


def test_separate_is_the_sum_of_the_tasks_penalties(tasks: Tasks) -> None:
    for name in "abc":
        tasks.learn(name, merge_rule="separate")
    assert tasks.stored.factor_anchor is not None
    assert tasks.stored.ledger.factor_offset != tasks.stored.ledger.penalty_offset
    explicit = [tasks.alone(name) for name in "abc"]
    for strength in (0.0, 0.1, 1.0):  # at the weights, near, far
        module = moved(tasks.last, strength)
        whole = penalty_of(tasks.stored, module).value()
        parts = [penalty_of(stored, module).value() for stored in explicit]
        assert whole == pytest.approx(sum(parts), rel=2e-4)


def test_what_finetune_reports_is_the_penalty_of_the_factors(tasks: Tasks) -> None:
    for name in "ab":
        tasks.learn(name, merge_rule="separate")
    stored, module = tasks.stored, moved(tasks.last, 0.0)
    result = tasks.learn("c")
    expected = 5 * penalty_of(stored, module).value()  # λ is 10 there
    assert result["history"][0]["penalty"] == pytest.approx(expected, rel=1e-5)
    diagonal = finetune(
        stored.folder.parent, tasks.folder / "c.npz", output_dir=tasks.folder / "d",
        ewc_lambda=10.0, epochs=2, structure="diagonal", **FAST,
    )  # fmt: skip
    assert diagonal["history"][0]["penalty"] != pytest.approx(expected, rel=1e-3)


def test_a_frozen_layer_keeps_a_share_of_its_matrix(tasks: Tasks) -> None:
    tasks.learn("a", gamma=0.5)
    before = factors(tasks.stored)
    tasks.learn("b", freeze=["0.*"])
    after = factors(tasks.stored)
    assert torch.equal(after["0.weight.R"], 0.5 * before["0.weight.R"])
    assert not torch.equal(after["2.weight.R"], 0.5 * before["2.weight.R"])
    anchored = tasks.learn("c", freeze=["0.bias"], merge_rule="separate")
    assert anchored["fisher"]["factors"]["layers"] == 2
    assert tasks.stored.ledger.blocks == BLOCKS


def test_a_layer_measured_before_without_a_matrix_gets_none(tasks: Tasks) -> None:
    tasks.learn("a", freeze=["0.*"])
    assert list(factors(tasks.stored)) == ["2.weight.R"]
    tasks.learn("b")
    assert list(factors(tasks.stored)) == ["0.weight.R", "2.weight.R"]  # it had no Fisher at all


def test_the_diagonal_alone_drops_the_factors(
    tasks: Tasks, caplog: pytest.LogCaptureFixture
) -> None:
    tasks.learn("a")
    caplog.set_level("INFO", logger="consolidate")
    result = tasks.learn("b", structure="diagonal")
    assert tasks.stored.factors is None
    assert needed_version(tasks.stored.ledger) == 1
    assert (result["fisher"]["structure"], result["fisher"]["factors"]) == ("diagonal", None)
    assert (
        "the factors of a are neither used nor kept: the diagonal protects all" in caplog.messages
    )


def test_factors_cannot_begin_in_the_middle_of_a_chain(tasks: Tasks) -> None:
    tasks.learn("a", structure="diagonal")
    with pytest.raises(InputError, match="has no factors, which --structure inputs needs: measure"):
        tasks.learn("b", structure="inputs")
    with pytest.raises(UsageError, match="the earlier tasks were measured without factors"):
        tasks.learn("b", structure="inputs", penalty="l2")
    data = tasks.write("more", seed=7)
    with pytest.raises(UsageError, match="the earlier tasks were measured without factors"):
        fisher(tasks.last, data, add=True, structure="inputs", **NETWORK)
    tasks.learn("b")
    assert tasks.stored.factors is None


@pytest.mark.parametrize("rule", ["online", "separate"])
def test_measured_later_is_byte_for_byte_measured_at_once(tasks: Tasks, rule: str) -> None:
    tasks.learn("a")
    options = {"data_digest": False, "merge_rule": rule}
    tasks.learn("b", **options)
    shutil.move(tasks.last, tasks.folder / "at-once")
    tasks.last = tasks.learned.pop() and tasks.learned[-1]
    before = factors(tasks.stored)
    tasks.learn("b", no_fisher=True, **options)
    pending = tasks.stored
    assert pending.factor_anchor is not None
    assert all(torch.equal(factors(pending)[name], matrix) for name, matrix in before.items())
    start = load_file(tasks.folder / "a" / "model.safetensors")
    for name, values in pending.factor_anchor.items():
        assert torch.equal(values, start[name])
    fisher(tasks.last, tasks.folder / "b.npz", data_digest=False, **FAST_FISHER)
    assert contents(tasks.last / "fisher") == contents(tasks.folder / "at-once" / "fisher")


FAST_FISHER = {**NETWORK, "task": "b"}


def test_another_task_at_the_same_weights(tasks: Tasks) -> None:
    tasks.learn("a")
    before = factors(tasks.stored)
    result = fisher(tasks.last, tasks.write("more", seed=7), add=True, **NETWORK)
    assert result["structure"] == "inputs"
    after = factors(tasks.stored)
    assert all((after[name].diagonal() >= m.diagonal()).all() for name, m in before.items())


def test_factors_continue_after_another_program(tasks: Tasks) -> None:
    tasks.learn("a", merge_rule="separate")
    first = tasks.stored
    tasks.learn("b")
    elsewhere = tasks.folder / "elsewhere"
    shutil.copytree(tasks.last, elsewhere, ignore=shutil.ignore_patterns("fisher"))
    data = tasks.folder / "b.npz"
    fisher(elsewhere, data, after=first.folder.parent, **NETWORK)
    stored, expected = read_fisher(elsewhere / "fisher"), tasks.stored
    assert stored.factor_anchor is not None
    assert expected.factor_anchor is not None
    assert all(torch.equal(factors(stored)[n], m) for n, m in factors(expected).items())
    assert all(torch.equal(stored.factor_anchor[n], m) for n, m in expected.factor_anchor.items())
    assert stored.ledger.factor_offset == expected.ledger.factor_offset


def with_blocks(folder: Path, blocks: dict[str, Block], matrices: dict[str, Tensor]) -> None:
    """Write a Fisher folder again with other factors."""
    stored = read_fisher(folder)
    values = {name: tensor.clone() for name, tensor in stored.fisher.items()}
    stored.ledger.blocks = blocks
    shutil.rmtree(folder)
    write_fisher(folder, values, stored.ledger, factors=matrices)


def test_names_of_another_program_are_understood(tasks: Tasks) -> None:
    tasks.learn("a")
    shutil.copytree(tasks.last, tasks.folder / "named")
    others = {f"block {i}": m.clone() for i, m in enumerate(factors(tasks.stored).values())}
    turned = [Block("R", (1,), tuple(reversed(block.parameters))) for block in BLOCKS.values()]
    with_blocks(tasks.folder / "named" / "fisher", dict(zip(others, turned, strict=True)), others)
    tasks.learn("b", data_digest=False)
    expected = tasks.stored
    tasks.last = tasks.folder / "named"
    tasks.learned.pop()
    tasks.learn("b", data_digest=False, overwrite=True)
    assert tasks.stored.ledger.blocks == expected.ledger.blocks == BLOCKS
    assert all(torch.equal(factors(tasks.stored)[n], m) for n, m in factors(expected).items())


def test_matrices_of_another_kind_are_dropped(
    tasks: Tasks, caplog: pytest.LogCaptureFixture
) -> None:
    tasks.learn("a")
    sides = {"A": Block("A", (1,), ("0.weight",)), "G": Block("G", (0,), ("0.weight",))}
    with_blocks(tasks.last / "fisher", sides, {"A": torch.eye(6), "G": torch.eye(8)})
    caplog.set_level("INFO", logger="consolidate")
    tasks.learn("b")
    assert tasks.stored.factors is None
    assert (
        "the factors of a are neither used nor kept: the diagonal protects all" in caplog.messages
    )


MODEL = {"model": f"{__name__}:headed_network"}


def headed_network(config: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, config["num_labels"]))


@pytest.mark.parametrize("rule", ["online", "separate"])
@pytest.mark.parametrize("head", ["new", "extend"])
def test_the_block_of_a_new_or_wider_head_is_dropped(
    tmp_path: Path, write_task: Write, rule: str, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    start = tmp_path / "headed"
    start.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(headed_network({"num_labels": 3}).state_dict(), start / "model.safetensors")
    (start / "config.json").write_text(json.dumps({"num_labels": 3}))
    options = {**FAST, **MODEL, "merge_rule": rule, "epochs": 2}
    first = write_task("a")
    finetune(start, first, output_dir=tmp_path / "a", penalty="none", structure="inputs", **options)
    options["ewc_lambda"] = 10.0
    finetune(tmp_path / "a", write_task("b", 1), output_dir=tmp_path / "b", **options)
    before = read_fisher(tmp_path / "b" / "fisher")
    caplog.set_level("INFO", logger="consolidate")
    more = write_task("c", seed=2)
    with np.load(more) as rows:
        found = dict(rows)
    np.savez(more, inputs=found["inputs"], labels=found["labels"] + 1)
    finetune(tmp_path / "b", more, output_dir=tmp_path / "c", head=head, **options)
    stored = read_fisher(tmp_path / "c" / "fisher")
    lost = "the diagonal alone protects 2.weight from now on: it has new rows"
    assert (lost in caplog.messages) == (head == "extend")
    # A new head has no earlier Fisher, so that it gets a matrix of its own.
    expected = ["0.weight.R", "2.weight.R"] if head == "new" else ["0.weight.R"]
    assert list(factors(stored)) == expected
    assert list(stored.heads) == (["a", "b"] if head == "new" else [])
    if (rule, head) == ("separate", "new"):
        assert before.factor_anchor is not None
        offset, weights = before.ledger.factor_offset, load_file(tmp_path / "b/model.safetensors")
        assert offset is not None
        far = [weights[n] - before.factor_anchor[n] for n in ("2.weight", "2.bias")]
        rows = torch.cat([far[0], far[1][:, None]], 1).double()
        matrix = factors(before)["2.weight.R"].double()
        saved = float((rows @ matrix @ rows.T).trace()) / (2 * 3)
        assert (stored.ledger.factor_offset or 0) > offset + saved


def test_interpolated_weights_are_what_the_factors_are_measured_at(tasks: Tasks) -> None:
    tasks.learn("a")
    tasks.learn("b", interpolate=0.5, merge_rule="separate")
    alone = tasks.alone("b")
    module = moved(tasks.last, 0.1)
    parts = [penalty_of(tasks.alone("a"), module), penalty_of(alone, module)]
    whole = penalty_of(tasks.stored, module).value()
    assert whole == pytest.approx(sum(part.value() for part in parts), rel=2e-4)
    assert consolidate.verify(tasks.last)["factors"]["tensors"] == 2
