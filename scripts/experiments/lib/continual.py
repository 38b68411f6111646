"""Learning tasks one after the other in one process, through the library's own functions.

The loop is `training_steps`, the Fisher `fisher_diagonal`, the merge `merge_online` or
`merge_separate`, the penalty `Penalty`, the score `measure`: what the commands do, without files.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from consolidate.estimation.estimates import FisherDiagonal
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.ewc import factor_merging
from consolidate.ewc.block_penalty import BlockPenalty
from consolidate.ewc.fisher_merging import merge_online, merge_separate
from consolidate.ewc.penalty import Penalty, WeightPenalty
from consolidate.options import Recipe
from consolidate.training.evaluation import measure
from consolidate.training.loop import (
    data_order,
    make_optimizer,
    make_scheduler,
    seeded,
    training_steps,
)
from formats.fisher_json import Block
from scripts.experiments.lib.mnist_files import DEVIATION, MEAN, load
from scripts.experiments.lib.networks import mlp

Batches = Iterator[tuple[Tensor, Tensor]]
SQUARED_BATCH = "squared batch gradient"
"""Not a Fisher; what most software ships in its place."""
TESTED = 2000
"""Examples that are evaluated at a time."""


@dataclass(frozen=True)
class Method:
    """How a chain of tasks is learned: the settings of a unit of work."""

    sizes: tuple[int, ...] = (784, 400, 400, 10)
    dropout: bool = False
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.0
    batch_size: int = 256
    steps: int = 1000  # of each task
    penalty: str = "ewc"  # ewc, l2 or none
    ewc_lambda: float = 0.0
    penalty_step: str = "gradient"
    merge_rule: str = "online"
    gamma: float = 1.0
    task_weight: str = "one"  # one, or trace: tr F_1 / tr F_t
    estimator: str = "exact"
    fisher_examples: int = 2000
    fisher_batch: int = 250
    every: int = 0  # steps between looks at the scores, if there are any before the end
    mixed_precision: str = "no"  # or bf16: of the products in training, not of the Fisher
    patience: int = 0  # looks at which the validation error may rise, one after the other; 0: any


def settings_of(method: Method, **others: Any) -> dict[str, Any]:
    """Return the settings of a unit: those of the method, and others."""
    return {**others, **asdict(method), "sizes": list(method.sizes)}


def method_of(settings: dict[str, Any]) -> Method:
    """Return the method that the settings of a unit state."""
    own = {key: settings[key] for key in asdict(Method())}
    return Method(**{**own, "sizes": tuple(own["sizes"])})


class Part(NamedTuple):
    """Examples of a task: images, and the order in which the task has their pixels."""

    inputs: Tensor  # (N, pixels) float32
    labels: Tensor  # (N,) int64
    order: Tensor | None = None  # (pixels,)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return some of the examples."""
        inputs = self.inputs[rows]
        return inputs if self.order is None else inputs[:, self.order], self.labels[rows]

    def ordered(self) -> "Part":
        """Return the examples with their pixels put in order, all at once."""
        return self if self.order is None else Part(self.inputs[:, self.order], self.labels)

    def batches(self, size: int, most: int | None = None) -> Batches:
        """Yield the first examples, in order, so many at a time."""
        count = len(self.labels) if most is None else min(most, len(self.labels))
        for rows in torch.arange(count).split(size):
            yield self.rows(rows)


class Task(NamedTuple):
    """A task's examples, and which outputs of the network it uses."""

    train: Part
    validation: Part
    test: Part
    outputs: slice = slice(None)


class Network(nn.Module):
    """A fully connected network of which a task may use some outputs only."""

    def __init__(self, sizes: Sequence[int], *, dropout: bool = False):
        super().__init__()
        self.layers = mlp({"sizes": sizes, "dropout": dropout})
        self.outputs = slice(None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of the classes of the present task."""
        return self.layers(inputs)[:, self.outputs]


@dataclass
class Memory:
    """What is kept of the tasks before: Λ, μ, R, and the trace of each task's Fisher."""

    total: dict[str, Tensor] = field(default_factory=dict)
    anchor: dict[str, Tensor] = field(default_factory=dict)
    traces: list[float] = field(default_factory=list)
    factors: dict[str, Tensor] = field(default_factory=dict)  # R by block name, if measured
    blocks: dict[str, Block] = field(default_factory=dict)
    factor_anchor: dict[str, Tensor] = field(default_factory=dict)  # of the rule separate


def permuted_tasks(
    name: str, orders: Sequence[Tensor | None], *, side: int = 28, standardised: bool = True
) -> list[Task]:
    """Make a task of each order of the pixels.

    Args:
        name: Of the data, as `load` knows it.
        orders: Permutations of side² pixels; None leaves them as they are.
        side: The images are padded with zeros to side × side.
        standardised: Whether pixels have mean 0 and deviation 1, or are in [0, 1].

    Returns:
        The tasks; they share the images.
    """
    parts = {}
    for part, (pixels, labels) in load(name).items():
        if side > 28:
            before = (side - 28) // 2
            after = side - 28 - before
            images = pad(pixels.view(-1, 28, 28), (before, after, before, after))
            pixels = images.flatten(1)
        parts[part] = ((pixels - MEAN) / DEVIATION if standardised else pixels, labels)
    return [
        Task(
            Part(*parts["train"], order),
            Part(*parts["validation"], order),
            Part(*parts["test"], order),
        )
        for order in orders
    ]


def random_orders(count: int, pixels: int, seed: int) -> list[Tensor | None]:
    """Return the identity, as None, and count − 1 random permutations."""
    generator = torch.Generator().manual_seed(seed)
    return [None, *(torch.randperm(pixels, generator=generator) for _ in range(count - 1))]


def split_tasks(
    name: str,
    *,
    own_outputs: bool,
    digits: Sequence[int] = tuple(range(10)),
    standardised: bool = True,
) -> list[Task]:
    """Make five tasks of two digits each.

    Args:
        name: Of the data, as `load` knows it.
        own_outputs: Whether each task uses its own two of the ten outputs, or all use all ten.
        digits: All ten; the first two are those of the first task.
        standardised: Whether pixels have mean 0 and deviation 1, or are in [0, 1].

    Returns:
        The tasks.
    """
    tasks = []
    for first in range(0, 10, 2):
        one, other = digits[first : first + 2]
        parts = {}
        for part, (pixels, labels) in load(name).items():
            some = ((labels == one) | (labels == other)).nonzero().flatten()
            inputs = (pixels[some] - MEAN) / DEVIATION if standardised else pixels[some]
            own = (labels[some] == other).long() if own_outputs else labels[some]
            parts[part] = Part(inputs, own)
        outputs = slice(first, first + 2) if own_outputs else slice(None)
        tasks.append(Task(parts["train"], parts["validation"], parts["test"], outputs))
    return tasks


def learn_chain(
    tasks: Sequence[Task],
    method: Method,
    seed: int,
    *,
    first: Network | None = None,
    optimizer_kept: bool = False,
    structure: str = "diagonal",
    look: Callable[[Network, int, int], None] = lambda network, task, step: None,
    learned: Callable[[Network, int], None] = lambda network, task: None,
) -> tuple[Network, Memory]:
    """Learn the tasks one after the other.

    Args:
        tasks: In this order.
        method: How.
        seed: Of the weights, of the order of the examples and of labels that are sampled.
        first: What has learned the first task already, by `learn_first`; left as it is.
        optimizer_kept: Whether its moments go from task to task, or each starts anew.
        structure: Of the Fisher: diagonal or inputs.
        look: Called after every `method.every` steps with the network, the task's number and the
            steps taken on it.
        learned: Called after each task with the network and the task's number.

    Returns:
        The network, and what is remembered of all of them.

    Raises:
        ValueError: The optimizer is to be kept, but the first task was learned with another; or
            matrices are combined with proximal steps.
    """
    if structure != "diagonal" and method.penalty_step == "proximal":
        raise ValueError("the penalty by matrices has no proximal step: use gradient steps")
    if first is not None and optimizer_kept:
        raise ValueError("the moments of the first task are not known: leave first out")
    network = new_network(method, seed) if first is None else deepcopy(first)
    memory = Memory()
    optimizer = new_optimizer(method, network)
    for number, task in enumerate(tasks):
        network.outputs = task.outputs
        penalty: WeightPenalty | None = None
        if number and method.penalty == "l2":
            penalty = Penalty.l2(network, ewc_lambda=method.ewc_lambda)
        elif number and method.penalty == "ewc":
            penalty = _penalty(network, memory, method.ewc_lambda)
        if number or first is None:
            learn(
                network,
                [task],
                method,
                seed + 1000 * number,
                optimizer=optimizer if optimizer_kept else None,
                penalty=penalty,
                seen=tasks[: number + 1],
                look=lambda step, number=number: look(network, number, step),  # type: ignore[misc]
            )
        learned(network, number)
        if method.penalty == "ewc":
            remember(memory, network, task.train, method, seed, structure)
    return network, memory


def _penalty(network: Network, memory: Memory, strength: float) -> WeightPenalty:
    if not memory.factors:
        return Penalty(network, memory.total, memory.anchor, ewc_lambda=strength)
    return BlockPenalty(
        network,
        memory.total,
        memory.anchor,
        factors=memory.factors,
        blocks=memory.blocks,
        factor_anchor=memory.factor_anchor,
        ewc_lambda=strength,
    )


def learn_first(task: Task, method: Method, seed: int) -> Network:
    """Learn the first task of a chain, on which neither Fisher nor penalty has a bearing."""
    network = new_network(method, seed)
    network.outputs = task.outputs
    learn(network, [task], method, seed)
    return network


def new_network(method: Method, seed: int) -> Network:
    """Make a network with random weights."""
    with seeded(seed):
        return Network(method.sizes, dropout=method.dropout)


def new_optimizer(method: Method, network: Network) -> torch.optim.Optimizer:
    """Make the method's optimizer of all weights."""
    return make_optimizer(
        method.optimizer,
        network.parameters(),
        learning_rate=method.learning_rate,
        momentum=method.momentum,
    )


def learn(
    network: Network,
    tasks: Sequence[Task],
    method: Method,
    seed: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    penalty: WeightPenalty | None = None,
    seen: Sequence[Task] = (),
    look: Callable[[int], None] = lambda step: None,
) -> int:
    """Train a network on one task, or on several at once.

    Args:
        network: Trained in place.
        tasks: Of which the batches are made.
        method: How, and how long; early stopping goes back to the best weights.
        seed: Of the order of the examples, and of dropout.
        optimizer: A new one unless given.
        penalty: What holds the tasks before.
        seen: The tasks whose mean validation error ends training early.
        look: Called after every `method.every` steps, and at the end.

    Returns:
        The steps taken.
    """
    optimizer = optimizer or new_optimizer(method, network)
    hook = None
    if isinstance(penalty, Penalty) and method.penalty_step == "proximal":
        # As `training_steps` takes it, without the penalty's value in every step.
        hook = optimizer.register_step_post_hook(penalty.proximal_step_)
        penalty = None
    scheduler = make_scheduler("constant", optimizer, warmup_steps=0, total_steps=method.steps)
    batches = _endless(tasks, method.batch_size, seed)
    step, rises, lowest, before = 0, 0, float("inf"), float("inf")
    kept: dict[str, Tensor] = {}
    with seeded(seed):
        while step < method.steps:
            some = min(method.every or method.steps, method.steps - step)
            for taken in training_steps(
                network,
                islice(batches, some),
                get_likelihood("softmax"),
                optimizer,
                scheduler,
                Recipe(mixed_precision=method.mixed_precision),
                penalty=penalty,
                first_step=step,
            ):
                step = taken.step
            look(step)
            if method.patience:
                error = 1 - score(network, seen, "validation")
                if error < lowest:
                    lowest = error
                    kept = {name: p.detach().clone() for name, p in network.named_parameters()}
                rises = rises + 1 if error > before else 0
                before = error
                if rises > method.patience:
                    break
    if hook is not None:
        hook.remove()
    if kept:
        network.load_state_dict(kept)
    return step


def remember(
    memory: Memory,
    network: Network,
    part: Part,
    method: Method,
    seed: int,
    structure: str = "diagonal",
) -> None:
    """Measure the Fisher of what was learned, and merge it into what is kept."""
    fisher = fisher_of(network, part, method, seed, structure)
    memory.traces.append(sum(float(values.double().sum()) for values in fisher.values()))
    weight = memory.traces[0] / memory.traces[-1] if method.task_weight == "trace" else 1.0
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    if method.merge_rule == "separate":
        memory.total, memory.anchor, _ = merge_separate(
            memory.total, memory.anchor, fisher, weights, weight=weight
        )
    else:
        memory.total = merge_online(memory.total, fisher, gamma=method.gamma, weight=weight)
        memory.anchor = weights
    if not isinstance(fisher, FisherDiagonal) or not fisher.factors:
        return
    memory.blocks = fisher.blocks
    if method.merge_rule == "separate":
        memory.factors, memory.factor_anchor, _ = factor_merging.separate(
            memory.factors,
            memory.factor_anchor,
            fisher.factors,
            weights,
            fisher.blocks,
            weight=weight,
        )
    else:
        memory.factors = factor_merging.online(
            memory.factors, fisher.factors, gamma=method.gamma, weight=weight
        )


def fisher_of(
    network: Network, part: Part, method: Method, seed: int, structure: str = "diagonal"
) -> FisherDiagonal | dict[str, Tensor]:
    """Measure the Fisher of a task by the method's estimator, on its first examples."""
    batches = part.batches(method.fisher_batch, method.fisher_examples)
    if method.estimator == SQUARED_BATCH:
        return squared_batch_gradients(network, batches)
    return fisher_diagonal(
        network,
        batches,
        "softmax",
        estimator=method.estimator,
        structure=structure,
        seed=seed,
    )


def squared_batch_gradients(network: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Return (1/batches) Σ_batches (∇ mean loss of a batch's own labels)², which is no Fisher.

    The gradients of a batch cancel before they are squared, the more the larger it is.
    """
    squares = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    count = 0
    for inputs, labels in batches:
        network.zero_grad()
        cross_entropy(network(inputs), labels).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            squares[name] += parameter.grad.square()
        count += 1
    network.zero_grad()
    return {name: values / count for name, values in squares.items()}


@torch.no_grad()
def score(network: Network, tasks: Sequence[Task], part: str) -> float:
    """Return the mean accuracy over tasks on their validation or test examples."""
    return sum(scores(network, tasks, part)) / len(tasks)


def scores(network: Network, tasks: Sequence[Task], part: str) -> list[float]:
    """Return the accuracy on each task's validation or test examples."""
    found = []
    outputs = network.outputs
    for task in tasks:
        network.outputs = task.outputs
        batches = getattr(task, part).batches(TESTED)
        found.append(measure(network, batches, get_likelihood("softmax"))["accuracy"])
    network.outputs = outputs
    return found


def seconds(method: Method, tasks: int, structure: str = "diagonal") -> float:
    """Return about how long a chain takes on one core: its steps, and each task's Fisher."""
    weights = sum(a * b for a, b in zip(method.sizes, method.sizes[1:], strict=False))
    product, held = (4.2e-11, 1e-9) if method.mixed_precision == "no" else (0.9e-11, 1.7e-9)
    if method.penalty != "none":
        held += 3e-9
    step = 0.9e-3 + product * weights * method.batch_size + held * weights
    if structure == "inputs":  # ΔW R of each layer but the head
        step += 2.3e-11 * sum(a * a * b for a, b in pairwise(method.sizes[:-1]))
    fisher = 4.2e-11 * weights * 9 * method.fisher_examples if method.penalty == "ewc" else 0.0
    return tasks * (step * method.steps + fisher)


def _endless(tasks: Sequence[Task], size: int, seed: int) -> Batches:
    """Yield batches without end; of several tasks each batch has some of each."""
    share = -(-size // len(tasks))
    trained = [task.train.ordered() for task in tasks]  # once, not row by row in every step
    cut = [_rows(len(part.labels), share, seed + i) for i, part in enumerate(trained)]
    while True:
        parts = [part.rows(next(rows)) for part, rows in zip(trained, cut, strict=True)]
        yield torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _rows(count: int, size: int, seed: int) -> Iterator[Tensor]:
    for order in data_order(count, seed):
        yield from torch.tensor(order).split(size)
