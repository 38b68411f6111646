import json
from collections.abc import Callable
from pathlib import Path

import loopback_hub
import pytest
import torch
from conftest import make_network
from loopback_hub import run
from safetensors.torch import load_file

from consolidate.hub import locate
from formats.errors import InputError, UsageError

Write = Callable[..., Path]


def test_a_path_is_found_as_it_is(tmp_path: Path) -> None:
    assert locate(tmp_path) == tmp_path
    (tmp_path / "weights.pt").touch()
    assert locate(str(tmp_path / "weights.pt")) == tmp_path / "weights.pt"


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "what a name", "-x"])
def test_what_can_be_no_repository_is_a_missing_path(name: str) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        locate(name)


def test_a_path_that_begins_with_a_folder_here_is_a_missing_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x-1").mkdir(parents=True)
    for name in ("runs/x", "weights.pt", "user/model.safetensors"):
        with pytest.raises(InputError, match=f"^{name}: no such file or folder"):
            locate(name)
    with pytest.raises(InputError, match=r"folder \(in runs there is x-1\)"):
        locate("runs/x_1")


def test_a_misspelt_folder_is_told_before_the_network(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    for name in ("my-modle", "owner/name"):
        code, _, err = run(tmp_path, "evaluate", name, "--data", "x.jsonl", HF_HUB_OFFLINE="1")
        hint = " (in . there is my-model)" if name == "my-modle" else ""
        first = f"error: {name}: no such file or folder{hint}, and the Hub could not be reached"
        assert (code, err.startswith(first)) == (75, True), err


def test_a_repository_with_its_fisher_is_fine_tuned_without_the_old_data(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    old, new = write_task("old"), write_task("new", seed=4)
    model = ("--model", "conftest:make_network")
    assert run(tmp_path, "fisher", network_checkpoint, "--data", old, *model)[0] == 0
    torch.save(make_network({"sizes": [6, 8, 3]}).state_dict(), network_checkpoint / "old.bin")
    finetune = ("finetune", "user/name", "--data", new, *model, "--ewc-lambda", 10)
    with loopback_hub.serving("models", network_checkpoint) as address:
        hub = {"HF_ENDPOINT": address}
        code, out, err = run(tmp_path, *finetune, "--output-dir", "out", "--json", **hub)
        assert code == 0, err
        assert json.loads(out)["penalty"] == "ewc"
        code, out, err = run(tmp_path, "report", "user/name", "--revision", "main", **hub)
        assert (code, out) == (0, "user-name-report.html\n"), err
        assert "<h1>user/name</h1>" in (tmp_path / out.strip()).read_text()
        code, _, err = run(tmp_path, "evaluate", "user/other", "--data", new, *model, **hub)
        assert code == 3
        assert "no such repository" in err
        revision = ("--revision", "v9")
        code, _, err = run(tmp_path, "evaluate", "user/name", "--data", new, *revision, **hub)
        assert code == 3
        assert "has no revision 'v9'" in err
        code, _, err = run(tmp_path, "fisher", "user/name", "--data", new, *model, **hub)
        assert code == 2
        assert "--output-dir" in err
    assert not list((tmp_path / "cache").rglob("old.bin"))
    ledger = json.loads((tmp_path / "out" / "fisher" / "fisher.json").read_text())
    assert [task["name"] for task in ledger["tasks"]] == ["old", "new"]

    code, _, err = run(tmp_path, *finetune, "--output-dir", "again", HF_HUB_OFFLINE="1")
    assert code == 0, err
    first, again = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    code, _, err = run(
        tmp_path, "evaluate", "user/absent", "--data", new, *model, HF_HUB_OFFLINE="1"
    )
    assert code == 75
    assert "check the spelling, or try again" in err


def test_a_local_path_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is local"):
        locate(tmp_path, "main")
