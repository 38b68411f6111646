"""Digits of MNIST, upright, then turned, with a convolutional network that read house numbers."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from scripts.experiments.lib.tokenized import data_digest
from scripts.experiments.lib.tuning import Task

NAME = "vision"
SIZES = {"train": 3840, "validation": 300, "test": 1000}
IMAGES = "mnist/package/data"
WEIGHTS = "ccexam/ccexam/weights/svhn.pth"
NEEDS = (
    *(
        f"{IMAGES}/{part}-{kind}-ubyte"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ),
    WEIGHTS,
)
DATA = "c37dc69ca694ae34"
PIXELS = 32
MEANS = (0.4377, 0.4438, 0.4728)  # of SVHN, by colour, as the network was trained
DEVIATIONS = (0.1980, 0.2010, 0.1970)
Row = tuple[bool, bool, int]  # whether turned, whether of MNIST's test images, which image


class FrozenNorm(nn.BatchNorm2d):
    """A batch norm whose running statistics stay as they are while its weights are trained."""

    def train(self, mode: bool = True) -> "FrozenNorm":
        """Stay in eval mode."""
        del mode
        return super().train(False)


class Network(nn.Module):
    """Three blocks of two convolutions, each with batch norm, and two linear layers."""

    def __init__(self, widths: Sequence[int], hidden: int):
        super().__init__()
        blocks, before = [], 3
        for width in widths:
            layers: list[nn.Module] = []
            for inputs in (before, width):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), FrozenNorm(width), nn.ReLU()]
            blocks.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
            before = width
        self.features = nn.Sequential(*blocks)
        inputs = before * (PIXELS // 2 ** len(widths)) ** 2
        self.classifier = nn.Sequential(
            *(nn.Dropout(0.3), nn.Linear(inputs, hidden), nn.ReLU()),
            *(nn.Dropout(0.3), nn.Linear(hidden, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of (N, 3, 32, 32)."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


class Setting:
    """Images of both tasks, the same ten labels."""

    name = NAME
    batch_size = 32
    steps = 120
    old_steps = 240
    old_rate = 1e-3
    fisher_rows = 400
    likelihood = "softmax"
    estimator = "exact"
    head = "classifier.4."

    def __init__(self, raw: Path, seed: int):
        """Choose the seed's images: no image of one task is in the other."""
        self.seed = seed
        self.weights: Path | None = raw / WEIGHTS
        self.images = _images(raw)
        self._choose(SIZES)

    def _choose(self, sizes: dict[str, int]) -> None:
        # The strengths were chosen with the images of 0, test images too: they are not used.
        generator = torch.Generator().manual_seed(self.seed + 1)
        orders = {
            test: torch.randperm(len(self.images[test][1]), generator=generator).tolist()
            for test in (False, True)
        }
        tasks = []
        for turned in (False, True):
            parts: list[list[Row]] = []
            for part, size in sizes.items():
                test = part == "test"
                some, orders[test] = orders[test][:size], orders[test][size:]
                parts.append([(turned, test, place) for place in some])
            tasks.append(Task(*parts))
        self.old, self.new = tasks

    def fresh(self) -> nn.Module:
        """Return the network as it was published."""
        assert self.weights is not None
        network = Network((32, 64, 128), 256)
        network.load_state_dict(torch.load(self.weights, "cpu", weights_only=True))
        return network

    def batch(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Put rows together, the labels beside them."""
        images, labels = [], []
        for turned, test, place in rows:
            pixels, names = self.images[test]
            image = pixels[place].float() / 255
            images.append(image.rot90() if turned else image)
            labels.append(names[place])
        size = (PIXELS, PIXELS)
        grey = interpolate(torch.stack(images)[:, None], size, mode="bilinear", antialias=True)
        means, deviations = (torch.tensor(some).view(1, 3, 1, 1) for some in (MEANS, DEVIATIONS))
        return (grey - means) / deviations, torch.stack(labels)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Return what the model says of each image, (N, 10)."""
        logits: Tensor = model(batch[0])
        return logits

    def old_logits(self, model: nn.Module, batch: Any, logits: Tensor | None = None) -> Tensor:
        """Return what the old task's outputs say: both tasks have the same."""
        return self.logits(model, batch) if logits is None else logits

    def loss_of(self, logits: Tensor, batch: Any) -> Tensor:
        """Return the mean loss of a batch whose logits these are."""
        return cross_entropy(logits, batch[1])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""
        return self.loss_of(self.logits(model, batch), batch)

    def outcomes(self, model: nn.Module, rows: Sequence[Row]) -> list[float]:
        """Say of each row whether it is put into its class."""
        found: list[float] = []
        for first in range(0, len(rows), 100):
            batch = self.batch(rows[first : first + 100])
            found += (self.logits(model, batch).argmax(1) == batch[1]).float().tolist()
        return found

    def fisher_batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield inputs and labels of the first training images of the old task."""
        rows: Sequence[Row] = self.old.train[: self.fisher_rows]
        for first in range(0, len(rows), 40):
            yield self.batch(rows[first : first + 40])

    def layers(self) -> list[tuple[str, ...]]:
        """Return what names of parameters begin with, block by block."""
        return [("features.0.",), ("features.1.",), ("features.2.",), ("classifier.1.",)]


class Quick(Setting):
    """The same with a few images of noise and a bright stripe, and a narrow network."""

    batch_size, steps, old_steps, old_rate, fisher_rows = 8, 30, 60, 3e-3, 8

    def __init__(self, raw: Path, seed: int):
        """Make up images: where the stripe is, is the label."""
        del raw
        self.seed, self.weights = seed, None
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 10, (200,), generator=generator)
        images = torch.randint(0, 60, (200, 28, 28), generator=generator, dtype=torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[2 * label + 2 : 2 * label + 6] += 150
        self.images = {False: (images, labels), True: (images, labels)}
        self._choose({"train": 40, "validation": 16, "test": 24})

    def fresh(self) -> nn.Module:
        """Return a narrow network of random weights, with the statistics of some images."""
        torch.manual_seed(self.seed)
        network = Network((4, 8, 8), 16)
        norms = [one for one in network.modules() if isinstance(one, FrozenNorm)]
        for norm in norms:
            norm.training, norm.momentum = True, 1.0
        with torch.no_grad():
            network(self.batch(self.old.train)[0])
        return network.eval()


@cache
def _images(raw: Path) -> dict[bool, tuple[Tensor, Tensor]]:
    """Read images, (N, 28, 28) bytes, and labels, by whether of the test."""
    found = {}
    for test, part in ((False, "train"), (True, "t10k")):
        pixels = np.fromfile(raw / IMAGES / f"{part}-images-idx3-ubyte", np.uint8)[16:]
        labels = np.fromfile(raw / IMAGES / f"{part}-labels-idx1-ubyte", np.uint8)[8:]
        images = torch.from_numpy(pixels.reshape(-1, 28, 28))
        found[test] = (images, torch.from_numpy(labels).long())
    return found


@cache
def digest(raw: Path) -> str:
    """Return the digest of the images, the labels and the network's file."""
    return data_digest((), [raw / name for name in NEEDS])
