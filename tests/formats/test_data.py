import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from formats.data import open_data
from formats.errors import InputError, UsageError
from formats.rows import JoinedRows


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_missing_file_offers_near_names(tmp_path):
    lines(tmp_path / "train.jsonl", {"a": 1})
    missing = tmp_path / "trian.jsonl"
    with pytest.raises(InputError) as error:
        open_data(missing)
    assert str(error.value) == f"{missing} does not exist; did you mean train.jsonl?"
    with pytest.raises(InputError, match=r"does not exist: there is no folder .*nowhere"):
        open_data(tmp_path / "nowhere" / "train.jsonl")


@pytest.mark.parametrize(
    "spec",
    ["train.jsonl", "user/train.CSV", "./name", "a/b/c", "notes.txt", "READYOU.md"],
)
def test_names_of_files_are_never_looked_up_on_the_hub(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("formats.data.open_hub", lambda *_, **__: pytest.fail("sought"))
    with pytest.raises(InputError, match="does not exist"):
        open_data(spec)


def test_a_path_object_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="user/name does not exist"):
        open_data(Path("user/name"))


def test_unknown_kinds_are_refused(tmp_path):
    for name in ("notes.txt", "train", "train.jsonl.gz"):
        (tmp_path / name).write_text("x")
        with pytest.raises(InputError, match=r"unknown kind of data: expected one of \.jsonl, "):
            open_data(tmp_path / name)


def test_options_that_do_not_apply_are_refused(tmp_path):
    path = lines(tmp_path / "x.jsonl", {"a": 1})
    with pytest.raises(UsageError, match="has no splits"):
        open_data(path, split="train")
    with pytest.raises(UsageError, match="revision"):
        open_data(path, revision="main")
    with pytest.raises(UsageError, match="subset"):
        open_data(tmp_path, subset="en")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(tmp_path):
    path = lines(tmp_path / "x.jsonl", {"a": 1})
    path.chmod(0)
    with pytest.raises(InputError, match=f"{path} cannot be read: Permission denied"):
        open_data(path)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lines(tmp_path / "x.jsonl", {"a": 1})
    assert open_data("~/x.jsonl")[0] == {"a": 1}


def test_a_folder_of_files(tmp_path):
    root = tmp_path / "task"
    one = lines(root / "part-1.jsonl", {"a": 1, "b": 1}, {"a": 2, "b": 2})
    two = lines(root / "part-2.jsonl", {"b": 3, "a": 3})
    (root / "README.md").write_text("about")
    (root / ".hidden.csv").write_text("x")
    rows = open_data(root)
    assert isinstance(rows, JoinedRows)
    assert rows.name == "task"
    assert rows.columns == ["a", "b"]
    assert [row["a"] for row in rows] == [1, 2, 3]
    assert rows[-1] == {"a": 3, "b": 3}
    assert rows.where(2, "a") == "task/part-2.jsonl, row 1 (line 1), column 'a'"
    assert rows.tensors is None
    listing = "".join(
        json.dumps([path.name, hashlib.sha256(path.read_bytes()).hexdigest()]) + "\n"
        for path in (one, two)
    )
    assert rows.digest() == hashlib.sha256(listing.encode()).hexdigest()


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    lines(tmp_path / "task" / "x.jsonl", {"a": 1})
    monkeypatch.chdir(tmp_path / "task")
    assert open_data(".").name == "task"


def test_files_with_other_columns_are_refused(tmp_path):
    lines(tmp_path / "one.jsonl", {"a": 1})
    lines(tmp_path / "two.jsonl", {"b": 1})
    with pytest.raises(InputError, match=r"found a in one\.jsonl and b in two\.jsonl"):
        open_data(tmp_path)


def test_files_of_several_kinds_are_refused(tmp_path):
    lines(tmp_path / "one.jsonl", {"a": 1})
    (tmp_path / "two.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match=r"several kinds \(\.csv, \.jsonl\)"):
        open_data(tmp_path)


def test_folders_without_data_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"contains no data: .*, found nothing"):
        open_data(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"contains no data: .*, found notes\.txt"):
        open_data(tmp_path)


def test_a_split_is_found_as_the_refusal_names_it(tmp_path):
    for number, name in enumerate(("Train", "Test")):
        lines(tmp_path / f"{name}.jsonl", {"a": number})
    with pytest.raises(InputError, match="set split to one of: test, train"):
        open_data(tmp_path)
    assert [row["a"] for row in open_data(tmp_path, split="train")] == [0]


def test_splits_of_a_folder_are_never_mixed(tmp_path):
    lines(tmp_path / "train-00000-of-00002.jsonl", {"a": 1})
    lines(tmp_path / "train-00001-of-00002.jsonl", {"a": 2})
    lines(tmp_path / "test.jsonl", {"a": 3})
    with pytest.raises(InputError, match="set split to one of: test, train"):
        open_data(tmp_path)
    assert [row["a"] for row in open_data(tmp_path, split="train")] == [1, 2]
    assert [row["a"] for row in open_data(tmp_path, split="test")] == [3]
    with pytest.raises(InputError, match="no split 'tes'"):
        open_data(tmp_path, split="tes")


@pytest.mark.parametrize("other", ["eval", "evaluation", "holdout", "testing"])
def test_other_names_of_splits(tmp_path, other):
    lines(tmp_path / "train.jsonl", {"a": 1})
    lines(tmp_path / f"{other}.jsonl", {"a": 2})
    with pytest.raises(InputError, match="set split to one of: "):
        open_data(tmp_path)
    assert open_data(tmp_path, split=other)[0] == {"a": 2}


def test_files_of_no_split_are_not_mixed_with_those_of_one(tmp_path):
    lines(tmp_path / "train.jsonl", {"a": 1})
    lines(tmp_path / "old.jsonl", {"a": 2})
    with pytest.raises(InputError, match="contains the split train and other files, as old"):
        open_data(tmp_path)
    assert open_data(tmp_path, split="train")[0] == {"a": 1}


def test_splits_as_folders(tmp_path):
    lines(tmp_path / "train" / "x.jsonl", {"a": 1})
    assert open_data(tmp_path)[0] == {"a": 1}
    lines(tmp_path / "test" / "x.jsonl", {"a": 2})
    with pytest.raises(InputError, match="set split to one of: test, train"):
        open_data(tmp_path)
    assert open_data(tmp_path, split="test")[0] == {"a": 2}


def test_tensor_files_of_a_folder_are_joined(tmp_path):
    save_file({"x": torch.arange(6.0).view(3, 2), "y": torch.arange(3)}, tmp_path / "1.safetensors")
    save_file({"x": torch.ones(1, 2), "y": torch.tensor([7])}, tmp_path / "2.safetensors")
    rows = open_data(tmp_path)
    assert len(rows) == 4
    assert torch.equal(rows.tensors["y"], torch.tensor([0, 1, 2, 7]))
    assert torch.equal(rows.tensors["x"][3], torch.ones(2))
    assert rows.tensors["x"] is rows.tensors["x"]
    assert set(rows.tensors) == {"x", "y"}
    assert len(rows.tensors) == 2
    assert torch.equal(rows[3]["y"], torch.tensor(7))


def test_tensor_files_that_do_not_agree_are_refused(tmp_path):
    np.savez(tmp_path / "1.npz", x=np.zeros((3, 2)))
    np.savez(tmp_path / "2.npz", x=np.zeros((3, 4)))
    rows = open_data(tmp_path)
    with pytest.raises(InputError, match=r"float64 of shape \(2,\) as in 1\.npz.*\(4,\) in 2\.npz"):
        rows.tensors["x"]


def test_a_column_is_what_its_rows_hold(tmp_path: Path) -> None:
    table = {"text": ["x", "y", "z"], "label": [2, 0, 1]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet", row_group_size=2)
    (tmp_path / "t.csv").write_text("text,label\nx,2\ny,0\nz,1\n")
    for name in ("t.parquet", "t.csv"):
        rows = open_data(tmp_path / name)
        for column in (*table, "absent"):
            assert list(rows.values(column)) == [row.get(column) for row in rows]
    folder = tmp_path / "parts"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.csv").write_bytes((tmp_path / "t.csv").read_bytes())
    assert list(open_data(folder).values("label")) == ["2", "0", "1"] * 2


SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".safetensors", ".npz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_pipe_or_a_device_is_refused_before_it_is_opened(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    os.mkfifo(path)
    with pytest.raises(InputError, match="expected a regular file, found a pipe"):
        open_data(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="expected a regular file, found a device"):
        open_data(path)


def test_a_link_to_nothing_or_to_itself_is_named(tmp_path):
    for name, to in (("loop.jsonl", "loop.jsonl"), ("gone.jsonl", "nowhere")):
        (tmp_path / name).symlink_to(to)
        with pytest.raises(InputError, match=f"{name} is a broken link"):
            open_data(tmp_path / name)
