"""`finetune --interpolate`: the weights between the start and what was trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from consolidate.api import evaluate, finetune, fisher, report, show
from consolidate.commands import finetune as finetune_command
from consolidate.commands import finetune_choice, finetune_interpolation
from consolidate.runtime import signals
from formats.errors import ForgettingError, InputError, NonFiniteError, UsageError
from formats.fisher_folder import read_fisher
from support.checkpoints import Write, measured_by_hand, normed
from support.command_line import run
from support.faults import Killed, break_off, kill_after
from support.folders import contents, fisher_of
from support.json_schema import check_json
from support.networks import FAST, NETWORK

COMMON: dict[str, Any] = {**FAST, "epochs": 6, "ewc_lambda": 1.0}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def between(start: Path, end: Path, alpha: float) -> dict[str, torch.Tensor]:
    """θ_α by hand, in float64."""
    mu, theta = weights(start), weights(end)
    return {n: mu[n].double() + alpha * (theta[n].double() - mu[n].double()) for n in theta}


def test_weights_metrics_fisher_and_anchor_are_those_in_between(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    a, b = write_task("a-test", count=90), write_task("b", seed=1)
    options = {**COMMON, "evaluate": {"a": a}}
    finetune(learned, b, output_dir=tmp_path / "whole", **options)
    found = finetune(learned, b, output_dir=tmp_path / "half", interpolate=0.4, **options)
    half = weights(tmp_path / "half")
    for name, values in between(learned, tmp_path / "whole", 0.4).items():
        torch.testing.assert_close(half[name].double(), values, rtol=1e-6, atol=1e-7)
    assert found["metrics"]["after"] == evaluate(tmp_path / "half", {"a": a}, **NETWORK)
    old, merged = fisher_of(learned), fisher_of(tmp_path / "half")
    for name, values in measured_by_hand(half, b).items():
        torch.testing.assert_close(merged[name], old[name] + values, rtol=1e-4, atol=1e-8)
    stored = read_fisher(tmp_path / "half" / "fisher")
    assert stored.anchor is None  # which is the weights
    expected = {"alpha": 0.4, "method": "plain", "curve": []}
    assert found["interpolation"] == expected
    assert show(tmp_path / "half")["tasks"][-1]["interpolation"] == expected
    assert json.loads((tmp_path / "half" / "fisher" / "fisher.json").read_text())["version"] == 2
    again = finetune(learned, b, output_dir=tmp_path / "half", interpolate=0.4, **options)
    assert (again["status"], again["interpolation"]) == ("cached", expected)
    check_json("finetune", again)
    check_json("finetune", found)


def test_either_end_is_the_start_or_the_training_without_it(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b = write_task("b", seed=1)
    finetune(learned, b, output_dir=tmp_path / "whole", **COMMON)
    finetune(learned, b, output_dir=tmp_path / "one", interpolate=1, **COMMON)
    none = finetune(learned, b, output_dir=tmp_path / "none", interpolate=0, **COMMON)
    bytes_of = {
        name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "one")
    }
    assert bytes_of["one"] == bytes_of["whole"]
    assert fisher_of(tmp_path / "one").keys() == fisher_of(tmp_path / "whole").keys()
    for name, values in fisher_of(tmp_path / "whole").items():
        assert torch.equal(fisher_of(tmp_path / "one")[name], values)
    assert none["share_moved"] == 0
    for name, values in weights(learned).items():
        assert torch.equal(weights(tmp_path / "none")[name], values)


@pytest.mark.parametrize("penalty", ["none", "l2"])
def test_other_penalties_and_frozen_weights(
    learned: Path, write_task: Write, tmp_path: Path, penalty: str
) -> None:
    b = write_task("b", seed=1)
    options = {**COMMON, "penalty": penalty, "freeze": ["0.*"]}
    if penalty == "none":
        del options["ewc_lambda"]
    finetune(learned, b, output_dir=tmp_path / "whole", **options)
    finetune(learned, b, output_dir=tmp_path / "half", interpolate=0.5, **options)
    half = weights(tmp_path / "half")
    for name, values in between(learned, tmp_path / "whole", 0.5).items():
        torch.testing.assert_close(half[name].double(), values, rtol=1e-6, atol=1e-7)
    assert torch.equal(half["0.weight"], weights(learned)["0.weight"])
    assert not torch.equal(half["2.weight"], weights(learned)["2.weight"])


def test_narrow_weights_are_rounded_once(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    narrow = {name: values.bfloat16() for name, values in weights(network_checkpoint).items()}
    save_file(narrow, network_checkpoint / "model.safetensors", {"format": "pt"})
    fisher(network_checkpoint, write_task("old"), **NETWORK)
    seen: list[dict[str, torch.Tensor]] = []
    b = write_task("b", seed=1)
    options = {**COMMON, "epochs": 2}
    moved = finetune_interpolation.Interpolator.apply

    def noted(self: Any, *arguments: Any) -> None:
        module = self._start.model.module
        seen.append({name: p.detach().clone() for name, p in module.named_parameters()})
        moved(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_interpolation.Interpolator, "apply", noted)
        finetune(network_checkpoint, b, output_dir=tmp_path / "half", interpolate=0.3, **options)
    (trained,) = seen
    assert any((p != p.bfloat16().float()).any() for p in trained.values())  # not rounded yet
    for name, values in weights(tmp_path / "half").items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, narrow[name].float().lerp(trained[name], 0.3).bfloat16())


def test_tied_weights_and_counters(write_task: Write, tmp_path: Path) -> None:
    start = normed(tmp_path / "normed", write_task("old"))
    b = write_task("b", seed=1)
    options = {**COMMON, "model": "support.networks:Network"}
    finetune(start, b, output_dir=tmp_path / "whole", **options)
    finetune(start, b, output_dir=tmp_path / "half", interpolate=0.5, **options)
    before, half = weights(start), weights(tmp_path / "half")
    assert half.keys() == before.keys()  # tied: once
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(half[name], before[name])  # frozen
    for name, values in between(start, tmp_path / "whole", 0.5).items():
        if half[name].is_floating_point():
            torch.testing.assert_close(half[name].double(), values, rtol=1e-6, atol=1e-7)


def normed_by_batches(config: dict[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


def test_running_statistics_are_measured_again_where_they_follow_the_data(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = normed_by_batches({})
    save_file(module.state_dict(), network_checkpoint / "model.safetensors", {"format": "pt"})
    fisher(network_checkpoint, write_task("old"), model=f"{__name__}:normed_by_batches")
    b = write_task("b", seed=1, count=49)  # a last batch of one
    options = {**COMMON, "model": f"{__name__}:normed_by_batches", "norm_statistics": "update"}
    options |= {"batch_size": 12, "epochs": None, "max_steps": 4}
    finetune(network_checkpoint, b, output_dir=tmp_path / "whole", **options)
    finetune(network_checkpoint, b, output_dir=tmp_path / "half", interpolate=0.5, **options)
    half, whole = weights(tmp_path / "half"), weights(tmp_path / "whole")
    inputs = torch.from_numpy(np.load(b)["inputs"])
    order = torch.randperm(49, generator=torch.Generator().manual_seed(0))[:48]
    hidden = nn.functional.linear(inputs[order], half["0.weight"], half["0.bias"])
    torch.testing.assert_close(half["1.running_mean"], hidden.mean(0), rtol=1e-4, atol=1e-5)
    expected = torch.stack([part.var(0) for part in hidden.split(12)]).mean(0)
    torch.testing.assert_close(half["1.running_var"], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(half["1.num_batches_tracked"], whole["1.num_batches_tracked"])


@pytest.mark.parametrize("head", ["new", "extend"])
def test_what_is_new_is_as_trained(
    learned: Path, write_task: Write, tmp_path: Path, head: str
) -> None:
    b = write_task("b", seed=1)
    data = np.load(b)
    np.savez(tmp_path / "b.npz", inputs=data["inputs"], labels=data["labels"] + 2)
    config = json.loads((learned / "config.json").read_text())
    (learned / "config.json").write_text(json.dumps({**config, "num_labels": 3}))
    options = {**COMMON, "model": f"{__name__}:headed", "head": head}
    finetune(learned, tmp_path / "b.npz", output_dir=tmp_path / "whole", **options)
    finetune(learned, tmp_path / "b.npz", output_dir=tmp_path / "half", interpolate=0.25, **options)
    mu, theta, half = weights(learned), weights(tmp_path / "whole"), weights(tmp_path / "half")
    first = 0 if head == "new" else 3
    for name in ("2.weight", "2.bias"):
        assert torch.equal(half[name][first:], theta[name][first:])
        old = mu[name][:first].lerp(theta[name][:first], 0.25)
        torch.testing.assert_close(half[name][:first], old)
    torch.testing.assert_close(half["0.weight"], mu["0.weight"].lerp(theta["0.weight"], 0.25))


def headed(config: dict[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, config["num_labels"]))


def test_an_adapter_is_merged_before(learned: Path, write_task: Write, tmp_path: Path) -> None:
    b = write_task("b", seed=1)
    options = {**COMMON, "lora_rank": 2, "lora_targets": ["0"], "learning_rate": 0.05}
    finetune(learned, b, output_dir=tmp_path / "whole", **options)
    finetune(learned, b, output_dir=tmp_path / "half", interpolate=0.5, **options)
    half = weights(tmp_path / "half")
    for name, values in between(learned, tmp_path / "whole", 0.5).items():
        torch.testing.assert_close(half[name].double(), values, rtol=1e-6, atol=1e-7)
    assert not torch.equal(half["0.weight"], weights(learned)["0.weight"])
    assert torch.equal(half["2.weight"], weights(learned)["2.weight"])


def test_auto_takes_the_best_mean_score_and_reports_the_curve(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b = write_task("b", seed=1)
    held = {"a": write_task("a-held", count=120), "b": write_task("b-held", seed=1)}
    out = tmp_path / "auto"
    options = {**COMMON, "epochs": 20}
    found = finetune(learned, b, output_dir=out, interpolate="auto", validation=held, **options)
    check_json("finetune", found)
    search = found["alpha_search"]
    assert [trial["alpha"] for trial in search["trials"]] == [i / 10 for i in range(1, 11)]
    assert (search["rule"], search["old_tasks"], search["new_task"]) == ("best-mean", ["a"], "b")
    best = max(trial["mean"] for trial in search["trials"])
    chosen = [trial for trial in search["trials"] if trial["chosen"]]
    assert [trial["alpha"] for trial in chosen] == [search["alpha"]]
    assert chosen[0]["mean"] == best
    assert search["alpha"] == min(t["alpha"] for t in search["trials"] if t["mean"] == best)
    assert 0.1 < search["alpha"] < 1
    assert chosen[0]["metrics"] == evaluate(out, held, **NETWORK)
    lost = search["before"]["a"]["score"] - chosen[0]["metrics"]["a"]["score"]
    assert chosen[0]["forgetting"] == pytest.approx(lost)
    # With held-out data of the new task it is the run that the same α gives.
    finetune(learned, b, output_dir=tmp_path / "typed", interpolate=search["alpha"], **options)
    one, other = (contents(folder) for folder in (out, tmp_path / "typed"))
    assert one["model.safetensors"] == other["model.safetensors"]
    curve = found["interpolation"]["curve"]
    assert [point["alpha"] for point in curve] == [0.0, *(i / 10 for i in range(1, 11))]
    assert curve[0]["scores"] == {n: search["before"][n]["score"] for n in ("a", "b")}
    assert curve[-1]["scores"]["b"] == search["trials"][-1]["metrics"]["b"]["score"]
    page = tmp_path / "report.html"
    report(out, output=page)
    text = page.read_text()
    assert "Between the start and the trained weights" in text
    assert f"<td>{curve[3]['scores']['a']:.3f}</td>" in text


def test_auto_without_old_data_keeps_most_of_the_gain_on_rows_that_it_does_not_train_on(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b = write_task("b", seed=1, count=120)
    options = {**COMMON, "epochs": 20}
    found = finetune(learned, b, output_dir=tmp_path / "out", interpolate="auto", **options)
    search = found["alpha_search"]
    assert search["rule"] == "kept-gain"
    assert search["measured"] == "b on 50 examples held out of the training data; no old data"
    assert found["steps"] == 20 * 5  # of 70 examples
    assert found["fisher"]["examples"] == 120
    scores = {t["alpha"]: t["metrics"]["b"]["score"] for t in search["trials"]}
    before = search["before"]["b"]["score"]
    enough = before + 0.95 * (max(scores.values()) - before)
    assert search["alpha"] == min(alpha for alpha, score in scores.items() if score >= enough)
    assert all(trial["forgetting"] is None for trial in search["trials"])


def test_lambda_is_chosen_first_and_the_same_rows_are_held_out(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b = write_task("b", seed=1, count=120)
    options = {**COMMON, "ewc_lambda": [1, 100]}
    found = finetune(learned, b, output_dir=tmp_path / "out", interpolate="auto", **options)
    alone = finetune(learned, b, output_dir=tmp_path / "alone", **options)
    assert found["lambda_search"]["ewc_lambda"] == alone["lambda_search"]["ewc_lambda"]
    (trial,) = [t for t in found["lambda_search"]["trials"] if t["chosen"]]
    # The λ was trained on the same rows as the run is now.
    assert found["alpha_search"]["trials"][-1]["metrics"] == trial["metrics"]
    assert found["alpha_search"]["before"] == found["lambda_search"]["before"]


def test_the_gate_is_on_what_is_stored(learned: Path, write_task: Write, tmp_path: Path) -> None:
    held, b = write_task("a-held", count=120), write_task("b", seed=1)
    options = {**COMMON, "penalty": "none", "epochs": 40, "max_forgetting": 0.4}
    del options["ewc_lambda"]
    with pytest.raises(ForgettingError):
        finetune(learned, b, output_dir=tmp_path / "far", evaluate={"a": held}, **options)
    near = finetune(
        learned, b, output_dir=tmp_path / "near", interpolate=0.1, evaluate={"a": held}, **options
    )
    assert near["status"] == "done"
    found = finetune(
        learned, b, output_dir=tmp_path / "o", interpolate="auto", validation={"a": held}, **options
    )
    after = evaluate(tmp_path / "o", {"a": held}, **NETWORK)
    assert found["metrics"]["after"] == after  # the gate has the data of --validation


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "by Fishers": {"interpolation": "fisher"},
    "an adapter": {"lora_rank": 2, "lora_targets": ["last"]},
    "statistics": {"norm_statistics": "update"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_killed_anywhere_resumes_to_the_same_bytes(
    write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    old, new = write_task("old"), write_task("new", seed=1, count=120)
    start = normed(tmp_path / "normed", old)
    options = {**FAST, "model": "support.networks:Network", "ewc_lambda": 10.0, "epochs": 2}
    options |= {
        "save_every_minutes": 0,
        "interpolate": "auto",
        "evaluate": {"test": new},
        **WAYS[way],
    }
    whole = finetune(start, new, output_dir=tmp_path / "whole", **options)

    def again() -> Any:
        return finetune(start, new, output_dir=tmp_path / "killed", **options)

    break_off(monkeypatch, 3)
    with pytest.raises(Killed):
        again()
    tried: list[float] = []
    for stop in (1, 4, 10):
        interrupt_after(monkeypatch, stop, tried)
        with pytest.raises(Killed):
            again()
    assert tried == [i / 10 for i in range(1, 11)]  # none twice
    kill_after(monkeypatch, 32)
    with pytest.raises(Killed):
        again()
    resumed = again()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert resumed["alpha_search"] == whole["alpha_search"]
    assert resumed["metrics"] == whole["metrics"]
    assert not list(tmp_path.glob(".killed*"))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int, tried: list[float]) -> None:
    """Break the next search off once so many α in all have been kept."""
    whole = finetune_interpolation.Interpolator._trial

    def broken(self: Any, alpha: float) -> Any:
        if len(tried) >= count:
            monkeypatch.setattr(finetune_interpolation.Interpolator, "_trial", whole)
            raise Killed
        trial = whole(self, alpha)
        tried.append(alpha)
        return trial

    if count == 10:  # after the last, before the Fisher
        choose = finetune_interpolation.Interpolator._choose

        def stopped(self: Any, trials: Any) -> Any:
            monkeypatch.setattr(finetune_interpolation.Interpolator, "_choose", choose)
            raise Killed

        monkeypatch.setattr(finetune_interpolation.Interpolator, "_choose", stopped)
    monkeypatch.setattr(finetune_interpolation.Interpolator, "_trial", broken)


def test_weighted_by_the_fishers(learned: Path, write_task: Write, tmp_path: Path) -> None:
    b = write_task("b", seed=1)
    options = {**COMMON, "epochs": 10}
    finetune(learned, b, output_dir=tmp_path / "whole", **options)
    options |= {"interpolate": 0.3, "interpolation": "fisher"}
    found = finetune(learned, b, output_dir=tmp_path / "out", **options)
    mu, theta, out = weights(learned), weights(tmp_path / "whole"), weights(tmp_path / "out")
    old = {name: values.double() for name, values in fisher_of(learned).items()}
    new = {name: values.double() for name, values in measured_by_hand(theta, b).items()}
    sums = [sum(values.sum() for values in one.values()) for one in (old, new)]
    for name, values in out.items():
        shares = 0.7 * old[name] / sums[0], 0.3 * new[name] / sums[1]
        mean = (shares[0] * mu[name] + shares[1] * theta[name]) / sum(shares)
        plain = mu[name] + 0.3 * (theta[name] - mu[name])
        expected = torch.where(sum(shares) > 0, mean, plain.double())
        torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-6)
    assert found["interpolation"] == {"alpha": 0.3, "method": "fisher", "curve": []}
    # The Fisher in the output is that of the weights in the output.
    for name, values in measured_by_hand(out, b).items():
        merged = fisher_of(tmp_path / "out")[name]
        torch.testing.assert_close(merged, old[name].float() + values, rtol=1e-4, atol=1e-8)


def test_frozen_weights_and_new_rows_in_a_weighted_interpolation(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b = write_task("b", seed=1)
    data = np.load(b)
    np.savez(tmp_path / "b.npz", inputs=data["inputs"], labels=data["labels"] + 2)
    config = json.loads((learned / "config.json").read_text())
    (learned / "config.json").write_text(json.dumps({**config, "num_labels": 3}))
    options = {**COMMON, "model": f"{__name__}:headed", "head": "extend", "freeze": ["0.bias"]}
    data_file = tmp_path / "b.npz"
    finetune(learned, data_file, output_dir=tmp_path / "whole", **options)
    options |= {"interpolate": 0.5, "interpolation": "fisher"}
    finetune(learned, data_file, output_dir=tmp_path / "out", **options)
    theta, out = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert torch.equal(out["0.bias"], weights(learned)["0.bias"])
    assert torch.equal(out["2.weight"][3:], theta["2.weight"][3:])
    assert not torch.equal(out["2.weight"][:3], theta["2.weight"][:3])


@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_the_pass_before_a_weighted_interpolation_resumes_too(
    learned: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    alpha: Any,
) -> None:
    monkeypatch.setattr("consolidate.estimation.compensated_sums.FOLDED_BATCHES", 4)
    b, held = write_task("b", seed=1, count=100), write_task("held", seed=1)
    options = {**COMMON, "epochs": 2, "save_every_minutes": 0, "fisher_batch_size": 4}
    options |= {"interpolate": alpha, "interpolation": "fisher"}
    if alpha == "auto":
        options["validation"] = {"b": held}
    finetune(learned, b, output_dir=tmp_path / "whole", **options)
    caplog.set_level("INFO", "consolidate")
    for examples in (40, 60):
        kill_after(monkeypatch, examples)  # in the pass before, twice
        with pytest.raises(Killed):
            finetune(learned, b, output_dir=tmp_path / "out", **options)
    measure, passes = finetune_command.measure_fisher, []

    def counted(*arguments: Any, **settings: Any) -> Any:
        passes.append(settings["task"])
        found = measure(*arguments, **settings)
        if settings["task"] == "b, before interpolation":
            kill_after(monkeypatch, 40)  # in the pass after it
        return found

    monkeypatch.setattr(finetune_command, "measure_fisher", counted)
    caplog.clear()
    with pytest.raises(Killed):
        finetune(learned, b, output_dir=tmp_path / "out", **options)
    assert "resuming after 48 of 100 examples" in caplog.text
    finetune(learned, b, output_dir=tmp_path / "out", **options)
    assert passes == ["b, before interpolation", "b", "b"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_signal_while_alpha_is_chosen_keeps_the_training(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = write_task("b", seed=1, count=120)
    options = {**COMMON, "save_every_minutes": 10**6, "interpolate": "auto"}
    finetune(learned, b, output_dir=tmp_path / "whole", **options)
    whole = finetune_choice.evaluate_all
    calls: list[int] = []

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # before training, and two α
            raise signals.Terminated
        return whole(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_choice, "evaluate_all", interrupted)
        with pytest.raises(signals.Terminated):
            finetune(learned, b, output_dir=tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        patch.delattr("consolidate.commands.finetune_run.training_steps")
        finetune(learned, b, output_dir=tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_signal_while_statistics_are_measured_again_keeps_the_training(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, b = network_checkpoint, write_task("b", seed=1, count=120)
    module = normed_by_batches({})
    save_file(module.state_dict(), start / "model.safetensors", {"format": "pt"})
    options = {**COMMON, "model": f"{__name__}:normed_by_batches", "norm_statistics": "update"}
    options |= {"penalty": "none", "ewc_lambda": None, "interpolate": 0.5}
    finetune(start, b, output_dir=tmp_path / "whole", **options)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune_interpolation, "remeasure_statistics", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(start, b, output_dir=tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        patch.delattr("consolidate.commands.finetune_run.training_steps")
        finetune(start, b, output_dir=tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_alpha_is_another_result(learned: Path, write_task: Write, tmp_path: Path) -> None:
    b, out = write_task("b", seed=1), tmp_path / "out"
    finetune(learned, b, output_dir=out, interpolate=0.5, **COMMON)
    again = finetune(learned, b, output_dir=out, interpolate=0.7, overwrite=True, **COMMON)
    assert again["status"] == "done"
    assert again["interpolation"]["alpha"] == 0.7


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), float("inf")])
def test_alpha_is_from_0_to_1(learned: Path, tmp_path: Path, alpha: float) -> None:
    with pytest.raises(UsageError, match=r"--interpolate .*: expected a number from 0 to 1"):
        finetune(learned, "b", output_dir=tmp_path / "out", interpolate=alpha, **COMMON)


def test_wrong_use_is_refused(
    learned: Path, network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    b, held = write_task("b", seed=1), write_task("held")
    common: dict[str, Any] = {"output_dir": tmp_path / "out", **COMMON}
    with pytest.raises(UsageError, match="expected a number, or one of auto"):
        finetune(learned, b, interpolate="best", **common)
    with pytest.raises(UsageError, match="--validation needs a search"):
        finetune(learned, b, interpolate=0.5, validation={"a": held}, **common)
    with pytest.raises(UsageError, match="cannot be chosen on training or --evaluate data"):
        finetune(learned, b, interpolate="auto", validation={"b": b}, **common)
    with pytest.raises(UsageError, match=r"expected the new task, b, or a task of the ledger: a$"):
        finetune(learned, b, interpolate="auto", validation={"c": held}, **common)
    free = common | {"penalty": "none", "ewc_lambda": None}
    with pytest.raises(UsageError, match=r"the checkpoint has none; run `consolidate fisher` on"):
        finetune(network_checkpoint, b, interpolate="auto", validation={"a": held}, **free)
    with pytest.raises(UsageError, match="--interpolation fisher needs --interpolate"):
        finetune(learned, b, interpolation="fisher", **common)
    with pytest.raises(UsageError, match="--interpolate cannot be combined with --shard"):
        finetune(learned, b, interpolate=0.5, shard=True, **common)
    assert not (tmp_path / "out").exists()


def test_weighting_needs_the_fisher_of_earlier_tasks(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    options = {**FAST, "penalty": "none", "interpolate": 0.5, "interpolation": "fisher"}
    with pytest.raises(InputError, match=r"needs the Fisher of earlier tasks, and .* has none"):
        finetune(network_checkpoint, write_task("b"), output_dir=tmp_path / "out", **options)


def test_what_diverged_is_refused(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise NonFiniteError("the loss is nan")

    b = write_task("b", seed=1)
    measure_start = finetune_interpolation.Interpolator.measure_start

    def then_broken(self: Any) -> None:
        measure_start(self)
        monkeypatch.setattr(finetune_choice, "evaluate_all", broken)

    monkeypatch.setattr(finetune_interpolation.Interpolator, "measure_start", then_broken)
    with pytest.raises(NonFiniteError, match="no α has a finite loss"):
        finetune(learned, b, output_dir=tmp_path / "out", interpolate="auto", **COMMON)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_command_line_prints_the_curve(
    learned: Path, write_task: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b, held = write_task("b", seed=1), write_task("a-held", count=90)
    words = ["finetune", learned, "--data", b, "--output-dir", tmp_path / "out"]
    words += ["--model", NETWORK["model"], "--interpolate", "auto", "--validation", f"a={held}"]
    words += ["--ewc-lambda", "1", "--learning-rate", "0.01"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "the best mean score" in out
    assert out.count("  chosen") == 1
    code, out, err = run(capsys, *words, "--interpolate", "1.5")
    assert code == 2
    assert "expected a number from 0 to 1" in err
