"""Options are written once: what is made from their records says the same everywhere."""

import ast
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import cloup
import numpy as np
import pytest
import torch

import consolidate
from consolidate.cli import cli
from consolidate.fields import OTHER, REQUIRED, flat_options, gather, help_text, option, part
from consolidate.flags import flags_of, record_of
from consolidate.options import COMMANDS, TYPED, Columns, FinetuneOptions, MergeOptions, Recipe
from formats.errors import UsageError
from scripts.option_pages import options_page

ROOT = Path(__file__).resolve().parents[1]
GIVEN = {"checkpoint": "a", "data": "b", "output_dir": "c"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_editors_see_every_keyword(name: str) -> None:
    function = getattr(consolidate, name)
    parameters = inspect.signature(function).parameters
    flats = {flat.name: flat for flat in flat_options(COMMANDS[name], python=True)}
    assert set(parameters) == set(flats)
    for keyword, parameter in parameters.items():
        default = inspect.Parameter.empty
        if flats[keyword].default is not REQUIRED:
            default = None if keyword == "columns" else flats[keyword].default
        assert parameter.default == default, keyword
        assert f"\n    {keyword}: " in str(inspect.getdoc(function))


@pytest.mark.parametrize("name", ["fisher", "finetune", "evaluate"])
def test_defaults_on_the_command_line_are_those_of_python(name: str, tmp_path: Path) -> None:
    words = ["start", "--data", "x"] + ["--output-dir", "y"] * (name == "finetune")
    above = click.Context(cli, info_name="consolidate")
    typed = cli.commands[name].make_context(name, words, parent=above).params
    for other in ("json", "quiet", "metrics", "mlflow", "wandb"):
        typed.pop(other)
    data = {"x": "x"} if name == "evaluate" else "x"
    given: dict[str, Any] = {"checkpoint": "start", "data": data}
    if name == "finetune":
        given["output_dir"] = "y"
    assert record_of(COMMANDS[name], typed) == gather(COMMANDS[name], given)


def test_every_name_stands_once() -> None:
    for command, record in COMMANDS.items():
        records = (record, *TYPED[command])
        names = [flat.name for one in records for flat in flat_options(one)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_options_has_those_of_help_under_the_same_headings(name: str) -> None:
    (section,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", options_page(), re.M | re.S)
    shown: dict[str, list[str]] = {}
    for title, flag in re.findall(r"^\*\*(.+)\*\*$|^\| `--([\w-]+)` ", section, re.M):
        if title:
            shown[title] = []
        else:
            shown[list(shown)[-1]].append(flag)
    expected: dict[str, list[str]] = {}
    for param in cli.commands[name].params:
        if isinstance(param, cloup.Option):
            title = OTHER if param.group is None else param.group.title
            expected.setdefault(title, []).append(param.opts[0].removeprefix("--"))
    assert shown == expected
    assert ("from 0 to below 2^63" in section) == ("`--seed`" in section)


def test_help_says_the_default_and_what_a_value_may_be() -> None:
    texts = {flat.flag: help_text(flat) for flat in flat_options(FinetuneOptions)}
    assert texts["learning-rate"] == "Peak learning rate. (default: 5e-5)"
    assert texts["gamma"].endswith(". (from 0 to 1; default: that of the earlier tasks, else 1)")
    assert texts["momentum"] == "Momentum of sgd. (from 0 to below 1; default: 0)"
    assert texts["output-dir"].endswith(". (required)")
    assert texts["evaluate"].endswith(". (repeatable)")
    assert texts["data-digest"].endswith(". (default: on)")
    assert texts["fisher-batch-size"].endswith(". (default: --batch-size)")
    measured = {flat.flag: help_text(flat) for flat in flat_options(COMMANDS["fisher"])}
    assert measured["batch-size"].endswith(". (default: 16)")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_texts_are_sentences(name: str) -> None:
    for record in (COMMANDS[name], *TYPED[name]):
        for flat in flat_options(record):
            assert re.match(r"[A-Zα-ωλ]|[a-z][a-z-]*: ", flat.option.help), flat.option.help
            assert flat.option.help.endswith((".", "…")), flat.option.help
            assert "by default" not in flat.option.help, flat.option.help


def test_a_command_names_its_own_options_as_common() -> None:
    for record in COMMANDS.values():
        names = [flat.name for flat in flat_options(record)]
        assert set(getattr(record, "COMMON", ())) <= set(names)


def test_flat_keywords_become_records() -> None:
    found = gather(
        FinetuneOptions,
        GIVEN
        | {"epochs": 3, "ewc_lambda": [1, 10], "fisher_batch_size": 8, "freeze": ["a"]}
        | {"columns": Columns(text="body"), "penalty_dtype": torch.bfloat16},
    )
    assert found.recipe == Recipe(epochs=3)
    assert (found.search.ewc_lambda, found.parameters.freeze) == ((1, 10), ("a",))
    assert (found.estimation.batch_size, found.recipe.batch_size) == (8, 16)
    assert (found.encoding.columns.text, found.penalty.penalty_dtype) == ("body", "bfloat16")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "--epochs 0: expected at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0: expected a finite number above 0"),
        ({"learning_rate": float("inf")}, "--learning-rate inf: expected a finite number above 0"),
        ({"weight_decay": float("nan")}, "--weight-decay nan: expected a finite number from 0"),
        ({"ewc_lambda": -1.0}, "--ewc-lambda -1.0: expected a finite number from 0"),
        ({"ewc_lambda": [1.0, -2.0]}, "--ewc-lambda -2.0: expected a finite number from 0"),
        ({"ewc_lambda": "much"}, "--ewc-lambda much: expected a number, or one of auto"),
        ({"ewc_lambda": []}, "--ewc-lambda []: expected a number or a list of"),
        ({"ewc_lambda": {1.0}}, "--ewc-lambda {1.0}: expected a number or a list of"),
        ({"ewc_lambda": 1e308}, r"--ewc-lambda 1e+308: expected a number below 2^128"),
        (
            {"gradient_accumulation_steps": 10**24},
            f"--gradient-accumulation-steps {10**24}: expected a number below 2^63",
        ),
        ({"select": "best"}, "--select best: expected one of best-mean, smallest, largest"),
        ({"epochs": "3"}, "--epochs 3: expected an integer"),
        ({"epochs": True}, "--epochs True: expected an integer"),
        ({"freeze": "encoder.*"}, "--freeze encoder.*: expected a list of strings"),
        ({"evaluate": ["a"]}, "--evaluate ['a']: expected a table"),
        ({"pack": 1}, "--pack 1: expected true or false"),
        ({"columns": {"label": "y"}}, "--columns {'label': 'y'}: expected a Columns"),
        ({"checkpoint": None}, "checkpoint None: expected a string"),
        (
            {"save_every_minutes": float("nan")},
            "--save-every-minutes nan: expected a number from 0",
        ),
        ({"gamma": 1.5}, "--gamma 1.5: expected a number from 0 to 1"),
        ({"momentum": 1.0}, "--momentum 1.0: expected a number from 0 to below 1"),
        ({"optimizer": "adma"}, "--optimizer adma: expected one of adamw, adam, sgd"),
        ({"fisher_accumulate_dtype": torch.float16}, "--fisher-accumulate-dtype float16: expected"),
        ({"learnin_rate": 1.0}, "there is no option 'learnin_rate'"),
    ],
)
def test_a_value_is_refused_by_the_name_of_its_flag(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        gather(FinetuneOptions, GIVEN | given)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overwrite = 3", "overwrite: expected true or false, found 3"),
        ("epochs = 1.5", "epochs: expected an integer, found 1.5"),
        ('epochs = "2"', "epochs: expected an integer, found '2'"),
        ("learning-rate = true", "learning-rate: expected a number, found True"),
        ("evaluate = 3", "evaluate: expected a list of strings, found 3"),
        ("metrics = 3", "metrics: expected a string, found 3"),
        ("epochs = 1\nepochs_ = 2", "has no option 'epochs_'; did you mean epochs"),
        ("ewc-lambda = 1\newc_lambda = 2", "ewc_lambda is given twice"),
        ('config = "other.toml"', "has no option 'config'"),
    ],
)
def test_a_file_of_options_is_held_to_their_types(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "options.toml").write_text(text)
    words = [
        "start",
        "--data",
        "x",
        "--output-dir",
        "y",
        "--config",
        str(tmp_path / "options.toml"),
    ]
    with pytest.raises(click.BadParameter, match=re.escape(message)):
        cli.commands["finetune"].make_context("finetune", words)


def test_numbers_of_numpy_are_numbers() -> None:
    numbers = {"ewc_lambda": [np.float32(1), np.int64(10)], "epochs": np.int64(2)}
    found = gather(FinetuneOptions, GIVEN | numbers | {"overwrite": np.bool_(True)})
    assert (found.search.ewc_lambda, found.recipe.epochs) == ((1.0, 10), 2)
    assert [type(one) for one in found.search.ewc_lambda] == [float, int]
    assert found.saving.overwrite is True
    weights = gather(MergeOptions, {"checkpoints": [], "output_dir": "a", "weights": np.ones(2)})
    assert weights.weights == (1.0, 1.0)
    assert (
        gather(
            FinetuneOptions, GIVEN | {"save_every_minutes": float("inf")}
        ).saving.save_every_minutes
        > 0
    )


def test_a_new_option_needs_no_more_than_its_field() -> None:
    @dataclass(frozen=True)
    class Inner:
        strength: float = option(0.5, "How strong.", above=0)

    @dataclass(frozen=True)
    class Command:
        checkpoint: str = option(REQUIRED, "Which.", argument=True)
        inner: Inner = part(Inner(), prefix="outer_")  # noqa: RUF009

    assert [flat.flag for flat in flat_options(Command)] == ["checkpoint", "outer-strength"]

    @click.command
    @flags_of(Command)
    def command(**typed: Any) -> Any:
        return record_of(Command, typed)

    def parse(*words: str) -> Any:
        return command.main([*words], standalone_mode=False)

    assert parse("a") == Command("a")
    assert parse("a", "--outer-strength", "2") == Command("a", Inner(2.0))
    with pytest.raises(
        UsageError, match=r"--outer-strength 0\.0: expected a finite number above 0"
    ):
        parse("a", "--outer-strength", "0")


def test_no_option_is_written_into_a_signature_again() -> None:
    """A keyword of three or more of the records' names in one function would be a copy of them."""
    names = {flat.name for record in COMMANDS.values() for flat in flat_options(record)}
    names -= {"checkpoint", "data", "task", "seed", "batch_size", "output_dir", "overwrite"}
    for path in (ROOT / "consolidate" / "commands").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                copied = names & {argument.arg for argument in node.args.kwonlyargs}
                assert len(copied) <= 3, f"{path.name}: {node.name} has {copied}"
