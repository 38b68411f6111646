"""What the Fisher predicts that old tasks lose, beside what they lost."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import consolidate
from consolidate.api import finetune
from consolidate.commands import finetune_penalty
from consolidate.commands.finetune_nats import Forecast
from consolidate.ewc.block_penalty import BlockPenalty
from consolidate.ewc.penalty import Penalty
from consolidate.training.forgetting import rises
from consolidate.views.metrics import finetune_metrics
from consolidate.views.text import finetune_text
from formats.fisher_folder import read_fisher
from formats.fisher_json import Ledger, TaskRecord
from support.checkpoints import Write, first_task, write_clusters
from support.networks import FAST

COMMON: dict[str, Any] = {**FAST, "epochs": 3}
WAYS: dict[str, dict[str, Any]] = {
    "ewc": {"ewc_lambda": 10.0},
    "l2": {"penalty": "l2", "ewc_lambda": 0.01},
    "none": {"penalty": "none"},
    "search": {"ewc_lambda": [1.0, 100.0]},
    "interpolated": {"ewc_lambda": 10.0, "interpolate": 0.5},
    "rounded": {"ewc_lambda": 10.0, "penalty_dtype": "bfloat16"},
    "diagonal": {"ewc_lambda": 10.0, "structure": "diagonal"},
    "adapter": {"ewc_lambda": 10.0, "lora_rank": 2, "lora_targets": ["0"]},
}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {n: t.double() for n, t in load_file(folder / "model.safetensors").items()}


def quadratic(fisher_of: Path, at: Path, *, matrices: bool) -> float:
    """½ Σ Λ (θ − μ)², or ½ tr(ΔW R ΔWᵀ)/out, of a Fisher folder at the weights of a checkpoint."""
    stored, there = read_fisher(fisher_of / "fisher"), weights_of(fisher_of)
    blocks = stored.ledger.blocks or {} if matrices else {}
    anchor, around = stored.anchor or there, stored.factor_anchor or there
    theta, total, covered = weights_of(at), 0.0, set()
    for name, block in blocks.items():
        weight, bias = block.parameters
        change = torch.cat(
            [
                theta[weight] - around[weight].double(),
                (theta[bias] - around[bias].double())[:, None],
            ],
            1,
        )
        assert stored.factors is not None
        total += float(torch.trace(change @ stored.factors[name].double() @ change.T)) / len(change)
        covered |= {weight, bias}
    for name in stored.fisher:
        if name not in covered:
            far = theta[name] - anchor[name].double()
            total += float((stored.fisher[name].double() * far**2).sum())
    return total / 2


@pytest.fixture(scope="module")
def learned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that checkpoint and its data, which `learned` copies."""
    folder = tmp_path_factory.mktemp("learned")
    first_task(folder, write_clusters(folder, "a"), structure="inputs", **COMMON)
    return folder


@pytest.fixture
def learned(learned_once: Path, tmp_path: Path) -> Path:
    """A checkpoint that knows task a, with matrices beside the diagonal."""
    return shutil.copytree(learned_once, tmp_path, dirs_exist_ok=True) / "first"


@pytest.mark.parametrize("way", WAYS)
def test_the_prediction_is_that_of_the_quadratic_at_the_saved_weights(
    learned: Path, write_task: Write, tmp_path: Path, way: str
) -> None:
    a, out = tmp_path / "a.npz", tmp_path / "out"
    options = {**COMMON, **WAYS[way], "evaluate": {"a": a}}
    result = finetune(learned, write_task("b", seed=1), output_dir=out, **options)
    assert result["status"] == "done"
    expected = quadratic(learned, out, matrices=way != "diagonal")
    assert expected > 1e-5
    assert result["predicted_nats"] == pytest.approx(expected, rel=1e-4)
    assert result["task_weights"] == {"a": 1.0}
    losses = [result["metrics"][when]["a"]["loss"] for when in ("before", "after")]
    assert result["measured_nats"] == {"a": losses[1] - losses[0]}


@pytest.mark.parametrize("rule", ["online", "separate"])
def test_of_a_chain_the_prediction_is_the_rise_since_the_start_of_the_run(
    learned: Path, write_task: Write, tmp_path: Path, rule: str
) -> None:
    second, third = tmp_path / "second", tmp_path / "third"
    merging = {"merge_rule": rule, "gamma": 0.5 if rule == "online" else None, "task_weight": 3.0}
    options = {**COMMON, "ewc_lambda": 1.0, **merging}
    finetune(learned, write_task("b", seed=1), output_dir=second, **options)
    result = finetune(second, write_task("c", seed=2), output_dir=third, **options)
    start, end = (quadratic(second, at, matrices=True) for at in (second, third))
    assert (start > 0) == (rule == "separate")
    assert result["status"] == "done"
    assert result["predicted_nats"] == pytest.approx(end - start, rel=1e-3)
    assert result["task_weights"] == {"a": 0.5 if rule == "online" else 1.0, "b": 3.0}
    assert result["measured_nats"] == {}


@pytest.mark.parametrize(("way", "times"), [("ewc", 1), ("rounded", 3), ("l2", 3), ("none", 2)])
def test_the_penalty_predicts_too_where_it_is_that_of_the_fisher_as_stored(
    learned: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    times: int,
) -> None:
    made: list[type] = []

    def counted(kind: type) -> Callable[..., Any]:
        def make(*arguments: Any, **options: Any) -> Any:
            made.append(kind)
            return kind(*arguments, **options)

        return make

    for kind in (BlockPenalty, Penalty):
        maker = counted(kind)
        maker.l2 = lambda *a, **o: counted(Penalty.l2)(*a, **o)  # type: ignore[attr-defined]
        monkeypatch.setattr(finetune_penalty, kind.__name__, maker)
    options = {**COMMON, "epochs": 1, "no_fisher": True, **WAYS[way]}
    finetune(learned, write_task("b", seed=1), output_dir=tmp_path / "out", **options)
    assert len(made) == times


def test_a_first_task_has_no_prediction(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    data = write_task("a")
    options = {**COMMON, "penalty": "none", "evaluate": {"a": data}}
    result = finetune(network_checkpoint, data, output_dir=tmp_path / "out", **options)
    assert (result["predicted_nats"], result["task_weights"]) == (None, {})  # type: ignore[typeddict-item]
    assert result["measured_nats"] == {}
    assert "old loss" not in finetune_text(result)


def test_both_are_in_one_line_of_the_text_and_in_the_metrics(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b, out = write_task("b", seed=1), tmp_path / "out"
    options = {**COMMON, "ewc_lambda": 10.0, "evaluate": {"a": tmp_path / "a.npz", "b": b}}
    done = finetune(learned, b, output_dir=out, **options)
    assert done["status"] == "done"
    predicted, measured = done["predicted_nats"], done["measured_nats"]["a"]
    assert predicted is not None
    line = f"old loss, mean nats: predicted {predicted:+.3g}; measured {measured:+.3g} of a"
    assert line in finetune_text(done).splitlines()
    numbers = finetune_metrics(done)
    assert (numbers["predicted_nats"], numbers["a.measured_nats"]) == (predicted, measured)
    again = finetune(learned, b, output_dir=out, **options)
    assert (again["status"], again["measured_nats"]) == ("cached", {"a": measured})
    assert f"old loss, mean nats: measured {measured:+.3g} of a" in finetune_text(again)


def record(name: str, weight: float, estimator: str | None = "exact") -> TaskRecord:
    count = None if estimator is None else 1
    return TaskRecord(
        name, "o", "softmax", None, "example", count, count, estimator, None, 0, weight=weight
    )


def test_a_task_that_was_not_measured_has_no_weight_and_fades_no_other() -> None:
    tasks = [record("a", 2.0), record("b", 1.0, None), record("c", 4.0)]
    forecast = Forecast(
        Ledger(tasks, gamma=0.5), lambda: consolidate.Penalty((), {}, ewc_lambda=1.0), 0.0
    )
    assert forecast.weights() == {"a": 1.0, "c": 4.0}


def test_only_losses_of_old_tasks_before_and_after_are_compared() -> None:
    before = {"a": {"loss": 1.0}, "b": {"loss": 1.0}, "bench": {"score": 0.5}}
    after = {"a": {"loss": 1.5}, "b": {"loss": 2.0}, "c": {"loss": 1.0}, "bench": {"score": 0.4}}
    assert rises(before, after, ["a", "c", "bench"]) == {"a": 0.5}
    assert rises({}, {}, ["a"]) == {}


@pytest.mark.parametrize("structure", ["diagonal", "inputs"])
def test_for_small_changes_the_prediction_is_the_expected_rise_of_the_loss(structure: str) -> None:
    """Of labels as the model draws them that rise is KL(old ‖ new), mean per example.

    The diagonal knows the change of one weight at a time, and a matrix one row of them, as the
    mean over the rows.
    """
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=False).double()
    inputs = torch.randn(50, 5, dtype=torch.float64)
    old = model(inputs).log_softmax(1).detach()
    options = {"estimator": "exact", "accumulate_dtype": torch.float64, "structure": structure}
    batches = [(inputs, torch.zeros(50, dtype=torch.int64))]
    fisher = consolidate.fisher_diagonal(model, batches, "softmax", **options)  # type: ignore[arg-type]
    small = {n: f.double() for n, f in fisher.items()}
    if structure == "inputs":
        matrices = {n: r.double() for n, r in fisher.factors.items()}
        penalty: Any = consolidate.BlockPenalty(
            model, small, factors=matrices, blocks=fisher.blocks, ewc_lambda=1.0
        )
    else:
        penalty = consolidate.Penalty(model, small, ewc_lambda=1.0)
    forecast = Forecast(Ledger([]), lambda: penalty, penalty.value())
    weight, direction = model.weight.data, 1e-4 * torch.randn(5, dtype=torch.float64)

    def rises(change: Tensor) -> tuple[float, float]:
        """The expected rise of the loss, and the prediction."""
        weight.add_(change)
        now = model(inputs).log_softmax(1).detach()
        found = float((old.exp() * (old - now)).sum(1).mean()), forecast.nats()
        weight.sub_(change)
        return found

    if structure == "diagonal":
        for i, j in ((0, 0), (2, 3), (3, 4)):
            expected, predicted = rises(1e-4 * torch.eye(4).double()[:, i, None] * torch.eye(5)[j])
            assert predicted == pytest.approx(expected, rel=1e-3)
        return
    each = [rises(torch.eye(4).double()[:, i, None] * direction) for i in range(4)]
    expected = sum(rise for rise, _ in each) / 4
    assert each[0][1] == pytest.approx(expected, rel=1e-3)
