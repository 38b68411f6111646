"""Fine-tuning in plain torch: one straight loop for every method, and the scores after it."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from scripts.experiments.lib.kept import kept

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]
PARTS = ("validation", "test")


class Done(NamedTuple):
    """What a training took."""

    steps: int
    seconds: float  # of the processor


class Task(NamedTuple):
    """Rows of a task; what a row is, its setting knows."""

    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]


class Setting(Protocol):
    """What a model has learned, what it is to learn, and how: all of it for one seed."""

    name: str
    seed: int
    old: Task
    new: Task
    batch_size: int
    steps: int  # on the new task
    old_steps: int  # on the old task, before; 0 where the model comes with it
    old_rate: float
    fisher_rows: int
    likelihood: str
    estimator: str
    head: str  # parameters whose names begin so are the output layer; "" where it is tied

    def fresh(self) -> nn.Module:
        """Return the model as it was before the old task."""

    def batch(self, rows: Sequence[Any]) -> Batch:
        """Put rows together, the labels beside them."""

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return what the model says of each example or token, (N, classes), float32."""

    def old_logits(self, model: nn.Module, batch: Batch, logits: Tensor | None = None) -> Tensor:
        """Return what the old task's outputs say; `logits` are those of the new task's."""

    def loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of a batch whose logits these are."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""

    def outcomes(self, model: nn.Module, rows: Sequence[Any]) -> list[float]:
        """Return each row's part of the score, which is their mean: larger is better."""

    def fisher_batches(self) -> Iterable[tuple[Any, Tensor]]:
        """Yield inputs and labels of `fisher_rows` rows of the old task, as the library takes."""

    def layers(self) -> list[tuple[str, ...]]:
        """Return what names of parameters begin with, layer by layer, the embeddings first."""


@dataclass
class Job:
    """One fine-tuning: what a method is given."""

    setting: Setting
    model: nn.Module  # trained in place
    rate: float
    strength: float
    start: Callable[[], nn.Module]  # makes another model that is at the start
    fisher_name: str  # under which the Fisher of the start is kept

    def rows(self, rows: Sequence[Any], size: int, stream: int = 0) -> Iterator[Sequence[Any]]:
        """Yield batches of rows for ever, in a new order each time; `stream` tells orders apart."""
        generator = torch.Generator().manual_seed(1000 * self.setting.seed + stream)
        while True:
            order = torch.randperm(len(rows), generator=generator).tolist()
            for first in range(0, len(rows) - size + 1, size):
                yield [rows[i] for i in order[first : first + size]]

    def new_batches(self) -> Iterator[Batch]:
        """Yield batches of the new task for ever."""
        setting = self.setting
        return map(setting.batch, self.rows(setting.new.train, setting.batch_size))


def fit(
    model: nn.Module,
    batches: Iterator[Batch],
    loss: Loss,
    *,
    rate: float,
    steps: int,
    after_backward: Callable[[], object] | None = None,
) -> Done:
    """Train what requires gradients, with AdamW and a rate that falls linearly to zero.

    Products are in bfloat16, weights, gradients and what comes `after_backward` in float32. Where
    the loss stops being finite training ends: the model is scored as it is.

    Args:
        model: Trained in place, in train mode.
        batches: One for each step.
        loss: Of a batch, float32.
        rate: Of the first step.
        steps: How many.
        after_backward: Adds to the gradients, as penalties do.
    """
    began = time.process_time()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    made = 0
    for step, batch in enumerate(islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        value = loss(model, batch)
        if not value.isfinite():
            break
        value.backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        optimizer.zero_grad()
        made += 1
    return Done(made, time.process_time() - began)


def start_of(setting: Setting, digest: str) -> tuple[dict[str, Tensor], Any]:
    """Return the weights that have learned the old task, and their scores; made once, then kept."""

    def make() -> tuple[Mapping[str, Tensor], Any]:
        torch.manual_seed(setting.seed)
        model = setting.fresh()
        if setting.old_steps:
            job = Job(setting, model, setting.old_rate, 0.0, setting.fresh, "")
            batches = map(setting.batch, job.rows(setting.old.train, setting.batch_size, 1))
            fit(model, batches, setting.loss, rate=setting.old_rate, steps=setting.old_steps)
        return dict(model.named_parameters()), scores(setting, model)

    return kept(f"{setting.name}-{setting.seed}-{digest}-start", make)


def scores(setting: Setting, model: nn.Module) -> dict[str, Any]:
    """Score the old task and the new one, on validation and on test rows.

    Returns:
        `validation` and `test`: the scores of the old and of the new task; `outcomes`: of each
        test row, as `packed`.
    """
    model.eval()
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for part in PARTS:
            outcomes = [
                setting.outcomes(model, getattr(t, part)) for t in (setting.old, setting.new)
            ]
            found[part] = [sum(values) / len(values) for values in outcomes]
        found["outcomes"] = [packed(values) for values in outcomes]
    return found


def packed(outcomes: Sequence[float]) -> str | list[float]:
    """Write what came of each row: bits as hexadecimal digits, other numbers with five digits."""
    if all(value in (0, 1) for value in outcomes):
        return np.packbits(np.array(outcomes, dtype=bool)).tobytes().hex()
    return [float(f"{value:.5g}") for value in outcomes]


def measure_two_tasks(
    setting: Setting,
    tune: Callable[[Job], Done],
    settings: Mapping[str, Any],
    digest: str,
    fisher_digest: str,
) -> dict[str, Any]:
    """Fine-tune the start on the new task by one method, and score it.

    Args:
        setting: Of one seed.
        tune: The method.
        settings: `rate`, `strength`, and `alphas`: shares of the way from the start to what was
            tuned at which it is scored, the one that counts in a search first.
        digest: Of the code and data that make the start.
        fisher_digest: Of those that make the Fisher of it.

    Returns:
        The figures of the record.
    """
    weights, before = start_of(setting, digest)

    def start() -> nn.Module:
        model = setting.fresh()
        model.load_state_dict(weights, strict=False)
        return model

    model = start()
    fisher_name = f"{setting.name}-{setting.seed}-{fisher_digest}-fisher"
    job = Job(setting, model, settings["rate"], settings["strength"], start, fisher_name)
    torch.manual_seed(setting.seed)
    done = tune(job)
    points = {}
    for alpha in settings["alphas"]:
        if alpha != 1:
            mixed = {
                name: p.detach().lerp(weights[name], 1 - alpha)
                for name, p in model.named_parameters()
            }
            point = start()
            point.load_state_dict(mixed, strict=False)
            points[f"{alpha:g}"] = scores(setting, point)
        else:
            points["1"] = scores(setting, model)
    first = points[f"{settings['alphas'][0]:g}"]
    return {
        "validation": sum(first["validation"]) / 2,
        "start": {part: before[part] for part in PARTS},
        "points": points,
        "steps": done.steps,
        "tuning_seconds": done.seconds,
    }
