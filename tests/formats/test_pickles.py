import argparse
import json
import pickle
import zipfile

import pytest
import torch

from formats.errors import InputError
from formats.pickles import open_pickle


def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    return dict(model.state_dict())


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(expected) and all(
        torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype
        for name in expected
    )


class Touch:
    """An object whose pickle makes a file when it is loaded with code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_state_dict(tmp_path, suffix, zipped):
    path = tmp_path / f"model.{suffix}"
    torch.save(state_dict(), path, _use_new_zipfile_serialization=zipped)
    assert same(open_pickle(path), state_dict())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_nested_state_dict(tmp_path, key):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict()
    content = {"epoch": 3, "loss": torch.tensor(0.5), "optimizer": optimizer, key: state_dict()}
    torch.save(content, tmp_path / "model.ckpt")
    assert same(open_pickle(tmp_path / "model.ckpt"), state_dict())


def test_lightning_checkpoint(tmp_path):
    weights = {f"net.{name}": tensor for name, tensor in state_dict().items()}
    content = {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": weights,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [],
        "hyper_parameters": {"lr": 0.1},
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert same(open_pickle(tmp_path / "last.ckpt"), weights)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_wrapper_prefixes_are_taken_off(tmp_path, prefix):
    torch.save({prefix + name: t for name, t in state_dict().items()}, tmp_path / "model.pt")
    assert same(open_pickle(tmp_path / "model.pt"), state_dict())


def test_other_prefixes_stay(tmp_path):
    names = [["model.a", "model.b"], ["module.a", "b"]]
    for some in names:
        torch.save({name: torch.ones(1) for name in some}, tmp_path / "model.pt")
        assert list(open_pickle(tmp_path / "model.pt")) == some


def test_parameters_and_tied_weights(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    torch.save({"a": parameter, "b": parameter}, tmp_path / "model.pt")
    found = open_pickle(tmp_path / "model.pt")
    assert same(found, {"a": torch.ones(2), "b": torch.ones(2)})
    assert not found["a"].requires_grad
    assert type(found["a"]) is torch.Tensor


def test_writing_to_a_tensor_does_not_change_the_file(tmp_path):
    torch.save(state_dict(), tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    open_pickle(tmp_path / "model.pt")["0.weight"].add_(1)
    assert (tmp_path / "model.pt").read_bytes() == before


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(tmp_path, zipped):
    path = tmp_path / "model.pt"
    content = {"state_dict": state_dict(), "extra": Touch(tmp_path / "ran")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"model\.pt: .* a pickle that would import io\.open"):
        open_pickle(path)
    assert not (tmp_path / "ran").exists()


def test_plain_pickle_with_code(tmp_path):
    path = tmp_path / "model.pt"
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps({"x": Touch(tmp_path / "ran")}, protocol=protocol))
        with pytest.raises(InputError, match=r"model\.pt"):
            open_pickle(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"state_dict": {}, "hyper_parameters": argparse.Namespace(lr=1)}, "argparse.Namespace"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_class_is_named_with_what_to_do(tmp_path, content, name):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(
        InputError, match=rf"import {name}, .*save its state_dict\(\) alone"
    ) as error:
        open_pickle(tmp_path / "model.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([1, 2], "expected a state dict, found list"),
        (torch.ones(2), "expected a state dict, found Tensor"),
        ({}, "contains no state dict: .*found nothing"),
        ({"epoch": 1, "net": {"a": 1}}, "contains no state dict: .*found 'epoch', 'net'"),
        ({"model": {"a": 1}}, "contains no state dict"),
        ({"a": torch.ones(1), "epoch": 3}, "'epoch': expected a tensor, found int"),
        ({3: torch.ones(1)}, "expected names of tensors, found 3"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is sparse"),
        ({"a": torch.ones(2, device="meta")}, "'a' has no values"),
        (
            {"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}},
            r"expected one state dict, found several \(state_dict, model\)",
        ),
    ],
)
def test_content_that_does_not_fit(tmp_path, content, why):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(InputError, match=why):
        open_pickle(tmp_path / "model.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_file_cut_short_anywhere(tmp_path, zipped):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    # In the old format the name of a class can be what is cut, and then it is an unknown class.
    why = "truncated|empty" if zipped else "truncated|empty|expected tensors alone"
    for length in range(0, len(whole), 7 if zipped else 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"model\.pt(: | is )({why})") as error:
            open_pickle(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"<html></html>", b"hello world", b"\x80\x02", bytes(100)])
def test_file_of_another_kind(tmp_path, content):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.bin is truncated or not a file of torch\.save"):
        open_pickle(tmp_path / "model.bin")


def test_zip_of_another_kind(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
        file.writestr("readme.txt", "nothing")
    with pytest.raises(InputError, match=r"model\.pt is truncated or not a file of torch\.save"):
        open_pickle(tmp_path / "model.pt")


def test_git_lfs_pointer(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"
    (tmp_path / "model.bin").write_text(text)
    with pytest.raises(InputError, match="git lfs pull"):
        open_pickle(tmp_path / "model.bin")


def test_missing(tmp_path):
    with pytest.raises(InputError, match=r"model\.pt does not exist"):
        open_pickle(tmp_path / "model.pt")
    with pytest.raises(InputError, match="is not a file"):
        open_pickle(tmp_path)


def sharded(folder, **weight_map):
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(2)}, folder / "pytorch_model-00002-of-00002.bin")
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": names | weight_map}))
    return path


def test_shards(tmp_path):
    found = open_pickle(sharded(tmp_path))
    assert same(found, {"a": torch.ones(1), "b": torch.ones(2)})


def test_index_that_does_not_fit(tmp_path):
    with pytest.raises(
        InputError, match=r"'b' is misplaced: expected in .*00001-of-00002\.bin, found in"
    ):
        open_pickle(
            sharded(
                tmp_path, b="pytorch_model-00001-of-00002.bin", c="pytorch_model-00002-of-00002.bin"
            )
        )
    with pytest.raises(InputError, match=r"nothing\.bin does not exist"):
        open_pickle(sharded(tmp_path, c="nothing.bin"))
    with pytest.raises(InputError, match="expected the name of a file in this folder"):
        open_pickle(sharded(tmp_path, c="../other.bin"))
    path = sharded(tmp_path)
    torch.save(
        {"a": torch.ones(1), "b": torch.ones(2)}, tmp_path / "pytorch_model-00002-of-00002.bin"
    )
    with pytest.raises(InputError, match="'a' is in both"):
        open_pickle(path)
