import hashlib
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from formats import parquet_rows
from formats.data import open_data
from formats.errors import InputError, UsageError


def test_rows_across_row_groups(tmp_path):
    path = tmp_path / "train.parquet"
    columns = {
        "text": [f"text {i}" for i in range(10)],
        "label": [i % 3 for i in range(10)],
        "scores": [[i / 2] * (i % 2) for i in range(10)],
        "missing": [None if i == 4 else i for i in range(10)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=4)
    rows = open_data(path)
    assert len(rows) == 10
    assert rows.columns == list(columns)
    expected = [{name: values[i] for name, values in columns.items()} for i in range(10)]
    assert list(rows) == expected
    order = [9, 0, 4, 3, 8, 1]
    assert [rows[i] for i in order] == [expected[i] for i in order]
    assert rows.where(9, "text") == "train.parquet, row 10, column 'text'"
    assert rows.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert rows.label_names("label") is None


def test_row_groups_leave_memory(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    table = pyarrow.table({"x": np.arange(4000.0)})
    pyarrow.parquet.write_table(table, path, row_group_size=1000)
    monkeypatch.setattr(parquet_rows, "_CACHE_BYTES", 2 * 9000)
    rows = open_data(path)
    assert [rows[i]["x"] for i in (0, 1000, 2000, 3000, 0)] == [0, 1000, 2000, 3000, 0]
    assert list(rows._cache) == [3, 0]


def test_images_and_class_names_as_datasets_writes_them(tmp_path):
    path = tmp_path / "train.parquet"
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B"])),
        }
    )
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    datasets.Dataset.from_dict(
        {"image": [picture, None], "label": [1, 0], "tags": [[0, 1], []]}, features=features
    ).to_parquet(path)
    rows = open_data(path)
    assert rows[0]["image"].getpixel((0, 0)) == (1, 2, 3)
    assert rows[1]["image"] is None
    assert rows[0]["label"] == 1
    assert rows.label_names("label") == ["cat", "dog"]
    assert rows.label_names("tags") == ["O", "B"]
    assert rows.label_names("image") is None


def test_files_that_number_their_classes_differently_are_refused(tmp_path):
    for file, names in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        features = datasets.Features({"label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"label": [0, 1]}, features=features)
        rows.to_parquet(tmp_path / "data" / f"{file}.parquet")
    rows = open_data(tmp_path / "data")
    with pytest.raises(InputError, match=r"found cat, dog in a\.parquet and dog, cat in b"):
        rows.label_names("label")


def test_a_damaged_image_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    images = [{"bytes": b"no image", "path": "a.png"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), path)
    with pytest.raises(InputError, match=r"x\.parquet, row 1, column 'image'.*cannot be read"):
        open_data(path)[0]


def test_unreadable_files_are_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"x": [1.5] * 1000}), path)
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2], b"text" * 100):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{path} is not valid Parquet"):
            open_data(path)


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2]}), path, row_group_size=1)
    rows = open_data(path)
    assert rows[0] == {"a": 1}
    pyarrow.parquet.write_table(pyarrow.table({"a": [30, 40]}), path)
    with pytest.raises(InputError, match=rf"{path} was changed while it was being read"):
        rows[1]


def test_a_damaged_row_group_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"x": [f"some text {i}" for i in range(1000)]})
    pyarrow.parquet.write_table(table, path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[8:200] = b"\xff" * 192
    path.write_bytes(content)
    with pytest.raises(InputError, match="row group 1 is damaged"):
        open_data(path)[0]


def test_empty_and_ambiguous_files_are_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"x": pyarrow.array([], pyarrow.int64())}), path)
    with pytest.raises(InputError, match="is empty"):
        open_data(path)
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["x", "x"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(InputError, match="two columns are named 'x'"):
        open_data(path)


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"consolidate-ewc\[datasets\]"):
        open_data(path)
