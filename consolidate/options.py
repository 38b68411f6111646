"""Every option of every command, once: type, default, bounds, help.

A record holds what one part of the work takes, and what a command takes is a record of records. An
option that is added here has its flag, variable, TOML key, range check and keyword in Python; what
uses it is left to write, and `scripts/write_docs` writes the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consolidate.fields import REQUIRED, option, part

EXACT_UP_TO = 16
"""Outcomes of an example up to which the default estimator is exact, beyond it mc."""

_PER_CALL: dict[str, Any] = {"changes_result": False, "in_run_file": False}
"""What names a place, or is about how one command is run: not for the tasks of a run file."""


def read_numbers(text: str) -> tuple[float, ...]:
    """Read numbers with commas between them, as they were typed, or a list as TOML has it."""
    try:
        return tuple(float(number) for number in text.strip("[]").split(","))
    except ValueError:
        raise ValueError("expected numbers with commas between them") from None


def read_lambda(text: str) -> Any:
    """Read λ as it was typed: a number, several with commas between them, or auto."""
    if text == "auto":
        return text
    try:
        found = read_numbers(text)
    except ValueError as error:
        raise ValueError("expected a number, several with commas between them, or auto") from error
    return found if len(found) > 1 else found[0]


def read_alpha(text: str) -> float | str:
    """Read α as it was typed."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ValueError("expected a number from 0 to 1, or auto") from None


def read_weight(text: str) -> float | str:
    """Read a task's weight as it was typed."""
    try:
        return text if text in ("units", "trace") else float(text)
    except ValueError:
        raise ValueError("expected a number, units or trace") from None


def _checkpoint() -> Any:
    text = "A folder, a weights file, or a repository on the Hub."
    return option(REQUIRED, text, argument=True, **_PER_CALL)


def _revision() -> Any:
    text = "Branch, tag or commit of a CHECKPOINT on the Hub."
    return option(None, text, metavar="REV", **_PER_CALL)


def _output_dir(help: str) -> Any:
    return option(REQUIRED, help, metavar="DIR", **_PER_CALL)


def _restart() -> Any:
    return option(False, "Discard saved progress and start over.", **_PER_CALL)


def _overwrite(
    help: str = "Replace the output that is there. One that is up to date is left as it is.",
) -> Any:
    return option(False, help, **_PER_CALL)


def _task(help: str = "Name of the task; that of the data by default.") -> Any:
    return option(None, help, metavar="NAME", in_run_file=False)


def _seed() -> Any:
    return option(0, "Random seed.", least=0, below=2**63)


def _batch_size(help: str = "Examples at a time.") -> Any:
    return option(16, help, least=1)


def _dtype() -> Any:
    return option(
        None,
        "Dtype of the weights; as stored by default. A Fisher is float32 in any case.",
        dtype=True,
        choices=("float32", "float64", "bfloat16", "float16"),
    )


@dataclass(frozen=True)
class Source:
    """Which checkpoint it is, and what module it becomes."""

    objective: str | None = option(
        None,
        "What is predicted; the architecture's own by default. One of sequence-classification, "
        "multi-label, token-classification, regression, causal-lm, masked-lm, seq2seq-lm, "
        "image-classification, classification.",
        metavar="NAME",
    )
    model: str | None = option(
        None,
        "Function that makes the torch module, called with the contents of config.json, for "
        "models that transformers does not know.",
        metavar="PACKAGE.MODULE:FACTORY",
    )
    revision: str | None = _revision()
    base_model: str | Path | None = option(
        None,
        "Base model of a CHECKPOINT that is an adapter of peft; the folder that its config names "
        "by default, if that is there.",
        metavar="PATH|REPO",
        **_PER_CALL,
    )
    device: str | None = option(
        None, "cpu, cuda, mps, …; the best there is by default.", metavar="DEVICE"
    )


def _column(what: str) -> Any:
    return option(None, f"Where the {what} is in the data.", metavar="COLUMN")


@dataclass(frozen=True)
class Columns:
    """The names of the columns with each role; None takes the usual ones."""

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


@dataclass(frozen=True)
class Encoding:
    """How rows become batches."""

    columns: Columns = part(Columns(), suffix="_column", one_argument=True)
    split: str | None = option(None, "Split of a dataset that has several.", metavar="NAME")
    max_length: int | None = option(
        None, "Truncate texts after this many tokens; the model's own limit by default.", least=1
    )
    pack: bool = option(False, "Fill sequences with consecutive texts (language models).")


@dataclass(frozen=True)
class Estimation:
    """How a Fisher is measured."""

    estimator: str | None = option(
        None,
        "Labels the Fisher is an expectation over: all of them (exact), sampled from the model "
        "(mc), the data's own (empirical), or sampled and squared per batch (batched). By default "
        f"exact up to {EXACT_UP_TO} outcomes, else mc.",
        choices=("exact", "mc", "empirical", "batched"),
    )
    mc_samples: int | None = option(
        None, "Labels sampled per example by mc and batched; 1 by default.", least=1
    )
    max_outcomes: int | None = option(
        None, "Refuse exact above this many backward passes per example; 4096 by default.", least=1
    )
    max_examples: int | None = option(
        None, "Measure on a seeded random subset of this size.", least=1
    )
    batch_size: int | None = option(
        16,
        "Examples measured at a time; the Fisher is that of single examples. In finetune as "
        "--batch-size by default.",
        least=1,
    )
    tolerance: float | None = option(
        None,
        "Read in random order, and stop once the relative standard error of every parameter's "
        "trace is at most this, after 64 examples at the earliest.",
        above=0,
    )
    accumulate_dtype: str = option(
        "float32",
        "Dtype for squaring and accumulating gradients.",
        dtype=True,
        choices=("float32", "float64"),
    )
    check: bool = option(
        False,
        "Verify per-example gradients on every batch, not only the first.",
        changes_result=False,
    )


@dataclass(frozen=True)
class Parameters:
    """Which parameters take part, and how devices hold them."""

    freeze: tuple[str, ...] = option(
        (),
        "Neither train nor measure the parameters whose name matches, such as 'encoder.*'; may be "
        "repeated.",
        metavar="PATTERN",
    )
    gradient_checkpointing: bool = option(
        False,
        "Layers keep only their inputs, and run again in the backward pass: less memory for long "
        "examples, more time, the same result. For transformers' models.",
    )
    shard: bool = option(
        False,
        "Each of several processes (torchrun) holds a shard of weights, Fisher and optimizer's "
        "state (FSDP2): for models that no device holds whole.",
        in_run_file=False,
    )


@dataclass(frozen=True)
class Merging:
    """How a task's Fisher is merged with those before it."""

    merge_rule: str | None = option(
        None,
        "online protects all tasks around the new weights, separate each around the weights it "
        "was learned at. As for the task before by default, online at first.",
        choices=("online", "separate"),
    )
    gamma: float | None = option(
        None,
        "With online: the share of the earlier Fisher that is kept. As before by default, 1 at "
        "first.",
        least=0,
        most=1,
    )
    task_weight: float | str = option(
        1.0,
        "Factor of the task's Fisher: a number, or such that, relative to the first task, it "
        "counts by the units it was measured on, or has as large a trace.",
        metavar="X|units|trace",
        choices=("units", "trace"),
        least=0,
        typed=read_weight,
    )


@dataclass(frozen=True)
class Saving:
    """What is saved on the way, and what is replaced."""

    save_every: float = option(
        5.0,
        "Save progress every MINUTES beside the output; rerunning the command resumes and gives "
        "bit-identical results. 0: as often as possible, inf: never. SIGTERM and Ctrl-C save too.",
        metavar="MINUTES",
        least=0,
        infinite=True,
        changes_result=False,
    )
    restart: bool = _restart()
    overwrite: bool = _overwrite()
    data_digest: bool = option(True, "Keep a digest of the data in the ledger (kept by default).")


@dataclass(frozen=True)
class Search:
    """The strength of the penalty, and how it is chosen."""

    ewc_lambda: float | tuple[float, ...] | str | None = option(
        None,
        "λ, the strength of the penalty. Several, or auto, are trained from the same start and "
        "one of them is chosen: see --validation and --choose.",
        metavar="X|X,Y,…|auto",
        choices=("auto",),
        least=0,
        typed=read_lambda,
    )
    validation: dict[str, str | Path] | None = option(
        None,
        "Held-out data to choose λ by, of old tasks and of the new one; may be repeated. A tenth "
        "of the new task's data is held out where none is given for it.",
        metavar="NAME=DATA",
        changes_result=False,
    )
    choose: str | None = option(
        None,
        "mean: the λ of the largest mean score. least: the smallest that stays under "
        "--max-forgetting. most: the largest that keeps 95% of what the new task gains. By "
        "default most without old data, least with --max-forgetting, else mean.",
        choices=("mean", "least", "most"),
    )
    search_plot: str | Path | None = option(
        None,
        "Draw the search as .png, .svg or .pdf (needs matplotlib).",
        metavar="FILE",
        written=True,
        changes_result=False,
    )


@dataclass(frozen=True)
class PenaltyOptions:
    """What the penalty is, and where its tensors are."""

    penalty: str = option(
        "ewc",
        "ewc: Fisher-weighted penalty; l2: uniform penalty; none: no penalty.",
        choices=("ewc", "l2", "none"),
    )
    penalty_dtype: str | None = option(
        None,
        "Dtype of Λ and μ in memory; as they are stored by default.",
        dtype=True,
        choices=("float32", "bfloat16"),
    )
    penalty_device: str | None = option(
        None, "Where Λ and μ are; beside the weights by default.", metavar="DEVICE"
    )
    fisher: str | Path | None = option(
        None,
        "Take the Fisher from here; from beside the weights by default.",
        metavar="PATH|REPO",
        **_PER_CALL,
    )
    penalty_on: str | None = option(
        None,
        "Where an adapter is trained: adapter protects its own parameters by their Fisher, merged "
        "protects W + s·B·A by the Fisher of the whole weights. By default adapter for a "
        "CHECKPOINT that is an adapter with a Fisher, else merged.",
        choices=("adapter", "merged"),
    )


@dataclass(frozen=True)
class Adapter:
    """A fresh low-rank adapter, trained in place of the weights."""

    lora_rank: int | None = option(
        None,
        "Train a fresh low-rank adapter W + s·B·A in place of the weights W (Hu et al. 2021). The "
        "output is a whole checkpoint, with the adapter merged (needs peft).",
        metavar="R",
        least=1,
    )
    lora_targets: tuple[str, ...] = option(
        (),
        "Layers that get one, such as '*.q_proj' or q_proj; may be repeated. By default those "
        "that peft has for the architecture.",
        metavar="PATTERN",
    )
    lora_alpha: float | None = option(
        None, "α of s = α/R; R by default, so that s = 1.", metavar="X", above=0
    )
    lora_train_head: bool = option(
        False,
        "Train the head of --head keep in full beside the adapter (modules_to_save in peft), "
        "penalized by its Fisher; frozen by default. A new or extended head trains in any case.",
    )


@dataclass(frozen=True)
class Interpolating:
    """How far the weights go from the start to what was trained."""

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
        typed=read_alpha,
    )
    interpolation: str = option(
        "plain",
        "plain: α for all weights; fisher: each weight's start and end weighted by the Fishers "
        "of the earlier tasks and of the new one, for which a second pass measures it.",
        choices=("plain", "fisher"),
    )


@dataclass(frozen=True)
class Head:
    """What becomes of the output layer."""

    head: str = option(
        "keep",
        "The output layer: keep it, for data with its labels; new saves it for the tasks that use "
        "it and initializes a new, unpenalized one; extend adds rows for new labels.",
        choices=("keep", "new", "extend"),
    )
    head_parameters: tuple[str, ...] = option(
        (),
        "Names of the output layer's parameters; by default those outside the base model of "
        "transformers, else those of the last module that has some. May be repeated.",
        metavar="PATTERN",
    )


@dataclass(frozen=True)
class Recipe:
    """How a run descends."""

    epochs: int | None = option(
        None, "Passes over the data; 1 unless --max-steps is given.", least=1
    )
    max_steps: int | None = option(
        None, "Optimizer steps in all; ends the run before --epochs do.", least=1
    )
    max_examples: int | None = option(
        None, "Train on a seeded random subset of this size.", least=1
    )
    batch_size: int = _batch_size("Examples per batch and process.")
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", least=1)
    learning_rate: float = option(5e-5, "The peak of the schedule.", above=0)
    optimizer: str = option(
        "adamw", "The optimizer, torch's own.", choices=("adamw", "adam", "sgd")
    )
    momentum: float | None = option(None, "Of sgd; 0 by default.", least=0, below=1)
    adam_betas: tuple[float, ...] | None = option(
        None,
        "β₁,β₂ of adam and adamw, the decay rates of their moments; 0.9,0.999 by default.",
        metavar="B1,B2",
        least=0,
        below=1,
        typed=read_numbers,
    )
    weight_decay: float = option(
        0.0, "0 by default: it would pull unprotected weights to zero, task after task.", least=0
    )
    lr_scheduler: str = option(
        "constant", "After the warm-up.", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = option(0, "Steps from zero to the peak.", least=0)
    max_grad_norm: float | None = option(
        None, "Clip the norm of the whole gradient, an added penalty's included.", above=0
    )
    mixed_precision: str = option(
        "no",
        "Autocast of the forward pass; the master weights are float32.",
        choices=("no", "bf16", "fp16"),
    )
    norm_statistics: str | None = option(
        None,
        "Running statistics of batch norms. By default frozen, whatever the penalty; update only "
        "without a penalty, a Fisher and another task to evaluate.",
        choices=("frozen", "update"),
    )
    penalty_step: str = option(
        "gradient",
        "gradient adds λ Λ (θ − μ) to the gradient; proximal takes the penalty's step implicitly "
        "after the optimizer's, stable for every λ.",
        choices=("gradient", "proximal"),
    )
    evaluate_every: int | None = option(
        None,
        "Measure after so many optimizer steps too, and at the last.",
        metavar="STEPS",
        least=1,
    )
    log_every: int = option(
        50, "Log every N optimizer steps.", metavar="N", least=1, changes_result=False
    )
    seed: int = _seed()

    def step_examples(self, processes: int) -> int:
        """Return the examples of one optimizer step, over all micro-batches and processes."""
        return self.batch_size * self.gradient_accumulation_steps * processes


@dataclass(frozen=True)
class Gate:
    """What is measured on the way, and what may be lost."""

    evaluate: dict[str, str | Path] | None = option(
        None,
        "Measure before, after each epoch and at the end; may be repeated. A task of that NAME "
        "that has a head of its own is measured with that.",
        metavar="NAME=DATA",
        **_PER_CALL,
    )
    max_forgetting: float | None = option(
        None,
        "Exit with code 5 and save the output as DIR.failed-forgetting where an old task that "
        "--evaluate names loses more than this in score: accuracy, else minus the loss.",
        metavar="X",
        least=0,
    )


@dataclass(frozen=True)
class FisherOptions:
    """The options of `fisher`."""

    checkpoint: str | Path = _checkpoint()
    data: str | Path = option(
        REQUIRED,
        "The task's data: a file, a folder, a dataset on the Hub, or a task.toml.",
        metavar="DATA",
        changes_result=False,
    )
    task: str | None = _task()
    source: Source = part(Source())
    encoding: Encoding = part(Encoding())
    estimation: Estimation = part(Estimation())
    seed: int = _seed()
    dtype: str | None = _dtype()
    parameters: Parameters = part(Parameters())
    add: bool = option(False, "Add another task measured at the same weights.")
    merging: Merging = part(Merging())
    output_dir: str | Path | None = option(
        None,
        "Write a whole checkpoint here instead of a folder fisher into CHECKPOINT.",
        metavar="DIR",
        changes_result=False,
    )
    saving: Saving = part(Saving())
    dry_run: bool = option(
        False,
        "Only say what it would take: time, memory, sizes of files. Nothing is written.",
        changes_result=False,
    )


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of `finetune`."""

    checkpoint: str | Path = _checkpoint()
    data: str | Path = option(
        REQUIRED,
        "The new task's data: a file, a folder, a dataset on the Hub, or a task.toml.",
        metavar="DATA",
        **_PER_CALL,
    )
    output_dir: str | Path = _output_dir("Where the new checkpoint goes.")
    search: Search = part(Search())
    penalty: PenaltyOptions = part(PenaltyOptions())
    adapter: Adapter = part(Adapter())
    interpolating: Interpolating = part(Interpolating())
    task: str | None = _task()
    source: Source = part(Source())
    head: Head = part(Head())
    encoding: Encoding = part(Encoding())
    recipe: Recipe = part(Recipe())
    gate: Gate = part(Gate())
    parameters: Parameters = part(Parameters())
    saving: Saving = part(Saving())
    estimation: Estimation = part(Estimation(batch_size=None), prefix="fisher_")
    merging: Merging = part(Merging())
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

    checkpoint: str | Path = _checkpoint()
    data: dict[str, str | Path] | str | Path = option(
        REQUIRED,
        "The data by task name; may be repeated. A task of that NAME that has a head of its own "
        "is measured with that.",
        metavar="[NAME=]DATA",
        python="str | Path | Mapping[str, str | Path]",
    )
    task: str | None = _task(
        "Measure with the output layer of this task, whatever the data is named."
    )
    source: Source = part(Source())
    encoding: Encoding = part(Encoding())
    batch_size: int = _batch_size()
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
    output_dir: str | Path = _output_dir("Where the merged checkpoint goes.")
    weights: tuple[float, ...] | None = option(
        None,
        "Coefficients of the checkpoints, in their order; 1 each by default.",
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
class RunOptions:
    """The options of `run`."""

    path: str | Path = option(
        REQUIRED,
        "The run file; docs/run.md tells what it may say.",
        argument=True,
        metavar="TASKS.TOML",
    )
    output_dir: str | Path | None = option(
        None, "Where the checkpoints go; as the file says by default.", metavar="DIR"
    )
    dry_run: bool = option(False, "Only say what would be done or skipped, and why.")
    restart: bool = _restart()


@dataclass(frozen=True)
class ShowOptions:
    """The options of `show`."""

    checkpoint: str | Path = _checkpoint()
    revision: str | None = _revision()
    top: int = option(10, "How many parameters to list.", least=1)
    csv: str | Path | None = option(
        None, "Write the accuracy matrix and the curves over training steps here.", metavar="FILE"
    )
    plot: str | Path | None = option(
        None, "Draw them here; needs matplotlib.", metavar="FILE.png|svg"
    )
    overlap: str | Path | None = option(
        None,
        "Another checkpoint: how far its Fisher lies on the same weights, 0 to 1 for each layer.",
        metavar="OTHER",
    )


@dataclass(frozen=True)
class ReportOptions:
    """The options of `report`."""

    checkpoint: str | Path = _checkpoint()
    output: str | Path | None = option(
        None, "NAME-report.html in the current folder by default.", metavar="FILE.html"
    )
    plots: str | Path | None = option(
        None, "Write the pictures here too, as SVG and PNG; needs matplotlib.", metavar="DIR"
    )
    revision: str | None = _revision()
    overwrite: bool = _overwrite(
        "Replace files that are there; those of an earlier report are replaced anyway."
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
        "Base model of a CHECKPOINT that is an adapter of peft; the folder that its config names "
        "by default, if that is there. Of one that holds a Fisher alone: the weights it is of.",
        metavar="PATH|REPO",
    )


@dataclass(frozen=True)
class PushOptions:
    """The options of `push`."""

    checkpoint: str | Path = _checkpoint()
    repository: str = option(
        REQUIRED,
        "Where to, such as user/model; created where it is missing.",
        argument=True,
        metavar="REPO",
    )
    public: bool = option(
        False, "Create the repository as public, and allow pushing to a public one."
    )
    create_pr: bool = option(False, "Open a pull request instead of committing.")
    revision: str | None = option(
        None, "The branch; created where it is missing.", metavar="BRANCH"
    )
    commit_message: str | None = option(None, "Message of the commit.", metavar="TEXT")
    tag: str | None = option(None, "Tag the commit with this name.", metavar="NAME")
    token: str | None = option(
        None, "Token for the Hub; that of `hf auth login` or HF_TOKEN by default.", metavar="TOKEN"
    )
    base_model: tuple[str, ...] = option(
        (),
        "For the card: what this model was made from. May be repeated, for a merge.",
        metavar="REPO",
    )
    fisher_dtype: str | None = option(
        None,
        "Dtype of the Fisher, as it is by default; bfloat16 is half as large.",
        dtype=True,
        choices=("float32", "bfloat16"),
    )
    fisher_only: bool = option(
        False, "Publish the Fisher alone, for the weights in the repository --base-model."
    )
    dry_run: bool = option(
        False,
        "Only list what would be sent, with sizes, and what is there already; without a network "
        "all of it.",
    )


COMMANDS: dict[str, type] = {
    "fisher": FisherOptions,
    "finetune": FinetuneOptions,
    "evaluate": EvaluateOptions,
    "merge": MergeOptions,
    "run": RunOptions,
    "show": ShowOptions,
    "report": ReportOptions,
    "verify": VerifyOptions,
    "push": PushOptions,
}
