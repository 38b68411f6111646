"""The command line: commands, messages and exit codes; other modules do the work."""

import errno
import inspect
import logging
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click
import cloup

from consolidate.flags import flags_of, record_of
from consolidate.options import COMMANDS, TYPED
from consolidate.runtime.progress import show_progress
from consolidate.runtime.signals import Terminated, ask, asked
from consolidate.runtime.torchrun import rank, stop_with_torchrun, world_size
from consolidate.views import text as text_view
from consolidate.views.text import json_text, plain
from formats.errors import ConsolidateError, ForgettingError, InputError, PeerError
from formats.wording import first_line, suggestion

if TYPE_CHECKING:
    from consolidate.views.tracking import Tracker

LOG = logging.getLogger("consolidate")
MAIN, INSPECT = cloup.Section("Main commands"), cloup.Section("Inspect")
PUBLISH = cloup.Section("Combine and publish")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, by default that of the process, and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if sys.platform == "win32":
        click.echo("error: consolidate does not run on Windows itself; use WSL", err=True)
        sys.exit(2)
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    stop_with_torchrun()
    for library in ("HF_HUB", "DATASETS"):  # read when they are imported
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if hasattr(sys.stdout, "reconfigure"):  # λ and … in a locale that lacks them
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None:  # closed before the start
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if not sys.stderr.isatty():
        _hide_transfers()
    state: dict[str, bool] = {}
    stdout = sys.stdout
    try:
        code = cli(arguments, prog_name="consolidate", standalone_mode=False, obj=state)
        _exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        _exit(error.exit_code)
    except click.ClickException as error:
        if rank() > 0:  # the first process reports it
            _exit(error.exit_code)
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        if "--json" in arguments or _wants_json(arguments):  # later options are not parsed
            state["json"] = True
        _fail(f"{error.format_message()}{hint}", error.exit_code, state)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130, state)
    except Terminated:
        _fail("terminated", Terminated.exit_code, state)
    except PeerError as error:
        if not str(error):
            _exit(error.exit_code)
        _fail(str(error), error.exit_code, state)
    except SystemExit:
        if sys.stdout is stdout:
            raise
        _exit(141)  # click wraps a closed pipe, and would exit with 1
    except Exception as error:
        if isinstance(error, OSError) and isinstance(error.__context__, KeyboardInterrupt):
            _fail("interrupted", 130, state)  # click writes a line end first, which failed
        if state.get("debug"):
            traceback.print_exc()
        message, code = _explain(error)
        refused = isinstance(error, ConsolidateError) and not state.get("begun")
        if rank() > 0 and refused:  # as for click's errors
            _exit(code)
        if len(message) > 2000:  # a name in a file can be as long as the file
            message = f"{message[:1500]} … {message[-400:]}"
        _fail(message, code, state)


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether the variable of the command that is named asks for JSON."""
    name = next((word for word in arguments if not word.startswith("-")), "")
    given = os.environ.get(f"CONSOLIDATE_{name.upper()}_JSON", "")
    return given.lower() in {"1", "true", "t", "yes", "y", "on"}


def _hide_transfers() -> None:
    """Hide the bars of downloads and uploads; the Hub's client reads this when it is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _fail(message: str, code: int, state: dict[str, bool]) -> NoReturn:
    """Report what failed, also as JSON on stdout where that is wanted and nothing was written."""
    kind = "" if code > 128 else "error: "
    with suppress(OSError):  # the code says it too
        click.echo(plain(f"{kind}{message}"), err=True)
    if state.get("json") and not state.get("written"):
        with suppress(OSError):  # stderr has it
            click.echo(_json({"status": "failed", "exit_code": code, "error": message}))
    _exit(code)


def _json(result: Mapping[str, Any]) -> str:
    """Give a result as JSON in characters that stdout has: others would not be JSON's escapes."""
    encoding = str(getattr(sys.stdout, "encoding", None) or "utf-8")
    return json_text(result, ascii_only=not encoding.lower().startswith("utf"))


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, ConsolidateError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _no_memory(error)):
        what = f" ({first_line(error)})" if str(error) else ""
        advice = "raise the limit (ulimit -v), use another machine, or a smaller --batch-size"
        return f"not enough memory{what}; {advice}", InputError.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'output'}: no space left", InputError.exit_code
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        where = error.filename or "output"
        return f"{where}: the file exceeds the size limit (ulimit -f)", InputError.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", InputError.exit_code
    what = f"{type(error).__name__}: {error}"
    return f"{what} (internal error, please report it with the output of --debug)", 1


def _no_memory(error: RuntimeError) -> bool:
    from consolidate.estimation.batches import out_of_memory  # with torch, which raised it

    return out_of_memory(error)


def _exit(code: int) -> NoReturn:
    for stream, unwritten in ((sys.stdout, 141), (sys.stderr, 0)):
        try:
            if stream is not None:  # closed before the start
                stream.flush()
        except OSError:
            code = code or unwritten
            with suppress(OSError, ValueError):  # what is left would fail again at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _stop(signum: int, frame: FrameType | None) -> None:
    """Unwind, so that no half-written file remains; exit at once during an import.

    Work that can be saved first continues to the next point that it can be resumed from.

    Extension modules lose or replace an exception that passes through their import; a finalizer
    swallows it, so there the signal is sent again a moment later.
    """
    reason = KeyboardInterrupt if signum == signal.SIGINT else Terminated
    if several := world_size() > 1:  # torchrun sends on what a terminal has sent to all
        signal.signal(signum, signal.SIG_IGN)
    first = not asked()  # Linux can send one for each thread of a torchrun that is killed
    if ask(reason):
        again = b"" if several or reason is Terminated else b"; press Ctrl-C again to exit at once"
        if rank() == 0 and first:
            with suppress(OSError):  # a closed pipe
                os.write(2, b"stopping at the next point to resume from%s\n" % again)
        return
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            with suppress(OSError):
                os.write(2, b"interrupted\n" if signum == signal.SIGINT else b"terminated\n")
            os._exit(128 + signum)
        if frame.f_code.co_name == "__del__":
            threading.Timer(0.05, os.kill, (os.getpid(), signum)).start()
            return
        frame = frame.f_back
    raise reason


@cloup.group(
    sections=[MAIN, INSPECT, PUBLISH],
    context_settings=cloup.Context.settings(
        auto_envvar_prefix="CONSOLIDATE",
        help_option_names=["-h", "--help"],
        max_content_width=100,
        formatter_settings=cloup.HelpFormatter.settings(col1_max_width=26),
    ),
    epilog="`consolidate COMMAND --help` lists the options of a command.",
)
@click.version_option(
    package_name="consolidate-ewc",
    prog_name="consolidate",
    allow_from_autoenv=False,  # a pipeline's own variable would end every command
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Fine-tune checkpoints with less forgetting of earlier tasks.

    Measure the Fisher of a checkpoint on its task's data, or on texts that it generates, store it
    beside the weights, and fine-tune on the next task with the Elastic Weight Consolidation (EWC)
    penalty.
    """
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    show_progress(True)
    if world_size() > 1 and context.invoked_subcommand not in ("fisher", "finetune"):
        raise click.UsageError(
            f"{context.invoked_subcommand} runs in one process: start it without torchrun"
        )
    _note_misspelt_variables()


def _note_misspelt_variables() -> None:
    """Warn about variables that begin like ours and set no option; values are never shown."""
    known = {
        f"CONSOLIDATE_{command}_{option.name}".replace("-", "_").upper()
        for command, below in cli.commands.items()
        for option in below.params
        if isinstance(option, click.Option)
    }
    known.add("CONSOLIDATE_HUB_TIMEOUT")  # read by formats/hub.py
    for name in sorted(os.environ):
        if name.startswith("CONSOLIDATE_") and name not in known:
            near = get_close_matches(name, known, 1, 0.8)
            LOG.warning(f"the environment variable {name} sets no option{suggestion(near)}")


class _StderrHandler(logging.Handler):
    """Writes a line to stderr without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with suppress(OSError):  # a log on a full disk ends no training
            tqdm.write(plain(self.format(record)), file=sys.stderr)


class _Command(cloup.Command):
    """A command whose first sentence is listed whole."""

    def get_short_help_str(self, limit: int = 0) -> str:
        return super().get_short_help_str(limit=1000)


def _command(section: cloup.Section, example: str = "") -> Callable[[Any], click.Command]:
    """Make a command of the function of its name, with the options of its records."""

    def make(function: Any) -> click.Command:
        name, text = function.__name__, inspect.getdoc(function)
        if example:
            words = f"Example: consolidate {example}".replace(" ", "\xa0").replace("\xa0--", " --")
            lines = textwrap.wrap(words, 76, break_on_hyphens=False)
            text = f"{text}\n\n\b\n" + " \\\n  ".join(lines).replace("\xa0", " ")
        made = flags_of(COMMANDS[name], *TYPED[name])(function)
        return cli.command(cls=_Command, section=section, help=text)(made)

    return make


@_command(MAIN, "fisher my-model --data old-task.jsonl --task old")
def fisher(**typed: Any) -> None:
    """Measure the Fisher of CHECKPOINT and store it beside the weights.

    The Fisher says how much each weight matters for a task: the diagonal of the Fisher information,
    and with --structure inputs also a matrix over each layer's inputs. It is measured on DATA, or
    with --generate on texts that a language model writes itself.

    CHECKPOINT is a folder, a .safetensors, .bin, .pt, .pth or .ckpt file, or a repository on the
    Hub. DATA is a .jsonl, .json, .csv, .tsv, .parquet, .safetensors or .npz file, a folder of these
    or of images by class, a dataset on the Hub, or a task.toml that names one of these.
    """
    _do(typed, text_view.fisher_text)


@_command(MAIN, "finetune my-model --data new.jsonl --ewc-lambda 100 --output-dir my-model-2")
def finetune(**typed: Any) -> None:
    """Fine-tune CHECKPOINT on a new task with an EWC penalty that protects earlier tasks."""
    _do(typed, text_view.finetune_text)


@_command(MAIN, "evaluate my-model-2 --data old=old-test.jsonl --data new=new-test.jsonl")
def evaluate(**typed: Any) -> None:
    """Measure loss and accuracy or perplexity of CHECKPOINT on each task."""
    _do(typed, text_view.evaluate_text)


@_command(PUBLISH, "merge my-model-a my-model-b --base my-model --output-dir my-model-ab")
def merge(**typed: Any) -> None:
    """Merge checkpoints of one architecture by Fisher-weighted averaging.

    Every CHECKPOINT needs its Fisher. The output protects the tasks of all of them.
    """
    _do(typed, text_view.merge_text)


@_command(PUBLISH, "remap renamed-model --fisher-of my-model --output-dir my-model-2")
def remap(**typed: Any) -> None:
    """Carry the Fisher over to the same weights under other names.

    CHECKPOINT has the new names. Its tensors are paired with those of the Fisher by their bytes,
    and by their names where several have the same bytes. Changed values are refused.
    """
    _do(typed, text_view.remap_text)


@_command(MAIN, "run tasks.toml --dry-run")
def run(**typed: Any) -> None:
    """Train a sequence of tasks described in TASKS.TOML.

    A step is skipped if its checkpoint is intact and up to date: made from the same checkpoint,
    data, test data and options. Rerunning the command therefore resumes an interrupted run, and
    after a change repeats only the steps that the change affects.
    """
    _do(typed, text_view.run_text)


@_command(INSPECT)
def show(**typed: Any) -> None:
    """Show the tasks of CHECKPOINT, what was forgotten, and its Fisher traces.

    Row i of the accuracy matrix has every task's score after task i was learned: accuracy, or mean
    log-likelihood. ACC is the mean of its last row, BWT the mean change on earlier tasks since each
    was learned; forgetting is the mean drop from each one's best.

    From a repository on the Hub only the ledger and the headers of the Fisher are downloaded; the
    traces are then those that the ledger recorded.
    """
    from consolidate.views.summary import show_markdown, show_text

    markdown = typed.pop("markdown")
    if markdown and typed["json"]:
        raise click.UsageError("--markdown cannot be combined with --json")
    if markdown and typed["overlap"]:
        raise click.UsageError(
            "--markdown cannot be combined with --overlap: it prints the accuracy matrix alone"
        )
    _do(typed, show_markdown if markdown else show_text)


@_command(INSPECT, "report my-model-2 --output report.html")
def report(**typed: Any) -> None:
    """Write an HTML report: tasks, accuracy and forgetting, Fisher per layer.

    The report is one file that needs no network and runs no script.
    """
    _do(typed, lambda result: "\n".join([result["report"], *result["plots"]]))


@_command(INSPECT)
def verify(**typed: Any) -> None:
    """Check every digest, name, shape and value of CHECKPOINT and its Fisher.

    The ledger's tasks must be consistent, and their traces match the Fisher. Several checkpoints,
    such as those of a run, must each descend from the one before.
    """
    _do(typed, text_view.verify_text)


@_command(PUBLISH, "push my-model-2 user/my-model --dry-run")
def push(**typed: Any) -> None:
    """Publish CHECKPOINT with Fisher, ledger and model card on the Hub, in one commit.

    Sends only weights, Fisher, ledger, card, tokenizer, licence, code that an auto_map names, and
    configuration (local paths under known keys removed). An existing README.md keeps what a person
    wrote. The repository is unchanged until everything has been sent; rerunning a push sends what
    is missing.
    """
    _do(typed, text_view.push_text)


def _do(typed: dict[str, Any], text: Callable[[Any], str]) -> None:
    """Do what was typed of the present command, and write what it returns."""
    name, json = str(click.get_current_context().info_name), typed.pop("json")
    if typed.pop("quiet"):
        LOG.setLevel(logging.WARNING)
        show_progress(False)
        _hide_transfers()
    followed = {way: typed.pop(way) for way in ("metrics", "mlflow", "wandb") if way in typed}
    options: Any = record_of(COMMANDS[name], dict(typed))
    command = getattr(import_module(f"consolidate.commands.{name}"), name)
    click.get_current_context().ensure_object(dict)["begun"] = True
    try:
        if followed:
            show = partial(_write, json=json, text=text)
            result = _measured(name, command, options, typed, show, **followed)
        else:
            result = command(options)
    except ForgettingError as error:
        if name == "finetune" and error.result is not None:
            failed = {"exit_code": error.exit_code, "error": str(error)}
            _write(error.result | failed, json, text)
        raise
    _write(result, json, text)


def _measured(
    name: str,
    command: Callable[[Any], Any],
    options: Any,
    typed: Mapping[str, Any],
    show: Callable[[Any], None],
    *,
    metrics: Path | None,
    **stores: bool,
) -> Any:
    """Do a command that measures something, track it, and report its numbers.

    Where they cannot be reported, the result is shown all the same, as the same command again would
    not measure it again.
    """
    from consolidate.views.tracking import tracked

    if name != "evaluate":
        _flush_denormals()
    wanted = [store for store, given in stores.items() if given and rank() == 0]
    if typed.get("dry_run") and wanted:
        LOG.info("no run is started by --%s: a dry run measures nothing", " or --".join(wanted))
        wanted = []
    modules = [import_module(f"consolidate.views.{store}") for store in wanted]
    with ExitStack() as stack:
        trackers = [stack.enter_context(tracked(name, typed, m.open_run)) for m in modules]
        if trackers and name == "finetune":
            options = replace(options, on_step=partial(_on_step, trackers))
        try:
            result = command(options)
        except ForgettingError as error:
            if error.result is not None:
                try:
                    _report(name, error.result, metrics, trackers)
                except (InputError, OSError) as lost:  # the gate says more
                    LOG.warning("%s", lost)
            raise
        try:
            _report(name, result, metrics, trackers)
        except (InputError, OSError):
            show(result)
            raise
        return result


def _on_step(trackers: Sequence["Tracker"], step: Any) -> None:
    for tracker in trackers:
        tracker.on_step(step)


def _flush_denormals() -> None:
    """Treat numbers too small for a normal float as 0, in all threads that torch will start.

    Adam's moments decay to them for weights that the data seldom touch, and a step on a CPU then
    takes many times as long.
    """
    import torch

    torch.set_flush_denormal(True)


def _write(result: Any, json: bool, text: Callable[[Any], str]) -> None:
    if rank() == 0:
        click.echo(_json(result) if json else plain(text(result)))
    click.get_current_context().ensure_object(dict)["written"] = True


def _report(
    command: str, result: Mapping[str, Any], metrics: Path | None, trackers: Sequence["Tracker"]
) -> None:
    """Write the numbers of a result, and track them, before anything that prints it can fail."""
    from consolidate.views import metrics as metrics_view
    from consolidate.views.tracking import report

    if rank() > 0 or (metrics is None and not trackers):
        return
    if result.get("status") == "dry run":
        if metrics is not None:
            LOG.info("%s was not written: a dry run measures nothing", metrics)
        return
    numbers = getattr(metrics_view, f"{command}_metrics")(result)
    for tracker in trackers:
        report(tracker, result, numbers)
    if metrics is not None:
        metrics_view.write_metrics(metrics, numbers)
