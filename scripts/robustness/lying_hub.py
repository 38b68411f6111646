"""A Hub that fails, lies or hangs, one route at a time: a table of cases, and what became of them.

Each case has a repository of its own on one loopback Hub. All run at once, in threads of one
process, as the client waits between its tries.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from consolidate.api import fisher
from scripts.benchmarks.harness import ROOT
from scripts.robustness.records import Record, add_record

sys.path.append(str(ROOT / "tests"))
from support import loopback_hub
from support.folders import contents
from support.loopback_hub import ALWAYS, CUT, HANG, TOKEN, Hub, run_python
from support.networks import SIZES, make_network

Failure = dict[str, Any]
LIMIT = "CONSOLIDATE_HUB_TIMEOUT"
MARK = {"format": "pt"}

INFO = "^GET /api/models/{name}(/revision/main)?$"
LISTING = "^GET /api/models/{name}/tree/"
FILE = "/{name}/resolve/.*/config.json$"
WEIGHTS = "/{name}/resolve/.*/model.safetensors$"
LEDGER = "/{name}/resolve/.*/fisher/fisher.json$"
HEADER = "^GET /{name}/resolve/.*/fisher.safetensors$"
PORTAL = b"<html><h1>Welcome to our hotel</h1></html>"
DEEP = b"[" * 200_000
ODD = "has an unexpected form"


def answer(body: Any, **more: Any) -> Failure:
    """Answer with JSON, or bytes."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return {"status": 200, "body": body, **more}


def status(code: int, **more: Any) -> Failure:
    """Answer with a status."""
    return {"status": code, "Retry_After": "0", **more}


def info(**fields: Any) -> Failure:
    """Answer with what a repository is, but for some fields."""
    return answer({"id": "x/y", "sha": loopback_hub.COMMIT, "private": True, **fields})


def header(text: bytes, claim: int | None = None) -> Failure:
    """Answer with a safetensors header, whose length may be another than it claims."""
    return answer((len(text) if claim is None else claim).to_bytes(8, "little") + text)


def changed(place: int) -> Failure:
    """Have one byte of the file changed in the repository, with a digest to match."""
    return {"place": place}


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
    ("verify", WEIGHTS, changed(-1), 3, "other values"),
    ("verify", LEDGER, changed(5), 3, "fisher.json"),
    ("verify", LEDGER, answer(PORTAL), 75, "digest or size"),
    ("verify", INFO, {"status": 302, "Location": "http://127.0.0.1:9/x"}, 75, "cannot be reached"),
    ("verify", INFO, {"status": 302, "Location": "file:///etc/passwd"}, 75, ""),
    ("verify", INFO, {"status": 302, "Location": "/api/models/{name}"}, 75, ""),
    ("verify", LISTING, answer([{"type": "file", "path": "/x", "size": 1, "oid": "a"}]), 3, "/x"),
    ("verify", LISTING, answer([{"type": "file", "path": "x\0", "size": 1, "oid": "a"}]), 3,
     "null byte"),
    ("verify", LISTING, answer(DEEP), 3, ODD),
    ("evaluate", INFO, status(500), 75, "status 500"),
    ("evaluate", INFO, answer(PORTAL), 75, "not JSON"),
    ("evaluate", LISTING, answer({"a": 1}), 3, ODD),
    ("evaluate", FILE, answer(PORTAL), 75, "digest or size"),
    ("evaluate", FILE, status(404), 3, "file for config.json"),
    ("evaluate", f"^GET {WEIGHTS}", {"status": CUT}, 75, "cannot be reached"),
    ("evaluate", f"^GET {WEIGHTS}", {"status": HANG}, 75, "ReadTimeout"),
    ("finetune", INFO, answer([]), 3, ODD),
    ("finetune", LISTING, status(500), 75, "status 500"),
    ("finetune", FILE, status(429), 75, "limits the rate"),
    ("finetune", WEIGHTS, changed(-1), 3, "other values"),
    ("finetune", f"^GET {LEDGER}", answer(b"{", Content_Length="17"), 75, "cannot be reached"),
    ("finetune", f"^GET {LEDGER}", {"status": HANG}, 75, "ReadTimeout"),
    ("fisher", INFO, status(403, message="no"), 3, "the Hub denies permission (no)"),
    ("fisher", FILE, answer(PORTAL), 75, "digest or size"),
    ("fisher", f"^GET {WEIGHTS}", answer(b"{"), 75, "ended early"),
    ("show", HEADER, header(b"{", 2**63 - 1), 3, "header of"),
    ("show", LEDGER, answer(PORTAL), 75, "digest or size"),
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
import consolidate
from consolidate import push, show, verify
from consolidate.cli import _explain
from formats.data import open_data

def run(number, what, name, checkpoint, rows):
    told[number] = "no answer in 100 s", None
    try:
        if what.startswith("push"):
            push(checkpoint, name, tag="v1" if "--tag" in what else None)
        elif what in ("evaluate", "finetune", "fisher"):
            options = {"model": "support.networks:make_network", "data": rows}
            if what != "evaluate":
                options["output_dir"] = f"out-{number}"
            if what == "finetune":
                options |= {"max_steps": 1, "ewc_lambda": 1.0}
            getattr(consolidate, what)(name, **options)
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
end = time.monotonic() + 100
for thread in threads:
    thread.join(max(0, end - time.monotonic()))
print(json.dumps([told[number] for number in range(len(cases))]), flush=True)
os._exit(0)
"""


def make_checkpoint(folder: Path) -> Path:
    """Write a checkpoint with its Fisher, and the data of its task beside it."""
    folder.mkdir(parents=True)
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


def outcomes(folder: Path, checkpoint: Path) -> list[Record]:
    """Run every case; gives the exit code, the message, and what was changed that must not be."""
    rows = folder / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text('{"text": "a", "label": 0}\n')
    (folder / "nothing").mkdir()
    before = contents(checkpoint)
    with loopback_hub.running() as hub:
        cases = []
        for number, (what, where, failure, *_) in enumerate(CASES):
            name = f"user/case-{number}"
            source = {"data": rows, "push": folder / "nothing"}.get(what.split()[0], checkpoint)
            kind = "datasets/" if what == "data" else ""
            there = hub.put(f"{kind}{name}", source, private=what.startswith("push"))
            where = where.replace("{name}", name)
            if "place" in failure:
                path = where.partition("/.*/")[2].rstrip("$")
                content = bytearray(there.files[path])
                content[failure["place"]] ^= 1
                there.files[path] = bytes(content)
            else:
                given = {key: v.replace("{name}", name) if key == "Location" else v
                         for key, v in failure.items()}  # fmt: skip
                hub.fail(where, **{"times": ALWAYS, **given})
            if where == "^PUT /hangs/":  # no other case may send this file before
                hub.fail(f"^POST /{name}.git/info/lfs/objects/batch", **batch(hub, checkpoint))
            cases.append([what, name, str(checkpoint), str(checkpoint.parent / "old.npz")])
        (folder / "cases.json").write_text(json.dumps(cases))
        there = {name: dict(repository.branches) for name, repository in hub.repositories.items()}
        variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, LIMIT: "0.5"}
        variables["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"
        code, out, err = run_python(folder, "-c", MANY, folder / "cases.json", **variables)
        after = {name: dict(repository.branches) for name, repository in hub.repositories.items()}
    if code or TOKEN in out + err:
        raise RuntimeError(f"exit code {code}: {err}")
    found = []
    for number, (message, left) in enumerate(json.loads(out.splitlines()[-1])):
        what, where, failure, expected, words = CASES[number]
        name = f"{'datasets/' if what == 'data' else ''}user/case-{number}"
        changed = []
        if after[name] != there[name] and "/tag/" not in where:  # the tag follows the commit
            changed.append("the repository")
        if list(folder.glob(f"*out-{number}")) + list(folder.glob(f".out-{number}.*")):
            changed.append("the output")
        if contents(checkpoint) != before:
            changed.append("the checkpoint")
        named = f"user/case-{number}" in message or f"user--case-{number}/" in message
        right = left == expected and words in message and named
        told = " ".join(f"{key}={value!r:.60}" for key, value in failure.items())
        route = where.replace("{name}", "REPO")
        found.append(
            {"command": what, "route": route, "answer": told, "expected": expected, "exit": left,
             "message": message, "right": right, "changed": changed}
        )  # fmt: skip
    return found


def attack(path: Path) -> list[Record]:
    """Run every case, and write the records again."""
    path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="hub-") as temporary:
        checkpoint = make_checkpoint(Path(temporary, "made", "checkpoint"))
        Path(temporary, "work").mkdir()
        found = outcomes(Path(temporary, "work"), checkpoint)
    for record in found:
        record["message"] = record["message"].replace(f"{temporary}/", "")
        add_record(path, record)
    return found


def main() -> int:
    """Run every case, and print those that are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    found = attack(parser.parse_args().records)
    wrong = [record for record in found if not record["right"] or record["changed"]]
    for record in wrong:
        print(json.dumps(record, indent=1), file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
