import hashlib
import io
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from formats.data import open_data
from formats.errors import InputError
from support.folders import flip


def same(row, expected):
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        assert row[name].dtype == value.dtype
        assert torch.equal(row[name], value)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "inputs": torch.randn(5, 2, 3, generator=generator),
        "labels": torch.tensor([0, 1, 2, 1, 0]),
        "half": torch.randn(5, 4, generator=generator).bfloat16(),
    }


def test_safetensors(tmp_path):
    path = tmp_path / "task.safetensors"
    data = tensors()
    save_file(data, path)
    rows = open_data(path)
    assert len(rows) == 5
    assert set(rows.columns) == set(data)
    for i in (0, 4, -2):
        same(rows[i], {name: value[i] for name, value in data.items()})
    assert rows[0]["labels"].dim() == 0
    assert set(rows.tensors) == set(data)
    batch = torch.tensor([3, 1])
    assert torch.equal(rows.tensors["inputs"][batch], data["inputs"][batch])
    assert rows.where(3, "inputs") == "task.safetensors, row 4, column 'inputs'"
    assert rows.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(KeyError):
        rows.tensors["missing"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    path = tmp_path / "task.npz"
    inputs = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    save(
        path,
        inputs=np.asfortranarray(inputs),
        labels=np.array([3, 2, 1, 0], dtype=">i8"),
        mask=np.array([True, False, True, True]),
    )
    rows = open_data(path)
    assert rows.columns == ["inputs", "labels", "mask"]
    assert len(rows) == 4
    same(
        rows[1],
        {
            "inputs": torch.from_numpy(inputs[1]),
            "labels": torch.tensor(2),
            "mask": torch.tensor(False),
        },
    )
    assert torch.equal(rows.tensors["labels"], torch.tensor([3, 2, 1, 0]))
    assert rows.tensors["labels"] is rows.tensors["labels"]
    assert rows.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(KeyError):
        rows.tensors["missing"]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"inputs": np.zeros((5, 2)), "labels": np.zeros(4)}, "the same first dimension in all"),
        ({"inputs": np.zeros((0, 2)), "labels": np.zeros(0)}, "0 rows"),
        ({"inputs": np.zeros((5, 2)), "scale": np.array(1.0)}, "found a single number"),
        ({}, "is empty"),
    ],
)
def test_wrong_shapes_are_refused(tmp_path, suffix, data, said):
    path = tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez(path, **data)
    else:
        save_file({name: torch.from_numpy(value) for name, value in data.items()}, path)
    with pytest.raises(InputError) as error:
        open_data(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_an_npz_file_that_is_replaced_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(2), b=np.zeros(2))
    tensors = open_data(path).tensors
    assert tensors["a"].shape == (2,)
    np.savez(path, a=np.zeros(2), b=np.ones(3))
    with pytest.raises(InputError, match=rf"{path} was changed while it was being read"):
        tensors["b"]


def test_the_unequal_lengths_are_named(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, inputs=np.zeros((5, 2)), labels=np.zeros(4))
    with pytest.raises(InputError, match="found 5 in 'inputs' and 4 in 'labels'"):
        open_data(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("cut", [0, 5, 100, -10])
def test_truncated_files_are_refused(tmp_path, suffix, cut):
    path = tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez(path, inputs=np.zeros((50, 2)))
    else:
        save_file({"inputs": torch.zeros(50, 2)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=str(path)):
        open_data(path)


def test_a_damaged_array_is_named_when_it_is_read(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, inputs=np.zeros(1000))
    flip(path, 2000)
    rows = open_data(path)
    with pytest.raises(InputError, match="'inputs' is damaged"):
        rows[0]


class Opened:
    """Unpickling this would raise, and say so."""

    def __reduce__(self):
        return (exec, ("raise AssertionError('code inside the data was run')",))


def test_objects_and_text_inside_npz_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, inputs=np.array([Opened()], dtype=object))
    with pytest.raises(InputError, match="'inputs': expected numbers, found Python objects"):
        open_data(path)
    np.savez(path, labels=np.array(["a", "b"]))
    with pytest.raises(InputError, match="'labels': expected numbers, found text"):
        open_data(path)


def test_a_header_that_hides_objects_does_not_run_code(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Opened()], dtype=object), allow_pickle=True)
    honest = buffer.getvalue()
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", honest.replace(b"'|O'", b"'i8'"))
    with pytest.raises(InputError, match=r"of shape \(1,\) has [0-9]+ bytes"):
        open_data(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no array")
    with pytest.raises(InputError, match=r"is not a valid \.npz file"):
        open_data(path)


def test_npz_loads_one_array_at_a_time(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(3), b=np.zeros(3))
    rows = open_data(path)
    rows.tensors["a"]
    assert list(rows.tensors._loaded) == ["a"]


def npy(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["labels", "labels.npy"])
def test_an_array_that_is_there_twice_is_refused(tmp_path, second):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.npy", npy(np.zeros(5)))
        archive.writestr(second, npy(np.zeros(40)))
    with pytest.raises(InputError, match="array 'labels': expected it once, found it twice"):
        open_data(path)


def test_a_small_file_that_holds_very_much_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.zeros(200_000), labels=np.zeros(200_000, dtype=np.int64))
    assert len(open_data(path)) == 200_000  # constant columns are no reason, if they are small
    monkeypatch.setattr("formats.tensor_rows._PLAUSIBLE_BYTES", 10**6)
    with pytest.raises(InputError, match=r"at most 100 times.*found 3,200,256 bytes in \d,\d"):
        open_data(path)
    np.savez(path, x=np.zeros(200_000))
    assert len(open_data(path)) == 200_000
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=200_000))
    assert len(open_data(path)) == 200_000
