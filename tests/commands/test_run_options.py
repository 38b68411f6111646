"""Every option of `finetune` can be written in a run file, as it is spelled on the command line."""

from pathlib import Path
from typing import Any

import click
import pytest

from consolidate.cli import cli
from consolidate.commands.run_options import (
    OPTIONS,
    fisher_options,
    of_training,
    read_options,
    without_penalty,
)
from consolidate.fields import flat_options, gather, value_of
from consolidate.options import FinetuneOptions, FisherOptions
from formats.errors import InputError, UsageError

# What is the run's own, or the command line's.
OURS = {"data", "output-dir", "task", "evaluate", "overwrite", "revision", "fisher", "base-model"}
OURS |= {"protect-self", "save-generated"}  # of a first task, which a run measures by its `fisher`
OURS |= {"dry-run"}  # a run has its own
OURS |= {
    "config",
    "json",
    "quiet",
    "metrics",
    "mlflow",
    "wandb",
    "restart",
    "debug",
    "shard",
    "compare-none",
}


def read(**written: Any) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in written.items()}
    return read_options(named, Path("/runs"))


def options(**given: Any) -> FinetuneOptions:
    return gather(FinetuneOptions, {"checkpoint": "a", "data": "b", "output_dir": "c", **given})


def test_the_names_are_those_of_the_command_line() -> None:
    names = {
        flag.removeprefix("--")
        for option in cli.commands["finetune"].params
        if isinstance(option, click.Option)
        for flag in option.opts
    }
    assert set(OPTIONS) == names - OURS


def test_values_become_what_finetune_takes(tmp_path: Path) -> None:
    found = read(
        ewc_lambda=100, epochs=3, pack=True, optimizer="sgd", freeze="encoder.*",
        penalty_dtype="bfloat16", task_weight="trace", text_column="body", text_pair_column="b",
    )  # fmt: skip
    assert found == {
        "ewc_lambda": 100.0,
        "epochs": 3,
        "pack": True,
        "optimizer": "sgd",
        "freeze": ("encoder.*",),
        "penalty_dtype": "bfloat16",
        "task_weight": "trace",
        "text_column": "body",
        "text_pair_column": "b",
    }
    assert isinstance(found["ewc_lambda"], float)
    several = [read(ewc_lambda=written)["ewc_lambda"] for written in ([1, 2], "auto")]
    assert several == [(1.0, 2.0), "auto"]


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.npz").touch()
    here = str(tmp_path / "a.npz")
    written = {"validation": {"a": "a.npz", "b": "owner/b"}, "search-plot": "plots/lambda.png"}
    assert read_options(written, tmp_path) == {
        "validation": {"a": here, "b": "owner/b"},
        "search_plot": str(tmp_path / "plots/lambda.png"),
    }
    with pytest.raises(InputError, match=r"validation: expected a table, found 'a\.npz'"):
        read_options({"validation": "a.npz"}, tmp_path)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"epochs": "3"}, "epochs: expected an integer, found '3'"),
        ({"epochs": True}, "epochs: expected an integer, found True"),
        ({"epochs": 1.5}, "epochs: expected an integer, found 1.5"),
        ({"learning_rate": "fast"}, "learning-rate: expected a number, found 'fast'"),
        ({"learning_rate": 10**400}, f"learning-rate: expected a number, found {10**400}"),
        ({"pack": 1}, "pack: expected true or false, found 1"),
        ({"penalty_dtype": 32}, "penalty-dtype: expected a dtype such as 'float32', found 32"),
        ({"freeze": [1]}, "freeze: expected a list of strings, found [1]"),
        ({"label_column": 1}, "label-column: expected a string, found 1"),
        ({"optimizer": ""}, "optimizer: expected a string, found ''"),
    ],
)
def test_a_value_of_another_type(written: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(**written)
    assert str(caught.value) == message


def test_a_value_out_of_its_range() -> None:
    with pytest.raises(UsageError, match="--epochs 0: expected at least 1"):
        read(epochs=0)
    with pytest.raises(UsageError, match="--penalty-dtype nn: expected one of float32, bfloat16"):
        read(penalty_dtype="nn")
    with pytest.raises(UsageError, match=r"--seed 10+: expected"):
        read(seed=10**400)


def test_a_first_task_is_trained_freely() -> None:
    given = {"ewc_lambda": 1.0, "penalty_step": "proximal", "max_forgetting": 0.1, "epochs": 2}
    assert without_penalty(given) == {"penalty": "none", "epochs": 2}
    kept = without_penalty(given, keep={"max_forgetting"})
    assert kept == {"penalty": "none", "epochs": 2, "max_forgetting": 0.1}


def test_a_task_that_is_only_measured_takes_the_options_of_fisher() -> None:
    given = {
        "epochs": 2, "max_examples": 5, "fisher_max_examples": 7, "batch_size": 3, "seed": 1,
        "fisher_batch_size": 4, "fisher_check": True, "model": "a:b", "ewc_lambda": 3.0,
    }  # fmt: skip
    assert sorted(of_training(given)) == ["epochs", "ewc-lambda", "max-examples"]

    def values_of(record: FisherOptions) -> dict[str, Any]:
        return {flat.name: value_of(record, flat) for flat in flat_options(FisherOptions)}

    found = values_of(fisher_options(options(**given), add=True))
    expected = {"max_examples": 7, "batch_size": 4, "seed": 1, "check": True, "model": "a:b"}
    expected |= {"add": True, "checkpoint": "a", "data": "b", "output_dir": "c"}
    default = values_of(fisher_options(options()))
    assert found == {**default, **expected}
    assert default["batch_size"] == 16
