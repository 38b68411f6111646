"""What λ costs in nats of old loss, and `--budget` beside every fixed λ: the tables of the guide.

A network 64–128–128–10 has learned 1,000 of scikit-learn's digits (task A) and is fine-tuned on the
same digits with their pixels permuted, or turned by 90 degrees (task B), for 320 steps. Of the
other digits each half takes the part of the rows that the budget is kept on once, and the other
half that of the rows it is checked on. The data come with scikit-learn; the tables go to stdout:

    .venv/bin/python scripts/experiments/tasks/loss_budget.py
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import consolidate
from scripts.experiments.lib.common import NETWORKS, markdown
from scripts.experiments.lib.networks import mlp

SIZES = [64, 128, 128, 10]
TRAINED, HALF = 1000, 398  # rows to learn from; rows of A in the first half of the others
BUDGETS = (0.1, 0.3)
GRID = (1.0, 10.0, 31.6, 100.0, 316.0, 1000.0, 3160.0, 1e4, 1e5)


@dataclass(frozen=True)
class Setting:
    """A task B and a seed, with the start and the data in a folder."""

    kind: str
    seed: int
    folder: Path

    def run(self, **options: Any) -> dict[str, Any]:
        """Fine-tune on B, measured on test rows of B and on rows of A, all but those of `start`."""
        old = options.pop("old", "a-test")
        found = consolidate.finetune(
            self.folder / "start",
            self.folder / "b-train.npz",
            output_dir=self.folder / "out",
            task="B",
            model="networks:mlp",
            optimizer="adam",
            learning_rate=1e-3,
            batch_size=32,
            epochs=10,
            lr_scheduler="linear",
            evaluate={"A": self.folder / f"{old}.npz", "B": self.folder / "b-test.npz"},
            no_fisher=True,
            overwrite=True,
            seed=self.seed,
            **options,
        )
        return cast(dict[str, Any], found)


def prepare(kind: str, seed: int, folder: Path) -> Setting:
    """Write the rows of both tasks, train on A in plain torch, and measure its Fisher."""
    digits = load_digits()
    inputs, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int64)
    random = np.random.default_rng(seed)
    order, places = random.permutation(len(inputs)), random.permutation(64)
    images = np.rot90(inputs.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    new = inputs[:, places] if kind == "permuted" else images
    cuts = {
        "train": order[:TRAINED],
        "test": order[TRAINED:],
        "first": order[TRAINED : TRAINED + HALF],
        "second": order[TRAINED + HALF :],
    }
    folder.mkdir(parents=True)
    for part, rows in cuts.items():
        for task, of in (("a", inputs), ("b", new)):
            np.savez(folder / f"{task}-{part}.npz", inputs=of[rows], labels=labels[rows])
    torch.manual_seed(seed)
    network = mlp({"sizes": SIZES})
    known, said = (torch.from_numpy(of[cuts["train"]].copy()) for of in (inputs, labels))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(20):
        for rows in torch.randperm(TRAINED).split(32):
            optimizer.zero_grad()
            cross_entropy(network(known[rows]), said[rows]).backward()
            optimizer.step()
    start = folder / "start"
    start.mkdir()
    save_file(network.state_dict(), start / "model.safetensors", {"format": "pt"})
    (start / "config.json").write_text(json.dumps({"sizes": SIZES}) + "\n", encoding="utf-8")
    consolidate.fisher(
        start, folder / "a-train.npz", task="A", model="networks:mlp", structure="inputs"
    )
    return Setting(kind, seed, folder)


def accuracy(result: dict[str, Any], task: str) -> float:
    """Give the accuracy after the training."""
    return float(result["metrics"]["after"][task]["accuracy"])


def cost_of_lambda(setting: Setting) -> str:
    """Write what was predicted and what was measured, in nats of A, for three λ."""
    rows = []
    for structure in ("diagonal", "inputs"):
        for strength in (1.0, 100.0, 1000.0):
            found = setting.run(ewc_lambda=strength, structure=structure)
            name = f"λ = {strength:g}" + ", `--structure inputs`" * (structure == "inputs")
            values = (found["predicted_nats"], found["measured_nats"]["A"])
            rows.append(
                [name, *(f"{x:.3g}" for x in values), f"{100 * accuracy(found, 'A'):.1f} %"]
            )
    return markdown(["", "predicted", "measured", "accuracy on A"], rows)


def at_equal_loss(fixed: list[dict[str, Any]], lost: float) -> float | None:
    """Give the best accuracy on B of a fixed λ that loses as much, linear between neighbours.

    None where every λ of the grid loses more.
    """
    points = [(run["measured_nats"]["A"], accuracy(run, "B")) for run in fixed]
    kept = [learned for at, learned in points if at <= lost]
    for (more, one), (less, other) in pairwise(points):
        if more > lost >= less:
            kept.append(other + (lost - less) / (more - less) * (one - other))
    return max(kept, default=None)


def budget_rows(setting: Setting) -> Iterator[list[str]]:
    """Yield a row for each budget: what was lost where, and what was learned beside a fixed λ."""
    fixed = [setting.run(ewc_lambda=strength, structure="diagonal") for strength in GRID]
    for budget in BUDGETS:
        runs = [
            setting.run(
                budget=budget,
                validation={"A": setting.folder / f"a-{given}.npz"},
                old=f"a-{other}",
                structure="diagonal",
            )
            for given, other in (("first", "second"), ("second", "first"))
        ]
        given = fmean(run["budget"]["lost"]["A"] for run in runs)
        other = fmean(run["measured_nats"]["A"] for run in runs)
        learned = fmean(accuracy(run, "B") for run in runs)
        beside = at_equal_loss(fixed, (given + other) / 2)
        shares = [
            1 if run["interpolation"] is None else run["interpolation"]["alpha"] for run in runs
        ]
        yield [
            f"{setting.kind}, seed {setting.seed}, X = {budget:g}",
            f"{given:.3f}",
            f"{other:.3f}",
            ", ".join(f"{alpha:.3g}" for alpha in shares),
            f"{100 * learned:.1f} %",
            "–" if beside is None else f"{100 * beside:.1f} %",
        ]


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=["permuted", "turned"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    sys.path.insert(0, str(NETWORKS.parent))
    header = ["task B", "lost, rows given", "lost, other rows", "α", "accuracy on B", "fixed λ"]
    with tempfile.TemporaryDirectory() as folder:
        rows: list[list[str]] = []
        for kind in options.kinds:
            for seed in options.seeds:
                setting = prepare(kind, seed, Path(folder) / f"{kind}-{seed}")
                if not rows:
                    print(cost_of_lambda(setting), end="\n\n", flush=True)
                for row in budget_rows(setting):
                    print(*row, sep="  ", file=sys.stderr, flush=True)
                    rows.append(row)
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
