"""Every option of every command can be given as a flag, by a variable and in a TOML file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from consolidate.cli import cli
from support.command_line import run

# What the type alone does not tell: the words of a flag, and what stands in a TOML file.
VALUES: dict[str, tuple[str, Any]] = {
    "ewc-lambda": ("1,10", [1, 10]),
    "interpolate": ("0.25", 0.25),
    "adam-betas": ("0.5,0.75", [0.5, 0.75]),
    "task-weight": ("2.5", 2.5),
    "weights": ("1,0.5", [1, 0.5]),
    "image-mean": ("0.5,0.25,0", [0.5, 0.25, 0]),
    "image-std": ("0.5", [0.5]),
}
REQUIRED = {
    "fisher": ["start"],
    "finetune": ["start", "--data", "x", "--output-dir", "y"],
    "evaluate": ["start", "--data", "x"],
    "merge": ["start", "--output-dir", "y"],
    "remap": ["start", "--output-dir", "y"],
    "run": ["tasks.toml"],
    "show": ["start"],
    "report": ["start"],
    "verify": ["start"],
    "push": ["start", "user/model"],
}


def all_options() -> Iterator[tuple[str, click.Option]]:
    for name, command in cli.commands.items():
        for option in command.params:
            if isinstance(option, click.Option) and option.name not in ("config", "debug"):
                yield name, option


def value_of(option: click.Option) -> tuple[list[str], str, Any]:
    """Give words for the command line, the text of a variable, and a value for TOML."""
    flag = option.opts[0]
    if option.is_flag:
        off = option.default is True
        return [option.secondary_opts[0] if off else flag], str(not off).lower(), not off
    if option.multiple:
        return [flag, "n=a", flag, "m=b"], "n=a m=b", ["n=a", "m=b"]
    text, value = VALUES.get(flag.removeprefix("--"), ("words", "words"))
    if isinstance(option.type, click.Choice):
        text = value = option.type.choices[-1]
    elif option.type is click.INT:
        text, value = "3", 3
    elif option.type is click.FLOAT:
        text, value = "0.25", 0.25
    return [flag, text], text, value


def parsed(command: str, words: list[str]) -> dict[str, Any]:
    above = click.Context(cli, info_name="consolidate", auto_envvar_prefix="CONSOLIDATE")
    return cli.commands[command].make_context(command, list(words), parent=above).params


@pytest.mark.parametrize(
    ("command", "option"), [pytest.param(c, o, id=f"{c} {o.opts[0]}") for c, o in all_options()]
)
def test_an_option_is_the_same_from_everywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, option: click.Option
) -> None:
    monkeypatch.chdir(tmp_path)
    name = option.opts[0].removeprefix("--")
    words, text, value = value_of(option)
    required = REQUIRED[command]
    if option.required:
        at = required.index(option.opts[0])
        required = required[:at] + required[at + 2 :]
    expected = parsed(command, [*required, *words])
    if not option.required:
        assert expected != parsed(command, required)

    variable = f"CONSOLIDATE_{command}_{name}".replace("-", "_").upper()
    monkeypatch.setenv(variable, text)
    assert parsed(command, required) == expected
    monkeypatch.delenv(variable)

    config = tmp_path / "options.toml"
    config.write_text(f"{name} = {json.dumps(value)}\n")
    assert parsed(command, [*required, "--config", str(config)]) == expected
    monkeypatch.setenv(f"CONSOLIDATE_{command.upper()}_CONFIG", str(config))
    assert parsed(command, required) == expected


def test_a_traceback_is_shown_however_it_was_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("show", tmp_path / "nowhere")
    assert "Traceback" not in run(capsys, *words)[2]
    assert "Traceback" in run(capsys, *words, "--debug")[2]
    (tmp_path / "options.toml").write_text("debug = true\n")
    assert "Traceback" in run(capsys, *words, "--config", tmp_path / "options.toml")[2]
    monkeypatch.setenv("CONSOLIDATE_SHOW_DEBUG", "1")
    assert "Traceback" in run(capsys, *words)[2]


@pytest.mark.parametrize(
    ("command", "option", "text", "value"),
    [
        ("finetune", "--ewc-lambda", "100", 100.0),
        ("finetune", "--ewc-lambda", "1,10", (1.0, 10.0)),
        ("finetune", "--ewc-lambda", "auto", "auto"),
        ("fisher", "--task-weight", "trace", "trace"),
        ("merge", "--weights", "2", (2.0,)),
    ],
)
def test_what_is_typed_becomes_what_the_functions_take(
    command: str, option: str, text: str, value: Any
) -> None:
    found = parsed(command, [*REQUIRED[command], option, text])
    assert found[option.removeprefix("--").replace("-", "_")] == value


@pytest.mark.parametrize("text", ["much", "1,,2"])
def test_what_cannot_be_read_is_refused_by_the_name_of_the_option(text: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        parsed("finetune", [*REQUIRED["finetune"], "--ewc-lambda", text])
    assert "--ewc-lambda" in caught.value.format_message()
    assert repr(text) in caught.value.format_message()


@pytest.mark.parametrize("text", ["-1", "1,inf"])
def test_numbers_out_of_their_range_are_refused_by_the_name_of_the_option(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    code, _, err = run(capsys, "finetune", *REQUIRED["finetune"], "--ewc-lambda", text)
    assert code == 2
    assert f"--ewc-lambda {float(text.split(',')[-1])}: expected a finite number from 0" in err
