"""Everything numerical on a second device: the numbers of the CPU, and no operation mixes the two.

The device is that of support/elsewhere.py, which refuses what CUDA refuses. It says nothing of
CUDA's own kernels: `scripts/robustness/device_suite.py` runs on an accelerator.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consolidate.estimation.batches import model_outputs
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.ewc.block_penalty import BlockPenalty
from consolidate.ewc.fisher_merging import ModelTensor, merge_models, merge_online, merge_separate
from consolidate.ewc.interpolation import fisher_share, interpolated
from consolidate.ewc.low_rank_penalty import LowRank, MergedPenalty
from consolidate.ewc.overlap import fisher_overlap
from consolidate.ewc.penalty import Penalty, WeightPenalty
from consolidate.options import Recipe
from consolidate.training.evaluation import divergence, measure, tensors_of
from consolidate.training.loop import (
    make_optimizer,
    make_scheduler,
    remeasure_statistics,
    training_steps,
)
from support.elsewhere import DEVICE, REAL, WIDE, Elsewhere, back, second_device
from support.modules import Experts, Images, network
from support.networks import normed_network

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-9, "atol": 1e-12} if torch.float64 == WIDE else {"rtol": 1e-3, "atol": 1e-5}
TRAINED = {"rtol": 1e-6, "atol": 1e-8} if torch.float64 == WIDE else CLOSE  # Adam divides by √v
simulated = pytest.mark.skipif(REAL is not None, reason="a device of the machine is the second one")
Found = Mapping[str, Tensor | float]


class Words(nn.Module):
    """An embedding tied to the head, an attention layer, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(5, 4, padding_idx=0)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(ids)) * self.scale)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def labels(*shape: int, below: int = 3) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, Tensor, Tensor]] = {
    "mlp": (network, "softmax", numbers(7, 5), labels(7)),
    "several labels": (network, "bernoulli", numbers(7, 5), labels(7, 3, below=2)),
    "regression": (network, "gaussian", numbers(7, 5), numbers(7, 3, seed=3)),
    "images": (Images, "softmax", numbers(4, 2, 6, 6), labels(4)),
    "experts": (Experts, "softmax", numbers(6, 5), labels(6)),
    "words": (Words, "next-token-softmax", labels(3, 6, below=5), labels(3, 6, below=5)),
}


def made(name: str, device: torch.device) -> tuple[nn.Module, str, list[tuple[Tensor, Tensor]]]:
    """A network there, and batches of unequal size that are still on the CPU."""
    make, likelihood, x, y = NETWORKS[name]
    batches = list(zip(x.split(4), y.split(4), strict=True))
    return make().to(WIDE).to(device), likelihood, batches


def check_same(
    work: Callable[[torch.device], Found],
    monkeypatch: pytest.MonkeyPatch,
    close: Mapping[str, float] = CLOSE,
) -> None:
    """Do the work on the CPU and on the second device, and compare what it gives."""
    expected = work(CPU)
    with second_device(monkeypatch) as device:
        found = work(device)
    assert found.keys() == expected.keys()
    assert expected
    for name, value in expected.items():
        there = found[name]
        if isinstance(value, Tensor):
            assert isinstance(there, Tensor)
            torch.testing.assert_close(there.detach().cpu(), value.detach(), **close)
        else:
            assert there == pytest.approx(value, rel=close["rtol"], abs=close["atol"])


def fisher_of(model: nn.Module, device: torch.device, seed: int = 5) -> dict[str, Tensor]:
    """A Fisher in the shapes of a model, there."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {
        name: numbers(*shape, seed=seed + i).square().to(device)
        for i, (name, shape) in enumerate(shapes.items())
    }


@simulated
def test_the_second_device_refuses_what_cuda_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    host = torch.arange(3.0)
    with second_device(monkeypatch) as device:
        there = host.to(device)
        for made_there in (there, torch.ones(3, device=device), there.new_zeros(3), there > 1):
            assert made_there.device == device
            assert back(made_there).shape == (3,)
        assert (there + 1 + torch.tensor(2.0)).sum().item() == 12.0
        assert back(there[torch.tensor([2])]).tolist() == [2.0]
        assert there.cpu().tolist() == there.clone().copy_(host).tolist() == [0.0, 1.0, 2.0]
        for mixed in (
            lambda: there + host,
            lambda: host.add_(there),
            lambda: torch.stack([there, host]),
            lambda: host[there.long()],
            lambda: there.where(host > 1, there),
        ):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
        with pytest.raises(RuntimeError, match="generator"):
            there.normal_(generator=torch.Generator())
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical", "batched"])
@pytest.mark.parametrize(
    ("name", "placed"), [*((name, False) for name in NETWORKS), ("mlp", True), ("words", True)]
)
def test_a_fisher(name: str, placed: bool, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: torch.device) -> Found:
        model, likelihood, batches = made(name, device)
        if placed:
            batches = [(x.to(device), y.to(device)) for x, y in batches]
        return fisher_diagonal(
            model, batches, likelihood, estimator=estimator, accumulate_dtype=WIDE
        )

    check_same(work, monkeypatch)


@pytest.mark.parametrize("name", ["mlp", "images", "words"])
def test_the_matrices_of_a_fisher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: torch.device) -> Found:
        model, likelihood, batches = made(name, device)
        found = fisher_diagonal(
            model, batches, likelihood, structure="inputs", accumulate_dtype=WIDE
        )
        return {**found, **found.factors}

    check_same(work, monkeypatch)


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Values near a model's own, as an anchor, there."""
    return {name: p.detach() * 0.9 + 0.01 for name, p in model.named_parameters()}


def diagonal_penalty(model: nn.Module, place: torch.device, **options: Any) -> WeightPenalty:
    return Penalty(model, fisher_of(model, place), moved(model), ewc_lambda=2.0, **options)


def l2_penalty(model: nn.Module, place: torch.device, **options: Any) -> WeightPenalty:
    return Penalty.l2(model, moved(model), ewc_lambda=2.0, **options)


def block_penalty(model: nn.Module, place: torch.device, **options: Any) -> WeightPenalty:
    found = fisher_diagonal(
        model,
        [(NETWORKS["mlp"][2], labels(7))],
        "softmax",
        structure="inputs",
        accumulate_dtype=WIDE,
    )
    given: dict[str, Any] = {"factors": found.factors, "blocks": found.blocks}
    return BlockPenalty(model, found, moved(model), ewc_lambda=2.0, **given, **options)


PENALTIES = {"diagonal": diagonal_penalty, "l2": l2_penalty, "blocks": block_penalty}


@pytest.mark.parametrize("stored", [None, "cpu"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_a_penalty(kind: str, stored: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: torch.device) -> Found:
        model = network().to(WIDE).to(device)
        penalty = PENALTIES[kind](model, device, device=stored)
        value = float(penalty.value_and_add_gradient_())
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {**found, "value": value, "again": penalty.value()}

    check_same(work, monkeypatch)


def test_a_penalty_follows_a_model_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: torch.device) -> Found:
        model = network().to(WIDE)
        penalty = diagonal_penalty(model, CPU)
        model.to(device)
        penalty.add_gradient_()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    check_same(work, monkeypatch)


@pytest.mark.parametrize("stored", [None, "cpu"])
def test_the_penalty_on_merged_weights(stored: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: torch.device) -> Found:
        shapes = ((6, 5), (2, 5), (6, 2))
        weight, a, b = (
            nn.Parameter(numbers(*shape, seed=i).to(device)) for i, shape in enumerate(shapes)
        )
        weight.requires_grad_(False)
        fisher = {"w": numbers(6, 5, seed=9).square().to(device)}
        anchor = {"w": weight.detach() + 0.1}
        penalty = MergedPenalty(
            {"w": LowRank(weight, a, b, 0.5)}, fisher, anchor, ewc_lambda=2.0, device=stored
        )
        value = float(penalty.value_and_add_gradient_())
        assert a.grad is not None
        assert b.grad is not None
        return {"a": a.grad, "b": b.grad, "value": value}

    check_same(work, monkeypatch)


def test_merging(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: torch.device) -> Found:
        model = network().to(WIDE).to(device)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        total, new = fisher_of(model, CPU), fisher_of(model, device, seed=20)
        anchor = {name: values.cpu() * 0.9 for name, values in weights.items()}
        online = merge_online(total, new, gamma=0.5, weight=2.0)
        separate, around, growth = merge_separate(total, anchor, new, weights, weight=2.0)
        name = "0.weight"
        models = [
            ModelTensor(1.0, anchor[name].to(device), total[name].to(device)),
            ModelTensor(2.0, weights[name], new[name], weights[name]),
        ]
        both = merge_models(models)
        return {
            **{f"online {at}": values for at, values in online.items()},
            **{f"separate {at}": values for at, values in separate.items()},
            **{f"around {at}": values for at, values in around.items()},
            "growth": growth,
            "merged": both.weights,
            "offset": both.offset,
            "overlap": fisher_overlap(total[name].to(device), new[name]),
        }

    check_same(work, monkeypatch)


def test_online_merging_of_what_is_not_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: torch.device) -> Found:
        model = network().to(WIDE).to(device)
        total, new = fisher_of(model, device), fisher_of(model, device, seed=20)
        return merge_online(total, new, gamma=0.5, weight=2.0)

    check_same(work, monkeypatch)


def test_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: torch.device) -> Found:
        start, trained = (numbers(4, 3, seed=i).to(device) for i in range(2))
        old, new = (numbers(4, 3, seed=i).square().to(device) for i in (2, 3))
        share = fisher_share(old.cpu(), new, 0.3)
        return {
            "plain": interpolated(start.cpu(), trained, 0.3),
            "fisher": interpolated(start, trained, share, first_new=3),
        }

    check_same(work, monkeypatch)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("diagonal", "gradient"),
        ("diagonal", "proximal"),
        ("blocks", "gradient"),
        (None, "gradient"),
    ],
)
def test_training(
    kind: str | None, step: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(device: torch.device) -> Found:
        model, likelihood, batches = made("mlp", device)
        recipe = Recipe(
            penalty_step=step,
            max_grad_norm=0.1,
            gradient_accumulation_steps=2,
            optimizer=optimizer,
        )
        made_for = make_optimizer(optimizer, model.parameters(), learning_rate=0.01)
        schedule = make_scheduler("cosine", made_for, warmup_steps=1, total_steps=3)
        penalty = None if kind is None else PENALTIES[kind](model, device)
        steps = training_steps(
            model,
            batches * 3,
            get_likelihood(likelihood),
            made_for,
            schedule,
            recipe,
            penalty=penalty,
        )
        losses = {f"loss {taken.step}": taken.loss for taken in steps}
        return {**losses, **tensors_of(model)}

    check_same(work, monkeypatch, TRAINED)


def test_running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: torch.device) -> Found:
        torch.manual_seed(4)
        model = normed_network().to(WIDE).to(device)
        x = numbers(9, 6)
        batches = [(part, labels(len(part))) for part in x.split(4)]
        remeasure_statistics(model, batches)
        return tensors_of(model)

    check_same(work, monkeypatch)


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: torch.device) -> Found:
        model, kind, batches = made(name, device)
        likelihood = get_likelihood(kind)
        old = {at: values.detach().clone() for at, values in tensors_of(model).items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        far = divergence(model, old, batches, likelihood)
        outputs = model_outputs(model.eval(), *(t.to(device) for t in batches[0]))
        return {**measure(model, batches, likelihood), "divergence": far, "outputs": outputs}

    check_same(work, monkeypatch)


@simulated
def test_all_of_it_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with second_device(monkeypatch) as device:
        model, likelihood, batches = made("mlp", device)
        assert device == DEVICE
        assert all(isinstance(p, Elsewhere) for p in model.parameters())
        found = fisher_diagonal(model, batches, likelihood)
        assert all(isinstance(values, Elsewhere) for values in found.values())
