import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from conftest import make_network
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import consolidate
import formats.checkpoint
from consolidate import commands, finetuning
from formats.atomic import claimed
from formats.data import open_data
from formats.digest import set_digest, tensor_record
from formats.errors import InputError, NonFiniteError, UsageError
from formats.fisher_folder import read_fisher

Write = Callable[..., Path]
NETWORK = {"model": "conftest:make_network"}
FAST = {**NETWORK, "optimizer": "adam", "learning_rate": 0.01, "batch_size": 16}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def fisher_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "fisher" / "fisher.safetensors")


def measured_by_hand(weights: dict[str, torch.Tensor], data: Path) -> dict[str, torch.Tensor]:
    """E_y[(∇ log p(y|x))²] of `make_network`, one example and one outcome at a time."""
    network = make_network({"sizes": [6, 8, 3]}).double()
    network.load_state_dict(weights)
    inputs = open_data(data).tensors["inputs"].double()
    total = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for x in inputs:
        probabilities = network(x).softmax(-1).detach()
        for y, p in enumerate(probabilities):
            network.zero_grad()
            cross_entropy(network(x), torch.tensor(y)).backward()
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None
                total[name] += p * parameter.grad**2 / len(inputs)
    return {name: values.float() for name, values in total.items()}


def test_fisher_stands_beside_untouched_weights(
    network_checkpoint: Path, write_task: Write
) -> None:
    before = contents(network_checkpoint)
    data = write_task("old")
    result = commands.fisher(network_checkpoint, data, **NETWORK)
    after = contents(network_checkpoint)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"fisher/fisher.json", "fisher/fisher.safetensors"}
    found = fisher_of(network_checkpoint)
    for name, values in measured_by_hand(
        load_file(network_checkpoint / "model.safetensors"), data
    ).items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-9)
    assert result["estimator"] == "exact"
    assert result["methods"] == {"rule": 4}
    assert result["examples"] == 60
    assert result["trace"] == pytest.approx(sum(v.sum().item() for v in found.values()))
    (task,) = read_fisher(network_checkpoint / "fisher").ledger.tasks
    assert (task.name, task.objective, task.data, task.units) == (
        "old",
        "classification",
        "old.npz",
        60,
    )
    assert task.layers["0.weight"].trace == pytest.approx(found["0.weight"].sum().item())


def test_the_same_seed_gives_the_same_bytes_whatever_the_batch(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    data = write_task("old")
    for name, size in (("a", 7), ("b", 7), ("c", 60)):
        commands.fisher(
            network_checkpoint,
            data,
            **NETWORK,
            estimator="mc",
            batch_size=size,
            output_dir=tmp_path / name,
        )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    first, other = fisher_of(tmp_path / "a"), fisher_of(tmp_path / "c")
    for name in first:
        torch.testing.assert_close(first[name], other[name], rtol=1e-5, atol=1e-10)
    assert (tmp_path / "a" / "LICENSE").read_text() == "free\n"


def test_a_subset_is_seeded(network_checkpoint: Path, write_task: Write, tmp_path: Path) -> None:
    data = write_task("old")
    traces = [
        commands.fisher(
            network_checkpoint,
            data,
            **NETWORK,
            max_examples=10,
            seed=seed,
            output_dir=tmp_path / f"{i}",
        )["trace"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert traces[0] == traces[1] != traces[2]
    assert read_fisher(tmp_path / "0" / "fisher").ledger.tasks[0].examples == 10


def test_a_fisher_that_is_there_is_kept(network_checkpoint: Path, write_task: Write) -> None:
    first, second = write_task("first"), write_task("second", seed=5)
    commands.fisher(network_checkpoint, first, **NETWORK)
    before = contents(network_checkpoint)
    with pytest.raises(InputError, match=r"--overwrite replaces it, --add adds"):
        commands.fisher(network_checkpoint, second, **NETWORK)
    with pytest.raises(UsageError, match=r"exclude each other"):
        commands.fisher(network_checkpoint, second, **NETWORK, add=True, overwrite=True)
    assert contents(network_checkpoint) == before
    one = fisher_of(network_checkpoint)
    commands.fisher(network_checkpoint, second, **NETWORK, add=True)
    both = fisher_of(network_checkpoint)
    commands.fisher(network_checkpoint, second, **NETWORK, overwrite=True)
    other = fisher_of(network_checkpoint)
    for name in one:
        torch.testing.assert_close(both[name], one[name] + other[name])
    with pytest.raises(UsageError, match="a task 'second' already"):
        commands.fisher(network_checkpoint, second, **NETWORK, add=True)


def test_finetune_keeps_the_old_task_and_can_go_on(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    a, b, c = (write_task(name, seed=seed) for seed, name in enumerate("abc"))
    first = tmp_path / "first"
    finetuning.finetune(network_checkpoint, a, output_dir=first, penalty="none", epochs=20, **FAST)
    evaluate = {"a": a, "b": b}
    common = {"epochs": 20, "evaluate": evaluate, **FAST}
    free = finetuning.finetune(first, b, output_dir=tmp_path / "free", penalty="none", **common)
    held = finetuning.finetune(first, b, output_dir=tmp_path / "held", ewc_lambda=100.0, **common)
    before = held["metrics"]["before"]["a"]["accuracy"]
    assert before > 0.9
    assert held["metrics"]["after"]["a"]["accuracy"] > free["metrics"]["after"]["a"]["accuracy"]
    assert held["metrics"]["after"]["b"]["accuracy"] > held["metrics"]["before"]["b"]["accuracy"]
    assert held["metrics"]["after"] == commands.evaluate(tmp_path / "held", evaluate, **NETWORK)
    assert held["penalty_value"] > 0
    assert free["penalty_value"] == 0
    assert 0.9 < held["share_moved"] <= 1
    assert held["steps"] == len(held["history"]) == 20 * 4
    assert set(held["metrics"]) == {"before", "after", *(f"epoch {i + 1}" for i in range(20))}

    last = tmp_path / "last"
    finetuning.finetune(tmp_path / "held", c, output_dir=last, ewc_lambda=100.0, epochs=1, **FAST)
    ledger = read_fisher(last / "fisher").ledger
    assert [task.name for task in ledger.tasks] == ["a", "b", "c"]
    assert [task.penalty for task in ledger.tasks] == ["none", "ewc", "ewc"]
    assert (
        ledger.tasks[1].metrics["after"]["a"]["accuracy"]
        == held["metrics"]["after"]["a"]["accuracy"]
    )
    assert consolidate.verify(last)["tasks"] == ["a", "b", "c"]


def test_the_new_fisher_is_measured_at_the_stored_weights_and_added(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    weights = load_file(network_checkpoint / "model.safetensors")
    narrow = {name: values.bfloat16() for name, values in weights.items()}
    save_file(narrow, network_checkpoint / "model.safetensors", {"format": "pt"})
    commands.fisher(network_checkpoint, write_task("old"), **NETWORK)
    new = write_task("new", seed=7)
    result = finetuning.finetune(
        network_checkpoint,
        new,
        output_dir=tmp_path / "out",
        ewc_lambda=1.0,
        penalty_dtype=torch.bfloat16,
        **FAST,
    )
    assert result["history"][0]["penalty"] == 0  # a bfloat16 anchor of such weights is exact
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {values.dtype for values in stored.values()} == {torch.bfloat16}
    assert result["share_moved"] > 0
    old, merged = fisher_of(network_checkpoint), fisher_of(tmp_path / "out")
    for name, values in measured_by_hand(stored, new).items():
        torch.testing.assert_close(merged[name], old[name] + values, rtol=1e-4, atol=1e-8)
    layer = read_fisher(tmp_path / "out" / "fisher").ledger.tasks[1].layers["0.weight"]
    assert layer.overlap is not None
    assert 0 < layer.overlap < 1


def test_l2_holds_all_weights_alike(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    data = write_task("new")

    def moved(strength: float) -> float:
        out = tmp_path / str(strength)
        finetuning.finetune(
            network_checkpoint, data, output_dir=out, penalty="l2", ewc_lambda=strength, **FAST
        )
        start = load_file(network_checkpoint / "model.safetensors")
        end = load_file(out / "model.safetensors")
        return sum((end[name] - start[name]).abs().sum().item() for name in start)

    assert moved(1000.0) < 0.4 * moved(0.0)


def test_proximal_steps_hold_where_the_gradient_diverges(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    commands.fisher(network_checkpoint, write_task("old"), **NETWORK)
    new = write_task("new", seed=7)
    options = {"ewc_lambda": 1e9, **FAST, "optimizer": "sgd", "learning_rate": 0.1}
    with pytest.raises(NonFiniteError, match=r"the (penalty|loss) is"):
        finetuning.finetune(
            network_checkpoint, new, output_dir=tmp_path / "out", epochs=20, **options
        )
    result = finetuning.finetune(
        network_checkpoint,
        new,
        output_dir=tmp_path / "out",
        penalty_step="proximal",
        penalty_device="cpu",
        **options,
    )
    assert result["penalty_value"] < 1
    assert result["history"][0]["penalty"] < result["history"][-1]["penalty"]
    consolidate.verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs --ewc-lambda"),
        ({"penalty": "none", "ewc_lambda": 1.0}, "no meaning with --penalty none"),
        ({"penalty": "none", "penalty_step": "proximal"}, "no meaning with --penalty none"),
        ({"penalty": "none", "penalty_device": "cpu"}, "penalty-device has no meaning with --pena"),
        (
            {"penalty": "none", "penalty_dtype": torch.float32},
            "penalty-dtype has no meaning with --penalty none",
        ),
        ({"penalty": "none", "momentum": 0.0}, "momentum has no meaning with --optimizer adamw"),
        ({"ewc_lambda": 1.0, "penalty_step": "implicit"}, "expected one of gradient, proximal"),
    ],
)
def test_options_that_contradict(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        finetuning.finetune(
            network_checkpoint, write_task("new"), output_dir=tmp_path / "out", **options
        )


def test_without_a_fisher_ewc_says_how_to_get_one(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="holds no Fisher: run `consolidate fisher"):
        finetuning.finetune(
            network_checkpoint, write_task("new"), output_dir=tmp_path / "out", ewc_lambda=1.0
        )
    assert not (tmp_path / "out").exists()


def test_a_fisher_from_elsewhere(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    commands.fisher(network_checkpoint, write_task("old"), **NETWORK)
    shutil.move(network_checkpoint / "fisher", tmp_path / "published")
    new = write_task("new", seed=3)
    for name in ("published", "start"):
        if name == "start":
            shutil.move(tmp_path / "published", network_checkpoint / "fisher")
        finetuning.finetune(
            network_checkpoint,
            new,
            output_dir=tmp_path / f"by-{name}",
            ewc_lambda=5.0,
            fisher=tmp_path / "published" if name == "published" else None,
            **FAST,
        )
    assert contents(tmp_path / "by-published") == contents(tmp_path / "by-start")
    with pytest.raises(InputError, match="holds no Fisher"):
        finetuning.finetune(
            network_checkpoint,
            new,
            output_dir=tmp_path / "out",
            ewc_lambda=5.0,
            fisher=tmp_path,
            **FAST,
        )


def test_the_fisher_of_another_model_is_refused(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    commands.fisher(network_checkpoint, write_task("old"), **NETWORK)
    weights = load_file(network_checkpoint / "model.safetensors")
    weights["2.bias"] = weights["2.bias"] + 1
    save_file(weights, network_checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"belongs to other weights.*2\.bias"):
        finetuning.finetune(
            network_checkpoint,
            write_task("new"),
            output_dir=tmp_path / "out",
            ewc_lambda=1.0,
            **FAST,
        )
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_holds_something_is_kept(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    options = {"output_dir": out, "penalty": "none", "max_steps": 1, **FAST}
    with pytest.raises(InputError, match=r"already holds 'thesis\.txt'"):
        finetuning.finetune(network_checkpoint, write_task("new"), **options)
    assert contents(out) == {"thesis.txt": b"years of work"}
    with pytest.raises(InputError, match="holds no checkpoint"):
        finetuning.finetune(network_checkpoint, write_task("new"), **options, overwrite=True)
    assert contents(out) == {"thesis.txt": b"years of work"}
    (out / "thesis.txt").unlink()
    finetuning.finetune(network_checkpoint, write_task("new"), **options)
    assert (out / "model.safetensors").is_file()


def test_nan_in_the_weights_is_named(network_checkpoint: Path, write_task: Write) -> None:
    weights = load_file(network_checkpoint / "model.safetensors")
    weights["0.bias"][2] = float("nan")
    save_file(weights, network_checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"0\.bias"):
        commands.fisher(network_checkpoint, write_task("old"), **NETWORK)
    assert not (network_checkpoint / "fisher").exists()


def test_a_run_that_diverges_leaves_nothing(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    commands.fisher(network_checkpoint, write_task("old"), **NETWORK)
    with pytest.raises(NonFiniteError):
        finetuning.finetune(
            network_checkpoint,
            write_task("new", seed=2),
            output_dir=tmp_path / "out",
            ewc_lambda=1e9,
            optimizer="sgd",
            learning_rate=1.0,
            epochs=30,
            **NETWORK,
        )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_frozen_parameter_is_neither_trained_nor_measured(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    options = {"freeze": ["0.*"], **FAST}
    finetuning.finetune(
        network_checkpoint,
        write_task("new"),
        output_dir=tmp_path / "out",
        penalty="none",
        **options,
    )
    start = load_file(network_checkpoint / "model.safetensors")
    end = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(start["0.weight"], end["0.weight"])
    assert not torch.equal(start["2.weight"], end["2.weight"])
    assert set(fisher_of(tmp_path / "out")) == {"2.weight", "2.bias"}
    ledger = read_fisher(tmp_path / "out" / "fisher").ledger
    assert set(ledger.unprotected) == {"0.weight", "0.bias"}
    assert "frozen" in ledger.unprotected["0.bias"]


def test_a_bare_file_needs_an_output_folder(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    bare = tmp_path / "weights.pt"
    torch.save({"state_dict": load_file(network_checkpoint / "model.safetensors")}, bare)
    data = write_task("old")
    factory = {"model": "test_commands:fixed_network"}
    with pytest.raises(UsageError, match="--output-dir"):
        commands.fisher(bare, data, **factory)
    commands.fisher(bare, data, output_dir=tmp_path / "out", **factory)
    commands.fisher(network_checkpoint, data, **NETWORK)
    records = [
        read_fisher(folder / "fisher").ledger.weights
        for folder in (tmp_path / "out", network_checkpoint)
    ]
    assert set_digest(records[0]) == set_digest(records[1])
    for name, values in fisher_of(network_checkpoint).items():
        assert torch.equal(values, fisher_of(tmp_path / "out")[name])


def fixed_network() -> torch.nn.Module:
    return make_network({"sizes": [6, 8, 3]})


def test_a_task_file_names_data_and_columns(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    write_task("old")
    (tmp_path / "task.toml").write_text('name = "clusters"\ndata = "old.npz"\n')
    result = commands.fisher(network_checkpoint, tmp_path / "task.toml", **NETWORK)
    assert result["task"] == "clusters"
    assert read_fisher(network_checkpoint / "fisher").ledger.tasks[0].data == "old.npz"


def test_no_digest_of_the_data_on_request(network_checkpoint: Path, write_task: Write) -> None:
    commands.fisher(network_checkpoint, write_task("old"), **NETWORK, data_digest=False)
    ledger = json.loads((network_checkpoint / "fisher" / "fisher.json").read_text())
    assert ledger["tasks"][0]["data_digest"] is None


def test_the_penalty_in_a_loop_of_ones_own(network_checkpoint: Path, write_task: Write) -> None:
    commands.fisher(network_checkpoint, write_task("old"), **NETWORK)
    network = make_network({"sizes": [6, 8, 3]})
    weights = load_file(network_checkpoint / "model.safetensors")
    network.load_state_dict({name: values + 0.1 for name, values in weights.items()})
    penalty = consolidate.load_penalty(network, network_checkpoint, ewc_lambda=2.0)
    expected = sum(
        0.1**2 * values.sum().item() for values in fisher_of(network_checkpoint).values()
    )
    assert penalty.value() == pytest.approx(expected, rel=1e-4)
    narrow = consolidate.load_penalty(
        network, network_checkpoint, ewc_lambda=2.0, dtype=torch.bfloat16, device="cpu"
    )
    assert narrow.value() == pytest.approx(expected, rel=0.1)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are read from /proc")
def test_fisher_and_anchor_stay_in_the_mapped_files(
    network_checkpoint: Path, write_task: Write
) -> None:
    commands.fisher(network_checkpoint, write_task("old"), **NETWORK)
    network = make_network({"sizes": [6, 8, 3]})
    penalty = consolidate.load_penalty(network, network_checkpoint, ewc_lambda=2.0)
    value = penalty.value()
    mapped = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            mapped[range(start, end)] = Path(line.split()[-1])
    for term in penalty._terms:
        for tensor, file in ((term.fisher, "fisher/fisher"), (term.anchor, "model")):
            (found,) = (path for place, path in mapped.items() if tensor.data_ptr() in place)
            assert found == network_checkpoint / f"{file}.safetensors"
    # A model that is saved over the one that is held to does not take the anchor along.
    save_file(network.state_dict(), network_checkpoint / "model.safetensors", {"format": "pt"})
    assert penalty.value() == value > 0


def test_a_device_that_is_not_here_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--device"):
        commands.best_device("quantum")
    with pytest.raises(UsageError, match="--device"):
        commands.best_device("cuda:99")


def test_a_fisher_of_ones_own_is_stored_like_the_command_does(
    network_checkpoint: Path, write_task: Write
) -> None:
    data = write_task("old")
    network = make_network({"sizes": [6, 8, 3]})
    network.load_state_dict(load_file(network_checkpoint / "model.safetensors"))
    tensors = open_data(data).tensors
    batches = zip(tensors["inputs"].split(16), tensors["labels"].split(16), strict=True)
    diagonal = consolidate.fisher_diagonal(network, batches, "softmax")
    options = {"task": "old", "objective": "classification"}
    consolidate.store_fisher(network, network_checkpoint, diagonal, **options)
    own = (network_checkpoint / "fisher" / "fisher.safetensors").read_bytes()
    commands.fisher(network_checkpoint, data, **NETWORK, overwrite=True)
    assert (network_checkpoint / "fisher" / "fisher.safetensors").read_bytes() == own
    with torch.no_grad():
        network[0].bias += 1
    with pytest.raises(InputError, match=r"0\.bias.*save the weights first"):
        consolidate.store_fisher(network, network_checkpoint, diagonal, overwrite=True, **options)
    with pytest.raises(InputError, match="exists already"):
        consolidate.store_fisher(network, network_checkpoint, diagonal, **options)


def test_where_nothing_can_be_written_is_known_before_the_work(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="no folder that can be written"):
        finetuning.finetune(
            network_checkpoint, write_task("new"), output_dir=tmp_path / "file" / "out",
            penalty="none", epochs=10**9, **FAST,
        )  # fmt: skip


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs a tmpfs")
def test_a_disk_that_is_too_small_is_known_before_the_work(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk]).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        (disk / "full").write_bytes(bytes(4096))
        with pytest.raises(InputError, match="has room for 0 bytes, and 5,784 are needed"):
            finetuning.finetune(
                network_checkpoint, write_task("new"), output_dir=disk / "out", penalty="none",
                epochs=10**9, **FAST,
            )  # fmt: skip
        assert [file.name for file in disk.iterdir()] == ["full"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_experts_keep_their_keys_through_a_chain(tmp_path: Path) -> None:
    start = tiny_models.save(
        tmp_path / "start",
        transformers.MixtralForCausalLM,
        tiny_models.mixtral_config(),
        tiny_models.byte_tokenizer(),
    )
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_models.CORPUS))
    commands.fisher(start, data, task="old")
    out = tmp_path / "out"
    finetuning.finetune(start, data, task="new", output_dir=out, ewc_lambda=10.0, pack=True)
    before, after = load_file(start / "model.safetensors"), load_file(out / "model.safetensors")
    experts = [name for name in before if ".experts.0." in name]
    assert experts
    assert list(before) == list(after)
    assert set(fisher_of(out)) == set(before)
    assert all(fisher_of(out)[name].shape == values.shape for name, values in before.items())
    # The router, the experts and everything else load as before, in transformers' own names.
    model = transformers.MixtralForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], values) for name, values in after.items())
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        first = transformers.MixtralForCausalLM.from_pretrained(start)(tokens).logits
        assert not torch.equal(first, model(tokens).logits)


def test_running_statistics_stay_through_fisher_and_a_penalty(
    write_task: Write, tmp_path: Path
) -> None:
    folder = tmp_path / "normed"
    folder.mkdir()
    network = normed_network()
    network.train()
    network(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    before = (folder / "model.safetensors").read_bytes()
    options = {"model": "test_commands:normed_network"}
    commands.fisher(folder, write_task("old"), **options)
    assert (folder / "model.safetensors").read_bytes() == before
    ledger = read_fisher(folder / "fisher").ledger
    assert set(ledger.unprotected) == {
        "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip
    assert set(ledger.unprotected.values()) == {"a buffer, not a parameter"}
    new = write_task("new", seed=3)
    start = load_file(folder / "model.safetensors")
    for name, penalty in (("held", {"ewc_lambda": 1.0}), ("free", {"penalty": "none"})):
        finetuning.finetune(folder, new, output_dir=tmp_path / name, **options, **penalty)
        end = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(start["1.running_var"], end["1.running_var"]) == (name == "held")
        assert not torch.equal(start["0.weight"], end["0.weight"])


def normed_network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    )


def test_a_bare_encoder_learns_a_first_task(tmp_path: Path) -> None:
    encoder = tiny_models.save(
        tmp_path / "encoder",
        transformers.BertModel,
        tiny_models.bert_config(),
        tiny_models.word_tokenizer(),
    )
    data = tmp_path / "animals.csv"
    data.write_text("text,label\nthe cat sat,cat\na dog ate,dog\n")
    for objective in (None, "sequence-classification"):
        options = {"output_dir": tmp_path / "out", "penalty": "none", "objective": objective}
        if objective is None:
            with pytest.raises(InputError, match="--objective"):
                finetuning.finetune(encoder, data, **options)
        else:
            finetuning.finetune(encoder, data, **options)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "cat", 1: "dog"}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    named = dict(model.state_dict())
    assert torch.equal(stored["classifier.weight"], named["classifier.weight"])
    metrics = commands.evaluate(tmp_path / "out", {"animals": data})
    assert metrics["animals"]["accuracy"] in (0.0, 0.5, 1.0)
    with pytest.raises(InputError, match="first task with --penalty none"):
        finetuning.finetune(
            encoder, data, output_dir=tmp_path / "held", ewc_lambda=1.0,
            objective="sequence-classification",
        )  # fmt: skip


def test_a_checkpoint_can_replace_itself(network_checkpoint: Path, write_task: Write) -> None:
    start = load_file(network_checkpoint / "model.safetensors")
    result = finetuning.finetune(
        network_checkpoint, write_task("new"), output_dir=network_checkpoint, overwrite=True,
        penalty="none", **FAST,
    )  # fmt: skip
    end = load_file(network_checkpoint / "model.safetensors")
    moved = sum((start[name] != end[name]).sum().item() for name in start)
    assert result["share_moved"] == moved / sum(values.numel() for values in start.values()) > 0.5
    assert consolidate.verify(network_checkpoint)["tasks"] == ["new"]


def test_a_repository_is_not_replaced(network_checkpoint: Path, write_task: Write) -> None:
    (network_checkpoint / ".git").mkdir()
    with pytest.raises(InputError, match="git repository"):
        finetuning.finetune(
            network_checkpoint, write_task("new"), output_dir=network_checkpoint, overwrite=True,
            penalty="none", **FAST,
        )  # fmt: skip


def test_a_damaged_fisher_is_refused(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    commands.fisher(network_checkpoint, write_task("old"), **NETWORK)
    file = network_checkpoint / "fisher" / "fisher.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged: .*other values"):
        finetuning.finetune(
            network_checkpoint, write_task("new"), output_dir=tmp_path / "out", ewc_lambda=1.0,
            **FAST,
        )  # fmt: skip


class Noise(torch.nn.Module):
    """Draws in eval mode too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.randn(x.shape)


def noisy_network(config: dict[str, Any]) -> torch.nn.Module:
    network = make_network(config)
    network.append(torch.nn.Dropout(0.3)).append(Noise())
    return network


def test_measuring_at_steps_does_not_disturb_training(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    old, new = write_task("old"), write_task("new", seed=1)
    commands.fisher(network_checkpoint, old, **NETWORK)
    options = {**FAST, "model": "test_commands:noisy_network", "ewc_lambda": 1.0, "epochs": 3}
    options |= {"fisher_estimator": "empirical"}
    evaluate = {"old": old, "new": new}
    trained = {}
    for name, every in (("none", {}), ("often", {"evaluate": evaluate, "evaluate_every": 3})):
        out = tmp_path / name
        trained[name] = finetuning.finetune(
            network_checkpoint, new, output_dir=out, **options, **every
        )
        assert trained[name]["history"] == trained["none"]["history"]
    none, often = contents(tmp_path / "none"), contents(tmp_path / "often")
    assert none.pop("fisher/fisher.json") != often.pop("fisher/fisher.json")
    assert none.pop("fisher/fisher.safetensors")  # Noise makes it another one each time
    assert often.pop("fisher/fisher.safetensors")
    assert none == often
    metrics = read_fisher(tmp_path / "often" / "fisher").ledger.tasks[1].metrics
    assert list(metrics) == [
        *("before", "step 3", "epoch 1", "step 6", "epoch 2", "step 9", "step 12", "epoch 3"),
        "after",
    ]
    assert metrics["step 12"] == metrics["epoch 3"]
    assert metrics["step 6"]["new"].keys() == {"loss", "accuracy", "score"}


def test_the_last_step_is_measured_too(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    data = write_task("only")
    options: dict[str, Any] = {**FAST, "penalty": "none", "max_steps": 5, "evaluate_every": 3}
    with pytest.raises(UsageError, match="--evaluate-every needs data to measure"):
        finetuning.finetune(network_checkpoint, data, output_dir=tmp_path / "out", **options)
    result = finetuning.finetune(
        network_checkpoint, data, output_dir=tmp_path / "out", **options, evaluate={"only": data}
    )
    steps = [when for when in result["metrics"] if when.startswith("step")]
    assert steps == ["step 3", "step 5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adma"}, "--optimizer adma: expected one of adamw, adam, sgd"),
        ({"lr_scheduler": "step"}, "--lr-scheduler step"),
        ({"mixed_precision": "fp8"}, "--mixed-precision fp8"),
        ({"epochs": 0}, "--epochs 0: expected at least 1"),
        ({"freeze": ["*"]}, "--freeze leaves no parameter to train"),
    ],
)
def test_options_out_of_range(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        finetuning.finetune(
            network_checkpoint, write_task("new"), output_dir=tmp_path / "out", penalty="none",
            **NETWORK, **options,
        )  # fmt: skip


MC = "--{}mc-samples has no meaning with --{}estimator {}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mc_samples": 1}, MC + ", the default for this model: leave it out, or use mc or batch"),
        ({"estimator": "exact", "mc_samples": 2}, MC + ": leave"),
        ({"estimator": "empirical", "mc_samples": 2}, MC + ": leave"),
        ({"estimator": "mc", "max_outcomes": 4096}, "max-outcomes has no meaning .*, or use exact"),
        ({"estimator": "batched", "check": True}, "check has no meaning .*or use exact or mc or"),
    ],
)
def test_options_that_do_nothing_with_the_estimator(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    data, estimator = write_task("old"), options.get("estimator", "exact")
    for dry_run in (False, True):
        with pytest.raises(UsageError, match=message.format("", "", estimator)):
            commands.fisher(network_checkpoint, data, **NETWORK, **options, dry_run=dry_run)
    later = {f"fisher_{option}": value for option, value in options.items()}
    with pytest.raises(UsageError, match=message.format("fisher-", "fisher-", estimator)):
        finetuning.finetune(
            network_checkpoint, data, output_dir=tmp_path / "out", penalty="none",
            epochs=10**9, **FAST, **later,
        )  # fmt: skip


def test_statistics_that_are_not_there_are_told(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "consolidate")
    finetuning.finetune(
        network_checkpoint, write_task("new"), output_dir=tmp_path / "out", penalty="none",
        norm_statistics="frozen", **FAST,
    )  # fmt: skip
    assert "--norm-statistics does nothing: the model keeps no running statistics" in caplog.text


def test_one_data_set_needs_no_name(network_checkpoint: Path, write_task: Write) -> None:
    assert set(commands.evaluate(network_checkpoint, write_task("new"), **NETWORK)) == {"new"}


def test_every_batch_can_be_checked(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    data = write_task("old")
    for name, check in (("once", False), ("always", True)):
        commands.fisher(
            network_checkpoint, data, **NETWORK, check=check, output_dir=tmp_path / name
        )
    assert contents(tmp_path / "once") == contents(tmp_path / "always")


# Long passes.


class Killed(BaseException):
    """As a signal would end a pass."""


def kill_after(monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    """Break the next pass off once so many examples have been read."""
    whole = consolidate.measuring.fisher_diagonal

    def broken(model: Any, batches: Any, *arguments: Any, **options: Any) -> Any:
        def read() -> Any:
            count = 0
            for inputs, labels in batches:
                if count >= examples:
                    monkeypatch.setattr(consolidate.measuring, "fisher_diagonal", whole)
                    raise Killed
                count += len(labels)
                yield inputs, labels

        return whole(model, read(), *arguments, **options)

    monkeypatch.setattr(consolidate.measuring, "fisher_diagonal", broken)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pass be kept after few examples."""
    monkeypatch.setattr(consolidate.accumulators, "FOLDED_BATCHES", 8)


LONG = {**NETWORK, "batch_size": 2, "save_every": 0, "estimator": "mc"}


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("options", [{}, {"tolerance": 0.2}, {"max_examples": 90, "check": True}])
def test_the_same_command_goes_on_to_the_same_bytes(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
) -> None:
    data = write_task("old", count=100)
    whole = commands.fisher(
        network_checkpoint, data, **LONG, **options, output_dir=tmp_path / "whole"
    )
    assert whole["examples"] > 60
    for examples in (20, 41, 60):  # Killed three times.
        kill_after(monkeypatch, examples)
        with pytest.raises(Killed):
            commands.fisher(
                network_checkpoint, data, **LONG, **options, output_dir=tmp_path / "killed"
            )
        assert not (tmp_path / "killed").exists()
        assert (tmp_path / ".killed.consolidate-partial").exists()
    caplog.set_level("INFO", "consolidate")
    resumed = commands.fisher(
        network_checkpoint, data, **LONG, **options, output_dir=tmp_path / "killed"
    )
    assert "going on after 48 of" in caplog.text
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert {**resumed, **dict.fromkeys(("checkpoint", "fisher"))} == {
        **whole,
        **dict.fromkeys(("checkpoint", "fisher")),
    }
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("often")
def test_another_command_does_not_go_on(
    network_checkpoint: Path, write_task: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_task("old", count=100)
    kill_after(monkeypatch, 40)
    with pytest.raises(Killed):
        commands.fisher(network_checkpoint, data, **LONG)
    with pytest.raises(InputError, match=r"not of this one .seed: 0 then, 1 now.*--restart"):
        commands.fisher(network_checkpoint, data, **LONG, seed=1)
    with pytest.raises(InputError, match=r"not of this one .data: "):
        commands.fisher(network_checkpoint, write_task("old", seed=3, count=100), **LONG)
    assert list(network_checkpoint.glob(".*"))
    result = commands.fisher(network_checkpoint, data, **LONG, seed=1, restart=True)
    assert result["examples"] == 100
    assert not list(network_checkpoint.glob(".*"))


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs a tmpfs")
@pytest.mark.usefixtures("often")
def test_what_is_kept_of_a_pass_leaves_room_for_its_result(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = [6, 20_000, 3]
    network = make_network({"sizes": sizes})
    save_file(network.state_dict(), network_checkpoint / "model.safetensors", {"format": "pt"})
    (network_checkpoint / "config.json").write_text(json.dumps({"sizes": sizes}))
    disk = tmp_path / "disk"
    disk.mkdir()
    # For the weights and their Fisher, 0.8 MB each, and half of the 1.6 MB that would be kept.
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2400k", "tmpfs", disk]).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        caplog.set_level("INFO", "consolidate")
        commands.fisher(network_checkpoint, write_task("old"), **LONG, output_dir=disk / "out")
        assert consolidate.verify(disk / "out")["tasks"] == ["old"]
        assert "of the half-done pass the result needs" in caplog.text
        assert [file.name for file in disk.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_at_work_on_one_target_are_refused_at_the_start(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    absent = tmp_path / "absent.npz"  # which would be seen first by one that went on
    with claimed(network_checkpoint / "fisher"):
        with pytest.raises(InputError, match=f"worked on by process {os.getpid()}"):
            commands.fisher(network_checkpoint, absent, **NETWORK)
        commands.fisher(network_checkpoint, write_task("old"), **NETWORK, dry_run=True)
    with claimed(tmp_path / "out"), pytest.raises(InputError, match="worked on by process"):
        finetuning.finetune(
            network_checkpoint, absent, output_dir=tmp_path / "out", penalty="none", **FAST
        )


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("add", [False, True])
def test_weights_are_hashed_once(
    network_checkpoint: Path, write_task: Write, monkeypatch: pytest.MonkeyPatch, add: bool
) -> None:
    if add:
        commands.fisher(network_checkpoint, write_task("first"), **NETWORK)
    hashed = []

    def counted(tensor: torch.Tensor) -> Any:
        hashed.append(tensor.shape)
        return tensor_record(tensor)

    monkeypatch.setattr(formats.checkpoint, "tensor_record", counted)
    commands.fisher(network_checkpoint, write_task("old"), **LONG, add=add)
    assert len(hashed) == 4


@pytest.mark.usefixtures("often")
def test_a_pass_goes_on_where_it_cannot_be_kept(
    network_checkpoint: Path,
    write_task: Write,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*arguments: Any) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr(consolidate.kept_pass, "write_partial", full)
    caplog.set_level("INFO", "consolidate")
    result = commands.fisher(network_checkpoint, write_task("old"), **LONG)
    assert result["examples"] == 60
    assert caplog.text.count("cannot be kept, and the pass goes on: the disk is full") == 1


def test_a_tolerance_reads_in_random_order(network_checkpoint: Path, write_task: Write) -> None:
    data = write_task("old", count=600)
    result = commands.fisher(network_checkpoint, data, **NETWORK, tolerance=0.15)
    assert 64 <= result["examples"] < 600
    assert max(layer["relative_error"] for layer in result["layers"].values()) <= 0.15
    ledger = read_fisher(network_checkpoint / "fisher").ledger
    assert ledger.tasks[0].examples == result["examples"]
    again = fisher_of(network_checkpoint)
    commands.fisher(network_checkpoint, data, **NETWORK, tolerance=0.15, overwrite=True)
    assert all(torch.equal(again[k], v) for k, v in fisher_of(network_checkpoint).items())
    # The first examples of the data alone would give another Fisher.
    first = write_task("old", count=600)
    rows = open_data(first).tensors
    count = result["examples"]
    save_file(
        {k: v[:count].contiguous() for k, v in rows.items()}, first.with_suffix(".safetensors")
    )
    commands.fisher(
        network_checkpoint, first.with_suffix(".safetensors"), **NETWORK, overwrite=True
    )
    assert not torch.equal(again["0.weight"], fisher_of(network_checkpoint)["0.weight"])


def test_sums_in_float64(network_checkpoint: Path, write_task: Write) -> None:
    data = write_task("old")
    commands.fisher(network_checkpoint, data, **NETWORK, accumulate_dtype=torch.float64)
    weights = load_file(network_checkpoint / "model.safetensors")
    for name, values in measured_by_hand(weights, data).items():
        torch.testing.assert_close(fisher_of(network_checkpoint)[name], values, rtol=1e-5, atol=0)


def test_a_dry_run_writes_nothing(network_checkpoint: Path, write_task: Write) -> None:
    before = contents(network_checkpoint)
    cost = commands.fisher(
        network_checkpoint, write_task("old", count=300), **NETWORK, dry_run=True
    )
    assert contents(network_checkpoint) == before
    assert cost["status"] == "dry run"
    assert (cost["examples"], cost["parameters"], cost["estimator"]) == (300, 83, "exact")
    assert 0 < cost["seconds_per_example"] * 300 < 10 * cost["seconds"] < 100
    assert 50e6 < cost["peak_memory"] < 20e9
    assert cost["files"] == {"fisher.safetensors": 4 * 83}
    assert cost["kept"] == {".fisher.consolidate-partial": 2 * 4 * 83}


def test_a_dry_run_of_a_single_short_batch(network_checkpoint: Path, write_task: Write) -> None:
    data = write_task("old", count=3)
    cost = commands.fisher(
        network_checkpoint, data, **NETWORK, dry_run=True, output_dir=network_checkpoint / "new"
    )
    assert cost["seconds_per_example"] > 0
    assert cost["files"] == {"fisher.safetensors": 332, "model.safetensors": 332}
    assert not (network_checkpoint / "new").exists()
