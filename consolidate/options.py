"""Every option of every command, once: type, default, bounds, help.

A record holds what one part of the work takes, and a command takes a record of records. Its TITLE
heads its options in --help; those that a command names in COMMON come first. An option that is
added here has its flag, variable, TOML key, range check and keyword in Python; the code that uses
it is left to write, and `scripts/write_docs` writes the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consolidate.fields import OTHER, REQUIRED, option, part

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""Of images, as Pillow and timm name them."""
EXACT_UP_TO = 16
"""Outcomes per example up to which the default estimator is exact; above it is mc."""
REPLAY_SHARE = 0.1
"""Of the rows trained on that are replayed, unless another share is given."""

_PER_CALL: dict[str, Any] = {"changes_result": False, "in_run_file": False}
"""Of an option that names a place or says how one command runs: not for tasks of a run file."""


def read_numbers(text: str) -> tuple[float, ...]:
    """Read numbers separated by commas, as typed, or a list as in TOML."""
    try:
        return tuple(float(number) for number in text.strip("[]").split(","))
    except ValueError:
        raise ValueError("expected numbers separated by commas") from None


def read_lambda(text: str) -> Any:
    """Read λ as typed: a number, several separated by commas, or auto."""
    if text == "auto":
        return text
    try:
        found = read_numbers(text)
    except ValueError as error:
        raise ValueError("expected a number, several separated by commas, or auto") from error
    return found if len(found) > 1 else found[0]


def number_or(*words: str, expected: str) -> Callable[[str], float | str]:
    """Give the function that reads a number, or one of some words, as it was typed."""

    def read(text: str) -> float | str:
        try:
            return text if text in words else float(text)
        except ValueError:
            raise ValueError(expected) from None

    return read


def _checkpoint(help: str = "A folder, a weights file, or a repository on the Hub.") -> Any:
    return option(REQUIRED, help, argument=True, **_PER_CALL)


def _with_fisher() -> Any:
    return _checkpoint("A folder or a repository on the Hub, with its Fisher.")


def _revision() -> Any:
    text = "Branch, tag or commit of CHECKPOINT on the Hub."
    return option(None, text, metavar="REV", **_PER_CALL)


def _output_dir(help: str) -> Any:
    return option(REQUIRED, help, metavar="DIR", **_PER_CALL)


def _restart() -> Any:
    return option(False, "Discard saved progress and start over.", **_PER_CALL)


def _overwrite(help: str = "Replace an existing output unless it is up to date.") -> Any:
    return option(False, help, **_PER_CALL)


def _task(help: str, by_default: str | None = "that of the data") -> Any:
    return option(None, help, by_default=by_default, metavar="NAME", in_run_file=False)


def _seed() -> Any:
    return option(0, "Random seed.", least=0, below=2**63)


def _dtype(by_default: str = "as stored") -> Any:
    return option(
        None,
        "Dtype of the weights.",
        by_default=by_default,
        group=Source.TITLE,
        dtype=True,
        choices=("float32", "float64", "bfloat16", "float16"),
    )


def _benchmark_limit() -> Any:
    return option(
        None,
        "Score a benchmark on its first N examples only, a group on N of each of its tasks.",
        by_default="all",
        least=1,
    )


def _column(what: str) -> Any:
    text = f"Column with the {what}."
    return option(None, text, by_default="its usual name", metavar="COLUMN")


@dataclass(frozen=True)
class Columns:
    """Names of the columns by role; None stands for the usual ones."""

    TITLE = "Data"

    text: str | None = _column("text")
    text_pair: str | None = _column("second text of a pair")
    label: str | None = _column("label")
    tokens: str | None = _column("list of words (token classification)")
    image: str | None = _column("image")
    inputs: str | None = _column("input tensor")
    prompt: str | None = _column("prompt")
    completion: str | None = _column("completion")
    messages: str | None = _column("chat")
    target: str | None = _column("target text (sequence to sequence)")


def _numbers(help: str, by_default: str) -> Any:
    return option(None, help, by_default=by_default, metavar="X,…", typed=read_numbers)


@dataclass(frozen=True)
class Images:
    """How images become inputs of a user's own module; None stands for what the checkpoint says."""

    TITLE = "Images (with --model)"

    image_size: int | None = option(
        None,
        "Height and width of the model's input images, in pixels.",
        by_default="from config.json or preprocessor_config.json",
        least=1,
        most=8192,
    )
    crop_pct: float | None = option(
        None,
        "Resize the shorter side to the size divided by this, then crop the center.",
        by_default="from the same file, else 1",
        above=0,
        most=1,
    )
    image_mean: tuple[float, ...] | None = _numbers(
        "Mean to subtract from pixels in [0, 1], one for all channels or one for each.",
        "from the same file",
    )
    image_std: tuple[float, ...] | None = _numbers(
        "Standard deviation to divide by, one for all channels or one for each.",
        "from the same file",
    )
    image_interpolation: str | None = option(
        None,
        "Interpolation of the resizing.",
        by_default="from the same file, else bilinear",
        choices=INTERPOLATIONS,
    )


@dataclass(frozen=True)
class Encoding:
    """How rows become batches."""

    TITLE = "Data"

    columns: Columns = part(Columns(), suffix="_column", one_argument=True)
    split: str | None = option(None, "Split of --data, a dataset with several.", metavar="NAME")
    max_length: int | None = option(
        None, "Truncate texts to this many tokens.", by_default="the model's limit", least=1
    )
    pack: bool = option(False, "Fill each sequence with consecutive texts (language models).")
    loss_on: str | None = option(
        None,
        "Tokens that a causal language model predicts: the assistant's turns of chats, the "
        "completions of prompts, or all.",
        by_default="completion for prompts with completions, else all",
        choices=("assistant", "completion", "all"),
    )
    images: Images = part(Images())


@dataclass(frozen=True)
class Source:
    """The checkpoint, and the module that it is loaded into."""

    TITLE = "Model"

    objective: str | None = option(
        None,
        "What the model predicts: sequence-classification, multi-label, token-classification, "
        "regression, causal-lm, masked-lm, seq2seq-lm, image-classification or classification.",
        by_default="from the architecture",
        metavar="NAME",
    )
    model: str | None = option(
        None,
        "Function that builds the torch module from the contents of config.json, for models that "
        "transformers does not know.",
        metavar="PACKAGE.MODULE:FACTORY",
    )
    revision: str | None = _revision()
    base_model: str | Path | None = option(
        None,
        "Base model of a CHECKPOINT that is a peft adapter.",
        by_default="the folder that its config names, if it exists",
        metavar="PATH|REPO",
        **_PER_CALL,
    )
    device: str | None = option(
        None, "Device: cpu, cuda, mps, …", by_default="the best available", metavar="DEVICE"
    )


@dataclass(frozen=True)
class Parameters:
    """Which parameters take part, and how devices hold them."""

    TITLE = Source.TITLE

    freeze: tuple[str, ...] = option(
        (),
        "Neither train nor measure parameters whose name matches, such as 'encoder.*'.",
        metavar="PATTERN",
    )
    gradient_checkpointing: bool = option(
        False,
        "Recompute layers in the backward pass: less memory, more time, the same result (models "
        "of transformers).",
    )
    shard: bool = option(
        False,
        "Shard weights, Fisher and optimizer state over the processes of torchrun (FSDP2), for "
        "models too large for one device.",
        in_run_file=False,
    )


@dataclass(frozen=True)
class Estimation:
    """How a Fisher is measured."""

    TITLE = "Fisher"

    estimator: str | None = option(
        None,
        "Labels to take the expectation over: all (exact), sampled from the model (mc), the data's "
        "own (empirical), or sampled, with gradients squared per batch (batched).",
        by_default=f"exact up to {EXACT_UP_TO} outcomes, else mc",
        choices=("exact", "mc", "empirical", "batched"),
    )
    mc_samples: int | None = option(
        None, "Labels sampled per example by mc and batched.", by_default="1", least=1
    )
    max_outcomes: int | None = option(
        None,
        "Refuse exact if it needs more backward passes per example than this.",
        by_default="4096",
        least=1,
    )
    max_examples: int | None = option(
        None, "Measure on a seeded random subset of this size.", by_default="all", least=1
    )
    batch_size: int | None = option(
        16,
        "Examples measured at a time. Only batched depends on it: the others square gradients "
        "per example.",
        by_default="--batch-size",
        least=1,
    )
    tolerance: float | None = option(
        None,
        "Read examples in random order and stop once the relative standard error of every "
        "parameter's trace is at most this, after 64 examples (of batched, batches) at the "
        "earliest.",
        by_default="read all",
        above=0,
    )
    accumulate_dtype: str = option(
        "float32",
        "Dtype for squaring and accumulating gradients.",
        dtype=True,
        choices=("float32", "float64"),
    )
    check: bool = option(False, "Verify per-example gradients on every batch, not only the first.")
    kernel: bool = option(
        False,
        "Square gradients in a kernel that is compiled for this processor at the first use: by "
        "the C compiler for a CPU, by Triton for CUDA. The result is equal up to rounding.",
        changes_result=False,
    )


@dataclass(frozen=True)
class Generation:
    """Texts that a causal language model generates, in place of data."""

    TITLE = "Generated texts"

    generate: int | None = option(
        None,
        "Measure on N texts that a causal language model generates itself, without --data, each of "
        "at most --max-length tokens (default 128).",
        least=1,
    )
    prompts: str | Path | None = option(
        None,
        "File with a prompt on each line, used in turn; tokens of prompts are not counted. A "
        "model with a chat template reads each as a user's turn.",
        by_default="what the chat template writes before a user's words; without one the "
        "beginning-of-text token, else the end-of-text token",
        metavar="FILE",
        changes_result=False,
    )
    temperature: float = option(
        1.0,
        "Divide the logits by this before sampling texts. Labels are then sampled again, from the "
        "model itself.",
        above=0,
    )
    top_p: float = option(
        1.0,
        "Sample texts from the most likely tokens that together have this probability. Labels are "
        "then sampled again, from the model itself.",
        above=0,
        most=1,
    )
    save_generated: str | Path | None = option(
        None,
        "Write the texts to FILE as JSON Lines; they are not stored otherwise.",
        metavar="FILE",
        written=True,
        changes_result=False,
    )


@dataclass(frozen=True)
class Curvature:
    """What of the Fisher is measured, stored and used."""

    TITLE = Estimation.TITLE

    structure: str | None = option(
        None,
        "diagonal: a value for each weight. inputs: also a matrix over the inputs of each linear "
        "or convolutional layer, which the penalty then uses instead; it takes up to 4 times the "
        "memory of the layer's weights.",
        by_default="that of the earlier tasks, else diagonal",
        choices=("diagonal", "inputs"),
    )


@dataclass(frozen=True)
class Measuring:
    """Which Fishers a run measures besides training."""

    TITLE = Estimation.TITLE

    no_fisher: bool = option(
        False,
        "Do not measure the new task's Fisher: the ledger lists the task as not measured. The next "
        "finetune can measure it with --measure.",
    )
    measure: dict[str, str | Path] | None = option(
        None,
        "First measure the Fisher of CHECKPOINT's last task, which --no-fisher left out, on that "
        "task's data, with the options of this command except --split.",
        metavar="NAME=DATA",
        changes_result=False,
    )


@dataclass(frozen=True)
class Merging:
    """How a task's Fisher is merged with those before it."""

    TITLE = "Merging with earlier tasks"

    merge_rule: str | None = option(
        None,
        "online: protect all tasks around the new weights; separate: protect each task around "
        "the weights it was learned at.",
        by_default="that of the earlier tasks, else online",
        choices=("online", "separate"),
    )
    gamma: float | None = option(
        None,
        "Share of the earlier Fisher that online keeps.",
        by_default="that of the earlier tasks, else 1",
        least=0,
        most=1,
    )
    task_weight: float | str = option(
        1.0,
        "Factor of the task's Fisher. units: weight by the number of examples or tokens; "
        "trace: give the task the same trace as the first one.",
        metavar="X|units|trace",
        choices=("units", "trace"),
        least=0,
        typed=number_or("units", "trace", expected="expected a number, units or trace"),
    )


@dataclass(frozen=True)
class Saving:
    """What is saved on the way, and what is replaced."""

    TITLE = "Saving and resuming"

    save_every_minutes: float = option(
        5.0,
        "Save progress beside the output this often; rerunning the command resumes and gives "
        "bit-identical results. SIGTERM and Ctrl-C save too. 0: as often as possible; inf: never.",
        least=0,
        infinite=True,
        changes_result=False,
    )
    restart: bool = _restart()
    overwrite: bool = _overwrite()
    data_digest: bool = option(True, "Store a digest of the data in the ledger.")


@dataclass(frozen=True)
class Search:
    """The strength of the penalty, and how it is chosen."""

    TITLE = "Search for λ"

    ewc_lambda: float | tuple[float, ...] | str | None = option(
        None,
        "Strength λ: a number, several, or auto to search. Required with a penalty, but not with "
        "--budget.",
        metavar="X|X,Y,…|auto",
        choices=("auto",),
        least=0,
        typed=read_lambda,
    )
    budget: float | None = option(
        None,
        "In place of --ewc-lambda: by how many nats the loss per example or token may rise on each "
        "earlier task in --validation. λ is adjusted during the training; if the loss still rises "
        "more, the weights are interpolated with the start. Exit with code 5 if the new task "
        "cannot be learned within the budget.",
        above=0,
    )
    validation: dict[str, str | Path] | None = option(
        None,
        "Held-out data of earlier tasks and of the new one, to choose λ or α on.",
        by_default="a tenth of the new task's data",
        metavar="NAME=DATA",
        changes_result=False,
    )
    select: str | None = option(
        None,
        "Which λ to take. best-mean: the one with the best mean score; smallest: the smallest "
        "that stays within --max-forgetting; largest: the largest that keeps 95% of what the new "
        "task gains.",
        by_default="smallest with --max-forgetting, largest without old data, else best-mean",
        choices=("best-mean", "smallest", "largest"),
    )
    search_plot: str | Path | None = option(
        None,
        "Plot the search to a .png, .svg or .pdf file (needs matplotlib).",
        metavar="FILE",
        written=True,
        changes_result=False,
    )


@dataclass(frozen=True)
class PenaltyOptions:
    """What the penalty is, and where its tensors are."""

    TITLE = "Penalty"

    penalty: str = option(
        "ewc",
        "ewc: Fisher-weighted penalty; l2: uniform penalty; none: no penalty.",
        choices=("ewc", "l2", "none"),
    )
    fisher: str | Path | None = option(
        None,
        "Folder or repository with the Fisher.",
        by_default="in CHECKPOINT",
        metavar="PATH|REPO",
        **_PER_CALL,
    )
    protect_self: int | None = option(
        None,
        "For a causal language model without a Fisher: first measure one on N texts that it "
        "generates itself, as `fisher --generate N` does.",
        least=1,
        **_PER_CALL,
    )
    save_generated: str | Path | None = option(
        None,
        "Write the texts of --protect-self to FILE as JSON Lines; they are not stored otherwise.",
        metavar="FILE",
        written=True,
        **_PER_CALL,
    )
    penalty_dtype: str | None = option(
        None,
        "Dtype of Fisher Λ and anchor μ in memory.",
        by_default="as stored",
        dtype=True,
        choices=("float32", "bfloat16"),
    )
    penalty_device: str | None = option(
        None, "Device of Λ and μ.", by_default="that of the weights", metavar="DEVICE"
    )
    penalty_on: str | None = option(
        None,
        "What to penalize if an adapter is trained. adapter: its own parameters, by their Fisher; "
        "merged: the weights W + s·B·A, by the Fisher of all weights.",
        by_default="adapter for an adapter with a Fisher, else merged",
        choices=("adapter", "merged"),
    )


@dataclass(frozen=True)
class Replaying:
    """Old rows that are trained on together with the new ones."""

    TITLE = "Replay"

    replay: str | Path | None = option(
        None,
        "Rows of earlier tasks to mix into the batches, with the columns and labels of --data; a "
        "language model takes any text.",
        metavar="DATA",
        changes_result=False,
    )
    replay_share: float | None = option(
        None,
        "Share of replayed rows among all that are trained on. An epoch takes 1/(1 − X) times the "
        "steps.",
        by_default=f"{REPLAY_SHARE:g}",
        above=0,
        below=0.99,
    )


@dataclass(frozen=True)
class Adapter:
    """A new low-rank adapter, trained in place of the weights."""

    TITLE = "LoRA adapter"

    lora_rank: int | None = option(
        None,
        "Train a new low-rank adapter W + s·B·A of rank R in place of the weights W (Hu et al. "
        "2021). The output is a whole checkpoint with the adapter merged (needs peft).",
        metavar="R",
        least=1,
    )
    lora_targets: tuple[str, ...] = option(
        (),
        "Layers to adapt, such as '*.q_proj' or q_proj.",
        by_default="those that peft knows for the architecture",
        metavar="PATTERN",
    )
    lora_alpha: float | None = option(None, "α of s = α/R.", by_default="R, so that s = 1", above=0)
    lora_train_head: bool = option(
        False,
        "Train the head of --head keep in full beside the adapter, penalized with its Fisher "
        "(modules_to_save in peft). A new or extended head is always trained.",
    )


@dataclass(frozen=True)
class Interpolating:
    """How far the weights go from the start to what was trained."""

    TITLE = "Interpolation"

    interpolate: float | str | None = option(
        None,
        "α: save the weights μ + α (θ − μ) between the start μ and the trained θ, and measure them "
        "and their Fisher. auto: try 0.1, 0.2, …, 1 on held-out data, and take the α of the best "
        "mean score where --validation has old tasks, else the smallest that keeps 95% of what "
        "the new task gains.",
        metavar="X|auto",
        choices=("auto",),
        least=0,
        most=1,
        typed=number_or("auto", expected="expected a number from 0 to 1, or auto"),
    )
    interpolation: str = option(
        "plain",
        "plain: α for all weights; fisher: each weight's start and end weighted by the Fishers "
        "of the earlier tasks and of the new one, measured in one more pass.",
        choices=("plain", "fisher"),
    )


@dataclass(frozen=True)
class Head:
    """What becomes of the output layer."""

    TITLE = "Head (output layer)"

    head: str = option(
        "keep",
        "keep: for data with the same labels; new: keep the present head for its tasks, initialize "
        "a new, unpenalized one; extend: add rows for new labels.",
        choices=("keep", "new", "extend"),
    )
    head_parameters: tuple[str, ...] = option(
        (),
        "Names of the head's parameters.",
        by_default="those outside transformers' base model, else the last module that has any",
        metavar="PATTERN",
    )


@dataclass(frozen=True)
class Gate:
    """What is measured on the way, and what may be lost."""

    TITLE = "Evaluation"

    evaluate: dict[str, str | Path] | None = option(
        None,
        "Evaluate before training, after each epoch and at the end, with the head of task NAME "
        "if any. DATA may be lm-eval:TASK.",
        metavar="NAME=DATA",
        **_PER_CALL,
    )
    max_forgetting: float | None = option(
        None,
        "Exit with code 5 and save the output as DIR.failed-forgetting if an old task in "
        "--evaluate (else in --validation), or a benchmark, loses more score than this (accuracy, "
        "0.01 is one point; else minus the loss).",
        least=0,
    )
    benchmark_limit: int | None = _benchmark_limit()
    compare_none: bool = option(
        False,
        "Also train without a penalty, and report what the penalty saved of the old tasks in "
        "--evaluate.",
        **_PER_CALL,
    )


@dataclass(frozen=True)
class Recipe:
    """How a run trains."""

    TITLE = "Training"

    epochs: int | None = option(
        None, "Passes over the data.", by_default="1 or --max-steps", least=1
    )
    max_steps: int | None = option(
        None,
        "Train for this many optimizer steps, with as many passes over the data as they take. With "
        "--epochs too, the shorter of both counts.",
        least=1,
    )
    max_examples: int | None = option(
        None, "Train on a seeded random subset of this size.", by_default="all", least=1
    )
    batch_size: int = option(16, "Examples per batch on each process.", least=1)
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", least=1)
    learning_rate: float = option(5e-5, "Peak learning rate.", above=0)
    optimizer: str = option("adamw", "Optimizer from torch.", choices=("adamw", "adam", "sgd"))
    momentum: float | None = option(None, "Momentum of sgd.", by_default="0", least=0, below=1)
    adam_betas: tuple[float, ...] | None = option(
        None,
        "Decay rates β₁,β₂ of the moments of adam and adamw.",
        by_default="0.9,0.999",
        metavar="B1,B2",
        least=0,
        below=1,
        typed=read_numbers,
    )
    weight_decay: float = option(
        0.0, "Weight decay. It pulls unprotected weights to zero, task after task.", least=0
    )
    lr_scheduler: str = option(
        "constant",
        "Learning rate after the warm-up; linear and cosine end at zero.",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = option(0, "Steps from zero to the peak learning rate.", least=0)
    max_grad_norm: float | None = option(
        None,
        "Clip the norm of the gradient, including the penalty's.",
        by_default="no clipping",
        above=0,
    )
    mixed_precision: str = option(
        "no",
        "Autocast of the forward pass; the master weights stay float32.",
        choices=("no", "bf16", "fp16"),
    )
    norm_statistics: str | None = option(
        None,
        "Running statistics of batch norms: keep those of the checkpoint, or follow the new data.",
        by_default="frozen with a penalty, a Fisher or an old task to evaluate, else update",
        choices=("frozen", "update"),
    )
    penalty_step: str = option(
        "gradient",
        "gradient: add λΛ(θ − μ) to the gradient; proximal: apply the penalty implicitly after "
        "the optimizer's step, stable for every λ.",
        group=PenaltyOptions.TITLE,
        choices=("gradient", "proximal"),
    )
    evaluate_every: int | None = option(
        None,
        "Evaluate every STEPS optimizer steps too, and at the last step.",
        group=Gate.TITLE,
        metavar="STEPS",
        least=1,
    )
    log_every: int = option(
        50, "Log every N optimizer steps.", group="Output", least=1, changes_result=False
    )
    seed: int = _seed()

    def step_examples(self, processes: int) -> int:
        """Return the examples of one optimizer step, over all micro-batches and processes."""
        return self.batch_size * self.gradient_accumulation_steps * processes


@dataclass(frozen=True)
class FisherOptions:
    """The options of `fisher`."""

    COMMON = (
        "data",
        "task",
        "output_dir",
        "estimator",
        "max_examples",
        "batch_size",
        "seed",
        "add",
        "overwrite",
        "dry_run",
    )

    checkpoint: str | Path = _checkpoint()
    data: str | Path | None = option(
        None,
        "The task's data: file, folder, Hub dataset or task.toml. Required without --generate.",
        metavar="DATA",
        changes_result=False,
    )
    task: str | None = _task("Name of the task.", "that of the data; self with --generate")
    generation: Generation = part(Generation())
    encoding: Encoding = part(Encoding())
    source: Source = part(Source())
    parameters: Parameters = part(Parameters())
    dtype: str | None = _dtype("as stored, but float32 for float16")
    estimation: Estimation = part(Estimation())
    curvature: Curvature = part(Curvature())
    seed: int = _seed()
    add: bool = option(False, "Add the task to the Fisher that CHECKPOINT already has.")
    after: str | Path | None = option(
        None,
        "Where another program trained CHECKPOINT from the checkpoint OLD: merge the task with "
        "those of OLD.",
        group=Merging.TITLE,
        metavar="OLD",
        changes_result=False,
    )
    merging: Merging = part(Merging())
    output_dir: str | Path | None = option(
        None,
        "Write a whole checkpoint here. Required if CHECKPOINT is not a local folder.",
        by_default="only a folder fisher in CHECKPOINT",
        metavar="DIR",
        changes_result=False,
    )
    saving: Saving = part(Saving())
    dry_run: bool = option(
        False, "Only report what it would take: time, memory, file sizes.", changes_result=False
    )


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of `finetune`."""

    COMMON = (
        "data",
        "output_dir",
        "task",
        "ewc_lambda",
        "epochs",
        "learning_rate",
        "batch_size",
        "seed",
        "evaluate",
        "max_forgetting",
    )

    checkpoint: str | Path = _checkpoint()
    data: str | Path = option(
        REQUIRED,
        "The new task's data: file, folder, Hub dataset or task.toml.",
        metavar="DATA",
        **_PER_CALL,
    )
    output_dir: str | Path = _output_dir(
        "Where to write the new checkpoint, whose Fisher covers the new task too."
    )
    task: str | None = _task("Name of the task.")
    encoding: Encoding = part(Encoding())
    source: Source = part(Source())
    parameters: Parameters = part(Parameters())
    recipe: Recipe = part(Recipe())
    search: Search = part(Search())
    penalty: PenaltyOptions = part(PenaltyOptions())
    replaying: Replaying = part(Replaying())
    interpolating: Interpolating = part(Interpolating())
    curvature: Curvature = part(Curvature())
    estimation: Estimation = part(Estimation(batch_size=None), prefix="fisher_")
    measuring: Measuring = part(Measuring())
    merging: Merging = part(Merging())
    head: Head = part(Head())
    adapter: Adapter = part(Adapter())
    gate: Gate = part(Gate())
    saving: Saving = part(Saving())
    dry_run: bool = option(
        False,
        "Check what can be checked, take a few steps, and only report what training would take.",
        group="Output",
        **_PER_CALL,
    )
    on_step: Callable[..., None] | None = option(
        None,
        "Called after each optimizer step with its loss, its penalty and its learning rate; not "
        "for the candidates of a search.",
        python="Callable[[Step], None] | None",
        python_only=True,
        **_PER_CALL,
    )


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `evaluate`."""

    COMMON = ("data", "task", "batch_size", "seed")

    checkpoint: str | Path = _checkpoint()
    data: dict[str, str | Path] | str | Path = option(
        REQUIRED,
        "Data to evaluate on, with the head of task NAME if it has one. A language model can be "
        "scored on a benchmark of EleutherAI's harness: lm-eval:TASK, by a task's name or the "
        "path of a task file (.yaml; its functions are run).",
        metavar="[NAME=]DATA",
        python="str | Path | Mapping[str, str | Path]",
    )
    task: str | None = _task("Use the head of this task for all data.", None)
    encoding: Encoding = part(Encoding())
    source: Source = part(Source())
    batch_size: int = option(16, "Examples per batch.", least=1)
    benchmark_limit: int | None = _benchmark_limit()
    seed: int = _seed()
    dtype: str | None = _dtype()


@dataclass(frozen=True)
class MergeOptions:
    """The options of `merge`."""

    checkpoints: tuple[str | Path, ...] = option(
        REQUIRED,
        "Folders or repositories on the Hub, each with its Fisher.",
        argument=True,
        metavar="CHECKPOINT…",
    )
    output_dir: str | Path = _output_dir("Where to write the merged checkpoint.")
    weights: tuple[float, ...] | None = option(
        None,
        "Coefficients of the checkpoints, in their order.",
        by_default="1 each",
        metavar="X,Y,…",
        typed=read_numbers,
    )
    base: str | Path | None = option(
        None,
        "Common ancestor of the checkpoints, with its Fisher; its tasks are counted once.",
        metavar="CHECKPOINT",
    )
    overwrite: bool = _overwrite()


@dataclass(frozen=True)
class RemapOptions:
    """The options of `remap`."""

    checkpoint: str | Path = _checkpoint()
    output_dir: str | Path = _output_dir("Where to write the checkpoint with its Fisher.")
    fisher_of: str | Path | None = option(
        None,
        "Checkpoint with the old names, whose Fisher is carried over.",
        by_default="CHECKPOINT itself, with a fisher folder copied beside its weights",
        metavar="PATH|REPO",
    )
    revision: str | None = _revision()
    overwrite: bool = _overwrite()


@dataclass(frozen=True)
class RunOptions:
    """The options of `run`."""

    path: str | Path = option(
        REQUIRED,
        "The run file: the first checkpoint, the tasks and their options.",
        argument=True,
        metavar="TASKS.TOML",
    )
    output_dir: str | Path | None = option(
        None, "Where to write the checkpoints.", by_default="as the file says", metavar="DIR"
    )
    dry_run: bool = option(False, "Only report which steps would run or be skipped, and why.")
    restart: bool = _restart()


@dataclass(frozen=True)
class ShowOptions:
    """The options of `show`."""

    checkpoint: str | Path = _with_fisher()
    revision: str | None = _revision()
    top: int = option(10, "Number of parameters to list.", least=1)
    csv: str | Path | None = option(
        None,
        "Write the accuracy matrix and the curves over training steps to FILE.",
        metavar="FILE",
    )
    plot: str | Path | None = option(
        None, "Plot the accuracy matrix and the curves (needs matplotlib).", metavar="FILE.png|svg"
    )
    overlap: str | Path | None = option(
        None,
        "Print the overlap with the Fisher of another checkpoint, from 0 to 1, for each layer.",
        metavar="OTHER",
    )


@dataclass(frozen=True)
class ReportOptions:
    """The options of `report`."""

    checkpoint: str | Path = _with_fisher()
    output: str | Path | None = option(
        None,
        "Where to write the report.",
        by_default="NAME-report.html in the current folder",
        metavar="FILE.html",
    )
    plots: str | Path | None = option(
        None, "Write the figures here too, as SVG and PNG (needs matplotlib).", metavar="DIR"
    )
    search: str | Path | None = option(
        None, "Show the search for λ in this JSON output of `finetune`.", metavar="RESULT.json"
    )
    comparison: str | Path | None = option(
        None,
        "Show what the penalty saved, from this JSON output of `finetune --compare-none`.",
        metavar="RESULT.json",
    )
    revision: str | None = _revision()
    overwrite: bool = _overwrite(
        "Replace existing files; those of an earlier report are always replaced."
    )


@dataclass(frozen=True)
class VerifyOptions:
    """The options of `verify`."""

    checkpoints: tuple[str | Path, ...] = option(
        REQUIRED,
        "A checkpoint, and then others that were made from it, each from the one before.",
        argument=True,
        star=True,
        metavar="CHECKPOINT…",
    )
    revision: str | None = _revision()
    base_model: str | Path | None = option(
        None,
        "Base model of a CHECKPOINT that is a peft adapter, or the weights that belong to a Fisher "
        "alone.",
        by_default="the folder that the adapter's config names, if it exists",
        metavar="PATH|REPO",
    )


@dataclass(frozen=True)
class PushOptions:
    """The options of `push`."""

    checkpoint: str | Path = _with_fisher()
    repository: str = option(
        REQUIRED,
        "Where to, such as user/model; created if it does not exist.",
        argument=True,
        metavar="REPO",
    )
    public: bool = option(
        False, "Create the repository as public, and allow pushing to a public one."
    )
    create_pr: bool = option(False, "Open a pull request instead of committing.")
    revision: str | None = option(
        None, "Branch to push to; created if it does not exist.", metavar="BRANCH"
    )
    commit_message: str | None = option(None, "Message of the commit.", metavar="TEXT")
    tag: str | None = option(None, "Tag the commit with this name.", metavar="NAME")
    token: str | None = option(
        None,
        "Token for REPO; what else is read from the Hub needs `hf auth login` or HF_TOKEN.",
        by_default="that of `hf auth login` or HF_TOKEN",
        metavar="TOKEN",
    )
    base_model: tuple[str, ...] = option(
        (), "Model that this one was made from, for the card; several for a merge.", metavar="REPO"
    )
    fisher_dtype: str | None = option(
        None,
        "Dtype of the published Fisher; bfloat16 is half as large.",
        by_default="as stored",
        dtype=True,
        choices=("float32", "bfloat16"),
    )
    structure: str | None = option(
        None,
        "Structure of the published Fisher; diagonal leaves its factors out.",
        by_default="as stored",
        choices=("diagonal", "inputs"),
    )
    fisher_only: bool = option(
        False, "Publish the Fisher alone; --base-model names the weights' repository."
    )
    dry_run: bool = option(
        False,
        "Only list the files that would be sent, with sizes, and which of them the repository "
        "already has (offline: all files).",
    )


@dataclass(frozen=True)
class EveryCommand:
    """What every command takes on the command line, and has no keyword in Python."""

    TITLE = "Output"

    config: str | Path | None = option(
        None,
        "TOML file with options of this command; flags and variables take precedence.",
        group=OTHER,
        metavar="FILE",
    )
    json: bool = option(False, "Print the result as one JSON object.")
    quiet: bool = option(False, "Print no progress and no notes; warnings and errors remain.")
    debug: bool = option(False, "Print the traceback of an error.", group=OTHER)


@dataclass(frozen=True)
class Tracking:
    """What a command that measures something takes on the command line."""

    TITLE = EveryCommand.TITLE

    metrics: str | Path | None = option(
        None,
        "Also write the numbers to FILE, as one flat JSON object for DVC and CI jobs.",
        metavar="FILE",
    )
    mlflow: bool = option(
        False,
        "Log options, metrics and digests to MLflow, in the store MLFLOW_TRACKING_URI; in the run "
        "MLFLOW_RUN_ID if that is set.",
    )
    wandb: bool = option(
        False,
        "Log options, metrics and digests to Weights & Biases, in the project WANDB_PROJECT; on "
        "disk with WANDB_MODE=offline.",
    )


@dataclass(frozen=True)
class MarkdownFlag:
    """What `show` takes on the command line."""

    TITLE = EveryCommand.TITLE

    markdown: bool = option(
        False, "Print the accuracy matrix alone, as Markdown for the summary of a CI job."
    )


COMMANDS: dict[str, type] = {
    "fisher": FisherOptions,
    "finetune": FinetuneOptions,
    "evaluate": EvaluateOptions,
    "merge": MergeOptions,
    "remap": RemapOptions,
    "run": RunOptions,
    "show": ShowOptions,
    "report": ReportOptions,
    "verify": VerifyOptions,
    "push": PushOptions,
}
TYPED: dict[str, tuple[type, ...]] = dict.fromkeys(COMMANDS, (EveryCommand,))
"""What a command takes on the command line alone."""
TYPED |= dict.fromkeys(("fisher", "finetune", "evaluate", "run"), (Tracking, EveryCommand))
TYPED |= {"show": (MarkdownFlag, EveryCommand)}
