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
