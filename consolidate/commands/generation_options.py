"""What `--generate` and its options ask for: contradictions refused, the prompts opened."""

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from consolidate.data.prompts import open_prompts
from consolidate.options import Encoding, FisherOptions, Generation
from formats.atomic import check_file
from formats.errors import InputError, UsageError
from formats.rows import Rows
from formats.task_file import TaskFile, open_task

TASK = "self"
"""Name of a task that is measured on the model's own texts, unless --task is given."""


def check_generation(options: FisherOptions) -> None:
    """Refuse options that contradict --generate, or that need it."""
    generation, usual = options.generation, Generation()
    if generation.generate is None:
        for name in ("prompts", "temperature", "top_p", "save_generated"):
            if getattr(generation, name) != getattr(usual, name):
                raise UsageError(f"--{name.replace('_', '-')} needs --generate: give both or none")
        if options.data is None:
            raise UsageError(
                "fisher needs --data, or --generate N for a causal language model without data"
            )
        return
    encoding = replace(options.encoding, max_length=None)
    for option, given, why in (
        ("data", options.data is not None, "the model's own texts take its place"),
        ("max-examples", options.estimation.max_examples is not None, "N is their number"),
        ("shard", options.parameters.shard, "no process has a whole model that generates"),
        (
            "estimator empirical",
            options.estimation.estimator == "empirical",
            "there are no labels of data, and those of the texts are used by default",
        ),
        ("split, --pack, --loss-on, columns or images", encoding != Encoding(), "there are none"),
    ):
        if given:
            raise UsageError(f"--generate cannot be combined with --{option}: {why}; leave it out")
    if generation.save_generated is not None:
        _check_file(options, Path(generation.save_generated))


def _check_file(options: FisherOptions, path: Path) -> None:
    """Refuse a file for the texts that another file of the command would meet."""
    check_file(path)
    try:
        place = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise UsageError(f"--save-generated {path}: {error}: name another file") from error
    for folder in (options.checkpoint, options.output_dir):
        if folder is not None and place.is_relative_to(Path(folder).resolve()):
            raise UsageError(f"--save-generated {path} is in {folder}: name a file outside of it")
    prompts = options.generation.prompts
    if prompts is not None and place == Path(prompts).resolve():
        raise UsageError(f"--save-generated {path} is the file of the prompts: name another")


def refuse_texts(path: Path) -> NoReturn:
    """Refuse to replace a file by generated texts."""
    raise InputError(
        f"{path} already exists, with other content: delete it, name another file with "
        "--save-generated, or replace it with --overwrite"
    )


def lacks_texts(options: Generation) -> bool:
    """Return whether texts are to be written that are not there, so that no result is reused."""
    return options.save_generated is not None and not Path(options.save_generated).exists()


def open_source(options: FisherOptions) -> tuple[TaskFile, Rows]:
    """Open the task's data, or the prompts of the texts that take their place."""
    generation = options.generation
    if generation.generate is not None:
        return TaskFile(str(generation.prompts or TASK), TASK), open_prompts(generation.prompts)
    assert options.data is not None
    return open_task(options.data, split=options.encoding.split)
