import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from formats.errors import InputError
from formats.partial_work import read_partial, remove_partial, write_partial
from support.folders import flip

TENSORS = {"total/w": torch.arange(6.0).reshape(2, 3), "counts": torch.tensor([3, 2**40])}
STATE = {"levels": {"w": "rule"}, "most": None}
COMMAND = {"data": "ab", "seed": 0, "freeze": ["a*"]}


def test_work_is_kept_beside_its_target(tmp_path: Path) -> None:
    target = tmp_path / "not" / "there" / "fisher"
    write_partial(target, TENSORS, STATE, COMMAND)
    write_partial(target, {**TENSORS, "more": torch.ones(2)}, STATE, COMMAND)
    assert [file.name for file in target.parent.iterdir()] == [".fisher.consolidate-partial"]
    stored = read_partial(target)
    assert stored is not None
    assert (stored.state, stored.command) == (STATE, COMMAND)
    assert list(stored.tensors) == ["counts", "more", "total/w"]
    assert torch.equal(stored.tensors["counts"], TENSORS["counts"])
    assert torch.equal(stored.tensors["total/w"], TENSORS["total/w"])
    remove_partial(target)
    remove_partial(target)
    assert read_partial(target) is None
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize("damage", ["cut", "flipped", "no metadata", "other version", "no JSON"])
def test_what_cannot_be_read_is_refused(tmp_path: Path, damage: str) -> None:
    target = tmp_path / "fisher"
    write_partial(target, TENSORS, STATE, COMMAND)
    path = tmp_path / ".fisher.consolidate-partial"
    key = "consolidate-partial-work"
    text = json.dumps({"version": 1, "command": COMMAND, "state": STATE})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "flipped":
        flip(path, -10)
    elif damage == "no metadata":
        save_file(TENSORS, path)
    else:
        save_file(TENSORS, path, {key: text if damage == "other version" else "{"})
    with pytest.raises(InputError, match=r"cannot be resumed .*--restart"):
        read_partial(target)
