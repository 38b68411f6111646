import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from consolidate.api import evaluate, finetune, fisher, show
from formats.errors import InputError, UsageError
from formats.hub import commits_of, locate
from support import loopback_hub
from support.checkpoints import Write
from support.loopback_hub import ALWAYS, Hub, Repository, run
from support.networks import make_network

MAKE = "support.networks:make_network"


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
    with pytest.raises(InputError, match=r"folder \(did you mean x-1\?\); not looked for .*@main"):
        locate("runs/x_1")


def test_without_an_output_folder_no_weights_are_fetched(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, hub: Hub
) -> None:
    hub.put("user/name", network_checkpoint)
    words = ("user/name", "--data", write_task("old"), "--model", MAKE)
    code, _, err = run(tmp_path, "fisher", *words, HF_ENDPOINT=hub.address)
    assert (code, "with --output-dir" in err) == (2, True), err
    assert not any("safetensors" in path for path in hub.sent)
    options = ("--ewc-lambda", 1, "--output-dir", "out")
    code, _, err = run(tmp_path, "finetune", *words, *options, HF_ENDPOINT=hub.address)
    assert code == 3
    assert "run `consolidate fisher user/name --data OLD_DATA --output-dir DIR` first" in err


def test_a_folder_named_like_an_owner_does_not_hide_a_revision(
    wide: Path, tmp_path: Path, hub: Hub
) -> None:
    (tmp_path / "user").mkdir()
    hub.put("user/name", wide)
    code, _, err = run(tmp_path, "show", "user/name", HF_ENDPOINT=hub.address)
    assert (code, hub.requests) == (3, [])
    assert "as there is a folder user here: name a revision, as in user/name@main" in err
    for words in (("user/name@main",), ("user/name", "--revision", "main")):
        code, _, err = run(tmp_path, "show", *words, HF_ENDPOINT=hub.address)
        assert code == 0, err


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["name-q4.gguf", "onnx/model.onnx"], "found only name-q4.gguf, onnx/model.onnx: name the"),
        (["unet/model.safetensors", "vae/model.bin"], "found them only in unet/, vae/: download"),
        (["config.json", "model.safetensors"], "quantized weights (by the quantization_config in"),
    ],
)
def test_weights_that_cannot_be_read_are_refused_before_the_fetch(
    tmp_path: Path, hub: Hub, files: list[str], told: str
) -> None:
    content = json.dumps({"quantization_config": {"bits": 4}}).encode()
    hub.repositories["user/name"] = Repository({loopback_hub.COMMIT: dict.fromkeys(files, content)})
    code, _, err = run(
        tmp_path, "fisher", "user/name", "--data", "x", "--output-dir", "o", HF_ENDPOINT=hub.address
    )
    assert code == 3, err
    assert err.startswith("error: user/name: "), err
    assert told in err
    assert "nothing was fetched" in err
    assert not hub.sent


def test_a_misspelt_folder_is_told_before_the_network(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "run" / "a").mkdir(parents=True)
    for name, status, told in (
        ("my-modle", 3, " (did you mean my-model?)\n"),
        ("runs/a", 3, " (did you mean run/a?)\n"),
        ("gpt2", 3, ", and the Hub cannot be reached"),  # no retry cures HF_HUB_OFFLINE
        ("owner/name", 3, ", and the Hub cannot be reached"),
    ):
        code, _, err = run(tmp_path, "evaluate", name, "--data", "x.jsonl", HF_HUB_OFFLINE="1")
        first = f"error: {name}: no such file or folder{told}"
        assert (code, err.startswith(first)) == (status, True), err


def test_a_repository_with_its_fisher_is_fine_tuned_without_the_old_data(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    old, new = write_task("old"), write_task("new", seed=4)
    model = ("--model", "support.networks:make_network")
    assert run(tmp_path, "fisher", network_checkpoint, "--data", old, *model)[0] == 0
    torch.save(make_network({"sizes": [6, 8, 3]}).state_dict(), network_checkpoint / "old.bin")
    finetune = ("finetune", "user/name", "--data", new, *model, "--ewc-lambda", 10)
    with loopback_hub.serving("models", network_checkpoint) as address:
        hub = {"HF_ENDPOINT": address}
        code, out, err = run(tmp_path, *finetune, "--output-dir", "out", "--json", **hub)
        assert code == 0, err
        assert json.loads(out)["commits"] == {"user/name": loopback_hub.COMMIT}
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
    assert code == 3
    assert "check the spelling, or unset it" in err


def test_a_local_path_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is local"):
        locate(tmp_path, "main")


def test_paths_in_the_cache_tell_their_commit(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--user--a-b" / "snapshots" / "abc"
    assert commits_of(snapshot / "fisher", None, tmp_path / "local") == {"user/a-b": "abc"}


@pytest.fixture
def wide(tmp_path: Path, write_task: Write) -> Path:
    """A checkpoint with a Fisher that is larger than what is read to find its header."""
    folder = tmp_path / "wide"
    folder.mkdir()
    sizes = [6, 12_000, 3]
    save_file(
        make_network({"sizes": sizes}).state_dict(), folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps({"sizes": sizes}))
    fisher(folder, write_task("old", count=8), model="support.networks:make_network")
    return folder


def test_only_what_is_needed_is_fetched(wide: Path, tmp_path: Path, hub: Hub) -> None:
    hub.put("user/name", wide)
    variables = {"HF_ENDPOINT": hub.address}
    code, out, err = run(tmp_path, "show", "user/name", "--revision", "main", "--json", **variables)
    assert code == 0, err
    assert hub.sent["model.safetensors"] == 0
    assert 0 < hub.sent["fisher/fisher.safetensors"] <= 100_001
    remote, local = json.loads(out), show(wide)
    assert remote["commits"] == {"user/name": loopback_hub.COMMIT}
    assert f"user/name is at commit {loopback_hub.COMMIT}" in err
    for mine, theirs in zip(remote["parameters"], local["parameters"], strict=True):
        assert mine["trace"] == pytest.approx(theirs["trace"], rel=1e-5)
        assert (mine["name"], mine["shape"]) == (theirs["name"], theirs["shape"])
        assert mine["max"] is None
    assert remote["fisher"]["values"] == local["fisher"]["values"]

    read = ("evaluate", "user/name", "--data", tmp_path / "old.npz", "--model", MAKE)
    hub.sent.clear()
    code, _, err = run(tmp_path, *read, **variables)
    assert code == 0, err
    assert hub.sent["model.safetensors"] > 0
    assert hub.sent["fisher/fisher.safetensors"] == 0

    for words in (("show", "user/name"), read):
        code, _, err = run(tmp_path, *words, HF_HUB_OFFLINE="1")
        assert code == 0, err
    code, _, err = run(tmp_path, "verify", "user/name", HF_HUB_OFFLINE="1")
    assert code == 3, err  # the Fisher itself was never fetched
    code, out, err = run(tmp_path, "verify", "user/name@main", "--json", **variables)
    assert code == 0, err
    assert json.loads(out)["commits"] == remote["commits"]
    assert run(tmp_path, "verify", "user/name", HF_HUB_OFFLINE="1")[0] == 0


def test_other_copies_of_the_weights_are_not_fetched(wide: Path, tmp_path: Path, hub: Hub) -> None:
    copies = ("consolidated.safetensors", "model.fp16.safetensors", "original/params.json")
    (wide / "original").mkdir()
    for name in copies:
        (wide / name).write_text(f"{name}, which nothing reads")
    hub.put("user/name", wide)
    words = ("evaluate", "user/name", "--data", tmp_path / "old.npz", "--model", MAKE)
    code, _, err = run(tmp_path, *words, HF_ENDPOINT=hub.address)
    assert code == 0, err
    assert not any(hub.sent[name] for name in copies)
    code, _, err = run(tmp_path, *words, HF_HUB_OFFLINE="1")
    assert code == 0, err


def test_a_pickle_of_the_usual_name_is_the_weights_beside_another_file(
    wide: Path, tmp_path: Path, hub: Hub
) -> None:
    torch.save(load_file(wide / "model.safetensors"), wide / "pytorch_model.bin")
    (wide / "model.safetensors").rename(wide / "value_head.safetensors")
    hub.put("user/name", wide)
    words = ("evaluate", "user/name", "--data", tmp_path / "old.npz", "--model", MAKE)
    # While the Hub answers, what a download that ended early has left is not the whole.
    hub.fail(r"GET /user/name/resolve/[^/]+/pytorch_model\.bin", 503, times=ALWAYS)
    code, _, err = run(tmp_path, *words, HF_ENDPOINT=hub.address)
    assert code == 75, err
    hub.failures.clear()
    code, _, err = run(tmp_path, *words, HF_ENDPOINT=hub.address)
    assert code == 0, err
    assert hub.sent["pytorch_model.bin"]
    code, _, err = run(tmp_path, *words, HF_HUB_OFFLINE="1")
    assert code == 0, err


def test_a_model_without_a_fisher_is_told_by_its_name(wide: Path, tmp_path: Path, hub: Hub) -> None:
    mine = shutil.copytree(wide, tmp_path / "mine")
    shutil.rmtree(wide / "fisher")
    hub.put("user/name", wide)
    read = ("evaluate", "user/name", "--data", tmp_path / "old.npz", "--model", MAKE)
    overlap = ("show", mine, "--overlap", "user/name")
    for words in (("report", "user/name"), ("show", "user/name"), overlap):
        for _ in range(2):  # of an empty cache, and of one with the weights
            code, _, err = run(tmp_path, *words, HF_ENDPOINT=hub.address)
            assert code == 3, err
            assert "user/name has no fisher/fisher.json" in err
            run(tmp_path, *read, HF_ENDPOINT=hub.address)


def test_a_revision_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names a revision, and so does --revision v1: name it"):
        locate("user/name@v1", "v1")


def test_a_name_that_is_on_the_hub_is_not_misspelt(wide: Path, tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "run" / "name").mkdir(parents=True)
    hub.put("runs/name", wide)
    hub.fail(r"GET /runs/name/resolve/", 503, times=ALWAYS)
    code, _, err = run(tmp_path, "verify", "runs/name", HF_ENDPOINT=hub.address)
    assert code == 75, err
    assert "did you mean" not in err


def test_shards_whose_names_begin_like_a_copy_are_fetched(
    wide: Path, tmp_path: Path, hub: Hub
) -> None:
    shard = "model.safetensors-00001-of-00001.safetensors"
    names = load_file(wide / "model.safetensors")
    (wide / "model.safetensors").rename(wide / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (wide / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.put("user/name", wide)
    words = ("evaluate", "user/name", "--data", tmp_path / "old.npz", "--model", MAKE)
    code, _, err = run(tmp_path, *words, HF_ENDPOINT=hub.address)
    assert code == 0, err
    assert hub.sent[shard]


def test_a_header_on_the_hub_that_the_ledger_does_not_list(
    wide: Path, tmp_path: Path, hub: Hub
) -> None:
    save_file({"0.weight": torch.zeros(2)}, wide / "fisher" / "fisher.safetensors")
    hub.put("user/name", wide)
    code, _, err = run(tmp_path, "show", "user/name", HF_ENDPOINT=hub.address)
    assert code == 3, err
    assert "is not what fisher.json lists" in err
    assert "'0.weight' has shape [2]" in err
    for file in (wide / "fisher").iterdir():
        file.unlink()
    hub.put("user/bare", wide)
    code, _, err = run(tmp_path, "show", "user/bare", HF_ENDPOINT=hub.address)
    assert (code, "has no fisher/fisher.json" in err) == (3, True), err


def test_a_stranger_keeps_the_old_task_without_its_data(
    tmp_path: Path, write_task: Write, hub: Hub
) -> None:
    home, author = tmp_path / "home", tmp_path / "author"
    for folder in (home, author):
        folder.mkdir()
    sizes = {"sizes": [6, 48, 3]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = make_network(sizes).state_dict()
    save_file(weights, author / "model.safetensors", {"format": "pt"})
    (author / "config.json").write_text(json.dumps(sizes))
    old, new = write_task("old", count=300), write_task("new", seed=4, count=300)
    training = {"model": MAKE, "optimizer": "adam", "learning_rate": 1e-2, "epochs": 12}
    finetune(author, old, output_dir=tmp_path / "learned", penalty="none", **training)
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": loopback_hub.TOKEN}
    code, _, err = run(
        tmp_path, "push", tmp_path / "learned", "user/model", "--public", **variables
    )
    assert code == 0, err
    test = old.rename(tmp_path / "author-only.npz")
    shutil.rmtree(tmp_path / "learned")
    shutil.rmtree(author)

    words = ("finetune", "user/model", "--data", new, "--model", MAKE, "--optimizer", "adam")
    words = (*words, "--learning-rate", "1e-2", "--epochs", "12")
    accuracy = {}
    for name, penalty in (("held", ("--ewc-lambda", 300)), ("free", ("--penalty", "none"))):
        target = ("--output-dir", name, *penalty)
        code, _, err = run(home, *words, *target, HF_ENDPOINT=hub.address)
        assert code == 0, err
        scores = evaluate(home / name, {"old": test, "new": new}, model=MAKE)
        accuracy[name] = {task: scores[task]["accuracy"] for task in scores}
    assert accuracy["held"]["old"] > 0.85
    assert accuracy["held"]["old"] > accuracy["free"]["old"] + 0.1
    assert accuracy["held"]["new"] > 0.85


def test_a_misspelt_folder_without_a_network(tmp_path: Path) -> None:
    (tmp_path / "run" / "a").mkdir(parents=True)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for name, status in (("runs/a", 3), ("owner/name", 75)):
        code, _, err = run(tmp_path, "verify", name, **nowhere)
        assert code == status, err


def test_a_link_to_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop is a broken link"):
        locate(tmp_path / "loop")


def test_a_ledger_that_is_too_large_is_not_fetched(
    wide: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (wide / "fisher" / "fisher.json").stat().st_size
    hub.put("user/name", wide)
    monkeypatch.setattr("formats.hub.MAX_LEDGER_BYTES", size - 1)
    for words in (("show", "user/name"), ("verify", "user/name")):
        code, _, err = run(tmp_path, *words, HF_ENDPOINT=hub.address)
        assert code == 3, err
        assert f"fisher.json: expected at most {size - 1:,} bytes, found {size:,}" in err
    assert hub.sent["fisher/fisher.json"] == hub.sent["model.safetensors"] == 0
    monkeypatch.setattr("formats.hub.MAX_LEDGER_BYTES", size)
    assert run(tmp_path, "show", "user/name", HF_ENDPOINT=hub.address)[0] == 0
