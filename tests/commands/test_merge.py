import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import consolidate
from consolidate.api import finetune
from consolidate.commands import merge as merge_command
from consolidate.views.text import merge_text
from formats.atomic import replace_folder
from formats.errors import InputError, UsageError
from formats.fisher_folder import read_fisher, write_fisher
from formats.fisher_json import Block, read_ledger
from formats.tensors import TensorFiles
from support import factor_checkpoints
from support.checkpoints import Write, random_network, write_clusters
from support.folders import contents
from support.networks import make_network

NETWORK = {"model": "support.networks:make_network"}
FAST = {**NETWORK, "optimizer": "adam", "learning_rate": 0.01, "batch_size": 16, "epochs": 2}


def tensors(folder: Path, which: str) -> dict[str, torch.Tensor]:
    files = {"weights": "model", "fisher": "fisher/fisher", "anchor": "fisher/anchor"}
    loaded = load_file(folder / f"{files[which]}.safetensors")
    return {name: values.double() for name, values in loaded.items()}


def penalty_at(folder: Path, theta: dict[str, torch.Tensor]) -> float:
    """The stored penalty as `docs/reference/format.md` has it, without λ."""
    stored = read_fisher(folder / "fisher")
    anchor = tensors(folder, "weights" if stored.anchor is None else "anchor")
    fisher = tensors(folder, "fisher")
    return stored.ledger.penalty_offset + sum(
        float((fisher[name] * (theta[name] - anchor[name]) ** 2).sum()) / 2 for name in fisher
    )


def thetas(folder: Path) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        found.append(
            {
                name: values + torch.randn(values.shape, generator=generator)
                for name, values in tensors(folder, "weights").items()
            }
        )
    return found


@pytest.fixture(scope="module")
def family_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the family and its data, which `family` copies."""
    folder = tmp_path_factory.mktemp("family")
    base, old = folder / "base", write_clusters(folder, "old")
    finetune(random_network(folder / "start"), old, output_dir=base, penalty="none", **FAST)
    for seed, name in enumerate("ab", start=1):
        data = write_clusters(folder, f"task-{name}", seed=seed)
        finetune(base, data, output_dir=folder / name, ewc_lambda=10.0, **FAST)
    return folder


@pytest.fixture
def family(family_once: Path, tmp_path: Path) -> dict[str, Path]:
    """A base that learned the task `old`, and two children that learned a task each."""
    shutil.copytree(family_once, tmp_path, dirs_exist_ok=True)
    return {name: tmp_path / name for name in ("base", "a", "b")}


@pytest.fixture(scope="module")
def strangers_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the strangers and their data, which `strangers` copies."""
    folder = tmp_path_factory.mktemp("strangers")
    start = random_network(folder / "start")
    for seed in range(3):
        data = write_clusters(folder, f"task-{seed}", seed=seed)
        out = folder / f"stranger-{seed}"
        finetune(start, data, output_dir=out, penalty="none", seed=seed, **FAST)
    return folder


@pytest.fixture
def strangers(strangers_once: Path, tmp_path: Path) -> list[Path]:
    """Three checkpoints of one architecture, without a common task."""
    shutil.copytree(strangers_once, tmp_path, dirs_exist_ok=True)
    return [tmp_path / f"stranger-{seed}" for seed in range(3)]


def test_two_models_become_one_by_the_formulas(strangers: list[Path], tmp_path: Path) -> None:
    a, b, _ = strangers
    out = tmp_path / "out"
    result = consolidate.merge([a, b], output_dir=out, weights=[2, 0.5])
    assert result["tasks"] == ["task-0", "task-1"]
    assert result["anchor"] == "the weights"
    fishers, values = ([tensors(x, which) for x in (a, b)] for which in ("fisher", "weights"))
    found, fisher = tensors(out, "weights"), tensors(out, "fisher")
    assert result["trace"] == pytest.approx(sum(float(f.sum()) for f in fisher.values()), rel=1e-6)
    for name in found:
        total = 2 * fishers[0][name] + 0.5 * fishers[1][name]
        torch.testing.assert_close(fisher[name], total, rtol=1e-6, atol=0)
        weighed = 2 * fishers[0][name] * values[0][name] + 0.5 * fishers[1][name] * values[1][name]
        mean = (2 * values[0][name] + 0.5 * values[1][name]) / 2.5
        expected = torch.where(total > 0, weighed / total, mean)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    for theta in thetas(out):
        explicit = 2 * penalty_at(a, theta) + 0.5 * penalty_at(b, theta)
        assert penalty_at(out, theta) == pytest.approx(explicit, rel=1e-5)
    ledger = read_fisher(out / "fisher").ledger
    assert [task.weight for task in ledger.tasks] == [2.0, 0.5]
    assert (ledger.merge_rule, ledger.gamma) == ("separate", 1.0)
    assert (out / "LICENSE").read_text() == "free\n"


def test_what_was_merged_is_verified_shown_and_trained_on(
    strangers: list[Path], write_task: Write, tmp_path: Path
) -> None:
    out, last, data = tmp_path / "out", tmp_path / "last", write_task("next", seed=9)
    consolidate.merge(strangers, output_dir=out)
    assert consolidate.verify(out)["tasks"] == ["task-0", "task-1", "task-2"]
    assert consolidate.show(out)["merge_rule"] == "separate"
    finetune(out, data, output_dir=last, ewc_lambda=10.0, **FAST)
    assert consolidate.verify(last)["tasks"] == ["task-0", "task-1", "task-2", "next"]
    # The chain is still the sum of all four penalties: the new one stands alone here.
    alone = tmp_path / "alone"
    shutil.copytree(last, alone, ignore=shutil.ignore_patterns("fisher"))
    consolidate.fisher(alone, data, **NETWORK)
    for theta in thetas(last):
        explicit = sum(penalty_at(folder, theta) for folder in (*strangers, alone))
        assert penalty_at(last, theta) == pytest.approx(explicit, rel=1e-5)


def test_one_checkpoint_cannot_be_merged(strangers: list[Path], tmp_path: Path) -> None:
    for some in ([], strangers[:1]):
        with pytest.raises(UsageError, match=f"at least two checkpoints, found {len(some)}; to"):
            consolidate.merge(some, output_dir=tmp_path / "out", base=strangers[1])


def test_children_of_one_base_are_merged_with_it_and_refused_without(
    family: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    children = [family["a"], family["b"]]
    with pytest.raises(InputError, match=r"both have the tasks old, which would count twice"):
        consolidate.merge(children, output_dir=out)
    assert not out.exists()
    result = consolidate.merge(children, output_dir=out, base=family["base"])
    assert result["tasks"] == ["old", "task-a", "task-b"]
    a, b, base, merged = (tensors(x, "fisher") for x in (*children, family["base"], out))
    for name in merged:
        expected = a[name] + b[name] - base[name]
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-9)
    assert consolidate.verify(out)["tasks"] == result["tasks"]


def test_separate_children_and_their_base_are_the_sum_of_all_tasks(
    family: dict[str, Path], tmp_path: Path
) -> None:
    for name in "ab":
        finetune(
            family["base"], tmp_path / f"task-{name}.npz", output_dir=tmp_path / f"s{name}",
            ewc_lambda=10.0, merge_rule="separate", **FAST,
        )  # fmt: skip
    children, out = [tmp_path / "sa", tmp_path / "sb"], tmp_path / "out"
    consolidate.merge(children, output_dir=out, base=family["base"])
    alone = []
    for child in children:
        alone.append(tmp_path / f"{child.name}-alone")
        shutil.copytree(child, alone[-1], ignore=shutil.ignore_patterns("fisher"))
        consolidate.fisher(alone[-1], tmp_path / f"task-{child.name[1]}.npz", **NETWORK)
    for theta in thetas(out):
        explicit = sum(penalty_at(folder, theta) for folder in (family["base"], *alone))
        assert penalty_at(out, theta) == pytest.approx(explicit, rel=1e-5)


def test_a_base_that_is_not_shared_is_refused(family: dict[str, Path], tmp_path: Path) -> None:
    a, b, base, out = family["a"], family["b"], family["base"], tmp_path / "out"
    with pytest.raises(InputError, match=r"b/fisher has no task 'task-a' of the base"):
        consolidate.merge([a, b], output_dir=out, base=a)
    finetune(
        base, tmp_path / "task-b.npz", output_dir=tmp_path / "faded", ewc_lambda=10.0, gamma=0.5,
        **FAST,
    )  # fmt: skip
    with pytest.raises(
        InputError, match=r"faded/fisher: .* is below that of the base.*γ was below 1"
    ):
        consolidate.merge([a, tmp_path / "faded"], output_dir=out, base=base)
    consolidate.fisher(base, tmp_path / "old.npz", **NETWORK, overwrite=True, task="old", seed=1)
    with pytest.raises(InputError, match=r"has another record of the task 'old'"):
        consolidate.merge([a, b], output_dir=out, base=base)
    assert not out.exists()


def test_different_tasks_of_one_name_are_told_apart(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    for seed, name in enumerate(("one", "two")):
        consolidate.fisher(
            network_checkpoint, write_task("data", seed=seed), **NETWORK, output_dir=tmp_path / name
        )
    with pytest.raises(InputError, match=r"both have the tasks data.*another --task"):
        consolidate.merge([tmp_path / "one", tmp_path / "two"], output_dir=tmp_path / "out")


def resized(weights: dict[str, Any]) -> None:
    weights["2.bias"] = torch.zeros(4)


def renamed(weights: dict[str, Any]) -> None:
    weights["other.bias"] = weights.pop("2.bias")


def narrowed(weights: dict[str, Any]) -> None:
    weights["2.bias"] = weights["2.bias"].half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (resized, r"'2\.bias' has shape \[3\] in .*a and \[4\] in .*b"),
        (renamed, r"b has no tensor '2\.bias', which .*a has"),
        (narrowed, r"'2\.bias' in .*a and .*b is float32 and float16"),
    ],
)
def test_another_architecture_is_refused(
    strangers: list[Path], tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    shutil.copytree(strangers[0], a)
    weights = load_file(strangers[1] / "model.safetensors")
    change(weights)
    store(b, weights, {name: torch.ones(values.shape) for name, values in weights.items()}, "other")
    with pytest.raises(InputError, match=message):
        consolidate.merge([a, b], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def store(
    folder: Path, weights: dict[str, Any], fisher: dict[str, Any], task: str, **config: Any
) -> Path:
    """Write a checkpoint whose Fisher is given; what has none is a buffer."""
    from formats.checkpoint import weight_records
    from formats.fisher_json import Ledger, TaskRecord

    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", **config}))
    record = TaskRecord(task, "classification", "softmax", None, "example", 1, 1, "exact", None, 0)
    unprotected = {name: "a buffer, not a parameter" for name in weights if name not in fisher}
    ledger = Ledger([record], weights=weight_records(weights), unprotected=unprotected)
    write_fisher(folder / "fisher", fisher, ledger)
    return folder


def test_buffers_are_averaged_or_must_agree(tmp_path: Path) -> None:
    def weights(mean: float, steps: int) -> dict[str, Any]:
        return {
            "weight": torch.tensor([mean]),
            "running_mean": torch.tensor([mean], dtype=torch.bfloat16),
            "steps": torch.tensor(steps),
        }

    fisher = {"weight": torch.ones(1)}
    a, b, c = (
        store(tmp_path / name, weights(mean, steps), fisher, name)
        for name, mean, steps in (("a", 1.0, 5), ("b", 4.0, 5), ("c", 4.0, 6))
    )
    consolidate.merge([a, b], output_dir=tmp_path / "out", weights=[1, 2])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["running_mean"].item() == 3
    assert merged["running_mean"].dtype == torch.bfloat16
    assert merged["steps"].item() == 5
    with pytest.raises(InputError, match=r"the integer tensor 'steps' differs"):
        consolidate.merge([a, c], output_dir=tmp_path / "out-2")
    d = store(tmp_path / "d", weights(1.0, 5), fisher, "d", model_type="theirs")
    with pytest.raises(InputError, match=r"model_type is mine in .*a and theirs in .*d"):
        consolidate.merge([a, d], output_dir=tmp_path / "out-2")


def test_the_largest_count_of_batches_is_taken(tmp_path: Path) -> None:
    name = "norm.num_batches_tracked"
    a, b, c = (
        store(
            tmp_path / task,
            {"weight": torch.ones(1), name: torch.tensor(count)},
            {"weight": torch.ones(1)},
            task,
        )
        for task, count in (("a", 5), ("b", 9), ("c", 7))
    )
    consolidate.merge([a, b, c], output_dir=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert (merged.item(), merged.dtype) == (9, torch.int64)
    consolidate.verify(tmp_path / "out")


def test_a_parameter_that_one_model_does_not_hold_is_the_others(tmp_path: Path) -> None:
    first, second = {"w": torch.tensor([1.0]), "v": torch.tensor([1.0])}, {
        "w": torch.tensor([2.0]), "v": torch.tensor([2.0]),
    }  # fmt: skip
    a = store(tmp_path / "a", first, {"w": torch.ones(1)}, "a")
    b = store(tmp_path / "b", second, {"v": torch.ones(1)}, "b")
    consolidate.merge([a, b], output_dir=tmp_path / "out")
    assert tensors(tmp_path / "out", "weights") == {"w": 1.0, "v": 2.0}
    assert read_fisher(tmp_path / "out" / "fisher").ledger.unprotected == {}


def add_head(folder: Path, task: str, value: float) -> None:
    stored = read_fisher(folder / "fisher")
    fisher = {name: stored.fisher[name].clone() for name in stored.fisher}
    heads = {task: {"head.weight": torch.tensor([value])}}
    shutil.rmtree(folder / "fisher")
    write_fisher(folder / "fisher", fisher, stored.ledger, heads=heads)


def heads_of(folder: Path) -> dict[str, float]:
    heads = read_fisher(folder / "fisher").heads
    return {task: head["head.weight"].item() for task, head in heads.items()}


def test_heads_are_kept(strangers: list[Path], tmp_path: Path) -> None:
    add_head(strangers[0], "task-0", 1.0)
    add_head(strangers[2], "task-2", 2.0)
    consolidate.merge(strangers, output_dir=tmp_path / "out")
    assert heads_of(tmp_path / "out") == {"task-0": 1.0, "task-2": 2.0}
    assert consolidate.verify(tmp_path / "out")["heads"].keys() == {"task-0", "task-2"}


def test_the_head_that_children_put_aside_is_kept_once(
    family: dict[str, Path], tmp_path: Path
) -> None:
    for name in "ab":
        add_head(family[name], "old", 1.0)
    out = tmp_path / "out"
    consolidate.merge([family["a"], family["b"]], output_dir=out, base=family["base"])
    assert heads_of(out) == {"old": 1.0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "expected 2 numbers, one per checkpoint, found 1"),
        ([1.0, 0.0], "above 0, found 0.0"),
        ([1.0, float("nan")], "above 0, found nan"),
    ],
)
def test_coefficients_that_make_no_sense(
    strangers: list[Path], tmp_path: Path, weights: list[float], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        consolidate.merge(strangers[:2], output_dir=tmp_path / "out", weights=weights)


def test_an_output_inside_an_input_is_refused(strangers: list[Path]) -> None:
    before = [contents(folder) for folder in strangers]
    with pytest.raises(InputError, match="is inside the checkpoint"):
        consolidate.merge(strangers, output_dir=strangers[0] / "merged")
    assert [contents(folder) for folder in strangers] == before


def test_a_merge_in_place_of_another_needs_space_as_well(
    strangers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, usage = tmp_path / "out", shutil.disk_usage(tmp_path)
    consolidate.merge(strangers, output_dir=out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5))
    assert consolidate.merge(strangers, output_dir=out)["status"] == "cached"
    with pytest.raises(InputError, match="not enough disk space"):
        consolidate.merge(strangers[:2], output_dir=out, overwrite=True)


def test_an_output_that_is_an_input_is_replaced_whole(
    strangers: list[Path], tmp_path: Path
) -> None:
    consolidate.merge(strangers, output_dir=tmp_path / "out")
    consolidate.merge(strangers, output_dir=strangers[0], overwrite=True)
    assert contents(strangers[0]) == contents(tmp_path / "out")


def test_the_number_of_models_does_not_change_how_many_tensors_are_open(
    network_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that were read are counted while they live."""
    network = make_network({"sizes": [6, 8, 3]})
    folders = []
    for number in range(9):
        weights = {name: values + number for name, values in network.state_dict().items()}
        fisher = {name: torch.full(values.shape, 1.0 + number) for name, values in weights.items()}
        folders.append(store(tmp_path / str(number), weights, fisher, f"task-{number}"))
    live = most = 0
    read = TensorFiles.__getitem__

    def closed() -> None:
        nonlocal live
        live -= 1

    def watched(files: TensorFiles, name: str) -> torch.Tensor:
        nonlocal live, most
        tensor = read(files, name)
        live += 1
        most = max(most, live)
        # The storage lives as long as any view of it does.
        weakref.finalize(tensor.untyped_storage(), closed)
        return tensor

    monkeypatch.setattr(TensorFiles, "__getitem__", watched)
    peaks = []
    for count in (3, 9):
        most = 0
        consolidate.merge(folders[:count], output_dir=tmp_path / f"out-{count}")
        assert live == 0
        peaks.append(most)
    assert peaks[0] == peaks[1] <= 6


def test_chunks_are_put_together(
    strangers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consolidate.merge(strangers, output_dir=tmp_path / "whole")
    monkeypatch.setattr(merge_command, "_CHUNK", 5)
    consolidate.merge(strangers, output_dir=tmp_path / "chunks")
    whole, chunks = (contents(tmp_path / name) for name in ("whole", "chunks"))
    ledgers = [json.loads(found.pop("fisher/fisher.json")) for found in (whole, chunks)]
    offsets = [ledger.pop("penalty_offset") for ledger in ledgers]
    assert whole == chunks
    assert ledgers[0] == ledgers[1]
    assert offsets[0] == pytest.approx(offsets[1], rel=1e-12)


@pytest.mark.parametrize("command", ["verify", "merge", "finetune"])
def test_a_checkpoint_that_is_replaced_while_it_is_opened(
    strangers: list[Path],
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    first, other, third = strangers
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    left = 1

    def replacing(path: Path) -> Any:
        nonlocal left
        left -= copy in path.parents
        if left == 0 and copy in path.parents:
            with replace_folder(copy, overwrite=True) as staging:
                shutil.copytree(other, staging, dirs_exist_ok=True)
        return read_ledger(path)

    monkeypatch.setattr("formats.fisher_folder.read_ledger", replacing)
    if command == "verify":
        assert consolidate.verify(copy) == consolidate.verify(other) | {"checkpoint": str(copy)}
        return
    if command == "merge":
        consolidate.merge([copy, third], output_dir=tmp_path / "out")
    else:
        finetune(
            copy, write_task("new"), output_dir=tmp_path / "out", ewc_lambda=1.0, task="new", **FAST
        )
    assert left < 0
    learned = [task.name for task in read_fisher(tmp_path / "out" / "fisher").ledger.tasks]
    of_other = [task.name for task in read_fisher(other / "fisher").ledger.tasks]
    assert learned[:1] == of_other[:1]


def of_layer(folder: Path, block: Block) -> torch.Tensor:
    """[W, b] of a layer."""
    weight, bias = (tensors(folder, "weights")[name] for name in block.parameters)
    return torch.cat([weight, bias[:, None]], 1)


def factors_of(folder: Path) -> dict[str, torch.Tensor]:
    loaded = load_file(folder / "fisher" / "factors.safetensors")
    return {name: values.double() for name, values in loaded.items()}


@pytest.mark.parametrize("anchored", [False, True])
def test_layers_with_factors_are_merged_by_them(tmp_path: Path, anchored: bool) -> None:
    folders = [
        factor_checkpoints.write(tmp_path / name, name, seed=seed, anchored=anchored)
        for seed, name in enumerate("ab")
    ]
    out, swapped = tmp_path / "out", tmp_path / "swapped"
    result = consolidate.merge(folders, output_dir=out, weights=[2, 0.5])
    assert result["factors"] == {"layers": 2, "bytes": 4 * (7 * 7 + 9 * 9)}
    assert result["without_factors"] == []
    assert "factors of 2 layers" in merge_text(result)
    assert not list(out.glob(".*"))
    for name, block in factor_checkpoints.BLOCKS.items():
        a, b = (factors_of(folder)[name] for folder in folders)
        total = 2 * a + 0.5 * b
        torch.testing.assert_close(factors_of(out)[name], total, rtol=1e-6, atol=1e-9)
        w, v = (of_layer(folder, block) for folder in folders)
        pulls = 2 * w @ a + 0.5 * v @ b
        torch.testing.assert_close(of_layer(out, block) @ total, pulls, rtol=1e-4, atol=1e-6)
    for theta in thetas(out):
        one, two = (factor_checkpoints.penalty_at(folder, theta) for folder in folders)
        merged = factor_checkpoints.penalty_at(out, theta)
        assert merged == pytest.approx(2 * one + 0.5 * two, rel=1e-5)
        one, two = (penalty_at(folder, theta) for folder in folders)
        assert penalty_at(out, theta) == pytest.approx(2 * one + 0.5 * two, rel=1e-5)
    checked = consolidate.verify(out)
    assert ("factor_anchor" in checked) == anchored
    same = [
        factor_checkpoints.write(tmp_path / name, name, seed=0, anchored=anchored) for name in "xy"
    ]
    consolidate.merge(same, output_dir=tmp_path / "same")
    ledger = read_fisher(tmp_path / "same" / "fisher").ledger
    assert (ledger.factor_offset is None) == (not anchored)  # as it is the penalty_offset
    consolidate.merge(folders[::-1], output_dir=swapped, weights=[0.5, 2])
    for which in ("weights", "fisher"):
        for name, values in tensors(swapped, which).items():
            torch.testing.assert_close(values, tensors(out, which)[name], rtol=1e-4, atol=1e-5)
    again = consolidate.merge(folders, output_dir=out, weights=[2, 0.5])
    assert again == result | {"status": "cached", "trace": again["trace"]}


def test_a_factor_with_a_negative_eigenvalue_is_refused(tmp_path: Path) -> None:
    a, b = (factor_checkpoints.write(tmp_path / name, name) for name in "ab")
    factor_checkpoints.rewrite(
        b, lambda t: t["0.weight.R"].sub_(0.2).diagonal().add_(0.2), "factors"
    )
    with pytest.raises(
        InputError, match=r"b/fisher/factors.*'0\.weight\.R' has an eigenvalue below"
    ):
        consolidate.merge([a, b], output_dir=tmp_path / "out")


def test_merging_a_model_with_itself_changes_no_weight(tmp_path: Path) -> None:
    a = factor_checkpoints.write(tmp_path / "a", "a")
    b = factor_checkpoints.write(tmp_path / "b", "b")  # the same weights
    consolidate.merge([a, b], output_dir=tmp_path / "out")
    for name, values in tensors(tmp_path / "out", "weights").items():
        assert torch.equal(values, tensors(a, "weights")[name])


def test_layers_that_one_model_has_no_factor_of_lose_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = factor_checkpoints.write(tmp_path / "a", "a")
    b = factor_checkpoints.write(tmp_path / "b", "b", seed=1, without=("0.weight.R",))
    c = factor_checkpoints.write(tmp_path / "c", "c", seed=2, without=("0.weight.R", "2.weight.R"))
    for number, others in enumerate(([a, b], [b, a])):
        out = tmp_path / f"out-{number}"
        result = consolidate.merge(others, output_dir=out)
        assert result["without_factors"] == ["0.weight"]
        assert factors_of(out).keys() == {"2.weight.R"}
        assert f"{b} has no factor of 0.weight: these are merged by the diagonal" in caplog.text
        plain = tmp_path / f"plain-{number}"
        consolidate.merge([c, *others], output_dir=plain)
        assert read_fisher(plain / "fisher").factors is None
        consolidate.verify(out)
        consolidate.verify(plain)
    weights, fishers = ([tensors(x, which) for x in (a, b)] for which in ("weights", "fisher"))
    total = fishers[0]["0.weight"] + fishers[1]["0.weight"]
    mean = sum(f["0.weight"] * w["0.weight"] for f, w in zip(fishers, weights, strict=True)) / total
    found = tensors(tmp_path / "out-0", "weights")["0.weight"]
    torch.testing.assert_close(found, torch.where(total > 0, mean, found), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["online", "separate"])
def test_factors_of_children_and_their_base_count_once(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, rule: str
) -> None:
    base, old = tmp_path / "base", write_task("old")
    consolidate.fisher(network_checkpoint, old, output_dir=base, structure="inputs", **NETWORK)
    children, alone = [], []
    for seed, name in enumerate("ab", start=1):
        data = write_task(f"task-{name}", seed=seed)
        children.append(tmp_path / name)
        finetune(base, data, output_dir=children[-1], ewc_lambda=10.0, merge_rule=rule, **FAST)
        alone.append(tmp_path / f"{name}-alone")
        shutil.copytree(children[-1], alone[-1], ignore=shutil.ignore_patterns("fisher"))
        consolidate.fisher(alone[-1], data, structure="inputs", **NETWORK)
    out = tmp_path / "out"
    consolidate.merge(children, output_dir=out, base=base)
    assert consolidate.verify(out)["factors"]["tensors"] == 2
    for name, merged in factors_of(out).items():
        a, b, start = (factors_of(folder)[name] for folder in (*children, base))
        torch.testing.assert_close(merged, a + b - start, rtol=1e-5, atol=1e-8)
    if rule == "separate":
        for theta in thetas(out):
            each = [factor_checkpoints.penalty_at(folder, theta) for folder in (base, *alone)]
            assert factor_checkpoints.penalty_at(out, theta) == pytest.approx(sum(each), rel=1e-4)
    last = tmp_path / "last"
    finetune(out, write_task("next", seed=9), output_dir=last, ewc_lambda=10.0, **FAST)
    assert consolidate.verify(last)["factors"]["tensors"] == 2
