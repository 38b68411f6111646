"""Pushing to a Hub on loopback with the real client: what arrives, and what failures leave."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from consolidate.api import fisher, push, verify
from consolidate.views.text import push_text
from formats.errors import ConsolidateError, UsageError
from formats.fisher_folder import read_fisher
from support import factor_checkpoints, in_process, loopback_hub
from support.checkpoints import Write
from support.command_line import MODEL
from support.folders import flip
from support.loopback_hub import COMMIT, TOKEN, Hub, environment, run, run_python
from support.networks import SIZES, make_network


@pytest.fixture
def checkpoint(network_checkpoint: Path, write_task: Write) -> Path:
    """A folder with weights, a Fisher, and what is nobody else's business."""
    fisher(network_checkpoint, write_task("old"), model=MODEL[1])
    (network_checkpoint / "train.jsonl").write_text('{"text": "a secret row"}\n')
    (network_checkpoint / ".env").write_text("PASSWORD=secret\n")
    return network_checkpoint


def pushed(folder: Path, hub: Hub, *arguments: object) -> dict[str, Any]:
    """Push and give the result as JSON."""
    code, out, err = run(
        folder, "push", *arguments, "--json", HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN
    )
    assert code == 0, err
    return dict(json.loads(out))


def downloaded(folder: Path, hub: Hub, repository: str, into: str) -> Path:
    """Fetch a repository as people do."""
    script = "from huggingface_hub.cli.hf import main; main()"
    code, _, err = run_python(
        folder, "-c", script, "download", repository, "--local-dir", into,
        HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN,
    )  # fmt: skip
    assert code == 0, err
    return folder / into


def test_one_commit_holds_all_of_it(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    code, out, err = run(
        tmp_path, "push", checkpoint, "model", "--dry-run",
        HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN,
    )  # fmt: skip
    assert code == 0, err
    assert f"{(checkpoint / 'fisher' / 'fisher.safetensors').stat().st_size}  new" in out
    assert "'train.jsonl'" in err
    assert not hub.repositories

    done = pushed(tmp_path, hub, checkpoint, "model", "--tag", "v1")
    repository = hub.repositories["user/model"]
    assert done["commit"] == repository.branches["main"] == repository.tags["v1"]
    assert repository.private
    assert len(repository.commits) == 2
    files = repository.files
    assert set(files) == {
        ".gitattributes",
        "LICENSE",
        "README.md",
        "config.json",
        "fisher/fisher.json",
        "fisher/fisher.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
    }
    assert not any(b"secret" in content for content in files.values())
    index = json.loads(files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == {"model.safetensors"}

    # What is there already is compared, and without a network all is listed.
    dry = pushed(tmp_path, hub, checkpoint, "user/model", "--dry-run")
    assert {file["change"] for file in dry["files"]} == {"unchanged"}
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN}
    offline = {**nowhere, "HF_HUB_OFFLINE": "1"}
    for target, variables in (("user/model", offline), ("model", nowhere)):
        words = ("push", checkpoint, target, "--dry-run", "--json")
        code, out, err = run(tmp_path, *words, **variables)
        assert code == 0, err
        alone = json.loads(out)
        assert {file["change"] for file in alone["files"]} == {"not compared"}
        sizes = {file["path"]: file["size"] for file in dry["files"] if file["path"] != "README.md"}
        assert sizes.items() < {file["path"]: file["size"] for file in alone["files"]}.items()
        assert f"the Hub could not be asked for the contents of {target}" in err
    assert "bytes in total; not compared with the Hub" in push_text(alone)
    code, _, err = run(tmp_path, "push", checkpoint, "user/model", **offline)
    assert code == 3
    assert err == "error: user/model: HF_HUB_OFFLINE disables the Hub: unset it to push\n"

    # A person edits the card; again, nothing else is to be sent.
    edited = files["README.md"].replace(b"# user/model\n", b"# Mine\n\nI say so.\n")
    repository.commits["b" * 40] = {**files, "README.md": edited, "notes.txt": b"kept"}
    repository.branches["main"] = "b" * 40
    hub.requests.clear()
    again = pushed(tmp_path, hub, checkpoint, "user/model")
    assert again["status"] == "unchanged"
    assert again["commit"] == "b" * 40
    assert not hub.asked("^(PUT|POST)")

    # Half the Fisher, over what is there; what was of an earlier one goes.
    repository.commits["b" * 40]["fisher/anchor.safetensors"] = b"earlier"
    repository.commits["b" * 40]["model-00001-of-00002.safetensors"] = b"earlier"
    half = pushed(tmp_path, hub, checkpoint, "user/model", "--fisher-dtype", "bfloat16")
    assert half["deleted"] == ["fisher/anchor.safetensors", "model-00001-of-00002.safetensors"]
    changed = {file["path"] for file in half["files"] if file["change"] != "unchanged"}
    assert changed == {"README.md", "fisher/fisher.json", "fisher/fisher.safetensors"}
    assert b"# Mine\n\nI say so.\n" in repository.files["README.md"]
    assert repository.files["notes.txt"] == b"kept"
    fetched = downloaded(tmp_path, hub, "user/model", "fetched")
    assert verify(fetched)["fisher"]["bytes"] == verify(checkpoint)["fisher"]["bytes"] // 2
    exact = load_file(checkpoint / "fisher" / "fisher.safetensors")
    for name, values in load_file(fetched / "fisher" / "fisher.safetensors").items():
        assert torch.equal(values, exact[name].bfloat16())


def test_a_fisher_that_was_rounded_for_the_hub_is_not_up_to_date(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, hub: Hub
) -> None:
    options: dict[str, Any] = {"model": MODEL[1], "overwrite": True}
    for dtype, status in (("float32", "cached"), ("bfloat16", "done")):
        fisher(network_checkpoint, write_task("old"), **options)
        pushed(tmp_path, hub, network_checkpoint, "user/model", "--fisher-dtype", dtype)
        for name, content in hub.repositories["user/model"].files.items():
            if name.startswith("fisher/"):
                (network_checkpoint / name).write_bytes(content)
        again = fisher(network_checkpoint, write_task("old"), **options)
        assert again["status"] == status


def test_a_card_that_the_hub_refuses_is_known_before_anything_is_sent(
    checkpoint: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.card_errors = ['"license" must be one of apache-2.0, mit']
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    code, _, err = run(tmp_path, "push", checkpoint, "user/model", **variables)
    assert (code, '"license" must be one of' in err) == (3, True), err
    assert hub.repositories == {}


def test_what_is_refused_before_anything_is_sent(
    checkpoint: Path, tmp_path: Path, hub: Hub
) -> None:
    for options, message in (
        ({"create_pr": True, "revision": "x"}, "--revision"),
        ({"create_pr": True, "tag": "x"}, "--tag"),
        ({"token": "two words"}, "--token: expected an access token"),
        ({"fisher_only": True}, "needs one --base-model"),
        ({"base_model": ["a/b/c"]}, "is not a repository name"),
    ):
        with pytest.raises(UsageError, match=message):
            push(checkpoint, "user/model", **options)  # type: ignore[arg-type]
    public = hub.put("user/public", checkpoint)
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    code, _, err = run(tmp_path, "push", checkpoint, "user/public", **variables)
    assert (code, "--public" in err) == (2, True)
    public.tags["v1"] = "d" * 40
    code, _, err = run(
        tmp_path, "push", checkpoint, "user/public", "--public", "--tag", "v1", **variables
    )
    assert (code, "already has a tag 'v1'" in err) == (2, True)
    flip(checkpoint / "model.safetensors")
    code, _, err = run(tmp_path, "push", checkpoint, "user/model", **variables)
    assert (code, "has the expected dtype and shape, but other values" in err) == (3, True)
    assert not hub.asked("^(PUT|POST)")


def test_a_branch_and_a_pull_request(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    first = pushed(tmp_path, hub, checkpoint, "user/model", "--revision", "next", "--public")
    repository = hub.repositories["user/model"]
    assert repository.messages == {first["commit"]: "Push old"}
    assert not repository.private
    assert set(repository.files) == {".gitattributes"}
    assert "fisher/fisher.json" in repository.commits[repository.branches["next"]]
    words = ("--create-pr", "--public", "--commit-message", "Mine")
    done = pushed(tmp_path, hub, checkpoint, "user/model", *words)
    assert repository.messages[done["commit"]] == "Mine"
    assert done["pull_request"].endswith("/user/model/discussions/1")
    assert set(repository.files) == {".gitattributes"}
    assert repository.branches["refs/pr/1"] == done["commit"]
    words = ("--revision", "refs/pr/1", "--public", "--fisher-dtype", "bfloat16")
    more = pushed(tmp_path, hub, checkpoint, "user/model", *words)
    assert (more["status"], more["pull_request"]) == ("done", None)
    assert repository.branches["refs/pr/1"] == more["commit"] != done["commit"]
    assert set(repository.files) == {".gitattributes"}


def test_a_branch_is_made_where_nothing_changed(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    done = pushed(tmp_path, hub, checkpoint, "user/model")
    again = pushed(tmp_path, hub, checkpoint, "user/model", "--revision", "stable")
    assert again["status"] == "unchanged"
    assert hub.repositories["user/model"].branches["stable"] == done["commit"]


def test_all_of_a_tokenizer_and_of_modules_is_sent_and_nothing_hidden(
    checkpoint: Path, tmp_path: Path, hub: Hub
) -> None:
    sent = ["spm.model", "bpe.codes", "emoji.json", "word_shape.json", "word_pronunciation.json"]
    sent += ["2_Dense/config.json", "2_Dense/pytorch_model.bin"]
    not_sent = ["2_Dense/notes.txt", "fisher/.ipynb_checkpoints/notes.txt"]
    for name in (*sent, *not_sent):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("{}")
    (checkpoint / "fisher/.#fisher.json").symlink_to("me@here.1")  # as an editor's lock
    code, _, err = run(
        tmp_path, "push", checkpoint, "user/model", HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN
    )
    assert code == 0, err
    files = set(hub.repositories["user/model"].files)
    assert files.issuperset(sent)
    assert not files & {*not_sent}
    assert "'2_Dense/notes.txt'" in err


def test_other_formats_stay_with_unchanged_weights_alone(
    checkpoint: Path, write_task: Write, tmp_path: Path, hub: Hub
) -> None:
    shutil.rmtree(checkpoint / "fisher")
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model-q4.gguf"):
        (checkpoint / name).write_bytes(b"the same in another format")
    (checkpoint / "onnx").mkdir()
    (checkpoint / "onnx" / "model.onnx").write_bytes(b"the same in another format")
    hub.put("user/model", checkpoint)
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    words = ("fisher", "user/model", "--data", write_task("old"), *MODEL)
    code, _, err = run(tmp_path, *words, "--output-dir", "measured", **variables)
    assert code == 0, err
    done = pushed(tmp_path, hub, "measured", "user/model", "--public")
    assert done["deleted"] == []
    assert ("model.safetensors", "unchanged") in {(f["path"], f["change"]) for f in done["files"]}

    other = make_network({"sizes": SIZES}).state_dict()
    save_file(other, checkpoint / "model.safetensors", {"format": "pt"})
    fisher(checkpoint, write_task("old"), model=MODEL[1])
    code, out, err = run(
        tmp_path, "push", checkpoint, "user/model", "--public", "--json", **variables
    )
    assert code == 0, err
    gone = ["flax_model.msgpack", "pytorch_model.bin", "tf_model.h5"]
    assert json.loads(out)["deleted"] == gone
    assert "'model-q4.gguf', 'onnx/model.onnx' may hold earlier weights still: delete" in err
    assert {"model-q4.gguf", "onnx/model.onnx"} < set(hub.repositories["user/model"].files)


def test_an_adapter_that_was_there_goes(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    """Else transformers would load it, on its own base model."""
    pushed(tmp_path, hub, checkpoint, "user/model")
    files = hub.repositories["user/model"].files
    files |= {"adapter_config.json": b"{}", "adapter_model.safetensors": b"earlier"}
    done = pushed(tmp_path, hub, checkpoint, "user/model")
    assert done["deleted"] == ["adapter_config.json", "adapter_model.safetensors"]


FAILURES: list[tuple[str, dict[str, Any], int, str]] = [
    ("GET /api/models/user/model$", {"status": 503}, 75, "status 503"),
    ("GET /api/models/user/model$", {"status": 0}, 75, "cannot be reached"),
    ("GET .*/tree/", {"status": 401, "message": "Invalid credentials in Authorization header"}, 3,
     "hf auth login"),
    ("POST .*/commit/", {"status": 401}, 3, "hf auth login"),
    ("POST .*/commit/", {"status": 403, "message": "read-only"}, 3, "read-only"),
    ("POST .*/commit/", {"status": 404}, 3, "no such repository"),
    ("POST .*/commit/", {"status": 409}, 3, "has changed since"),
    ("POST .*/commit/", {"status": 412}, 3, "has changed since"),
    ("POST .*/commit/", {"status": 413, "message": "too \x1b large"}, 3, "status 413"),
    ("POST .*/commit/", {"status": 429, "Retry_After": "7"}, 75, "wait 7 s; push again"),
    ("POST .*/commit/", {"status": 500}, 75, "status 500"),
    ("POST .*/commit/", {"status": 0}, 75, "cannot be reached"),
    ("PUT", {"status": 403}, 3, "denies permission"),
]  # fmt: skip


def test_a_failure_leaves_the_repository_as_it_was(
    checkpoint: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = hub.put("user/model", tmp_path / "nothing", private=True)
    before = dict(repository.branches)
    pending = iter(FAILURES)

    def next_failure() -> None:
        where, failure, *_ = next(pending, ("never", {}))
        hub.failures.clear()
        hub.fail(where, **failure)
        assert repository.branches == before
        hub.objects.clear()
        hub.meanwhile["GET /api/models/user/model$"] = next_failure

    hub.meanwhile["GET /api/models/user/model$"] = next_failure
    told: list[tuple[int, str]] = []
    variables = environment(tmp_path, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    with in_process.environment(variables):
        for _ in range(len(FAILURES) + 1):
            try:
                push(checkpoint, "user/model")
                told.append((0, ""))
            except ConsolidateError as error:
                told.append((error.exit_code, str(error)))
    out, err = capsys.readouterr()
    for (where, failure, expected, message), (exit_code, said) in zip(FAILURES, told, strict=False):
        assert (exit_code, message in said) == (expected, True), (where, failure, said)
        assert "\x1b" not in said
        assert TOKEN not in said
    assert told[-1] == (0, "")
    assert repository.branches != before
    assert TOKEN not in out + err


def test_somebody_else_was_quicker(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    repository = hub.put("user/model", tmp_path / "nothing", private=True)
    theirs = {"README.md": b"theirs"}

    def commit() -> None:
        repository.commits["e" * 40] = theirs
        repository.branches["main"] = "e" * 40

    hub.meanwhile["POST .*/commit/"] = commit
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    code, _, err = run(tmp_path, "push", checkpoint, "user/model", **variables)
    assert (code, "has changed since it was read" in err) == (3, True)
    assert repository.files == theirs


def test_what_arrived_otherwise_is_told(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    repository = hub.put("user/model", tmp_path / "nothing", private=True)

    def damage() -> None:
        def spoil() -> None:
            repository.files["fisher/fisher.json"] = b"{}"

        hub.meanwhile["GET .*/tree/"] = spoil

    hub.meanwhile["POST .*/commit/"] = damage
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    code, _, err = run(tmp_path, "push", checkpoint, "user/model", **variables)
    assert (code, "fisher/fisher.json has another digest" in err) == (75, True), err


def test_an_interrupted_upload_goes_on(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    hub.put("user/model", tmp_path / "nothing", private=True)
    before = dict(hub.repositories["user/model"].branches)
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    second: list[str] = []

    def slow_down() -> None:
        hub.meanwhile["PUT"] = lambda: (setattr(hub, "slow", 60.0), second.append("begun"))

    hub.meanwhile["PUT"] = slow_down
    command = [sys.executable, "-m", "consolidate", "push", checkpoint, "user/model"]
    process = subprocess.Popen(
        command, env=environment(tmp_path, **variables), stderr=subprocess.PIPE, text=True
    )
    while not second and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert (process.returncode, err.splitlines()[-1]) == (143, "terminated")
    assert hub.repositories["user/model"].branches == before
    sent = dict(hub.sent)
    assert len(sent) == 1

    hub.slow = 0.0
    hub.fail("^PUT")  # and the connection is cut once in the middle of what is left
    pushed(tmp_path, hub, checkpoint, "user/model")
    assert all(hub.sent[digest] == count for digest, count in sent.items())
    assert len(hub.sent) == 2
    assert "fisher/fisher.json" in hub.repositories["user/model"].files


def test_the_fisher_of_somebody_elses_weights(
    checkpoint: Path, write_task: Write, tmp_path: Path, hub: Hub
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(checkpoint / name, theirs)
    (theirs / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    hub.put("them/model", theirs)
    only = (checkpoint, "user/fisher", "--fisher-only", "--base-model", "them/model")
    done = pushed(tmp_path, hub, *only)
    files = hub.repositories["user/fisher"].files
    assert {path.partition("/")[0] for path in files} == {".gitattributes", "README.md", "fisher"}
    card = files["README.md"].decode()
    assert "base_model: them/model" in card
    assert "# Theirs" not in card
    assert f"at commit `{COMMIT}` (digest `{done['weights']}`" in card

    code, _, err = run(
        tmp_path, "finetune", "them/model", "--revision", COMMIT, "--fisher", "user/fisher",
        "--data", write_task("new", seed=4), *MODEL, "--ewc-lambda", 10, "--output-dir", "out",
        HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN,
    )  # fmt: skip
    assert code == 0, err
    assert verify(tmp_path / "out")["tasks"] == ["old", "new"]

    other = make_network({"sizes": SIZES}).state_dict()
    save_file(other, theirs / "model.safetensors", {"format": "pt"})
    hub.put("them/other", theirs)
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    code, _, err = run(tmp_path, "push", *only[:-1], "them/other", **variables)
    assert (code, "does not belong to the weights of them/other" in err) == (3, True), err
    pushed(tmp_path, hub, checkpoint, "user/whole")
    code, _, err = run(tmp_path, "push", checkpoint, "user/whole", *only[2:], **variables)
    assert (code, "has weights" in err) == (2, True), err
    shutil.copytree(theirs, tmp_path / "them" / "model")
    code, _, err = run(tmp_path, "push", *only, **variables)
    assert (code, "--base-model them/model is a folder here" in err) == (2, True), err


def test_factors_are_pushed_rounded_or_left_out(
    write_task: Write, tmp_path: Path, hub: Hub
) -> None:
    folder = factor_checkpoints.write(tmp_path / "one", anchored=True)
    files = {f"fisher/{kind}.safetensors" for kind in ("factors", "factor_anchor")}
    done = pushed(tmp_path, hub, folder, "user/one")
    assert files <= {file["path"] for file in done["files"]}
    remote = hub.repositories["user/one"]
    assert (
        remote.files["fisher/factors.safetensors"]
        == (folder / "fisher" / "factors.safetensors").read_bytes()
    )
    assert b"The factors (2 matrices) reveal more than the diagonal" in remote.files["README.md"]
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    code, out, err = run(tmp_path, "show", "user/one", "--json", **variables)
    assert code == 0, err
    assert json.loads(out)["factors"]["bytes"] == 4 * (7 * 7 + 9 * 9)
    assert not hub.asked("^GET /user/one/resolve/.*/fisher/factor[^ ]* .*whole")
    code, out, err = run(tmp_path, "verify", "user/one", **variables)
    assert (code, "factor anchor: 4 tensors" in out) == (0, True), err

    pushed(tmp_path, hub, folder, "user/half", "--fisher-dtype", "bfloat16")
    fetched = downloaded(tmp_path, hub, "user/half", "half")
    checked = verify(fetched)
    assert checked["factors"]["bytes"] == 4 * (7 * 7 + 9 * 9)
    exact = load_file(folder / "fisher" / "factors.safetensors")
    for name, values in load_file(fetched / "fisher" / "factors.safetensors").items():
        assert torch.equal(values, exact[name])

    less = pushed(tmp_path, hub, folder, "user/one", "--structure", "diagonal")
    assert set(less["deleted"]) == files
    assert not any("factor" in path for path in remote.files)
    assert b"reveal more than the diagonal" not in remote.files["README.md"]
    fetched = downloaded(tmp_path, hub, "user/one", "diagonal")
    assert verify(fetched)["fisher"] == verify(folder)["fisher"]
    ledger = read_fisher(fetched / "fisher").ledger
    assert (ledger.factors, ledger.blocks, ledger.factor_offset) == (None, None, None)
    assert ledger.penalty_offset == 0.25
    assert json.loads(remote.files["fisher/fisher.json"])["version"] == 1

    new = write_task("new", seed=4)
    for start in ("user/half", "user/one"):
        words = ("finetune", start, "--data", new, *MODEL, "--ewc-lambda", 10, "--overwrite")
        code, _, err = run(tmp_path, *words, "--output-dir", "out", **variables)
        assert code == 0, err
        ledger = read_fisher(tmp_path / "out" / "fisher").ledger
        assert [task.name for task in ledger.tasks] == ["old", "new"]
        assert (ledger.factors is not None) == (start == "user/half")
        assert verify(tmp_path / "out")["tasks"] == ["old", "new"]


def test_factors_that_cannot_be_pushed(tmp_path: Path, hub: Hub) -> None:
    folder = factor_checkpoints.write(tmp_path / "one", without=("0.weight.R", "2.weight.R"))
    with pytest.raises(UsageError, match=r"--structure inputs: .*fisher has no factors"):
        push(folder, "user/one", structure="inputs")
    with pytest.raises(UsageError, match="expected one of diagonal, inputs"):
        push(folder, "user/one", structure="kronecker")
    assert not hub.requests


def test_the_factors_of_somebody_elses_weights(tmp_path: Path, hub: Hub) -> None:
    folder, theirs = factor_checkpoints.write(tmp_path / "one"), tmp_path / "theirs"
    shutil.copytree(folder, theirs, ignore=shutil.ignore_patterns("fisher"))
    hub.put("them/model", theirs)
    only = (folder, "me/fisher", "--fisher-only", "--base-model", "them/model")
    pushed(tmp_path, hub, *only, "--fisher-dtype", "bfloat16")
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    words = ("verify", "me/fisher", "--base-model", "them/model", "--json")
    code, out, err = run(tmp_path, *words, **variables)
    assert code == 0, err
    assert json.loads(out)["factors"]["tensors"] == 2
    factor_checkpoints.rewrite(folder, lambda t: t["0.weight.R"].mul_(2), "factors")
    code, _, err = run(tmp_path, "push", *only, **variables)
    assert (code, "'0.weight.R': expected the trace" in err) == (3, True), err


LOADERS = """
import sys
import torch, transformers
from huggingface_hub import load_torch_model, snapshot_download
from consolidate import verify
name = sys.argv[1]
path = snapshot_download(name)
first = transformers.AutoModelForSequenceClassification.from_pretrained(name)
second = transformers.AutoModelForSequenceClassification.from_config(first.config)
result = load_torch_model(second, path, strict=True)
assert not result.missing_keys and not result.unexpected_keys, result
for key, value in first.state_dict().items():
    assert torch.equal(value, second.state_dict()[key]), key
print(verify(path)["weights"]["digest"])
"""


def test_what_was_pushed_loads_as_before(tmp_path: Path, hub: Hub) -> None:
    import transformers

    from support import tiny_models

    folder = tiny_models.save(
        tmp_path / "bert",
        transformers.BertForSequenceClassification,
        tiny_models.bert_config(),
        tiny_models.word_tokenizer(),
    )
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(tiny_models.CORPUS)]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fisher(folder, tmp_path / "old.jsonl")
    done = pushed(tmp_path, hub, folder, "user/bert")
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(hub.repositories["user/bert"].files)
    assert b"library_name: transformers" in hub.repositories["user/bert"].files["README.md"]
    code, out, err = run_python(
        tmp_path, "-c", LOADERS, "user/bert", HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN
    )
    assert code == 0, err
    assert out.splitlines()[-1] == done["weights"]


def test_a_token_refused_in_other_words_is_not_a_missing_repository(
    checkpoint: Path, hub: Hub
) -> None:
    # The client takes it for this by the address of the real Hub alone.
    said = {"message": "User Access Token is expired", "X_Error_Code": "RepoNotFound"}
    hub.fail("^GET /api/models/user/model", 401, **said)
    words = ("push", checkpoint, "user/model", "--dry-run")
    code, _, err = run(checkpoint, *words, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert (code, "rejects the token of HF_TOKEN" in err) == (3, True), err


@pytest.mark.parametrize(
    ("moment", "nothing"),
    [
        ("GET /user/model/resolve/.*README.md", "sent"),
        ("POST .*/info/lfs/objects/batch", "committed"),
    ],
)
def test_a_checkpoint_that_is_replaced_meanwhile_is_not_pushed(
    checkpoint: Path, write_task: Write, hub: Hub, moment: str, nothing: str
) -> None:
    hub.repositories["user/model"] = loopback_hub.Repository({COMMIT: {"README.md": b"# Mine\n"}})
    new = write_task("new", seed=1)
    hub.meanwhile[moment] = lambda: fisher(checkpoint, new, model=MODEL[1], overwrite=True)
    words = ("push", checkpoint, "user/model", "--public")
    code, _, err = run(checkpoint, *words, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert code == 3
    assert f"changed while it was being read; nothing was {nothing}" in err
    assert hub.repositories["user/model"].files == {"README.md": b"# Mine\n"}
    assert run(checkpoint, *words, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)[0] == 0
