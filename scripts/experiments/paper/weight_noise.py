"""How well the diagonal knows (Kirkpatrick et al. 2017, figure 4C): accuracy under weight noise."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scripts.experiments.lib.common import markdown
from scripts.experiments.lib.continual import (
    Method,
    fisher_of,
    learn,
    method_of,
    new_network,
    permuted_tasks,
    score,
    seconds,
    settings_of,
)
from scripts.experiments.lib.mnist_files import MNIST, SMALL
from scripts.experiments.lib.pictures import COLOURS, error_bars, panels, save_picture, write_csv
from scripts.experiments.lib.records import Experiment, Figures, Findings, Record, Row, Unit
from scripts.experiments.lib.sittings import main

NAME = "weight-noise"
SEEDS = 5
DRAWS = 3
SIZES = tuple(round(10 ** (-2.5 + i / 4), 6) for i in range(9))  # deviation of a weight, uniform
UNIFORM, SHAPED, NULL = "uniform", "shaped by (F + εI)⁻¹", "in the Fisher's null space"
TOLERANCE = 0.005  # of accuracy: what is nearer does as much harm
EPSILON, NOTHING = 1e-3, 1e-6  # of the largest value of the Fisher
TEXT = """
A network 784–400–400–10 learns MNIST, inputs standardised ({steps:,} steps of 128 images, Adam at
1e-3), and its exact Fisher is measured on {fisher_examples:,} images. Then noise is added to all
weights and biases, of the same total size ‖δ‖ in three ways: uniform; with a variance in proportion
to 1/(F + ε), ε = {epsilon:g} of the largest value; and only where F is below {nothing:g} of the
largest value, {share:.0%} of all weights. Test accuracy, mean over {seeds} of {planned} seeds of
{draws} draws each and the standard error over seeds:

![Accuracy against the size of the noise](weight-noise.png)

{table}

The size is ‖δ‖/√N, the root mean square over all N weights. Half of the accuracy above chance is
lost at {half}, interpolated. Sizes at which the accuracies of two kinds differ by more than
{tolerance:g} points:

- shaped noise does less harm than uniform noise at {less}, more at {more}
- noise in the null space does less harm than shaped noise at {null_less}, more at {null_more}

For small noise the loss in the null space would be nothing: the noise of the weights is
independent, so that the diagonal alone counts. What is lost there is due to sizes at which the loss
is no longer quadratic, to the threshold and to the images. Noise of the same total size on a share
of the weights is larger on each. In inputs from 0 to 1 the pixels of the border, which are always
0, would have weights without any effect, and the null space would do less harm.
"""


def plan(records: Sequence[Record], quick: bool) -> list[Unit]:
    """List one unit a seed."""
    base = Method(steps=4000, batch_size=128, penalty="none")
    data, others = MNIST, {"draws": DRAWS, "noise": list(SIZES)}
    shares = {"epsilon": EPSILON, "nothing": NOTHING}
    if quick:
        base = Method(
            sizes=(784, 50, 10), steps=80, batch_size=64, penalty="none", fisher_examples=200
        )
        data, others = SMALL, {"draws": 1, "noise": list(SIZES[::4])}
    settings = settings_of(base, data=data, **others, **shares)
    return [Unit(NAME, "MNIST network", seed, settings) for seed in range(1 if quick else SEEDS)]


def cost(unit: Unit) -> float:
    """Return about how long a unit takes on one core."""
    looks = 3 * unit.settings["draws"] * len(unit.settings["noise"])
    return seconds(method_of(unit.settings), 1) + 0.35 * looks


def deviations(fisher: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the deviation of each weight's noise, its mean square over all weights one.

    Args:
        fisher: The Fisher diagonal by name.
        kind: One of the three.

    Returns:
        By name, in the shapes of the Fisher.
    """
    largest = max(float(values.max()) for values in fisher.values())
    variances = {
        name: {
            UNIFORM: torch.ones_like(values),
            SHAPED: 1 / (values + EPSILON * largest),
            NULL: (values <= NOTHING * largest).float(),
        }[kind]
        for name, values in fisher.items()
    }
    count = sum(values.numel() for values in fisher.values())
    whole = sum(float(values.double().sum()) for values in variances.values())
    return {name: (values * (count / whole)).sqrt() for name, values in variances.items()}


@torch.no_grad()
def with_noise(
    parameters: Mapping[str, nn.Parameter],
    fisher: Mapping[str, Tensor],
    kinds: Sequence[str],
    sizes: Sequence[float],
    draws: int,
    seed: int,
    score: Callable[[], float],
) -> dict[str, list[float]]:
    """Return the mean score over draws of noise, by its kind, for each size.

    Args:
        parameters: Get the noise, and are as they were in the end.
        fisher: Their Fisher diagonal.
        kinds: Of noise.
        sizes: ‖δ‖/√N.
        draws: For each size.
        seed: Of the noise.
        score: Measures the parameters as they are.
    """
    weights = {name: p.clone() for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {}
    for kind in kinds:
        spread = deviations(fisher, kind)
        found[kind] = []
        for size in sizes:
            measured = []
            for _ in range(draws):
                for name, p in parameters.items():
                    noise = torch.randn(p.shape, generator=generator)
                    p.copy_(weights[name] + size * spread[name] * noise)
                measured.append(score())
            found[kind].append(math.fsum(measured) / len(measured))
    for name, p in parameters.items():
        p.copy_(weights[name])
    return found


@torch.no_grad()
def measure(unit: Unit) -> Figures:
    """Learn MNIST, and add noise of each kind and size."""
    method = method_of(unit.settings)
    [task] = permuted_tasks(unit.settings["data"], [None])
    network = new_network(method, unit.seed)
    with torch.enable_grad():
        learn(network, [task], method, unit.seed)
        fisher = dict(fisher_of(network, task.train, method, unit.seed))
    found = with_noise(
        dict(network.named_parameters()),
        fisher,
        (UNIFORM, SHAPED, NULL),
        unit.settings["noise"],
        unit.settings["draws"],
        unit.seed,
        lambda: score(network, [task], "test"),
    )
    largest = max(float(values.max()) for values in fisher.values())
    nothing = sum(int((values <= NOTHING * largest).sum()) for values in fisher.values())
    return {
        "accuracy": score(network, [task], "test"),
        "noisy": found,
        "null share": nothing / sum(values.numel() for values in fisher.values()),
    }


def report(records: Sequence[Record], folder: Path) -> Findings:
    """Draw the accuracy against the size of the noise."""
    rows = [
        Row("weight noise: noise shaped by the Fisher harms less than uniform noise", "less"),
        Row("weight noise: in the null space of the Fisher", "as much as shaped noise"),
    ]
    if not records:
        return Findings("", rows)
    sizes = records[0].unit.settings["noise"]
    found = {
        kind: np.array([record.figures["noisy"][kind] for record in records])
        for kind in (UNIFORM, SHAPED, NULL)
    }
    clean = float(np.mean([record.figures["accuracy"] for record in records]))
    halves = {kind: _half(sizes, values.mean(0), clean) for kind, values in found.items()}
    less, more = _harms(found[SHAPED], found[UNIFORM], sizes)
    null_less, null_more = _harms(found[NULL], found[SHAPED], sizes)
    rows = [
        rows[0]._replace(
            here=f"half is lost at {halves[SHAPED]} (uniform: {halves[UNIFORM]})",
            difference="holds" if less and not more else "does not hold",
            reason=f"MNIST here, Atari there; {len(records)} of {SEEDS} seeds",
        ),
        rows[1]._replace(
            here=f"half is lost at {halves[NULL]}",
            difference="does not hold" if null_more else "holds",
            reason=f"here where F is below {NOTHING:g} of its largest value; "
            f"more harm than shaped noise at {_at(null_more)}, less at {_at(null_less)}",
        ),
    ]  # fmt: skip
    figure, (axis,) = panels(1, width=5.5)
    axis.axhline(clean, color="0.4", lw=0.8, ls="--")
    for (kind, values), colour in zip(found.items(), COLOURS, strict=False):
        axis.errorbar(
            sizes, values.mean(0), error_bars(values), color=colour, marker="o", ms=4, label=kind
        )
    axis.set_xscale("log")
    axis.set_xlabel("size of the noise, ‖δ‖/√N")
    axis.set_ylabel("test accuracy")
    axis.legend(loc="lower left")
    save_picture(figure, folder, NAME)
    write_csv(
        folder,
        NAME,
        ["noise", "size", "seed", "accuracy"],
        [
            [kind, size, record.unit.seed, value]
            for kind in found
            for record in records
            for size, value in zip(sizes, record.figures["noisy"][kind], strict=True)
        ],
    )
    table = [
        [kind, *(f"{value:.1%}" for value in (clean, *values.mean(0)))]
        for kind, values in found.items()
    ]
    text = TEXT.format(
        **records[0].unit.settings,
        share=float(np.mean([record.figures["null share"] for record in records])),
        seeds=len(records),
        planned=SEEDS,
        tolerance=100 * TOLERANCE,
        less=_at(less),
        more=_at(more),
        null_less=_at(null_less),
        null_more=_at(null_more),
        table=markdown(["noise", "none", *(f"{size:.3g}" for size in sizes)], table),
        half=f"{halves[UNIFORM]} (uniform), {halves[SHAPED]} (shaped), {halves[NULL]} (null space)",
    )
    return Findings(text.strip(), rows)


def _harms(
    one: np.ndarray, other: np.ndarray, sizes: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Return the sizes at which one noise does less harm than another, and more."""
    gap = one.mean(0) - other.mean(0)
    return (
        [size for size, g in zip(sizes, gap, strict=True) if g > TOLERANCE],
        [size for size, g in zip(sizes, gap, strict=True) if g < -TOLERANCE],
    )


def _at(sizes: list[float]) -> str:
    return ", ".join(f"{size:.3g}" for size in sizes) or "none"


def _half(sizes: Sequence[float], accuracies: np.ndarray, clean: float) -> str:
    """Return the size at which half of the accuracy above chance is gone, between two sizes."""
    level = 0.1 + (clean - 0.1) / 2
    below = np.flatnonzero(accuracies < level)
    if not len(below):
        return f"more than {sizes[-1]:.2g}"
    i = int(below[0])
    if i == 0:
        return f"less than {sizes[0]:.2g}"
    share = (accuracies[i - 1] - level) / (accuracies[i - 1] - accuracies[i])
    return f"{math.exp(math.log(sizes[i - 1]) * (1 - share) + math.log(sizes[i]) * share):.2g}"


EXPERIMENT = Experiment(NAME, "How well the diagonal knows", cost, plan, measure, report)

if __name__ == "__main__":
    main(EXPERIMENT)
