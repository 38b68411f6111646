"""Ten permutations of the pixels of MNIST, with a small network of two hidden layers."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scripts.experiments.lib.networks import mlp
from scripts.experiments.lib.tokenized import data_digest
from scripts.experiments.lib.tuning import Setting, Task

NAME = "permutations"
COUNT = 10
SIZES = {"train": 12800, "validation": 300, "test": 500}
FOLDER = "mnist/package/data"
NEEDS = tuple(
    f"{FOLDER}/{part}-{kind}-ubyte"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
DATA = "e9914cff2ade526d"
MEAN, DEVIATION = 0.1307, 0.3081
Row = tuple[int, bool, int]  # a permutation, whether of MNIST's test images, which image


class Stage:
    """A permutation that is new, and those before it."""

    name = NAME
    batch_size = 64
    old_steps = 0
    old_rate = 0.0
    fisher_rows = 1000
    likelihood = "softmax"
    estimator = "exact"
    head = "4."

    def __init__(self, chain: "Chain", number: int):
        """Take a task of the chain, and those before it."""
        self.chain, self.number, self.seed = chain, number, chain.seed
        self.new = chain.tasks[number]
        before = chain.tasks[:number]
        rows = [[row for some in part for row in some] for part in zip(*before, strict=True)]
        self.old = Task(*rows) if rows else Task((), (), ())
        self.steps = chain.steps

    def fresh(self) -> nn.Module:
        """Return the chain's model."""
        return self.chain.fresh()

    def batch(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Put rows together, the labels beside them."""
        images, labels = [], []
        for task, test, place in rows:
            source = self.chain.images[test]
            images.append(source[0][place][self.chain.orders[task]])
            labels.append(source[1][place])
        return torch.stack(images), torch.stack(labels)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Return what the model says of each image, (N, 10)."""
        logits: Tensor = model(batch[0])
        return logits

    def old_logits(self, model: nn.Module, batch: Any, logits: Tensor | None = None) -> Tensor:
        """Return what the old tasks' outputs say: all tasks have the same."""
        return self.logits(model, batch) if logits is None else logits

    def loss_of(self, logits: Tensor, batch: Any) -> Tensor:
        """Return the mean loss of a batch whose logits these are."""
        return cross_entropy(logits, batch[1])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""
        return self.loss_of(self.logits(model, batch), batch)

    def outcomes(self, model: nn.Module, rows: Sequence[Row]) -> list[float]:
        """Say of each row whether it is put into its class."""
        batch = self.batch(rows)
        found: list[float] = (self.logits(model, batch).argmax(1) == batch[1]).float().tolist()
        return found

    def fisher_batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield inputs and labels of rows of the task before."""
        rows = self.chain.tasks[self.number - 1].train[: self.fisher_rows]
        for first in range(0, len(rows), 250):
            yield self.batch(rows[first : first + 250])

    def layers(self) -> list[tuple[str, ...]]:
        """Return what names of parameters begin with, layer by layer."""
        return [("0.",), ("2.",)]


class Chain:
    """The permutations, the first of which leaves the pixels where they are."""

    name = NAME
    first_rate = 1e-3
    steps = 200
    sizes = (784, 256, 256, 10)

    def __init__(self, raw: Path, seed: int):
        """Choose the seed's permutations and images."""
        self.seed = seed
        self.images = _images(raw)
        self._choose(SIZES, COUNT)

    def _choose(self, sizes: dict[str, int], count: int) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        pixels = self.images[False][0].shape[1]
        self.orders = [torch.arange(pixels)]
        self.orders += [torch.randperm(pixels, generator=generator) for _ in range(count - 1)]
        self.tasks: list[Task] = []
        for task in range(count):
            parts: list[list[Row]] = []
            for test, wanted in ((False, ("train", "validation")), (True, ("test",))):
                order = torch.randperm(len(self.images[test][1]), generator=generator).tolist()
                for part in wanted:
                    some, order = order[: sizes[part]], order[sizes[part] :]
                    parts.append([(task, test, place) for place in some])
            self.tasks.append(Task(*parts))

    def stage(self, number: int) -> Setting:
        """Return what a method is given at a task."""
        return Stage(self, number)

    def fresh(self) -> nn.Module:
        """Return the network with random weights."""
        torch.manual_seed(self.seed)
        return mlp({"sizes": self.sizes})


class Quick(Chain):
    """The same with a few random images, and a tiny network."""

    steps = 4
    sizes = (16, 12, 12, 3)

    def __init__(self, raw: Path, seed: int):
        """Make up images."""
        del raw
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 3, (400,), generator=generator)
        images = torch.randn(400, 16, generator=generator) + labels[:, None]
        self.images = {False: (images, labels), True: (images, labels)}
        self._choose({"train": 256, "validation": 32, "test": 40}, 3)


@cache
def _images(raw: Path) -> dict[bool, tuple[Tensor, Tensor]]:
    """Read images, (N, 784) of mean 0 and deviation 1, and labels, by whether of the test."""
    found = {}
    for test, part in ((False, "train"), (True, "t10k")):
        pixels = np.fromfile(raw / FOLDER / f"{part}-images-idx3-ubyte", np.uint8)[16:]
        labels = np.fromfile(raw / FOLDER / f"{part}-labels-idx1-ubyte", np.uint8)[8:]
        images = torch.from_numpy(pixels.reshape(-1, 784)).float() / 255
        found[test] = ((images - MEAN) / DEVIATION, torch.from_numpy(labels).long())
    return found


@cache
def digest(raw: Path) -> str:
    """Return the digest of the images and labels."""
    return data_digest((), [raw / name for name in NEEDS])
