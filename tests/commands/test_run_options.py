"""Every option of `finetune` can be written in a run file, as it is spelled on the command line."""

from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from consolidate.api import finetune, fisher
from consolidate.cli import cli
from consolidate.commands import run_options
from consolidate.commands.run_options import (
    fisher_options,
    option_names,
    parameters_of,
    without_penalty,
)
from consolidate.options import Columns
from formats.errors import InputError

PARAMETERS = parameters_of(finetune, fisher)
OPTION_NAMES = option_names(PARAMETERS)
read_options = partial(run_options.read_options, PARAMETERS)
effective = partial(run_options.effective, PARAMETERS)
measuring_options = partial(run_options.measuring_options, PARAMETERS)

# What is the run's own, or the command line's.
OURS = {"data", "output-dir", "task", "evaluate", "overwrite", "revision", "fisher"}
OURS |= {"base-model", "config", "json", "metrics", "mlflow", "restart", "force", "debug", "shard"}


def read(**written: Any) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in written.items()}
    return read_options(named, Path("/runs"), "tasks.toml, task 1")


def test_the_names_are_those_of_the_command_line() -> None:
    names = {
        flag.removeprefix("--")
        for option in cli.commands["finetune"].params
        if isinstance(option, click.Option)
        for flag in option.opts
    }
    assert set(OPTION_NAMES) == names - OURS


def test_values_become_what_finetune_takes() -> None:
    options = read(
        ewc_lambda=100, epochs=3, pack=True, optimizer="sgd", freeze="encoder.*",
        penalty_dtype="bfloat16", task_weight="trace", text_column="body", text_pair_column="b",
    )  # fmt: skip
    assert options == {
        "ewc_lambda": 100.0,
        "epochs": 3,
        "pack": True,
        "optimizer": "sgd",
        "freeze": ["encoder.*"],
        "penalty_dtype": torch.bfloat16,
        "task_weight": "trace",
        "columns": Columns(text="body", text_pair="b"),
    }
    assert isinstance(options["ewc_lambda"], float)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"epochs": "3"}, "epochs: expected an integer, found '3'"),
        ({"epochs": True}, "epochs: expected an integer, found True"),
        ({"epochs": 1.5}, "epochs: expected an integer, found 1.5"),
        ({"learning_rate": "fast"}, "learning-rate: expected a number, found 'fast'"),
        ({"pack": 1}, "pack: expected true or false, found 1"),
        ({"penalty_dtype": "nn"}, "penalty-dtype: expected a dtype such as 'float32', found 'nn'"),
        ({"freeze": [1]}, "freeze: expected a string, found 1"),
        ({"label_column": 1}, "label-column: expected a string, found 1"),
        ({"optimizer": ""}, "optimizer: expected a string, found ''"),
    ],
)
def test_a_value_of_another_type(written: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(**written)
    assert str(caught.value) == f"tasks.toml, task 1: {message}"


def test_options_to_come_need_no_code(tmp_path: Path) -> None:
    """Types that options of finetune may have, whether one of today's has them or not."""
    from collections.abc import Mapping, Sequence

    hints = {
        "several": float | Sequence[float] | str | None,
        "held_out": Mapping[str, str | Path] | None,
        "reference": str | Path | None,
    }
    parameters = PARAMETERS._replace(hints=hints)
    (tmp_path / "a.npz").touch()

    def value(name: str, written: Any) -> Any:
        return run_options.read_options(
            parameters, {name.replace("_", "-"): written}, tmp_path, "here"
        )[name]

    assert [value("several", 1), value("several", [1, 2]), value("several", "auto")] == [
        1.0,
        [1.0, 2.0],
        "auto",
    ]
    here = str(tmp_path / "a.npz")
    assert value("held_out", {"a": "a.npz", "b": "owner/b"}) == {"a": here, "b": "owner/b"}
    assert value("reference", "a.npz") == here
    assert [run_options.is_data(parameters, name) for name in hints] == [False, True, True]
    with pytest.raises(InputError, match=r"here: held-out: expected a table, found 'a\.npz'"):
        value("held_out", "a.npz")


def test_what_changes_nothing_is_left_out() -> None:
    options = {"log_every": 1, "learning_rate": 5e-5, "epochs": 1, "freeze": ["a"]}
    assert effective(options) == {"epochs": 1, "freeze": ["a"]}


def test_a_first_task_is_trained_freely() -> None:
    options = {"ewc_lambda": 1.0, "penalty_step": "proximal", "max_forgetting": 0.1, "epochs": 2}
    assert without_penalty(options) == {"penalty": "none", "epochs": 2}


def test_a_task_that_is_only_measured_takes_the_options_of_fisher() -> None:
    options = {
        "epochs": 2, "max_examples": 5, "fisher_max_examples": 7, "batch_size": 3, "seed": 1,
        "fisher_batch_size": 4, "fisher_check": True, "model": "a:b", "ewc_lambda": 3.0,
    }  # fmt: skip
    measuring = measuring_options(options)
    assert measuring.keys() == options.keys() - {"epochs", "max_examples", "ewc_lambda"}
    assert fisher_options(measuring) == {
        "max_examples": 7,
        "batch_size": 4,
        "seed": 1,
        "check": True,
        "model": "a:b",
    }
