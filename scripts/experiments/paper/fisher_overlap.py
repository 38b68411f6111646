"""Fisher overlap by layer (Kirkpatrick et al. 2017, figure 3C): similar and dissimilar tasks."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consolidate.ewc.overlap import layer_overlaps
from scripts.experiments.lib.common import markdown
from scripts.experiments.lib.continual import (
    Method,
    fisher_of,
    learn_chain,
    method_of,
    permuted_tasks,
    scores,
    seconds,
    settings_of,
)
from scripts.experiments.lib.mnist_files import MNIST, SMALL
from scripts.experiments.lib.pictures import COLOURS, error_bars, panels, save_picture, write_csv
from scripts.experiments.lib.records import (
    Experiment,
    Figures,
    Findings,
    Record,
    Row,
    Unit,
    chosen,
    mean,
)
from scripts.experiments.lib.sittings import main

NAME = "fisher-overlap"
SEEDS = 5
SQUARES = (8, 26)
BASE = Method(
    sizes=(784, *[100] * 6, 10),
    optimizer="sgd",
    learning_rate=1e-3,
    momentum=0.9,
    batch_size=256,
    steps=100 * 215,  # epochs
    ewc_lambda=100.0,
    penalty_step="proximal",
)
TEXT = """
Six hidden layers of 100 learn MNIST, then MNIST with the pixels of a central square permuted, 8 × 8
or 26 × 26, with SGD at 1e-3, {epochs} epochs a task. What the paper does not say is set here: EWC
with λ = {ewc_lambda:g}, not searched for, momentum 0.9, batches of {batch_size}, inputs
standardised. Then the exact Fisher of {fisher_examples:,} images of either task alone is measured,
both at the weights after the second, and both are scaled to unit trace within a layer: the
overlap is 1 − ½‖√F̂₁ − √F̂₂‖² (Fréchet), 1 where they lie on the same weights. Mean over the
seeds that are done and its standard error:

![Overlap against depth, for both squares](fisher-overlap.png)

{table}

`consolidate show ONE --overlap OTHER` prints the same measure of the Fishers that two checkpoints
have: after a chain these are sums over its tasks, each measured at its own weights.
"""


def plan(records: Sequence[Record], quick: bool) -> list[Unit]:
    """List both squares for each seed."""
    base, data = BASE, MNIST
    if quick:
        base = Method(
            sizes=(784, 20, 20, 10), batch_size=64, steps=60, ewc_lambda=10.0, fisher_examples=50
        )
        data = SMALL
    return [
        Unit(NAME, f"{side} × {side}", seed, settings_of(base, data=data, side=side))
        for seed in range(1 if quick else SEEDS)
        for side in SQUARES
    ]


def cost(unit: Unit) -> float:
    """Return about how long a unit takes on one core."""
    return seconds(method_of(unit.settings), 2)


def central_order(side: int, seed: int) -> Tensor:
    """Return a permutation of the 28 × 28 pixels that moves those of a central square only.

    Args:
        side: Of the square.
        seed: Of the permutation.

    Returns:
        (784,) int64.
    """
    pixels = torch.arange(784).view(28, 28)
    first = (28 - side) // 2
    inside = pixels[first : first + side, first : first + side].flatten()
    order = torch.arange(784)
    generator = torch.Generator().manual_seed(seed)
    order[inside] = inside[torch.randperm(len(inside), generator=generator)]
    return order


def measure(unit: Unit) -> Figures:
    """Learn both tasks, and measure either's Fisher at the last weights."""
    method = method_of(unit.settings)
    order = central_order(unit.settings["side"], unit.seed)
    tasks = permuted_tasks(unit.settings["data"], [None, order])
    network, _ = learn_chain(tasks, method, unit.seed)
    fisher = partial(fisher_of, network, method=method, seed=unit.seed)
    one, other = (fisher(part=task.train) for task in tasks)
    return {
        "overlaps": list(layer_overlaps(one, other).values()),
        "accuracies": scores(network, tasks, "test"),
    }


def report(records: Sequence[Record], folder: Path) -> Findings:
    """Draw the overlap against depth."""
    done = {side: chosen(records, side=side) for side in SQUARES}
    rows = [
        Row("Fisher overlap: 26 × 26 below 8 × 8 in the first layer", "smaller"),
        Row(
            "Fisher overlap: 26 × 26 is higher at the output than in the first hidden layer",
            "shared",
        ),
    ]
    if not all(done.values()):
        return Findings("", rows)
    overlaps = {
        side: np.array([record.figures["overlaps"] for record in found])
        for side, found in done.items()
    }
    small, large = (overlaps[side].mean(0) for side in SQUARES)
    seeds = min(map(len, overlaps.values()))
    reason = f"{seeds} seed" + "s" * (seeds > 1)
    rows = [
        rows[0]._replace(
            here=f"{large[0]:.3f} against {small[0]:.3f}",
            difference="holds" if large[0] < small[0] else "does not hold", reason=reason,
        ),
        rows[1]._replace(
            here=f"{large[0]:.3f} to {large[-1]:.3f}" + _dips(large),
            difference="holds" if large[-1] > large[0] else "does not hold", reason=reason,
        ),
    ]  # fmt: skip
    layers = len(small)
    figure, (axis,) = panels(1, width=5)
    for (side, values), colour in zip(overlaps.items(), COLOURS, strict=False):
        axis.errorbar(
            range(1, layers + 1), values.mean(0), error_bars(values), color=colour, marker="o",
            label=f"{side} × {side} permuted",
        )  # fmt: skip
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("layer, the last is the output")
    axis.set_ylabel("Fisher overlap")
    axis.legend(loc="lower right")
    save_picture(figure, folder, NAME)
    write_csv(
        folder,
        NAME,
        ["square", "seed", "layer", "overlap"],
        [
            [f"{side} x {side}", record.unit.seed, layer, value]
            for side, found in done.items()
            for record in found
            for layer, value in enumerate(record.figures["overlaps"], 1)
        ],
    )
    each = [f"layer {i}" for i in range(1, layers)]
    header = ["permuted", *each, "output", "accuracy on the first / second"]
    table = []
    for side, values in overlaps.items():
        cells = []
        for column in values.T:
            one = mean(list(column))
            cells.append(f"{one.value:.3f}" + (f" ± {one.error:.3f}" if one.seeds > 1 else ""))
        accuracies = np.array([record.figures["accuracies"] for record in done[side]]).mean(0)
        cells.append(" / ".join(f"{value:.2%}" for value in accuracies))
        table.append([f"{side} × {side}", *cells])
    settings = done[SQUARES[0]][0].unit.settings
    epochs = f"{settings['steps'] / 215:g}"
    text = TEXT.format(**settings, epochs=epochs, table=markdown(header, table))
    return Findings(text.strip(), rows)


def _dips(overlaps: np.ndarray) -> str:
    """Name the layers whose overlap is below that of the layer before."""
    lower = [str(layer) for layer in np.flatnonzero(np.diff(overlaps) < 0) + 2]
    return f", lower than in the layer before at {' and '.join(lower)}" if lower else ""


EXPERIMENT = Experiment(NAME, "Fisher overlap", cost, plan, measure, report)

if __name__ == "__main__":
    main(EXPERIMENT)
