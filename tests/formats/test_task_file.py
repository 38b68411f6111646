import json
import os
import re
import tomllib
from pathlib import Path

import pytest

from consolidate.options import Columns
from formats.errors import InputError, UsageError
from formats.hub_dataset import HubRows
from formats.task_file import TaskFile, open_task, read_task_file


def task(folder, content, name="task.toml"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def data(path, rows=({"a": 1},)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_key(tmp_path):
    keys = {
        "data": "user/name",
        "name": "topics",
        "split": "train[:10]",
        "subset": "en",
        "revision": "v1",
        "objective": "sequence-classification",
        "text_column": "body",
        "text_pair_column": "answer",
        "label_column": "topic",
        "tokens_column": "words",
        "image_column": "picture",
        "inputs_column": "x",
        "prompt_column": "question",
        "completion_column": "reply",
        "messages_column": "chat",
        "target_column": "summary",
    }
    path = task(tmp_path, "\ufeff" + "".join(f'{key} = "{value}"\n' for key, value in keys.items()))
    read = read_task_file(path)
    assert read == TaskFile(**keys)
    assert read.columns() == {
        "text": "body",
        "text_pair": "answer",
        "label": "topic",
        "tokens": "words",
        "image": "picture",
        "inputs": "x",
        "prompt": "question",
        "completion": "reply",
        "messages": "chat",
        "target": "summary",
    }


def test_roles_are_those_of_the_encoder():
    roles = {
        field.removesuffix("_column") for field in TaskFile.__annotations__ if "column" in field
    }
    assert roles == set(Columns.__annotations__)


def test_data_is_found_beside_the_file(tmp_path, monkeypatch):
    path = task(tmp_path / "tasks", 'data = "news/train.jsonl"\nname = "news"\n')
    data(tmp_path / "tasks" / "news" / "train.jsonl", [{"a": "beside"}])
    data(tmp_path / "news" / "train.jsonl", [{"a": "elsewhere"}])
    monkeypatch.chdir(tmp_path)
    file, rows = open_task(str(path))
    assert rows[0] == {"a": "beside"}
    assert file.name == "news"
    assert file.columns() == {}
    file, rows = open_task("tasks/task.toml")
    assert rows[0] == {"a": "beside"}


@pytest.mark.parametrize("folder", ["news/train", "rows", "./rows"])
def test_a_folder_with_the_form_of_a_hub_id_is_found_beside_the_file(tmp_path, monkeypatch, folder):
    path = task(tmp_path / "tasks", f'data = "{folder}"\n')
    data(tmp_path / "tasks" / folder / "x.jsonl", [{"a": "beside"}])
    for place in (tmp_path, path.parent):
        monkeypatch.chdir(place)
        for way in (path, path.relative_to(place)):
            rows = open_task(way)[1]
            assert rows[0] == {"a": "beside"}
            assert not isinstance(rows, HubRows)  # `datasets` would read the folder too


def test_an_absolute_path(tmp_path):
    target = data(tmp_path / "elsewhere" / "x.jsonl")
    path = task(tmp_path / "tasks", f'data = "{target}"\n')
    assert open_task(path)[1].name == "x.jsonl"


def test_what_is_given_wins_over_the_file(tmp_path):
    path = task(tmp_path, 'data = "d"\nsplit = "train"\n')
    data(tmp_path / "d" / "train.jsonl", [{"a": "train"}])
    data(tmp_path / "d" / "test.jsonl", [{"a": "test"}])
    assert open_task(path)[1][0] == {"a": "train"}
    file, rows = open_task(path, split="test")
    assert rows[0] == {"a": "test"}
    assert file.split == "test"


def test_plain_data(tmp_path):
    path = data(tmp_path / "x.jsonl")
    file, rows = open_task(path)
    assert file == TaskFile(data=str(path))
    assert rows[0] == {"a": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('data = "x"\ntext_colum = "a"\n', "unknown key 'text_colum'; did you mean text_column"),
        ('data = "x"\n[model]\n', "unknown key 'model'; expected one of: data, name, "),
        ('data = "x"\nsplit = 3\n', "$.split: expected a string, found 3"),
        ('data = ""\n', "$.data: expected a string that is not empty, found ''"),
        ('data = ["a", "b"]\n', "$.data: expected a string, found a list of 2"),
        ('name = "x"\n', "the field 'data' is missing"),
        ("", "the field 'data' is missing"),
        ("data = x\n", "is not valid TOML: "),
        (b'data = "\xff"\n', "is not UTF-8"),
        ('data = "x"\nname = "a b"\n', "$.name: expected a task name of 1 to 64"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, said):
    path = task(tmp_path, content)
    with pytest.raises(InputError) as error:
        read_task_file(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"task\.toml cannot be read: No such file"):
        open_task(tmp_path / "task.toml")


def test_errors_in_the_data_name_the_file_that_asked(tmp_path):
    path = task(tmp_path, 'data = "missing.jsonl"\n')
    with pytest.raises(InputError, match=rf"{path}: .*missing\.jsonl does not exist"):
        open_task(path)
    data(tmp_path / "x.jsonl")
    path = task(tmp_path, 'data = "x.jsonl"\nrevision = "main"\n')
    with pytest.raises(UsageError, match="revision = 'main'"):
        open_task(path)


def test_the_documentation_shows_every_key(tmp_path):
    text = (Path(__file__).parents[2] / "docs/reference/data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    shown = set()
    for block in blocks:
        read_task_file(task(tmp_path, block))
        shown |= tomllib.loads(block).keys()
    assert shown == set(TaskFile.__annotations__)


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    path = tmp_path / "task.toml"
    os.mkfifo(path)
    with pytest.raises(InputError, match="expected a regular file, found a pipe"):
        read_task_file(path)
