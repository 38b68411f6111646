"""The command line: options, messages, exit codes; the work is done by what it imports."""

import errno
import json
import logging
import os
import signal
import sys
import threading
import tomllib
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from formats.errors import ConsolidateError, ForgettingError, InputError

DTYPES = ("float32", "float64", "bfloat16", "float16")


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C, so that nothing half-written stays behind."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code.

    Args:
        arguments: Those of the process unless given.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    for library in ("HF_HUB", "DATASETS"):  # read when they are imported
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = cli(arguments, prog_name="consolidate", standalone_mode=False)
        _leave(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        click.echo(f"error: {error.format_message()}{hint}", err=True)
        _leave(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        _leave(130)
    except Terminated:
        click.echo("terminated", err=True)
        _leave(143)
    except BrokenPipeError:
        sys.stderr.close()
        _leave(141)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        message, code = _explain(error)
        if len(message) > 2000:  # a name in a file can be as long as the file
            message = f"{message[:1500]} … {message[-400:]}"
        click.echo(f"error: {plain(message)}", err=True)
        _leave(code)


def plain(text: str) -> str:
    """Escape what is not printable in a message: names from files could steer the terminal.

    Args:
        text: A message; its line breaks stay.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, ConsolidateError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'output'}: no space left", InputError.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", InputError.exit_code
    return f"{type(error).__name__}: {error} (a fault of consolidate; --debug shows where)", 1


def _leave(code: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except OSError:
        code = code or 141
    sys.exit(code)


def _stop(signum: int, frame: FrameType | None) -> None:
    """Unwind, so that nothing half-written stays; leave at once while something is imported.

    Extension modules lose an exception that passes through their import, or make another of it; a
    finalizer swallows it, so there the signal is sent again a moment later.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n" if signum == signal.SIGINT else b"terminated\n")
            os._exit(128 + signum)
        if frame.f_code.co_name == "__del__":
            threading.Timer(0.05, os.kill, (os.getpid(), signum)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt if signum == signal.SIGINT else Terminated


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


def _tell_everything(context: click.Context, option: click.Parameter, value: bool) -> None:
    """Let a traceback through; `main` looks for the flag itself."""


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def _column_options() -> Callable[[Any], Any]:
    return _options(
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


def _strengths(
    context: click.Context, option: click.Parameter, value: str | None
) -> float | list[float] | str | None:
    if value is None or value == "auto":
        return value
    try:
        numbers = [float(number) for number in value.strip("[]").split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{value!r}: expected a number, several with commas between them, or auto"
        ) from None
    if not all(0 <= number < float("inf") for number in numbers):
        raise click.BadParameter(f"{value!r}: expected finite numbers from 0")
    return numbers if len(numbers) > 1 else numbers[0]


def _numbers(
    context: click.Context, option: click.Parameter, value: str | None
) -> list[float] | None:
    try:
        return None if value is None else [float(number) for number in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected numbers with commas between them") from None


COMMON = _options(
    click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="TOML file with options of this command; flags and variables win over it.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Write the result as one JSON object."),
    click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_tell_everything,
        help="Show the traceback of an error.",
    ),
)

REVISION = click.option(
    "--revision", metavar="REV", help="Branch, tag or commit of a CHECKPOINT on the Hub."
)

MODEL = _options(
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
        "--device", metavar="DEVICE", help="cpu, cuda, mps, …; the best there is by default."
    ),
)

DATA = _options(
    click.option("--split", metavar="NAME", help="Split of a data set that has several."),
    click.option(
        "--max-length",
        type=click.IntRange(min=1),
        help="Truncate texts after this many tokens; the model's own limit by default.",
    ),
    click.option(
        "--pack", is_flag=True, help="Fill sequences with consecutive texts (language models)."
    ),
    _column_options(),
)


def _estimator_options(prefix: str) -> Callable[[Any], Any]:
    def option(name: str, **settings: Any) -> Callable[[Any], Any]:
        return click.option(f"--{prefix}{name}", **settings)

    return _options(
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
SEED = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of everything random.",
)
MERGING = _options(
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


@click.group(
    context_settings={"auto_envvar_prefix": "CONSOLIDATE", "help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="consolidate-ewc", prog_name="consolidate")
def cli() -> None:
    """Fine-tune checkpoints without forgetting.

    Measure the Fisher diagonal of a checkpoint on its task's data, store it beside the weights, and
    fine-tune on the next task with the Elastic Weight Consolidation penalty.
    """
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("consolidate")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    _note_misspelt_variables()


def _note_misspelt_variables() -> None:
    """Tell of variables that begin like ours and set no option; their values are never shown."""
    known = {
        f"CONSOLIDATE_{command}_{option.name}".replace("-", "_").upper()
        for command, below in cli.commands.items()
        for option in below.params
        if isinstance(option, click.Option)
    }
    for name in sorted(os.environ):
        if name.startswith("CONSOLIDATE_") and name not in known:
            near = get_close_matches(name, known, 1, 0.8)
            hint = f"; the nearest is {near[0]}" if near else ""
            logging.getLogger("consolidate").info(f"{name} sets no option{hint}")


class _StderrHandler(logging.Handler):
    """Writes a line to stderr without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(plain(self.format(record)), file=sys.stderr)


@cli.command()
@click.argument("checkpoint")
@click.option("--data", required=True, metavar="DATA", help="The task's data.")
@TASK
@MODEL
@DATA
@_estimator_options("")
@click.option(
    "--max-examples",
    type=click.IntRange(min=1),
    help="Measure on a seeded random subset of this size.",
)
@BATCH_SIZE
@SEED
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of the weights during the pass; as stored by default. The Fisher is float32.",
)
@FREEZE
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only say what it would take: time, memory, sizes of files. Nothing is written.",
)
@click.option(
    "--save-every",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    metavar="MINUTES",
    help="Keep what a long pass has so far; the same command started again goes on from there.",
)
@click.option("--restart", is_flag=True, help="Throw away what was kept of an unfinished pass.")
@click.option("--add", is_flag=True, help="Add another task measured at the same weights.")
@MERGING
@click.option(
    "--overwrite", is_flag=True, help="Replace the Fisher (or output folder) that is there."
)
@click.option(
    "--output-dir",
    metavar="DIR",
    help="Write a whole checkpoint here instead of DIR/fisher into CHECKPOINT.",
)
@DATA_DIGEST
@COMMON
def fisher(checkpoint: str, as_json: bool, **options: Any) -> None:
    """Measure the Fisher diagonal of CHECKPOINT and store it beside the weights.

    CHECKPOINT is a folder, a .safetensors, .bin, .pt or .ckpt file, or a repository on the
    Hub. DATA is a .jsonl, .csv, .parquet, .safetensors or .npz file, a folder of images by
    class, a data set on the Hub, or a task.toml that names these.

    Example: consolidate fisher my-model --data old-task.jsonl --task old
    """
    from consolidate import commands

    result = commands.fisher(checkpoint, **_with_objects(options))
    _write(result, as_json, _fisher_text)


@cli.command()
@click.argument("checkpoint")
@click.option("--data", required=True, metavar="DATA", help="The new task's data.")
@click.option("--output-dir", required=True, metavar="DIR", help="Where the new checkpoint goes.")
@click.option(
    "--ewc-lambda",
    metavar="X|X,Y,…|auto",
    callback=_strengths,
    help="λ, the strength of the penalty. Several, or auto, are trained from the same start and "
    "one of them is chosen: see --validation and --choose.",
)
@click.option(
    "--validation",
    multiple=True,
    metavar="NAME=DATA",
    help="Held-out data to choose λ by, of old tasks and of the new one; may be repeated. A tenth "
    "of the new task's data is held out where none is given for it.",
)
@click.option(
    "--choose",
    type=click.Choice(["mean", "least", "most"]),
    help="mean: the λ of the largest mean score. least: the least that stays under "
    "--max-forgetting. most: the largest that keeps 95% of what the new task gains. By default "
    "most without old data, least with --max-forgetting, else mean.",
)
@click.option(
    "--search-plot",
    metavar="FILE",
    help="Draw the search as .png, .svg or .pdf (needs matplotlib).",
)
@click.option(
    "--penalty",
    type=click.Choice(["ewc", "l2", "none"]),
    default="ewc",
    show_default=True,
    help="ewc holds each weight by its Fisher, l2 all alike.",
)
@click.option(
    "--penalty-step",
    type=click.Choice(["gradient", "proximal"]),
    default="gradient",
    show_default=True,
    help="proximal: implicitly, after the optimizer's step; stable for every λ.",
)
@click.option(
    "--penalty-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of Λ and μ in memory; float32 by default.",
)
@click.option(
    "--penalty-device",
    metavar="DEVICE",
    help="Where Λ and μ are; beside the weights by default.",
)
@click.option(
    "--fisher",
    metavar="PATH|REPO",
    help="Take the Fisher from here; from beside the weights by default.",
)
@TASK
@MODEL
@click.option(
    "--head",
    type=click.Choice(["keep", "new", "extend"]),
    default="keep",
    show_default=True,
    help="The output layer: keep it, for data with its labels; new puts it aside for the tasks "
    "that use it and starts a fresh one; extend adds rows for new labels.",
)
@click.option(
    "--head-parameters",
    multiple=True,
    metavar="PATTERN",
    help="Names of the output layer's parameters; by default those outside the base model of "
    "transformers, else those of the last module that has some. May be repeated.",
)
@DATA
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the data; 1 by default.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Optimizer steps in all.")
@click.option(
    "--max-examples",
    type=click.IntRange(min=1),
    help="Train on a seeded random subset of this size.",
)
@BATCH_SIZE
@click.option(
    "--gradient-accumulation-steps",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Batches per optimizer step.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=5e-5,
    show_default=True,
    help="The peak of the schedule.",
)
@click.option(
    "--optimizer", type=click.Choice(["adamw", "adam", "sgd"]), default="adamw", show_default=True
)
@click.option(
    "--momentum",
    type=click.FloatRange(0, 1, max_open=True),
    help="Of sgd; 0 by default.",
)
@click.option(
    "--weight-decay",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 by default: it would pull unprotected weights to zero, task after task.",
)
@click.option(
    "--lr-scheduler",
    type=click.Choice(["constant", "linear", "cosine"]),
    default="constant",
    show_default=True,
    help="After the warm-up.",
)
@click.option("--warmup-steps", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--max-grad-norm",
    type=click.FloatRange(min=0, min_open=True),
    help="Clip the norm of the whole gradient, an added penalty's included.",
)
@click.option(
    "--mixed-precision",
    type=click.Choice(["no", "bf16", "fp16"]),
    default="no",
    show_default=True,
    help="Autocast of the forward pass; the master weights are float32.",
)
@click.option(
    "--norm-statistics",
    type=click.Choice(["frozen", "update"]),
    help="Running statistics of batch norms; frozen by default where there is a penalty.",
)
@click.option(
    "--evaluate",
    multiple=True,
    metavar="NAME=DATA",
    help="Measure before, after each epoch and at the end; may be repeated. A task of that NAME "
    "whose output layer was put aside is measured with that.",
)
@click.option(
    "--max-forgetting",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Leave with exit code 5, the output kept as DIR.failed-forgetting, where an old task "
    "that --evaluate names loses more than this in score: accuracy, else minus the loss.",
)
@click.option(
    "--evaluate-every",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Measure after so many optimizer steps too, and at the last.",
)
@click.option(
    "--log-every", type=click.IntRange(min=1), default=50, show_default=True, help="In steps."
)
@SEED
@FREEZE
@click.option("--overwrite", is_flag=True, help="Replace the output folder that is there.")
@_estimator_options("fisher-")
@click.option(
    "--fisher-max-examples",
    type=click.IntRange(min=1),
    help="Measure the new task's Fisher on a seeded random subset of this size.",
)
@click.option("--fisher-batch-size", type=click.IntRange(min=1), help="As --batch-size by default.")
@MERGING
@DATA_DIGEST
@COMMON
def finetune(
    checkpoint: str,
    as_json: bool,
    evaluate: tuple[str, ...],
    validation: tuple[str, ...],
    **options: Any,
) -> None:
    """Fine-tune CHECKPOINT on a new task, held by the penalty where it matters for the old ones.

    The output is a whole checkpoint whose Fisher holds the new task as well: the next
    finetune starts from it.

    Example: consolidate finetune my-model --data new.jsonl --output-dir my-model-2
    --ewc-lambda 100
    """
    from consolidate import finetuning

    try:
        result = finetuning.finetune(
            checkpoint,
            evaluate=_named_data(evaluate, "--evaluate"),
            validation=_named_data(validation, "--validation"),
            **_with_objects(options),
        )
    except ForgettingError as error:
        _write(error.result, as_json, _finetune_text)
        raise
    _write(result, as_json, _finetune_text)


@cli.command()
@click.argument("checkpoint")
@click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="[NAME=]DATA",
    help="May be repeated. A task of that NAME whose output layer was put aside is measured with "
    "that.",
)
@click.option(
    "--task",
    metavar="NAME",
    help="Measure with the output layer of this task, whatever the data is named.",
)
@MODEL
@DATA
@BATCH_SIZE
@SEED
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights; as stored by default.")
@COMMON
def evaluate(checkpoint: str, as_json: bool, data: tuple[str, ...], **options: Any) -> None:
    """Measure CHECKPOINT on each task: loss, and accuracy or perplexity.

    Example: consolidate evaluate my-model-2 --data old=old-test.jsonl --data new=new-test.jsonl
    """
    from consolidate import commands

    result = commands.evaluate(checkpoint, _named_data(data, "--data"), **_with_objects(options))
    _write(result, as_json, _metrics_text)


@cli.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT…")
@click.option("--output-dir", required=True, metavar="DIR", help="Where the merged one goes.")
@click.option(
    "--weights",
    metavar="X,Y,…",
    callback=_numbers,
    help="Coefficients of the checkpoints, in their order; 1 each by default.",
)
@click.option(
    "--base",
    metavar="CHECKPOINT",
    help="Which they were all fine-tuned from: its tasks, which all hold, then count once.",
)
@click.option("--overwrite", is_flag=True, help="Replace the output folder that is there.")
@COMMON
def merge(checkpoints: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Merge checkpoints of one architecture into one, each weight by how much it matters to whom.

    Every CHECKPOINT needs its Fisher. The output protects the tasks of all.

    Example: consolidate merge my-model-a my-model-b --base my-model --output-dir my-model-ab
    """
    from consolidate import model_merging

    _write(model_merging.merge(checkpoints, **options), as_json, _merge_text)


@cli.command()
@click.argument("run_file", metavar="TASKS.TOML", type=click.Path(path_type=Path))
@click.option(
    "--output-dir",
    metavar="DIR",
    help="Where the checkpoints go; as the file says by default.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done or skipped, and why.")
@COMMON
def run(run_file: Path, as_json: bool, **options: Any) -> None:
    """Train a chain of tasks, one after the other, as TASKS.TOML says.

    A step is skipped if its checkpoint is whole and was made from the same content: the
    checkpoint before it, data, test data and options. So the same command goes on after it was
    stopped, and after a change it does again only what the change concerns.

    Example: consolidate run tasks.toml --dry-run
    """
    from consolidate import running

    _write(running.run(run_file, **options), as_json, _run_text)


@cli.command()
@click.argument("checkpoint")
@REVISION
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="How many parameters to list.",
)
@click.option(
    "--csv",
    metavar="FILE",
    help="Write the accuracy matrix and the curves over training steps here.",
)
@click.option("--plot", metavar="FILE.png|svg", help="Draw them here; needs matplotlib.")
@COMMON
def show(checkpoint: str, as_json: bool, **options: Any) -> None:
    """Show the ledger of CHECKPOINT, what was forgotten, and where its Fisher lies.

    The accuracy matrix holds the score on each task after training each: the accuracy, or minus
    the mean negative log-likelihood. ACC is the mean of its last row, BWT the mean gain on the
    earlier tasks since each was learned, forgetting the mean loss since each was at its best.

    Of a repository on the Hub only the ledger and the headers of the Fisher are fetched; the traces
    are then those that the ledger recorded.
    """
    from consolidate import inspection

    _write(inspection.show(checkpoint, **options), as_json, inspection.show_text)


@cli.command()
@click.argument("checkpoint")
@click.option(
    "--output", metavar="FILE.html", help="NAME-report.html in the current folder by default."
)
@click.option(
    "--plots", metavar="DIR", help="Write the pictures here too, as SVG and PNG; needs matplotlib."
)
@REVISION
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace files that are there; those of an earlier report are replaced anyway.",
)
@COMMON
def report(checkpoint: str, as_json: bool, **options: Any) -> None:
    """Write a page on CHECKPOINT: its tasks, what was kept of each, and where the protection sits.

    The page is one HTML file that needs no network and runs no script.

    Example: consolidate report my-model-2 --output report.html
    """
    from consolidate import reporting

    result = reporting.report(checkpoint, **options)
    _write(result, as_json, lambda result: "\n".join([result["report"], *result["plots"]]))


@cli.command()
@click.argument(
    "checkpoints",
    nargs=-1,
    required=True,
    metavar="CHECKPOINT…",
)
@REVISION
@COMMON
def verify(checkpoints: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Check every digest, name, shape and value of CHECKPOINT and its Fisher.

    Also that the ledger fits together: its tasks, and the Fisher's traces with theirs. Of several
    checkpoints, as a run leaves them, each has to descend from the one before.
    """
    from consolidate import inspection

    _write(inspection.verify(*checkpoints, **options), as_json, _verify_text)


@cli.command()
@click.argument("checkpoint")
@click.argument("repository", metavar="REPO")
@click.option(
    "--public",
    is_flag=True,
    help="A repository that is made can be seen by all, and one that can be may be pushed to. "
    "Private otherwise.",
)
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--revision", metavar="BRANCH", help="The branch; made where it is missing.")
@click.option("--commit-message", metavar="TEXT")
@click.option("--tag", metavar="NAME", help="Name the commit so afterwards.")
@click.option(
    "--token", metavar="TOKEN", help="Of the Hub; that of `hf auth login` or HF_TOKEN by default."
)
@click.option(
    "--base-model",
    multiple=True,
    metavar="REPO",
    help="For the card: what this model was made from. May be repeated, for a merge.",
)
@click.option(
    "--fisher-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of the Fisher, as it is by default; bfloat16 is half as large.",
)
@click.option(
    "--fisher-only",
    is_flag=True,
    help="Publish the Fisher alone, for the weights in the repository --base-model.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only list what would be sent, with sizes, and what is there already.",
)
@COMMON
def push(checkpoint: str, repository: str, as_json: bool, **options: Any) -> None:
    """Publish CHECKPOINT with its Fisher, ledger and model card on the Hub, in one commit.

    Weights, Fisher, configuration, tokenizer and licence are sent; other files are not. A README.md
    that is there keeps what a person wrote. The repository stays as it was until all has been sent;
    started again, a push sends what is missing.

    Example: consolidate push my-model-2 user/my-model --dry-run
    """
    import torch

    from consolidate import publishing

    if options["fisher_dtype"] is not None:
        options["fisher_dtype"] = getattr(torch, options["fisher_dtype"])
    result = publishing.push(checkpoint, repository, **options)
    _write(result, as_json, publishing.push_text)


def _with_objects(options: dict[str, Any]) -> dict[str, Any]:
    """Turn what was typed into what the functions take: a Columns and torch.dtypes."""
    import torch

    from consolidate.examples import Columns

    given = {
        k.removesuffix("_column"): options.pop(k) for k in list(options) if k.endswith("_column")
    }
    options["columns"] = Columns(**given)
    for name in ("dtype", "penalty_dtype", "accumulate_dtype", "fisher_accumulate_dtype"):
        if options.get(name) is not None:
            options[name] = getattr(torch, options[name])
    return options


def _named_data(values: Sequence[str], option: str) -> dict[str, str]:
    named = {}
    for value in values:
        name, found, data = value.partition("=")
        if not found or Path(value).exists():
            name, data = Path(value).stem, value
        if not name or not data:
            raise click.UsageError(f"{option} {value}: expected NAME=DATA")
        if name in named:
            raise click.UsageError(f"{option}: two data sets are named {name!r}; write NAME=DATA")
        named[name] = data
    return named


def _write(result: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    if not as_json:
        click.echo(plain(text(result)))
        return
    printed = json.dumps(result, ensure_ascii=False, indent=2)
    click.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in printed))


def _fisher_text(result: dict[str, Any]) -> str:
    if result.get("status") == "dry run":
        return _cost_text(result)
    errors = {
        name: layer["relative_error"]
        for name, layer in result["layers"].items()
        if layer["relative_error"] is not None
    }
    worst = max(errors, key=lambda name: errors[name], default=None)
    certainty = "" if worst is None else f" (at worst ± {errors[worst]:.1%}, of {worst})"
    return (
        f"{result['fisher']}: {result['estimator']} Fisher of {result['task']!r} over "
        f"{result['examples']:,} examples, {result['parameters']:,} parameters, "
        f"trace {result['trace']:.4g}{certainty}"
    )


def _cost_text(cost: dict[str, Any]) -> str:
    memory = f"{cost['peak_memory'] / 1e9:.2f} GB"
    if cost["peak_device_memory"] is not None:
        memory += f", and {cost['peak_device_memory'] / 1e9:.2f} GB on the device"
    each = cost["seconds_per_example"]
    files, kept = (
        ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in cost[which].items())
        for which in ("files", "kept")
    )
    return "\n".join(
        [
            f"parameters   {cost['parameters']:,}",
            f"examples     {cost['examples']:,}, {cost['estimator']}",
            f"time         {cost['seconds']:,.0f} s, {1000 * each:.3g} ms per example",
            f"memory       {memory} at most",
            f"files        {files}",
            f"in between   {kept}, where there is room for it as well",
            "Nothing was written: this was a dry run on a few batches.",
        ]
    )


def _finetune_text(result: dict[str, Any]) -> str:
    lines = []
    if "lambda_search" in result:
        from consolidate.searching import search_text

        lines += [search_text(result["lambda_search"]), ""]
    if result["metrics"]:
        lines += [
            _metrics_text(
                {
                    f"{task}, {when}": values
                    for when in ("before", "after")
                    for task, values in result["metrics"][when].items()
                }
            ),
            "",
        ]
    lines.append(
        f"{result['checkpoint']}: {result['steps']} steps, loss {result['loss']:.4f}, "
        f"penalty {result['penalty_value']:.4g}; {result['share_moved']:.1%} of the weights moved"
    )
    lines.append(_fisher_text({**result["fisher"], "fisher": result["fisher"]["folder"]}))
    return "\n".join(lines)


def _merge_text(result: dict[str, Any]) -> str:
    return (
        f"{result['checkpoint']}: merged from {', '.join(result['models'])}; tasks "
        f"{', '.join(result['tasks'])}; {result['parameters']:,} parameters, "
        f"trace {result['trace']:.4g}"
    )


def _run_text(result: dict[str, Any]) -> str:
    from consolidate.inspection import matrix_text

    lines = []
    for step in result["steps"]:
        reason = "" if step["reason"] is None else f": {step['reason']}"
        lines.append(f"{step['step']}  {step['status']}{reason}")
    if result["status"] == "dry run":
        return "\n".join([*lines, "Nothing was done: this was a dry run."])
    if result["accuracy_matrix"] is not None:
        lines += ["", matrix_text(result["accuracy_matrix"]), ""]
    return "\n".join([*lines, f"the last checkpoint: {result['checkpoint']}"])


def _verify_text(summary: dict[str, Any]) -> str:
    sets = {kind: summary[kind] for kind in ("weights", "fisher", "anchor") if summary.get(kind)}
    sets |= {f"head of {task}": head for task, head in summary["heads"].items()}
    lines = [
        f"{kind}: {found['tensors']:,} tensors, {found['bytes']:,} bytes, {found['digest']}"
        for kind, found in sets.items()
    ]
    if others := summary["other_files"]:
        rest = f" and {len(others) - 6} more" if len(others) > 6 else ""
        lines.append(f"no digest covers {', '.join(others[:6])}{rest}")
    lines.append(f"{summary['checkpoint']} is intact")
    told = {"weights": "the digest of its weights", "tasks": "its tasks alone"}
    for found in summary.get("later", ()):
        lines += ["", _verify_text(found)]
        lines.append(f"and descends from the one before, by {told[found['descends_by']]}")
    return "\n".join(lines)


def _metrics_text(metrics: dict[str, dict[str, float]]) -> str:
    columns = [
        c for c in ("loss", "accuracy", "perplexity") if any(c in m for m in metrics.values())
    ]
    width = max(len("task"), *map(len, metrics))
    lines = [f"{'task':<{width}}" + "".join(f"{column:>12}" for column in columns)]
    for task, values in metrics.items():
        cells = "".join(f"{values[c]:>12.4f}" if c in values else f"{'–':>12}" for c in columns)
        lines.append(f"{task:<{width}}{cells}")
    return "\n".join(lines)
