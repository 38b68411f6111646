import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import consolidate
import formats.checkpoint
from consolidate.api import evaluate, finetune
from consolidate.chain.resume import KeptWork
from consolidate.commands import measurement_report, pass_cost
from consolidate.commands.measurement import measure_fisher
from consolidate.estimation import passes
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.options import Columns
from consolidate.runtime import devices
from formats.atomic import claimed
from formats.data import open_data
from formats.digest import set_digest, tensor_record
from formats.errors import InputError, NonFiniteError, UsageError, install
from formats.fisher_folder import read_fisher
from formats.rows import file_digest
from support import tiny_models
from support.checkpoints import Write, measured_by_hand
from support.faults import Killed, kill_after
from support.folders import contents, fisher_of
from support.networks import FAST, NETWORK, make_network


def test_a_note_names_three_parameters_and_counts_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="consolidate")
    names = [f"layer.{i}" for i in range(60)]
    diagonal = FisherDiagonal(
        {name: torch.zeros(1) for name in names},
        examples=2,
        units=2,
        estimator="mc",
        mc_samples=1,
        seed=0,
        unreached=names[-3:],
        methods=dict.fromkeys(names[:57], "loop"),
        relative_errors={},
    )
    model: Any = SimpleNamespace(notes=[], checkpoint=SimpleNamespace(base=None))
    examples: Any = SimpleNamespace(notes_on=lambda used: [])
    measurement_report.log_notes(model, examples, diagonal, [])
    slow, zero = caplog.messages
    many = "57 of 57 parameters: layer.0, layer.1, layer.2 and 54 more"
    assert slow == f"measured one example at a time, which is slow: {many}"
    assert zero.endswith("on them: layer.57, layer.58, layer.59")


def test_fisher_stands_beside_untouched_weights(
    network_checkpoint: Path, write_task: Write
) -> None:
    before = contents(network_checkpoint)
    data = write_task("old")
    result = consolidate.fisher(network_checkpoint, data, **NETWORK)
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
    assert task.parent is None


def test_the_same_seed_gives_the_same_bytes_whatever_the_batch(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    data = write_task("old")
    for name, size in (("a", 7), ("b", 7), ("c", 60)):
        consolidate.fisher(
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


@pytest.mark.parametrize("estimator", [None, "mc", "batched"])
def test_rows_without_labels_are_enough_where_none_are_used(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    estimator: str | None,
) -> None:
    caplog.set_level("INFO", logger="consolidate")
    data, bare = write_task("old"), tmp_path / "bare.npz"
    np.savez(bare, inputs=np.load(data)["inputs"])
    rows = [{"inputs": row.tolist()} for row in np.load(data)["inputs"]]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {**NETWORK, "estimator": estimator}
    found = []
    for name in (data, bare, tmp_path / "bare.jsonl"):
        target = tmp_path / f"of-{name.name}"
        consolidate.fisher(network_checkpoint, name, **options, output_dir=target)
        found.append(fisher_of(target))
    for other in found[1:]:
        for name in found[0]:
            torch.testing.assert_close(other[name], found[0][name], rtol=1e-6, atol=0)
    assert "bare.npz has no labels: none are needed" in caplog.messages
    (tmp_path / "bare.jsonl").write_text(json.dumps(rows[0] | {"label": "other"}) + "\n")
    with pytest.raises(InputError, match=r"'other'; .*or leave the column out: no labels are "):
        consolidate.fisher(network_checkpoint, tmp_path / "bare.jsonl", **NETWORK)
    with pytest.raises(InputError, match="expected a column 'label' or 'labels'"):
        consolidate.fisher(network_checkpoint, bare, **NETWORK, estimator="empirical")
    with pytest.raises(InputError, match="expected a column 'kind'"):
        consolidate.fisher(network_checkpoint, bare, **NETWORK, columns=Columns(label="kind"))


@pytest.mark.parametrize(("kind", "outputs"), [("", 3), ("regression", 2), ("multi_label", 3)])
def test_texts_without_labels(tmp_path: Path, kind: str, outputs: int) -> None:
    names = {"": None, "regression": "regression", "multi_label": "multi_label_classification"}
    config = tiny_models.bert_config(num_labels=outputs, problem_type=names[kind])
    model = transformers.BertForSequenceClassification
    folder = tiny_models.save(tmp_path / "bert", model, config, tiny_models.word_tokenizer())
    labels = {"": "1", "regression": "[0.5, 2]", "multi_label": "[0, 1, 1]"}
    texts = ["the cat sat", "rain again"]
    found = []
    for name, more in (("with", f', "label": {labels[kind]}'), ("without", "")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"text": "{text}"{more}}}\n' for text in texts))
        consolidate.fisher(folder, path, output_dir=tmp_path / name)
        found.append(fisher_of(tmp_path / name))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_subset_is_seeded(network_checkpoint: Path, write_task: Write, tmp_path: Path) -> None:
    data = write_task("old")
    traces = [
        consolidate.fisher(
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
    consolidate.fisher(network_checkpoint, first, **NETWORK)
    before = contents(network_checkpoint)
    with pytest.raises(InputError, match=r"--overwrite replaces it, --add adds"):
        consolidate.fisher(network_checkpoint, second, **NETWORK)
    with pytest.raises(UsageError, match=r"cannot be combined with"):
        consolidate.fisher(network_checkpoint, second, **NETWORK, add=True, overwrite=True)
    assert contents(network_checkpoint) == before
    one = fisher_of(network_checkpoint)
    consolidate.fisher(network_checkpoint, second, **NETWORK, add=True)
    both = fisher_of(network_checkpoint)
    consolidate.fisher(network_checkpoint, second, **NETWORK, overwrite=True)
    other = fisher_of(network_checkpoint)
    for name in one:
        torch.testing.assert_close(both[name], one[name] + other[name])
    with pytest.raises(UsageError, match="already has a task 'second'"):
        consolidate.fisher(network_checkpoint, second, model="nowhere:made", add=True)


def test_a_fisher_folder_that_is_a_link_out_of_the_checkpoint_is_not_written(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    """No command would read it."""
    (tmp_path / "elsewhere").mkdir()
    (network_checkpoint / "fisher").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"fisher is a link to .*elsewhere, outside"):
        consolidate.fisher(network_checkpoint, write_task("old"), **NETWORK)
    assert contents(tmp_path / "elsewhere") == {}


def test_nan_in_the_weights_is_named(network_checkpoint: Path, write_task: Write) -> None:
    weights = load_file(network_checkpoint / "model.safetensors")
    weights["0.bias"][2] = float("nan")
    save_file(weights, network_checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"0\.bias"):
        consolidate.fisher(network_checkpoint, write_task("old"), **NETWORK)
    assert not (network_checkpoint / "fisher").exists()


def test_a_bare_file_needs_an_output_folder(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    bare = tmp_path / "weights.pt"
    torch.save({"state_dict": load_file(network_checkpoint / "model.safetensors")}, bare)
    data = write_task("old")
    factory = {"model": f"{__name__}:fixed_network"}
    with pytest.raises(UsageError, match="--output-dir"):
        consolidate.fisher(bare, data, **factory)
    consolidate.fisher(bare, data, output_dir=tmp_path / "out", **factory)
    consolidate.fisher(network_checkpoint, data, **NETWORK)
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
    result = consolidate.fisher(network_checkpoint, tmp_path / "task.toml", **NETWORK)
    assert result["task"] == "clusters"
    assert read_fisher(network_checkpoint / "fisher").ledger.tasks[0].data == "old.npz"


def test_no_batch_size_is_the_usual_one(network_checkpoint: Path, write_task: Write) -> None:
    data = write_task("old")
    consolidate.fisher(network_checkpoint, data, **NETWORK, batch_size=None)
    assert consolidate.fisher(network_checkpoint, data, **NETWORK)["status"] == "cached"


def test_no_digest_of_the_data_on_request(network_checkpoint: Path, write_task: Write) -> None:
    consolidate.fisher(network_checkpoint, write_task("old"), **NETWORK, data_digest=False)
    ledger = json.loads((network_checkpoint / "fisher" / "fisher.json").read_text())
    assert ledger["tasks"][0]["data_digest"] is None


def test_small_gradients_of_float16_weights_are_not_lost(
    network_checkpoint: Path,
    tmp_path: Path,
    write_task: Write,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "consolidate")
    weights = load_file(network_checkpoint / "model.safetensors")
    weights["2.weight"] *= 1e-5  # which makes all gradients before it small
    found = []
    for dtype in (torch.float16, torch.float32):
        folder = shutil.copytree(network_checkpoint, tmp_path / str(dtype))
        narrow = {name: values.half().to(dtype) for name, values in weights.items()}
        save_file(narrow, folder / "model.safetensors", {"format": "pt"})
        consolidate.fisher(folder, write_task("old"), **NETWORK)
        found.append(fisher_of(folder))
    assert caplog.text.count("the weights are float16, in which small gradients are 0") == 1
    assert all(torch.equal(found[0][name], values) for name, values in found[1].items())
    assert (found[0]["0.weight"] > 0).any()


def test_the_penalty_in_a_loop_of_ones_own(network_checkpoint: Path, write_task: Write) -> None:
    consolidate.fisher(network_checkpoint, write_task("old"), **NETWORK)
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
    network.requires_grad_(False)
    with pytest.raises(InputError, match=r"fisher protects no trainable parameter .* unfreeze"):
        consolidate.load_penalty(network, network_checkpoint, ewc_lambda=2.0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are read from /proc")
def test_fisher_and_anchor_stay_in_the_mapped_files(
    network_checkpoint: Path, write_task: Write
) -> None:
    consolidate.fisher(network_checkpoint, write_task("old"), **NETWORK)
    network = make_network({"sizes": [6, 8, 3]})
    penalty = consolidate.load_penalty(network, network_checkpoint, ewc_lambda=2.0)
    value = penalty.value()
    mapped = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            mapped[range(start, end)] = Path(line.split()[-1])
    for term in penalty._terms:
        for tensor, file in zip(term.stored, ("fisher/fisher", "model"), strict=True):
            (found,) = (path for place, path in mapped.items() if tensor.data_ptr() in place)
            assert found == network_checkpoint / f"{file}.safetensors"
    # A model that is saved over the one that is held to does not take the anchor along.
    save_file(network.state_dict(), network_checkpoint / "model.safetensors", {"format": "pt"})
    assert penalty.value() == value > 0


def test_a_device_that_is_not_here_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--device"):
        devices.best_device("quantum")
    with pytest.raises(UsageError, match="--device"):
        devices.best_device("cuda:99")


def test_a_device_that_cannot_compute_is_not_taken_by_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the MPS of a virtual machine."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    devices._available.cache_clear()
    assert devices.best_device() == torch.device("cpu")
    devices._available.cache_clear()
    assert "mps is there, but cannot be used: " in caplog.text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "pip install 'conso"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "peft is installed, but importing"),
        (ImportError("needs torch>=9\nmore"), "but importing it failed: needs torch>=9"),
    ],
)
def test_what_is_installed_and_does_not_fit_is_not_missing(error: ImportError, said: str) -> None:
    assert said in install("peft", error)
    assert "more" not in install("peft", error)


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
    consolidate.fisher(network_checkpoint, data, **NETWORK, overwrite=True)
    assert (network_checkpoint / "fisher" / "fisher.safetensors").read_bytes() == own
    with torch.no_grad():
        network[0].bias += 1
    with pytest.raises(InputError, match=r"0\.bias' differs from the module's: save"):
        consolidate.store_fisher(network, network_checkpoint, diagonal, overwrite=True, **options)
    with pytest.raises(InputError, match="already exists"):
        consolidate.store_fisher(network, network_checkpoint, diagonal, **options)
    with pytest.raises(UsageError, match="--task-weight unit: expected a number, or one of units"):
        consolidate.store_fisher(
            network, network_checkpoint, diagonal, task_weight="unit", overwrite=True, **options
        )
    (network_checkpoint / "fisher" / "fisher.json").write_text("{")
    network.load_state_dict(load_file(network_checkpoint / "model.safetensors"))
    with pytest.raises(InputError, match=r"fisher\.json"):
        consolidate.store_fisher(network, network_checkpoint, diagonal, **options)
    consolidate.store_fisher(network, network_checkpoint, diagonal, overwrite=True, **options)
    assert (network_checkpoint / "fisher" / "fisher.safetensors").read_bytes() == own
    with pytest.raises(UsageError, match=r"expected a FisherDiagonal.*found dict"):
        consolidate.store_fisher(network, network_checkpoint, dict(diagonal), **options)


def test_a_parameter_that_the_file_lacks_is_named(
    network_checkpoint: Path, write_task: Write
) -> None:
    network = make_network({"sizes": [6, 8, 3, 3]})
    network.load_state_dict(load_file(network_checkpoint / "model.safetensors"), strict=False)
    diagonal = consolidate.fisher_diagonal(
        network, [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))], "softmax"
    )
    with pytest.raises(InputError, match=r"'4\.\w+' differs from the module's: save"):
        consolidate.store_fisher(
            network, network_checkpoint, diagonal, task="old", objective="classification"
        )


MC = "--{}mc-samples cannot be combined with --{}estimator {}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mc_samples": 1}, MC + ", the default for this model: leave it out, or use mc or batch"),
        ({"estimator": "exact", "mc_samples": 2}, MC + ": leave"),
        ({"estimator": "empirical", "mc_samples": 2}, MC + ": leave"),
        (
            {"estimator": "mc", "max_outcomes": 4096},
            "max-outcomes cannot be combined .*, or use exact",
        ),
        (
            {"estimator": "batched", "check": True},
            "check cannot be combined .*or use exact or mc or",
        ),
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
            consolidate.fisher(network_checkpoint, data, **NETWORK, **options, dry_run=dry_run)
    later = {f"fisher_{option}": value for option, value in options.items()}
    with pytest.raises(UsageError, match=message.format("fisher-", "fisher-", estimator)):
        finetune(
            network_checkpoint, data, output_dir=tmp_path / "out", penalty="none",
            epochs=10**9, **FAST, **later,
        )  # fmt: skip


def test_one_data_set_needs_no_name(network_checkpoint: Path, write_task: Write) -> None:
    assert set(evaluate(network_checkpoint, write_task("new"), **NETWORK)) == {"new"}


def test_no_data_set_is_refused(network_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="data: expected at least one dataset"):
        evaluate(network_checkpoint, {}, **NETWORK)


def test_every_batch_can_be_checked(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, choose, checked = write_task("old"), passes.choose_methods, list[int]()

    def counted(*arguments: Any) -> Any:
        checked[-1] += 1
        return choose(*arguments)

    monkeypatch.setattr(passes, "choose_methods", counted)
    options = {**NETWORK, "batch_size": 20}
    for name, check in (("once", False), ("always", True)):
        checked.append(0)
        consolidate.fisher(
            network_checkpoint, data, **options, check=check, output_dir=tmp_path / name
        )
    assert checked == [1, 3]
    once, always = (tmp_path / name / "fisher/fisher.safetensors" for name in ("once", "always"))
    assert once.read_bytes() == always.read_bytes()


# Long passes.


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pass be kept after few examples."""
    monkeypatch.setattr(consolidate.estimation.compensated_sums, "FOLDED_BATCHES", 8)


LONG = {**NETWORK, "batch_size": 2, "save_every_minutes": 0, "estimator": "mc"}


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
    whole = consolidate.fisher(
        network_checkpoint, data, **LONG, **options, output_dir=tmp_path / "whole"
    )
    assert whole["examples"] > 60
    for examples in (20, 41, 60):  # Killed three times.
        kill_after(monkeypatch, examples)
        with pytest.raises(Killed):
            consolidate.fisher(
                network_checkpoint, data, **LONG, **options, output_dir=tmp_path / "killed"
            )
        assert not (tmp_path / "killed").exists()
        assert (tmp_path / ".killed.consolidate-partial").exists()
    caplog.set_level("INFO", "consolidate")
    resumed = consolidate.fisher(
        network_checkpoint, data, **LONG, **options, output_dir=tmp_path / "killed"
    )
    assert "resuming after 48 of" in caplog.text
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    unlike = dict.fromkeys(("checkpoint", "fisher", "seconds"))
    assert {**resumed, **unlike} == {**whole, **unlike}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("options", [{"overwrite": True}, {"add": True, "task": "two"}])
def test_progress_left_by_a_kill_after_the_result_was_written_is_removed(
    network_checkpoint: Path,
    write_task: Write,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    data = write_task("old", count=60)
    if "add" in options:
        consolidate.fisher(network_checkpoint, write_task("one"), **LONG)

    def killed(work: KeptWork) -> None:
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(KeptWork, "remove", killed)
        with pytest.raises(Killed):
            consolidate.fisher(network_checkpoint, data, **LONG, **options)
    assert (network_checkpoint / ".fisher.consolidate-partial").exists()
    again = consolidate.fisher(network_checkpoint, data, **LONG, **options)
    assert again["status"] == "cached"
    assert not list(network_checkpoint.glob(".*"))


@pytest.mark.usefixtures("often")
def test_another_command_does_not_go_on(
    network_checkpoint: Path, write_task: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_task("old", count=100)
    kill_after(monkeypatch, 40)
    with pytest.raises(Killed):
        consolidate.fisher(network_checkpoint, data, **LONG)
    with pytest.raises(InputError, match=r"another run .changed: seed 0 → 1.*--restart"):
        consolidate.fisher(network_checkpoint, data, **LONG, seed=1)
    with pytest.raises(InputError, match=r"another run .changed: data"):
        consolidate.fisher(network_checkpoint, write_task("old", seed=3, count=100), **LONG)
    assert list(network_checkpoint.glob(".*"))
    result = consolidate.fisher(network_checkpoint, data, **LONG, seed=1, restart=True)
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
        consolidate.fisher(network_checkpoint, write_task("old"), **LONG, output_dir=disk / "out")
        assert consolidate.verify(disk / "out")["tasks"] == ["old"]
        assert "bytes for the pass so far and" in caplog.text
        assert [file.name for file in disk.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_at_work_on_one_target_are_refused_at_the_start(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    absent = tmp_path / "absent.npz"  # which would be seen first by one that went on
    with claimed(network_checkpoint / "fisher"):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
            consolidate.fisher(network_checkpoint, absent, **NETWORK)
        consolidate.fisher(network_checkpoint, write_task("old"), **NETWORK, dry_run=True)
    with claimed(tmp_path / "out"), pytest.raises(InputError, match="in use by process"):
        finetune(network_checkpoint, absent, output_dir=tmp_path / "out", penalty="none", **FAST)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("add", [False, True])
def test_weights_are_hashed_before_the_pass_and_after_it(
    network_checkpoint: Path, write_task: Write, monkeypatch: pytest.MonkeyPatch, add: bool
) -> None:
    if add:
        consolidate.fisher(network_checkpoint, write_task("first"), **NETWORK)
    hashed = []

    def counted(tensor: torch.Tensor) -> Any:
        hashed.append(tensor.shape)
        return tensor_record(tensor)

    monkeypatch.setattr(formats.checkpoint, "tensor_record", counted)
    consolidate.fisher(network_checkpoint, write_task("old"), **LONG, add=add)
    assert len(hashed) == (3 if add else 2) * 4  # with the tensors of the Fisher that is there


@pytest.mark.usefixtures("often")
def test_data_that_change_after_they_were_read_are_not_up_to_date(
    network_checkpoint: Path, write_task: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, read = write_task("old"), file_digest(write_task("old"))

    def changing(*given: Any, **options: Any) -> Any:
        found = measure_fisher(*given, **options)
        write_task("old", seed=7)
        return found

    with monkeypatch.context() as patch:
        patch.setattr("consolidate.commands.fisher.measure_fisher", changing)
        consolidate.fisher(network_checkpoint, data, **NETWORK)
    [task] = read_fisher(network_checkpoint / "fisher").ledger.tasks
    assert task.data_digest == read
    with pytest.raises(InputError, match="already exists"):
        consolidate.fisher(network_checkpoint, data, **NETWORK)
    write_task("old")
    assert consolidate.fisher(network_checkpoint, data, **NETWORK)["status"] == "cached"


def test_a_pass_goes_on_where_it_cannot_be_kept(
    network_checkpoint: Path,
    write_task: Write,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*arguments: Any) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr(consolidate.chain.resume, "write_partial", full)
    caplog.set_level("INFO", "consolidate")
    result = consolidate.fisher(network_checkpoint, write_task("old"), **LONG)
    assert result["examples"] == 60
    assert caplog.text.count("cannot be saved, and the pass continues: the disk is full") == 1


def test_a_tolerance_reads_in_random_order(network_checkpoint: Path, write_task: Write) -> None:
    data = write_task("old", count=600)
    result = consolidate.fisher(network_checkpoint, data, **NETWORK, tolerance=0.15)
    assert 64 <= result["examples"] < 600
    assert max(layer["relative_error"] for layer in result["layers"].values()) <= 0.15
    ledger = read_fisher(network_checkpoint / "fisher").ledger
    assert ledger.tasks[0].examples == result["examples"]
    again = fisher_of(network_checkpoint)
    consolidate.fisher(network_checkpoint, data, **NETWORK, tolerance=0.15, overwrite=True)
    assert all(torch.equal(again[k], v) for k, v in fisher_of(network_checkpoint).items())
    # The first examples of the data alone would give another Fisher.
    first = write_task("old", count=600)
    rows = open_data(first).tensors
    count = result["examples"]
    save_file(
        {k: v[:count].contiguous() for k, v in rows.items()}, first.with_suffix(".safetensors")
    )
    consolidate.fisher(
        network_checkpoint, first.with_suffix(".safetensors"), **NETWORK, overwrite=True
    )
    assert not torch.equal(again["0.weight"], fisher_of(network_checkpoint)["0.weight"])


def test_sums_in_float64(network_checkpoint: Path, write_task: Write) -> None:
    data = write_task("old")
    consolidate.fisher(network_checkpoint, data, **NETWORK, accumulate_dtype=torch.float64)
    weights = load_file(network_checkpoint / "model.safetensors")
    for name, values in measured_by_hand(weights, data).items():
        torch.testing.assert_close(fisher_of(network_checkpoint)[name], values, rtol=1e-5, atol=0)


def test_a_dry_run_writes_nothing(
    network_checkpoint: Path, write_task: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(network_checkpoint)
    clock = iter([0.0, 10.0, 11.0, 12.0, 13.0])  # the first batch takes longer
    monkeypatch.setattr(pass_cost, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    cost = consolidate.fisher(
        network_checkpoint, write_task("old", count=300), **NETWORK, dry_run=True
    )
    assert contents(network_checkpoint) == before
    assert cost["status"] == "dry run"
    assert (cost["examples"], cost["parameters"], cost["estimator"]) == (300, 83, "exact")
    assert cost["seconds_per_example"] == 1 / 16
    assert cost["seconds"] == 10 + (300 - 16) / 16
    assert 50e6 < cost["peak_memory"] < 20e9
    assert cost["files"] == {"fisher.safetensors": 4 * 83}
    assert cost["kept"] == {".fisher.consolidate-partial": 2 * 4 * 83}


def test_a_dry_run_of_a_single_short_batch(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    data, new = write_task("old", count=3), tmp_path / "new"
    cost = consolidate.fisher(network_checkpoint, data, **NETWORK, dry_run=True, output_dir=new)
    assert cost["seconds_per_example"] > 0
    assert cost["files"] == {"fisher.safetensors": 332, "model.safetensors": 332}
    assert not new.exists()


@pytest.mark.usefixtures("often")
def test_a_pass_of_another_module_is_not_resumed(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though neither its weights nor the file of its factory tell."""
    (tmp_path / "activation.py").write_text("from torch.nn import ReLU as Activation\n")
    (tmp_path / "factory.py").write_text(
        "from torch import nn\n"
        "import activation\n"
        "def make(config):\n"
        "    return nn.Sequential(nn.Linear(6, 8), activation.Activation(), nn.Linear(8, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    weights = load_file(network_checkpoint / "model.safetensors")
    names = {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert set(weights) == names
    options = {**LONG, "model": "factory:make"}
    kill_after(monkeypatch, 40)
    with pytest.raises(Killed):
        consolidate.fisher(network_checkpoint, write_task("old", count=100), **options)
    activation = importlib.import_module("activation")
    activation.Activation = torch.nn.Tanh
    with pytest.raises(InputError, match=r"another run .changed: source of the module.*--restart"):
        consolidate.fisher(network_checkpoint, tmp_path / "old.npz", **options)
