"""A Hub that fails, lies or hangs, one route at a time: the exit code, and what is said."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi
from safetensors.torch import save_file

from consolidate.api import fisher
from formats.hub_errors import hub_call
from support import loopback_hub
from support.loopback_hub import ALWAYS, CUT, HANG, TOKEN, Hub, run, run_python
from support.networks import SIZES, make_network

Failure = dict[str, Any]
LIMIT = "CONSOLIDATE_HUB_TIMEOUT"
MARK = {"format": "pt"}

INFO = "^GET /api/models/{name}(/revision/main)?$"
LISTING = "^GET /api/models/{name}/tree/"
FILE = "/{name}/resolve/.*/config.json$"
HEADER = "^GET /{name}/resolve/.*/fisher.safetensors$"
PORTAL = b"<html><h1>Welcome to our hotel</h1></html>"
DEEP = b"[" * 200_000
ODD = "has an unexpected form"


def answer(body: Any, **more: Any) -> Failure:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return {"status": 200, "body": body, **more}


def status(code: int, **more: Any) -> Failure:
    return {"status": code, "Retry_After": "0", **more}


def info(**fields: Any) -> Failure:
    return answer({"id": "x/y", "sha": loopback_hub.COMMIT, "private": True, **fields})


def header(text: bytes) -> Failure:
    return answer(len(text).to_bytes(8, "little") + text)


# What is run, the route, what it answers: the exit code, and what is said.
CASES: list[tuple[str, str, Failure, int, str]] = [
    ("verify", INFO, status(500), 75, "the Hub responds with status 500"),
    ("verify", INFO, status(403, message="no"), 3, "the Hub denies permission (no)"),
    ("verify", INFO, status(418), 3, "status 418"),
    ("verify", INFO, {"status": CUT}, 75, "cannot be reached"),
    ("verify", INFO, answer(PORTAL), 75, "not JSON"),
    ("verify", INFO, answer([]), 3, ODD),
    ("verify", INFO, answer({}), 3, ODD),
    ("verify", INFO, answer(DEEP), 3, ODD),
    ("verify", INFO, info(sha=None), 3, "names no commit"),
    ("verify", INFO, info(sha=["x"]), 3, "names no commit"),
    ("verify", INFO, info(siblings=[5]), 3, ODD),
    ("verify", INFO, info(siblings=[{"rfilename": 5}]), 3, "the invalid name 5"),
    ("verify", INFO, info(siblings=[{"rfilename": "../x"}]), 3, "the invalid name '../x'"),
    ("verify", INFO, info(siblings=[{"rfilename": "/x"}]), 3, "the invalid name '/x'"),
    ("verify", INFO, info(siblings=[{"rfilename": "x\0"}]), 3, r"the invalid name 'x\x00'"),
    ("verify", LISTING, status(500), 75, "status 500"),
    ("verify", LISTING, answer(PORTAL), 75, "not JSON"),
    ("verify", LISTING, answer({"a": 1}), 3, ODD),
    ("verify", LISTING, answer([{"type": "file", "path": "../x", "size": 1, "oid": "a"}]), 3,
     "../x"),
    ("verify", LISTING, {"status": HANG}, 75, "does not answer in time (ReadTimeout"),
    ("verify", FILE, status(500), 75, "status 500 for config.json"),
    ("verify", FILE, status(429), 75, "limits the rate"),
    ("verify", FILE, status(403), 3, "the Hub denies permission"),
    ("verify", FILE, status(404), 3, "file for config.json"),
    ("verify", FILE, answer(b"{}", X_Repo_Commit=loopback_hub.COMMIT), 75, "digest or size"),
    ("verify", FILE, answer(PORTAL), 75, "digest or size"),
    ("verify", f"^GET {FILE}", answer(b"{", Content_Length="17"), 75, "cannot be reached"),
    ("verify", f"^GET {FILE}", answer(b"{"), 75, "ended early"),
    ("show", LISTING, status(500), 75, "status 500"),
    ("show", HEADER, header(b"[]"), 3, "header of"),
    ("show", HEADER, header(DEEP), 3, "header of"),
    ("show", HEADER, answer(PORTAL), 3, "header of"),
    ("show", HEADER, header(b'{"x": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}'), 3,
     "header of"),
    ("data", "^HEAD /datasets/{name}/", status(500), 75, "status 500"),
    ("data", "^HEAD /datasets/{name}/", status(403), 3, "the Hub denies permission"),
    ("data", "^GET /api/datasets/{name}", answer(PORTAL), 75, "not JSON"),
    ("data", "^GET /api/datasets/{name}", answer([]), 3, ODD),
    ("push", INFO, answer(PORTAL), 75, "not JSON"),
    ("push", INFO, answer({}), 3, ODD),
    ("push", INFO, info(sha=None), 3, "names no commit"),
    ("push", LISTING, answer({"a": 1}), 3, ODD),
    ("push", LISTING, answer([{"type": "file", "path": 5, "size": 1, "oid": "a"}]), 3, ODD),
    ("push", LISTING, answer([{"type": "file", "path": "README.md", "size": "1", "oid": "a"}]), 3,
     ODD),
    ("push", LISTING, {"status": HANG}, 75, "ReadTimeout"),
    ("push --tag v1", "^GET .*/{name}/refs", answer([]), 3, ODD),
    ("push --tag v1", "^GET .*/{name}/refs", {"status": HANG}, 75, "ReadTimeout"),
    ("push --tag v1", "^GET .*/{name}/refs", answer({"branches": [], "converts": [], "tags":
     [{"name": ["x"], "ref": "x", "targetCommit": 5}]}), 3, ODD),
    ("push", "^POST .*/{name}/preupload/", answer([]), 3, ODD),
    ("push", "^POST .*/{name}/preupload/", answer({"files": []}), 3, ODD),
    ("push", "^POST /{name}.git/info/lfs/objects/batch", answer([]), 3, ODD),
    ("push", "^POST /{name}.git/info/lfs/objects/batch", answer({"objects": [{}]}), 3, "refuses"),
    ("push", "^POST /{name}.git/info/lfs/objects/batch", answer({"objects":
     [{"oid": "x", "size": 1, "actions": {"upload": {"href": "x"}}}]}), 3, ODD),
    ("push", "^POST /{name}.git/info/lfs/objects/batch", {"status": HANG}, 75, "ReadTimeout"),
    ("push", "^PUT /hangs/", {"status": HANG}, 75, "ReadTimeout"),
    ("push", "^POST .*/{name}/commit/", answer([]), 3, ODD),
    ("push", "^POST .*/{name}/commit/", answer({}), 3, ODD),
    ("push", "^POST .*/{name}/commit/", {"status": HANG}, 75, "ReadTimeout"),
    ("push --tag v1", "^POST .*/{name}/tag/", status(403), 3, "the commit "),
    ("push --tag v1", "^POST .*/{name}/tag/", {"status": HANG}, 75, "the commit "),
]  # fmt: skip
MANY = """
import json, os, sys, threading, time
from consolidate import push, show, verify
from consolidate.cli import _explain
from formats.data import open_data

def run(number, what, name, checkpoint):
    told[number] = "nothing was said in 40 s", None
    try:
        if what.startswith("push"):
            push(checkpoint, name, tag="v1" if "--tag" in what else None)
        else:
            {"verify": verify, "show": show, "data": open_data}[what](name)
        told[number] = "done", 0
    except Exception as error:
        told[number] = _explain(error)

told = {}
cases = json.loads(open(sys.argv[1]).read())
sleep = time.sleep  # the client's pauses between tries
time.sleep = lambda seconds: sleep(min(seconds, 0.05))
threads = [threading.Thread(target=run, args=(n, *case)) for n, case in enumerate(cases)]
for thread in threads:
    thread.start()
end = time.monotonic() + 40
for thread in threads:
    thread.join(max(0, end - time.monotonic()))
print(json.dumps([told[number] for number in range(len(cases))]), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(make_network({"sizes": SIZES}).state_dict(), folder / "model.safetensors", MARK)
    (folder / "config.json").write_text(json.dumps({"sizes": SIZES}))
    inputs = np.random.default_rng(0).normal(size=(9, SIZES[0])).astype(np.float32)
    np.savez(folder.parent / "old.npz", inputs=inputs, labels=np.arange(9) % 3)
    fisher(folder, folder.parent / "old.npz", model="support.networks:make_network")
    return folder


def batch(hub: Hub, checkpoint: Path) -> Failure:
    """What is answered to who is about to send the weights."""
    weights = (checkpoint / "model.safetensors").read_bytes()
    upload = {"href": f"{hub.address}/hangs/"}
    file = {"oid": hashlib.sha256(weights).hexdigest(), "size": len(weights)}
    return answer({"transfer": "basic", "objects": [{**file, "actions": {"upload": upload}}]})


@pytest.fixture(scope="module")
def told(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """What every case says, and the exit code: all at once, as the client waits between tries."""
    folder = tmp_path_factory.mktemp("cases")
    rows = folder / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text('{"text": "a", "label": 0}\n')
    with loopback_hub.running() as hub:
        cases = []
        for number, (what, where, failure, *_) in enumerate(CASES):
            name = f"user/case-{number}"
            source = {"data": rows, "push": folder / "nothing"}.get(what.split()[0], checkpoint)
            kind = "datasets/" if what == "data" else ""
            hub.put(f"{kind}{name}", source, private=what.startswith("push"))
            hub.fail(where.format(name=name), **{"times": ALWAYS, **failure})
            if where == "^PUT /hangs/":  # no other case may send this file before
                hub.fail(f"^POST /{name}.git/info/lfs/objects/batch", **batch(hub, checkpoint))
            cases.append([what, name, str(checkpoint)])
        (folder / "cases.json").write_text(json.dumps(cases))
        variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, LIMIT: "0.5"}
        code, out, err = run_python(folder, "-c", MANY, folder / "cases.json", **variables)
    assert code == 0, err
    assert TOKEN not in out + err
    return [tuple(said) for said in json.loads(out.splitlines()[-1])]


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{n} {what}" for n, (what, *_) in enumerate(CASES)]
)
def test_a_hub_that_fails_lies_or_hangs(number: int, told: list[tuple[str, int]]) -> None:
    *_, expected, words = CASES[number]
    message, code = told[number]
    assert (code, words in message) == (expected, True), (CASES[number][:2], code, message)
    assert f"user/case-{number}" in message


def test_a_wrong_token_is_told_as_such(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    hub.put("user/model", checkpoint)
    wrong = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_expired"}
    code, _, err = run_python(tmp_path, "-m", "consolidate", "verify", "user/model", **wrong)
    told = "the Hub rejects the token of {} (Invalid credentials in Authorization header)"
    assert (code, told.format("HF_TOKEN") in err) == (3, True), err
    assert "`hf auth login`" in err
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "token").write_text("hf_expired")
    words = (
        "evaluate",
        checkpoint,
        "--model",
        "support.networks:make_network",
        "--data",
        "user/rows",
    )
    code, _, err = run_python(tmp_path, "-m", "consolidate", *words, HF_ENDPOINT=hub.address)
    assert (code, f"user/rows: {told.format('`hf auth login`')}" in err) == (3, True), err
    words = ("push", checkpoint, "user/model", "--public", "--token", "hf_other")
    code, _, err = run_python(tmp_path, "-m", "consolidate", *words, HF_ENDPOINT=hub.address)
    assert (code, f"user/model: {told.format('--token')}" in err) == (3, True), err


def test_a_hub_that_answers_401_to_everything(tmp_path: Path, hub: Hub) -> None:
    hub.fail("", 401, times=ALWAYS)
    for token, words in (
        ("", "requires a login; use `hf auth login`, or set HF_TOKEN"),
        ("hf_expired", "rejects the token of HF_TOKEN; set a valid one"),
        ("hf_\u00e9", "it contains invalid characters"),
    ):
        variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token}
        code, _, err = run(tmp_path, "verify", "user/model", **variables)
        assert (code, words in err) == (3, True), err


def test_what_the_cache_holds_is_read_when_the_hub_fails(
    checkpoint: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.put("user/model", checkpoint)
    assert run(tmp_path, "verify", "user/model", HF_ENDPOINT=hub.address)[0] == 0
    for failure, token, why in (
        (status(503), TOKEN, "the Hub responds with status 503"),
        (answer(PORTAL), TOKEN, "is not JSON"),
        (None, "hf_expired", "rejects the token of HF_TOKEN"),
    ):
        hub.failures.clear()
        if failure is not None:
            hub.fail("^GET /api/", times=ALWAYS, **failure)
        variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token}
        code, _, err = run(tmp_path, "verify", "user/model", **variables)
        assert code == 0, err
        assert "user/model: " in err
        assert why in err
        assert "; using the copy in the cache" in err


def test_a_repository_that_cannot_be_made(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    words = ("-m", "consolidate", "push", checkpoint, "user/model")
    for failure, expected, said in ((answer({}), 3, ODD), ({"status": HANG}, 75, "ReadTimeout")):
        hub.fail("^POST /api/repos/create", **failure)
        # An interpreter of its own: a process reads the limit once.
        code, _, err = run_python(tmp_path, *words, **variables, **{LIMIT: "0.5"})
        assert (code, said in err) == (expected, True), err
        assert "sets no option" not in err
    code, _, err = run_python(tmp_path, *words, **variables, **{LIMIT: "soon"})
    assert (
        code,
        "CONSOLIDATE_HUB_TIMEOUT: expected a number of seconds above 0, found 'soon'" in err,
    ) == (2, True), err


def test_a_tag_that_fails_is_set_by_the_next_push(
    checkpoint: Path, tmp_path: Path, hub: Hub
) -> None:
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    hub.fail("^POST .*/tag/", 403, message="tags are for owners")
    words = ("push", checkpoint, "user/model", "--tag", "v1")
    code, _, err = run(tmp_path, *words, **variables)
    commit = hub.repositories["user/model"].branches["main"]
    told = f"user/model: the commit {commit} was made, but not the tag 'v1': "
    assert (code, told in err, "tags are for owners" in err) == (3, True, True), err
    code, _, err = run(tmp_path, *words, **variables)
    assert (code, hub.repositories["user/model"].tags) == (0, {"v1": commit}), err


def test_what_is_not_the_hubs_passes(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(KeyError), hub_call("user/model: "):
        {}["ours"]
    hub.put("user/model", checkpoint)
    (tmp_path / "file").touch()
    api = HfApi(endpoint=hub.address, token=False)
    with pytest.raises(NotADirectoryError), hub_call("user/model: "):
        api.hf_hub_download("user/model", "config.json", cache_dir=tmp_path / "file" / "cache")


def test_a_revision_of_a_dataset_for_which_the_hub_names_no_commit(
    tmp_path: Path, hub: Hub
) -> None:
    hub.fail("^GET /api/datasets/user/rows", times=ALWAYS, **info(sha=None))
    script = "from formats.hub_dataset import open_hub; open_hub('user/rows', revision='main')"
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    code, _, err = run_python(tmp_path, "-c", script, **variables)
    assert code == 1
    assert "InputError: user/rows: a response of the Hub names no commit" in err
