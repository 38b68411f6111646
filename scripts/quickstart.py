"""Learn task A, measure its Fisher, learn task B without forgetting A, on real data in a minute.

Task A is scikit-learn's handwritten digits, task B the same digits with their pixels permuted. A
small network is trained on A in plain torch, like any checkpoint from elsewhere; the rest is the
command line. The output folder keeps everything, so that the commands can be repeated there.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parent.parent
EWC_LAMBDA = 100
SIZES = [64, 128, 128, 10]
NETWORK = '''"""The quickstart's network, for `--model network:mlp`."""

from itertools import pairwise

from torch import nn


def mlp(config):
    """Make a fully connected network with ReLU, its layer sizes from config.json."""
    layers = []
    for inputs, outputs in pairwise(config["sizes"]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
'''
FINETUNE = [
    *("finetune", "start", "--model", "network:mlp", "--data", "b-train.npz", "--task", "B"),
    *("--optimizer", "adam", "--learning-rate", "1e-3", "--batch-size", "32", "--epochs", "20"),
    *("--evaluate", "A=a-test.npz", "--evaluate", "B=b-test.npz", "--overwrite"),
]

BEGIN, END = "<!-- quickstart: by scripts/quickstart --readme -->", "<!-- quickstart ends -->"

Scores = dict[str, dict[str, dict[str, float]]]  # "before", "epoch 1", …, "after" -> task -> metric


def write_data(folder: Path) -> None:
    """Write a-train.npz, a-test.npz, b-train.npz and b-test.npz: inputs and labels."""
    digits = load_digits()
    inputs = (digits.data / digits.data.max()).astype(np.float32)
    random = np.random.default_rng(0)
    order, permutation = random.permutation(len(inputs)), random.permutation(inputs.shape[1])
    for name, rows in (("train", order[:1297]), ("test", order[1297:])):
        labels = digits.target[rows].astype(np.int64)
        np.savez(folder / f"a-{name}.npz", inputs=inputs[rows], labels=labels)
        np.savez(folder / f"b-{name}.npz", inputs=inputs[rows][:, permutation], labels=labels)


def train_start(folder: Path, epochs: int = 20) -> None:
    """Train on task A in plain torch and save it as the checkpoint `start`."""
    (folder / "network.py").write_text(NETWORK)
    sys.path.insert(0, str(folder))
    from network import mlp

    torch.manual_seed(0)
    network = mlp({"sizes": SIZES})
    data = np.load(folder / "a-train.npz")
    inputs, labels = torch.from_numpy(data["inputs"]), torch.from_numpy(data["labels"])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            cross_entropy(network(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    start = folder / "start"
    start.mkdir(exist_ok=True)
    save_file(network.state_dict(), start / "model.safetensors")
    (start / "config.json").write_text(json.dumps({"sizes": SIZES}) + "\n")


def consolidate(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a command in the folder and return its `--json` result; exit if it fails."""
    print("  " + shlex.join(["consolidate", *arguments]), flush=True)
    done = subprocess.run(
        [Path(sys.executable).with_name("consolidate"), *arguments, "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        sys.exit(f"scripts/quickstart: that command exited with code {done.returncode}")
    return json.loads(done.stdout)


def table(results: dict[str, Scores]) -> str:
    """Write the accuracies on A and B, before and after each fine-tuning."""
    rows = [("trained on A", next(iter(results.values()))["before"])]
    rows += [(f"fine-tuned on B, {name}", scores["after"]) for name, scores in results.items()]
    width = max(len(title) for title, _ in rows)
    lines = [f"{'accuracy on':<{width}}       A        B"]
    for title, scores in rows:
        values = "".join(f"{100 * scores[task]['accuracy']:7.1f} %" for task in ("A", "B"))
        lines.append(f"{title:<{width}}{values}")
    return "\n".join(lines)


def write_readme(results: dict[str, Scores], readme: Path) -> None:
    """Put the table between the page's markers."""
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    text = f"{before}{BEGIN}\n```text\n{table(results)}\n```\n{END}{after}"
    readme.write_text(text, encoding="utf-8")


def plot(results: dict[str, Scores], path: Path) -> None:
    """Draw the accuracy on both tasks over the epochs on task B."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, constrained_layout=True)
    for axis, task in zip(axes, ("A", "B"), strict=True):
        for name, scores in results.items():
            epochs = [scores[when] for when in scores if when != "after"]
            axis.plot([epoch[task]["accuracy"] for epoch in epochs], label=name)
        axis.set_title(f"task {task}")
        axis.set_xlabel("epochs on task B")
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    axes[0].legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Do all of it in the folder named on the command line, quickstart-output/ by default."""
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "quickstart-output")
    parser.add_argument("--readme", action="store_true", help="write table and plot into README.md")
    options = parser.parse_args()
    folder = options.folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder)
        print("Training a small network on task A, the digits")
        train_start(folder)
    except OSError as error:
        sys.exit(f"scripts/quickstart: {error}\nName a writable folder.")
    print(f"Running, in {folder}:")
    consolidate(
        folder,
        *("fisher", "start", "--model", "network:mlp", "--data", "a-train.npz", "--task", "A"),
        "--overwrite",
    )
    none = consolidate(folder, *FINETUNE, "--penalty", "none", "--output-dir", "without")
    ewc = consolidate(folder, *FINETUNE, "--ewc-lambda", str(EWC_LAMBDA), "--output-dir", "with")
    results = {"no penalty": none["metrics"], f"EWC, λ = {EWC_LAMBDA}": ewc["metrics"]}
    plot(results, folder / "accuracy.png")
    if options.readme:
        write_readme(results, ROOT / "README.md")
        plot(results, ROOT / "docs" / "images" / "quickstart.png")
    print(f"\n{table(results)}\n\nplot: {folder / 'accuracy.png'}")


if __name__ == "__main__":
    main()
