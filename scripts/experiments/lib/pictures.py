"""Pictures and tables of the paper's experiments, the same bytes from the same records."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart."""


def panels(
    count: int, *, width: float = 4.5, height: float = 3.4, across: int = 5, **options: Any
) -> Any:
    """Make a figure with that many panels, some side by side; return both."""
    columns = min(count, across)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        constrained_layout=True,
        **options,
    )
    for axis in axes.flat[count:]:
        axis.remove()
    for axis in axes.flat[:count]:
        axis.grid(alpha=0.3)
    return figure, list(axes.flat[:count])


def error_bars(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over the first axis, the seeds; 0 of a single one."""
    seeds = np.asarray(values)
    if len(seeds) == 1:
        return np.zeros_like(seeds[0])
    return np.asarray(seeds.std(0, ddof=1) / len(seeds) ** 0.5)


def save_picture(figure: Figure, folder: Path, name: str) -> None:
    """Write NAME.png, without a date, and close the figure."""
    figure.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def write_csv(
    folder: Path, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    """Write NAME.csv."""
    with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
