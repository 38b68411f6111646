"""Fine-tuning on several tasks in turn: what is kept of all, what is learned of each."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from consolidate.models.lora import merge_lora
from scripts.experiments.lib.block_fisher import SUFFIX
from scripts.experiments.lib.kept import FOLDER, kept
from scripts.experiments.lib.new_heads import started
from scripts.experiments.lib.tuning import PARTS, Done, Job, Setting, Task, fit, packed

Outcomes = dict[str, list[list[float]]]  # of each part, by task


class Chain(Protocol):
    """Tasks and the model that learns them, for one seed."""

    name: str
    seed: int
    tasks: Sequence[Task]
    first_rate: float

    def stage(self, number: int) -> Setting:
        """Return what a method is given at a task: itself is new, those before it are old.

        The stage's `steps` are of its own task, 0 for the first one.
        """

    def fresh(self) -> nn.Module:
        """Return the model before any task."""


Fisher = Callable[[Job, int], Mapping[str, Tensor]]
"""From a job at a task's stage, and the task before it, to that task's own Fisher."""


def measure_chain(
    chain: Chain,
    tune: Callable[[Job], Done],
    settings: Mapping[str, Any],
    names: tuple[str, str, str],
    fisher: Fisher | None,
    *,
    back: bool = False,
) -> dict[str, Any]:
    """Learn the first task, the same for every method, then the others by one method.

    Args:
        chain: Of one seed.
        tune: The method, at each task.
        settings: `rate` and `strength`.
        names: Of the start, of the first task's Fisher, and of this unit alone: under these things
            are kept.
        fisher: Of one task; given where the method uses one. They are summed, each with the trace
            of the first, and hold the weights where they are before a task.
        back: Whether `strength` is the share of the way that is gone at each task; a new head stays
            as trained.

    Returns:
        The figures of the record: `kept` is the mean over the tasks but the last at the end,
        `learned` the mean over the tasks but the first, each when it was learned.
    """
    start, first_fisher, own = names
    begin = f"{chain.name}-{chain.seed}"
    weights, first = kept(f"{begin}-{start}-start", lambda: _first(chain))
    total: dict[str, Tensor] = {}
    trace, steps, seconds = 0.0, 0, 0.0
    when_learned: list[dict[str, list[float]]] = [first]
    model = chain.fresh()
    for number in range(1, len(chain.tasks)):
        stage, before = chain.stage(number), weights

        def at_start(before: dict[str, Tensor] = before) -> nn.Module:
            fresh = chain.fresh()
            fresh.load_state_dict(before, strict=False)
            return fresh

        model = at_start()
        job = Job(
            stage, model, settings["rate"], settings["strength"], at_start,
            f"{begin}-{own}-fisher-{number}",
        )  # fmt: skip
        if fisher is not None:
            found = (
                kept(f"{begin}-{first_fisher}-first", partial(_first_fisher, fisher, job))[0]
                if number == 1  # the same for every method and strength
                else fisher(job, number - 1)
            )
            size = sum(
                float(tensor.sum(dtype=torch.float64))
                for name, tensor in found.items()
                if not name.endswith(SUFFIX)  # whose traces are in the diagonal
            )
            trace = trace or size
            for name, tensor in found.items():
                total[name] = total.get(name, 0) + tensor * (trace / size)
            kept(job.fisher_name, lambda: (total, None))
        torch.manual_seed(1000 * chain.seed + number)
        done = tune(job)
        steps, seconds = steps + done.steps, seconds + done.seconds
        if any("lora_" in name for name, _ in model.named_parameters()):
            merge_lora(model)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        if back:
            share, started_at = settings["strength"], started(stage, model)
            weights |= {name: weights[name].lerp(before[name], 1 - share) for name in started_at}
        model = chain.fresh()
        model.load_state_dict(weights, strict=False)
        when_learned.append(_outcomes(chain, model, number))
        if fisher is not None:
            for kind in ("safetensors", "lock"):
                (FOLDER / f"{job.fisher_name}.{kind}").unlink()
    last = [_outcomes(chain, model, number) for number in range(len(chain.tasks) - 1)]
    return _figures(last, when_learned, steps, seconds)


def _first(chain: Chain) -> tuple[Mapping[str, Tensor], Any]:
    """Learn the first task; say what came of its rows."""
    torch.manual_seed(chain.seed)
    stage, model = chain.stage(0), chain.fresh()
    job = Job(stage, model, chain.first_rate, 0.0, chain.fresh, "")
    fit(model, job.new_batches(), stage.loss, rate=chain.first_rate, steps=stage.steps)
    return dict(model.named_parameters()), _outcomes(chain, model, 0)


def _first_fisher(fisher: Fisher, job: Job) -> tuple[Mapping[str, Tensor], None]:
    return fisher(job, 0), None


def _outcomes(chain: Chain, model: nn.Module, number: int) -> dict[str, list[float]]:
    """Score a task on validation and on test rows."""
    model.eval()
    stage = chain.stage(number)
    with torch.inference_mode():
        return {part: stage.outcomes(model, getattr(chain.tasks[number], part)) for part in PARTS}


def _figures(
    last: Sequence[dict[str, list[float]]],
    when_learned: Sequence[dict[str, list[float]]],
    steps: int,
    seconds: float,
) -> dict[str, Any]:
    point: dict[str, Any] = {}
    for part in PARTS:
        old = [value for one in last for value in one[part]]
        new = [value for one in when_learned[1:] for value in one[part]]
        point[part] = [sum(old) / len(old), sum(new) / len(new)]
    point["outcomes"] = [packed(old), packed(new)]
    means = [[sum(one["test"]) / len(one["test"]) for one in some] for some in (when_learned, last)]
    lost = [before - after for before, after in zip(means[0], means[1], strict=False)]
    return {
        "validation": sum(point["validation"]) / 2,
        "points": {"1": point},
        "learned": means[0],
        "last": means[1],
        "forgetting": sum(lost) / len(lost),
        "steps": steps,
        "tuning_seconds": seconds,
    }
