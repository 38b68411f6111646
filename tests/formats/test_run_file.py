"""`tasks.toml` is read strictly, and its paths are relative to it."""

import re
from pathlib import Path

import pytest

from formats.errors import InputError
from formats.run_file import read_run_file

OPTIONS = ("ewc-lambda", "epochs", "learning-rate", "max-length")
WHOLE = """
start = "old-model"
revision = "main"
fisher = "elsewhere/fisher"
output-dir = "out"

[evaluate]
old = "old.jsonl"

[defaults]
ewc-lambda = 100
epochs = 2

[[task]]
name = "one"
data = "one.jsonl"
evaluate = "one-test.jsonl"
train = false

[[task]]
name = "two"
data = "owner/data"
epochs = 3
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "tasks.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_everything_is_read_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "old-model").mkdir()
    (tmp_path / "elsewhere" / "fisher").mkdir(parents=True)
    run = read_run_file(write(tmp_path, WHOLE), OPTIONS)
    assert run.start == str(tmp_path / "old-model")
    assert run.fisher == str(tmp_path / "elsewhere" / "fisher")
    assert run.output_dir == tmp_path / "out"
    assert (run.revision, run.config) == ("main", None)
    assert run.evaluate == {"old": str(tmp_path / "old.jsonl")}
    assert run.defaults == {"ewc-lambda": 100, "epochs": 2}
    one, two = run.tasks
    assert (one.name, one.train, one.options) == ("one", False, {})
    assert one.evaluate == str(tmp_path / "one-test.jsonl")
    assert (two.data, two.evaluate, two.train, two.options) == (
        "owner/data",
        None,
        True,
        {"epochs": 3},
    )


def test_a_checkpoint_on_the_hub_may_have_a_revision(tmp_path: Path) -> None:
    path = write(tmp_path, 'start = "user/a@v1"\nfisher = "user/b@v2"\n' + TASK)
    run = read_run_file(path, OPTIONS)
    assert (run.start, run.fisher) == ("user/a@v1", "user/b@v2")
    (tmp_path / "user" / "a@v1").mkdir(parents=True)
    assert read_run_file(path, OPTIONS).start == str(tmp_path / "user" / "a@v1")


def test_nothing_is_taken_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("models/base", "models/base@v1", "rows", "configs"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("models/base", 'start = "models/base"\n' + TASK),
        ("models/base@v1", 'fisher = "models/base@v1"\n' + TASK),
        ("rows", TASK.replace("a.npz", "rows")),
    ):
        write(tmp_path / "configs", text)
        said = f"'{name}' is not in {tmp_path / 'configs'}, and not looked for on the Hub"
        with pytest.raises(InputError, match=re.escape(said)):
            read_run_file(Path("configs", "tasks.toml"), OPTIONS)
        (tmp_path / "configs" / name).mkdir(parents=True)
        read_run_file(Path("configs", "tasks.toml"), OPTIONS)


def test_what_is_left_out(tmp_path: Path) -> None:
    run = read_run_file(write(tmp_path, '[[task]]\nname = "a"\ndata = "a.npz"\n'), OPTIONS)
    assert (run.start, run.output_dir, run.config, run.defaults) == (None, None, None, {})


TASK = '[[task]]\nname = "a"\ndata = "a.npz"\n'
REFUSED = {
    "no task": ("", "expected at least one table [[task]]"),
    "a task that is no table": ('task = "a"', "expected at least one table [[task]]"),
    "no name": ('[[task]]\ndata = "a"', "task 1: the field 'name' is missing"),
    "no data": (TASK + '[[task]]\nname = "b"', "task 2: the field 'data' is missing"),
    "a bad name": (TASK.replace('"a"', '"a/b"'), "task 1, $.name: expected a task name of 1 to 64"),
    "two of a name": (TASK + TASK, "task 2 and task 1 are both named 'a'; rename one"),
    "a name among evaluate": (
        '[evaluate]\na = "x"\n' + TASK,
        "task 1 and a line of [evaluate] are both named 'a'; rename one",
    ),
    "a typo at the top": ('outputdir = "x"\n' + TASK, "'outputdir'; did you mean output-dir?"),
    "a typo in defaults": ("[defaults]\newc-lamda = 1\n" + TASK, "did you mean ewc-lambda?"),
    "a typo in a task": (TASK + "epoch = 1", "task 1: unknown key 'epoch'; did you mean epochs?"),
    "an underscore": (TASK + "learning_rate = 1", "did you mean learning-rate?"),
    "what the run says itself": (TASK + 'overwrite = "b"', "unknown key 'overwrite'"),
    "a number for a text": ("start = 3\n" + TASK, "$.start: expected a string, found 3"),
    "an empty text": ('start = ""\n' + TASK, "$.start: expected a string that is not empty"),
    "a text for yes or no": (TASK + 'train = "x"', "task 1, $.train: expected true or false"),
    "a number for a folder": ("output-dir = 3\n" + TASK, "output-dir: expected a path, found 3"),
    "an empty folder": ('output-dir = ""\n' + TASK, "output-dir: expected a path, found ''"),
    "nobody's folder": (
        'output-dir = "~no-such-user/x"\n' + TASK,
        "is not a valid path: Could not",
    ),
    "a number to evaluate": ("[evaluate]\nx = 3\n" + TASK, "$.evaluate['x']: expected a string"),
    "what was removed": ("evaluate-ahead = true\n" + TASK, "unknown key 'evaluate-ahead'"),
    "a text for a table": ('defaults = "x"\n' + TASK, "$.defaults: expected an object"),
    "start and config": ('start = "x"\n[config]\na = 1\n' + TASK, "leave one of them out"),
    "a config that is no JSON": ("[config]\na = 2020-01-01\n" + TASK, "cannot be stored as JSON"),
    "no TOML": ("start =", "is not valid TOML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    text, message = REFUSED[case]
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_run_file(path, OPTIONS)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tasks\.toml cannot be read: No such file"):
        read_run_file(tmp_path / "tasks.toml", OPTIONS)


@pytest.mark.parametrize("start", [TASK, "[defaults]\n"])
def test_an_option_of_the_command_alone_is_refused_with_what_to_do(
    tmp_path: Path, start: str
) -> None:
    text = start + "protect-self = 4\n" + (TASK if start != TASK else "")
    with pytest.raises(InputError, match="'protect-self' is an option of `consolidate finetune`"):
        read_run_file(write(tmp_path, text), OPTIONS, ["protect-self", "evaluate"])
    text = text.replace("protect-self = 4", 'evalute = "x"')
    with pytest.raises(InputError, match="unknown key 'evalute'"):
        read_run_file(write(tmp_path, text), OPTIONS, ["protect-self", "evaluate"])
