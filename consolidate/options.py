"""Options that several commands share, and what is typed for them."""

import tomllib
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

DTYPES = ("float32", "float64", "bfloat16", "float16")


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make one decorator of several options; `--help` lists them in this order.

    Args:
        decorators: As `click.option` makes them, or groups of them.
    """

    def apply(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def _read_config(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Take defaults for the command's options from a TOML file; flags and variables win over it."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} is not TOML: {error}") from None
    names = {p.name: p for p in context.command.params if isinstance(p, click.Option)}
    defaults = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names:
            near = get_close_matches(name, [str(n) for n in names], 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise click.BadParameter(f"{path}: {context.command.name} has no option {key!r}{hint}")
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}


def _remember(context: click.Context, option: click.Parameter, value: bool) -> bool:
    """Let `main` know how what fails is to be told."""
    context.ensure_object(dict)[option.name] = value
    return value


def _place_of_metrics(
    context: click.Context, option: click.Parameter, value: str | None
) -> Path | None:
    from formats.atomic import check_file

    if value is None:
        return None
    check_file(Path(value))  # before the work
    return Path(value)


def column_options() -> Callable[[Any], Any]:
    """Give the options that say where the inputs and labels are."""
    return options(
        *(
            click.option(
                f"--{name.replace('_', '-')}-column",
                metavar="COLUMN",
                help=f"Where the {what} is in the data.",
            )
            for name, what in (
                ("text", "text"),
                ("text_pair", "second text of a pair"),
                ("label", "label"),
                ("tokens", "list of words (token classification)"),
                ("prompt", "prompt"),
                ("completion", "completion"),
                ("messages", "chat"),
                ("target", "target text (sequence to sequence)"),
                ("image", "image"),
                ("inputs", "input tensor"),
            )
        )
    )


def _task_weight(context: click.Context, option: click.Parameter, value: str) -> float | str:
    if value in ("units", "trace"):
        return value
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor units or trace") from None


def numbers_of(text: str) -> list[float]:
    """Read numbers with commas between them, as they were typed, or a list as a TOML file has it.

    Args:
        text: Such as ``1,10`` or ``[1, 10]``.

    Raises:
        ValueError: It is something else.
    """
    return [float(number) for number in text.strip("[]").split(",")]


def _numbers(
    context: click.Context, option: click.Parameter, value: str | None
) -> list[float] | None:
    try:
        return None if value is None else numbers_of(value)
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected numbers with commas between them") from None


COMMON = options(
    click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="TOML file with options of this command; flags and variables win over it.",
    ),
    click.option(
        "--json",
        is_flag=True,
        is_eager=True,  # known before anything else is found wrong
        callback=_remember,
        help="Write the result as one JSON object.",
    ),
    click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_remember,
        help="Show the traceback of an error.",
    ),
)

METRICS = click.option(
    "--metrics",
    metavar="FILE",
    callback=_place_of_metrics,
    help="Write the numbers here too, as one flat JSON object, which DVC and CI jobs read.",
)

WEIGHTS = click.option(
    "--weights",
    metavar="X,Y,…",
    callback=_numbers,
    help="Coefficients of the checkpoints, in their order; 1 each by default.",
)

MLFLOW = click.option(
    "--mlflow",
    is_flag=True,
    help="Log options, metrics and digests as a run of MLflow, in the store MLFLOW_TRACKING_URI; "
    "where MLFLOW_RUN_ID names a run, in that.",
)

REVISION = click.option(
    "--revision", metavar="REV", help="Branch, tag or commit of a CHECKPOINT on the Hub."
)

MODEL = options(
    click.option(
        "--objective",
        metavar="NAME",
        help="What is predicted; the architecture's own by default. One of "
        "sequence-classification, multi-label, token-classification, regression, causal-lm, "
        "masked-lm, seq2seq-lm, image-classification, classification.",
    ),
    click.option(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="Function that makes the torch module, called with the contents of config.json, for "
        "models that transformers does not know.",
    ),
    REVISION,
    click.option(
        "--base-model",
        metavar="PATH|REPO",
        help="Of a CHECKPOINT that is an adapter of peft; the folder that it names by default.",
    ),
    click.option(
        "--device", metavar="DEVICE", help="cpu, cuda, mps, …; the best there is by default."
    ),
)

DATA = options(
    click.option("--split", metavar="NAME", help="Split of a data set that has several."),
    click.option(
        "--max-length",
        type=click.IntRange(min=1),
        help="Truncate texts after this many tokens; the model's own limit by default.",
    ),
    click.option(
        "--pack", is_flag=True, help="Fill sequences with consecutive texts (language models)."
    ),
    column_options(),
)


def estimator_options(prefix: str) -> Callable[[Any], Any]:
    """Give the options of how a Fisher is measured.

    Args:
        prefix: ``""``, or ``"fisher-"`` where other options have the plain names.
    """

    def option(name: str, **settings: Any) -> Callable[[Any], Any]:
        return click.option(f"--{prefix}{name}", **settings)

    return options(
        option(
            "estimator",
            type=click.Choice(["exact", "mc", "empirical", "batched"]),
            help="Labels the Fisher is an expectation over: all of them (exact), sampled from the "
            "model (mc), the data's own (empirical), or sampled and squared per batch (batched). "
            "By default exact up to 16 outcomes, else mc.",
        ),
        option(
            "mc-samples",
            type=click.IntRange(min=1),
            help="Labels sampled per example by mc and batched; 1 by default.",
        ),
        option(
            "max-outcomes",
            type=click.IntRange(min=1),
            help="Refuse exact above this many backward passes per example; 4096 by default.",
        ),
        option(
            "tolerance",
            type=click.FloatRange(min=0, min_open=True),
            help="Read in random order, and stop once the relative standard error of every "
            "parameter's trace is at most this, after 64 examples at the earliest.",
        ),
        option(
            "accumulate-dtype",
            type=click.Choice(["float32", "float64"]),
            default="float32",
            show_default=True,
            help="Of the sums, and what gradients are squared in.",
        ),
        option(
            "check",
            is_flag=True,
            help="Hold every batch against single examples, not only the first.",
        ),
    )


FREEZE = click.option(
    "--freeze",
    multiple=True,
    metavar="PATTERN",
    help="Leave out the parameters whose name matches, such as 'encoder.*'; may be repeated.",
)
GRADIENT_CHECKPOINTING = click.option(
    "--gradient-checkpointing",
    is_flag=True,
    help="Layers keep only their inputs, and run again in the backward pass: less memory for long "
    "examples, more time, the same result. Of transformers' models.",
)
SHARD = click.option(
    "--shard",
    is_flag=True,
    help="Each of several processes (torchrun) holds a shard of weights, Fisher and optimizer's "
    "state (FSDP2): for models that no device holds whole.",
)
SEED = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of everything random.",
)
MERGING = options(
    click.option(
        "--merge-rule",
        type=click.Choice(["online", "separate"]),
        help="How the task is merged with those before it: online holds them all at the new "
        "weights, separate each where it was learned. As the task before by default, online at "
        "first.",
    ),
    click.option(
        "--gamma",
        type=click.FloatRange(0, 1),
        help="Of online: how much of the Fisher so far is kept. As before by default, 1 at first.",
    ),
    click.option(
        "--task-weight",
        metavar="X|units|trace",
        default="1",
        show_default=True,
        callback=_task_weight,
        help="What the task's Fisher is multiplied by: a number, or such that, relative to the "
        "first task, it counts by the units it was measured on, or has as large a trace.",
    ),
)
TASK = click.option("--task", metavar="NAME", help="Name of the task; that of the data by default.")
DATA_DIGEST = click.option(
    "--data-digest/--no-data-digest",
    default=True,
    help="Keep a digest of the data in the ledger (kept by default).",
)
BATCH_SIZE = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Examples at a time.",
)
RESTART = click.option(
    "--restart", is_flag=True, help="Throw away what was kept of work that was broken off."
)
KEEPING = options(
    click.option(
        "--save-every",
        type=click.FloatRange(min=0),
        default=5.0,
        show_default=True,
        metavar="MINUTES",
        help="Keep what was done so far beside the output; the same command started again goes on "
        "from there, to the same bytes. 0: as often as can be. SIGTERM and Ctrl-C keep it too.",
    ),
    RESTART,
)
FORCE = click.option(
    "--force",
    is_flag=True,
    help="Do it anew, and replace the output, even where that is there and was made from the same.",
)


def _strengths(
    context: click.Context, option: click.Parameter, value: str | None
) -> float | list[float] | str | None:
    if value is None or value == "auto":
        return value
    try:
        numbers = numbers_of(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r}: expected a number, several with commas between them, or auto"
        ) from None
    if not all(0 <= number < float("inf") for number in numbers):
        raise click.BadParameter(f"{value!r}: expected finite numbers from 0")
    return numbers if len(numbers) > 1 else numbers[0]


STRENGTH = options(
    click.option(
        "--ewc-lambda",
        metavar="X|X,Y,…|auto",
        callback=_strengths,
        help="λ, the strength of the penalty. Several, or auto, are trained from the same start "
        "and one of them is chosen: see --validation and --choose.",
    ),
    click.option(
        "--validation",
        multiple=True,
        metavar="NAME=DATA",
        help="Held-out data to choose λ by, of old tasks and of the new one; may be repeated. A "
        "tenth of the new task's data is held out where none is given for it.",
    ),
    click.option(
        "--choose",
        type=click.Choice(["mean", "least", "most"]),
        help="mean: the λ of the largest mean score. least: the least that stays under "
        "--max-forgetting. most: the largest that keeps 95% of what the new task gains. By default "
        "most without old data, least with --max-forgetting, else mean.",
    ),
    click.option(
        "--search-plot",
        metavar="FILE",
        help="Draw the search as .png, .svg or .pdf (needs matplotlib).",
    ),
)


PENALTY = options(
    click.option(
        "--penalty",
        type=click.Choice(["ewc", "l2", "none"]),
        default="ewc",
        show_default=True,
        help="ewc holds each weight by its Fisher, l2 all alike.",
    ),
    click.option(
        "--penalty-step",
        type=click.Choice(["gradient", "proximal"]),
        default="gradient",
        show_default=True,
        help="proximal: implicitly, after the optimizer's step; stable for every λ.",
    ),
    click.option(
        "--penalty-dtype",
        type=click.Choice(["float32", "bfloat16"]),
        help="Of Λ and μ in memory; as they are stored by default.",
    ),
    click.option(
        "--penalty-device",
        metavar="DEVICE",
        help="Where Λ and μ are; beside the weights by default.",
    ),
    click.option(
        "--fisher",
        metavar="PATH|REPO",
        help="Take the Fisher from here; from beside the weights by default.",
    ),
)


ADAPTER = options(
    click.option(
        "--lora-rank",
        type=click.IntRange(min=1),
        metavar="R",
        help="Train a fresh low-rank adapter W + s·B·A in place of the weights W. The output is a "
        "whole checkpoint, with the adapter merged (needs peft).",
    ),
    click.option(
        "--lora-targets",
        multiple=True,
        metavar="PATTERN",
        help="Layers that get one, such as '*.q_proj' or q_proj; may be repeated. By default those "
        "that peft has for the architecture.",
    ),
    click.option(
        "--lora-alpha",
        type=click.FloatRange(min=0, min_open=True),
        metavar="X",
        help="α of s = α/R; R by default, so that s = 1.",
    ),
    click.option("--rslora", is_flag=True, help="s = α/√R instead."),
    click.option(
        "--penalty-on",
        type=click.Choice(["adapter", "merged"]),
        help="Where an adapter is trained: adapter holds its own parameters by their Fisher, "
        "merged holds W + s·B·A by the Fisher of the whole weights. By default adapter for a "
        "CHECKPOINT that is an adapter with a Fisher, else merged.",
    ),
)


HEAD = options(
    click.option(
        "--head",
        type=click.Choice(["keep", "new", "extend"]),
        default="keep",
        show_default=True,
        help="The output layer: keep it, for data with its labels; new puts it aside for the tasks "
        "that use it and starts a fresh one; extend adds rows for new labels.",
    ),
    click.option(
        "--head-parameters",
        multiple=True,
        metavar="PATTERN",
        help="Names of the output layer's parameters; by default those outside the base model of "
        "transformers, else those of the last module that has some. May be repeated.",
    ),
)


TRAINING = options(
    click.option(
        "--epochs", type=click.IntRange(min=1), help="Passes over the data; 1 by default."
    ),
    click.option("--max-steps", type=click.IntRange(min=1), help="Optimizer steps in all."),
    click.option(
        "--max-examples",
        type=click.IntRange(min=1),
        help="Train on a seeded random subset of this size.",
    ),
    BATCH_SIZE,
    click.option(
        "--gradient-accumulation-steps",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Batches per optimizer step.",
    ),
    click.option(
        "--learning-rate",
        type=click.FloatRange(min=0, min_open=True),
        default=5e-5,
        show_default=True,
        help="The peak of the schedule.",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["adamw", "adam", "sgd"]),
        default="adamw",
        show_default=True,
    ),
    click.option(
        "--momentum",
        type=click.FloatRange(0, 1, max_open=True),
        help="Of sgd; 0 by default.",
    ),
    click.option(
        "--weight-decay",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="0 by default: it would pull unprotected weights to zero, task after task.",
    ),
    click.option(
        "--lr-scheduler",
        type=click.Choice(["constant", "linear", "cosine"]),
        default="constant",
        show_default=True,
        help="After the warm-up.",
    ),
    click.option("--warmup-steps", type=click.IntRange(min=0), default=0, show_default=True),
    click.option(
        "--max-grad-norm",
        type=click.FloatRange(min=0, min_open=True),
        help="Clip the norm of the whole gradient, an added penalty's included.",
    ),
    click.option(
        "--mixed-precision",
        type=click.Choice(["no", "bf16", "fp16"]),
        default="no",
        show_default=True,
        help="Autocast of the forward pass; the master weights are float32.",
    ),
    click.option(
        "--norm-statistics",
        type=click.Choice(["frozen", "update"]),
        help="Running statistics of batch norms. By default frozen, whatever the penalty; update "
        "only without a penalty, a Fisher and another task to evaluate.",
    ),
)


EVALUATION = options(
    click.option(
        "--evaluate",
        multiple=True,
        metavar="NAME=DATA",
        help="Measure before, after each epoch and at the end; may be repeated. A task of that "
        "NAME whose output layer was put aside is measured with that.",
    ),
    click.option(
        "--max-forgetting",
        type=click.FloatRange(min=0),
        metavar="X",
        help="Leave with exit code 5, the output kept as DIR.failed-forgetting, where an old task "
        "that --evaluate names loses more than this in score: accuracy, else minus the loss.",
    ),
    click.option(
        "--evaluate-every",
        type=click.IntRange(min=1),
        metavar="STEPS",
        help="Measure after so many optimizer steps too, and at the last.",
    ),
    click.option(
        "--log-every", type=click.IntRange(min=1), default=50, show_default=True, help="In steps."
    ),
)
