"""What the tests of several processes run, in each of them and in one alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from consolidate.estimation.estimates import FisherDiagonal
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.estimation.passes import PartialPass
from consolidate.ewc.penalty import Penalty
from consolidate.options import Recipe
from consolidate.runtime.distributed import dealt, is_first, place_in, process_group, shares
from consolidate.runtime.shards import shard, whole
from consolidate.training.evaluation import measure
from consolidate.training.loop import (
    Step,
    data_order,
    make_optimizer,
    make_scheduler,
    training_steps,
)
from formats.errors import UsageError

Cases = dict[str, Callable[..., Any]]


class Block(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.layer(hidden))


class Tied(nn.Module):
    """Tokens in and out through one table, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.body = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        for block in self.body:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


def network() -> nn.Module:
    """Make a classifier with a frozen layer, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)]
        model = nn.Sequential(*layers).double()
    model[2].bias.requires_grad_(False)
    return model


def tied() -> nn.Module:
    """Make a language model with a tied table, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Tied().double()


def vectors(count: int) -> tuple[Tensor, Tensor]:
    """Give that many examples for `network`."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=generator)


def sentences(count: int) -> tuple[Tensor, Tensor]:
    """Give that many examples for `tied`, some of whose positions are not predicted."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(11, (count, 9), generator=generator)
    labels = ids.roll(-1, 1)
    for row in range(count):
        labels[row, row % 7 + 2 :] = -100
    return ids, labels


def measured(
    group: ProcessGroup | None,
    make: Callable[[], nn.Module],
    data: tuple[Tensor, Tensor],
    likelihood: str,
    *,
    cut: bool = False,
    **options: Any,
) -> FisherDiagonal:
    """Measure a Fisher on batches of four that were dealt to the processes."""
    inputs, labels = data
    order = dealt(range(len(labels)), 4, group)
    chunks = [list(order[start : start + 4]) for start in range(0, len(order), 4)]
    model = make()
    if cut and group is not None:
        shard(model, group, torch.device("cpu"))
        with pytest.raises(UsageError, match="a sharded model needs group"):
            fisher_diagonal(model, [], likelihood)
    return fisher_diagonal(
        model,
        [(inputs[chunk], labels[chunk]) for chunk in chunks],
        likelihood,
        indices=order,
        accumulate_dtype=torch.float64,
        group=group,
        **options,
    )


SHARDED: Cases = {
    "sharded exact": lambda group: measured(group, network, vectors(30), "softmax", cut=True),
    "sharded tokens": lambda group: measured(
        group, tied, sentences(21), "token-softmax", cut=True, estimator="mc", mc_samples=2, seed=6
    ),
    "sharded batched": lambda group: measured(
        group, tied, sentences(22), "token-softmax", cut=True, estimator="batched", seed=7
    ),
}
FISHERS: Cases = {
    "exact": lambda group: measured(group, network, vectors(30), "softmax"),
    "mc": lambda group: measured(
        group, network, vectors(29), "softmax", estimator="mc", mc_samples=2, seed=5
    ),
    "empirical": lambda group: measured(
        group, tied, sentences(23), "token-softmax", estimator="empirical"
    ),
    "tokens": lambda group: measured(
        group, tied, sentences(21), "token-softmax", estimator="mc", seed=6
    ),
    "batched": lambda group: measured(
        group, network, vectors(26), "softmax", estimator="batched", seed=7
    ),
    "one batch": lambda group: measured(group, network, vectors(3), "softmax"),
    "inputs": lambda group: measured(group, network, vectors(30), "softmax", structure="inputs"),
}


def told(diagonal: FisherDiagonal) -> dict[str, Any]:
    """Give all that a Fisher says of itself, and its tensors."""
    counts = vars(diagonal) | {"factors": None, "blocks": list(diagonal.blocks)}
    return {"tensors": {**diagonal, **diagonal.factors}, **counts}


def settled(group: ProcessGroup | None) -> list[int]:
    """Stop by a tolerance; every process gives how many examples were read in all."""
    options = {"estimator": "mc", "tolerance": 0.2}
    number, size = place_in(group)
    counts = torch.zeros(size, dtype=torch.long)
    counts[number] = measured(group, network, vectors(400), "softmax", **options).examples
    if group is not None:
        torch.distributed.all_reduce(counts)
    return counts.tolist()


def going_on(group: ProcessGroup | None, tolerance: float) -> bool:
    """Go on with a pass of which only the first process has kept a part; say if it is the same."""
    kept: list[PartialPass] = []

    def keep(partial: PartialPass) -> None:
        tensors = {name: tensor.clone() for name, tensor in partial.tensors.items()}
        kept.append(PartialPass(tensors, partial.levels, partial.most))

    options: dict[str, Any] = {"estimator": "mc", "tolerance": tolerance}
    whole = measured(group, network, vectors(290), "softmax", keep=keep, **options)
    start = kept[0] if is_first(group) else None
    rest = measured(group, network, vectors(290), "softmax", start=start, **options)
    same = [torch.equal(values, rest[name]) for name, values in whole.items()]
    return all(same) and vars(whole) == vars(rest)


def trained(
    group: ProcessGroup | None,
    make: Callable[[], nn.Module],
    data: tuple[Tensor, Tensor],
    name: str,
    *,
    batch: int,
    accumulate: int = 1,
    optimizer: str = "adamw",
    rate: float = 1e-2,
    max_grad_norm: float | None = None,
    penalty_step: str = "gradient",
    norm_statistics: str = "frozen",
    cut: bool = False,
) -> dict[str, Any]:
    """Train two epochs with a penalty; the batch is that of all processes together."""
    inputs, labels = data
    model = make()
    generator = torch.Generator().manual_seed(8)
    fisher = {
        name: torch.rand(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    if cut and group is not None:
        shard(model, group, torch.device("cpu"))
    penalty = Penalty(model, fisher, ewc_lambda=0.3)
    descent = make_optimizer(
        optimizer, model.parameters(), learning_rate=rate, momentum=0.9 * (optimizer == "sgd")
    )
    schedule = make_scheduler("linear", descent, warmup_steps=2, total_steps=40)
    recipe = Recipe(
        penalty_step=penalty_step,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=max_grad_norm,
        norm_statistics=norm_statistics,
    )
    steps: list[Step] = []
    orders = data_order(len(labels), 9)
    for _ in range(2):
        order = next(orders)
        each = shares(order, batch // place_in(group)[1], group)
        steps += training_steps(
            model,
            ((inputs[list(share)], labels[list(share)]) if share else None for share in each),
            get_likelihood(name),
            descent,
            schedule,
            recipe,
            penalty=penalty,
            first_step=len(steps),
            group=group,
        )
    metrics = measure(
        model,
        [(inputs[i : i + 5], labels[i : i + 5]) for i in range(0, len(labels), 5)]
        if group is None
        else [(inputs[list(i)], labels[list(i)]) for i in shares(order, 5, group) if i],
        get_likelihood(name),
        group=group,
    )
    return {
        "tensors": {name: whole(tensor) for name, tensor in model.state_dict().items()},
        "steps": [vars(step) for step in steps],
        "penalty": penalty.value(),
        "metrics": metrics,
    }


def statistics(group: ProcessGroup | None) -> Tensor:
    """Give the running means after one step on three rows, which no two processes share evenly."""
    inputs = torch.arange(18, dtype=torch.float64).reshape(3, 6) ** 2
    model = nn.Sequential(nn.Unflatten(1, (3, 2)), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(6, 2))
    descent = make_optimizer("sgd", model.double().parameters(), learning_rate=0.1)
    schedule = make_scheduler("constant", descent, warmup_steps=0, total_steps=1)
    each = shares([0, 1, 2], 4 // place_in(group)[1], group)
    parts = ((inputs[list(s)], torch.zeros(len(s), dtype=torch.int64)) if s else None for s in each)
    recipe, likelihood = Recipe(norm_statistics="update"), get_likelihood("softmax")
    list(training_steps(model, parts, likelihood, descent, schedule, recipe, group=group))
    return torch.as_tensor(model[1].running_mean)


TRAININGS: Cases = {
    # 25 examples in batches of 6: the last one holds a single example, which one process has.
    "adamw": lambda group: trained(group, network, vectors(25), "softmax", batch=6),
    "clipped, accumulated": lambda group: trained(
        group, network, vectors(25), "softmax", batch=6, accumulate=2, max_grad_norm=0.05
    ),
    "tokens, tied": lambda group: trained(
        group, tied, sentences(23), "token-softmax", batch=12, optimizer="sgd", rate=0.1
    ),
    "sharded": lambda group: trained(
        group, network, vectors(25), "softmax", batch=6, max_grad_norm=0.05, cut=True
    ),
    "sharded, tied, accumulated": lambda group: trained(
        group, tied, sentences(23), "token-softmax", batch=6, accumulate=2, cut=True
    ),
    "sharded, proximal": lambda group: trained(
        group, tied, sentences(23), "token-softmax", batch=6, penalty_step="proximal", cut=True
    ),
    "proximal": lambda group: trained(
        group, network, vectors(31), "softmax", batch=6, penalty_step="proximal"
    ),
}


def write_found(folder: Path) -> None:
    """Run all cases; the first process writes what they gave."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with process_group() as group:
        for name, case in {**FISHERS, **SHARDED}.items():
            found[name] = told(case(group))
        for name, case in TRAININGS.items():
            found[name] = case(group)
        found["statistics"] = statistics(group)
        found["settled"] = settled(group)
        found["going on"] = going_on(group, 0.05)
        if is_first(group):
            torch.save(found, folder / "found.pt")
