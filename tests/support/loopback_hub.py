"""A small Hub on the loopback address: the routes that reading and pushing repositories take.

Files are whole in memory, commits are listings, and what was uploaded is kept by its digest whether
or not it was ever committed, as on the Hub. `Hub.fail` makes requests of a kind fail, lie or hang.
"""

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import in_process
from support.json_schema import check_json

COMMIT = "a" * 40
LARGE = re.compile(r".*\.(safetensors|bin|pt|npz)")
TOKEN = "hf_loopback"
CUT, HANG = 0, -1
"""In place of a status: the connection is cut, or no answer comes as long as the Hub runs."""
ALWAYS = 0
"""As often as is asked."""


@dataclass
class Repository:
    """Commits are listings of files; branches and tags name commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {COMMIT: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False
    messages: dict[str, str] = field(default_factory=dict)  # of pushed commits

    def commit_at(self, revision: str) -> str | None:
        revision = urllib.parse.unquote(revision)
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


@dataclass
class Failure:
    """What happens to the next requests whose method and path match."""

    where: str
    status: int = CUT
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    message: str = ""
    body: bytes = b""


@dataclass
class Hub:
    """The state of the server.

    Attributes:
        address: Its endpoint.
        repositories: By name; data sets as ``datasets/NAME``.
        objects: Files in LFS by their SHA-256.
        requests: What was asked for, as ``METHOD /path``; ranges stand behind the path.
        sent: Bytes of the files that were answered or received, by path or digest.
        slow: Seconds between two pieces of a body.
        meanwhile: What happens, once, just before a request that matches is answered.
        ended: Set when the Hub stops, which ends what hangs.
        card_errors: What it says of every card's metadata.
    """

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    slow: float = 0.0
    meanwhile: dict[str, Callable[[], object]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)
    card_errors: Sequence[str] = ()

    def fail(
        self,
        where: str,
        status: int = CUT,
        times: int = 1,
        message: str = "",
        body: bytes = b"",
        **headers: str,
    ) -> None:
        """Let requests whose ``METHOD /path`` matches fail, or be answered by `body`.

        With a ``Content_Length`` in `headers` larger than `body` the answer ends early.
        """
        self.failures.append(Failure(where, status, headers, times, message, body))

    def asked(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def put(self, name: str, folder: Path, commit: str = COMMIT, **options: Any) -> Repository:
        """Make a repository of a folder."""
        files = {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
        self.repositories[name] = Repository({commit: files}, {"main": commit}, **options)
        return self.repositories[name]


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def reply(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), Content_Type="application/json")

    def read_json(self) -> Any:
        return json.loads(self.body())

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def handle_one(self) -> None:
        parsed = urllib.parse.urlparse(self.path)
        query = urllib.parse.parse_qs(parsed.query)
        request = f"{self.command} {parsed.path}"
        with self.hub.lock:
            self.hub.requests.append(f"{request} {self.headers.get('Range', '')}".strip())
            for where in [where for where in self.hub.meanwhile if re.search(where, request)]:
                self.hub.meanwhile.pop(where)()
            failure = next((f for f in self.hub.failures if re.search(f.where, request)), None)
            if failure is not None:
                failure.times -= 1
                if failure.times == 0:
                    self.hub.failures.remove(failure)
        if failure is not None and failure.status == HANG:
            self.body()
            self.hub.ended.wait()
            self.close_connection = True
            return
        if failure is not None and failure.status == CUT:
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            self.connection.close()
            self.close_connection = True
            return
        if failure is not None:
            self.body()
            said = {"X_Error_Message": failure.message} if failure.message else {}
            self.reply(failure.status, failure.body, **said, **failure.headers)
            self.close_connection |= "Content_Length" in failure.headers
            return
        if "Authorization" in self.headers and not self.is_known():  # even for what is public
            self.body()
            self.reply(401, X_Error_Message="Invalid credentials in Authorization header")
            return
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, parsed.path)
            if method in (self.command, "GET" if self.command == "HEAD" else None) and found:
                answer(self, query, **found.groupdict())
                return
        self.reply(404, X_Error_Code="RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815, the names http.server calls

    def log_message(self, *args: object) -> None:
        pass

    def repository(self, name: str, kind: str = "models") -> Repository | None:
        found = self.hub.repositories.get(name if kind == "models" else f"{kind}/{name}")
        if found is None or (found.private and not self.is_known()):
            self.reply(404 if self.is_known() else 401, X_Error_Code="RepoNotFound")
            return None
        return found

    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def at(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.repository(name, kind)
        if repository is None:
            return None
        commit = repository.commit_at(revision)
        if commit is None:
            self.reply(404, X_Error_Code="RevisionNotFound")
            return None
        return repository, commit

    def info(self, query: Any, kind: str, name: str, revision: str = "main") -> None:
        if found := self.at(kind, name, revision):
            repository, commit = found
            sized = "blobs" in query
            siblings = [
                {"rfilename": path} | ({"size": len(content)} if sized else {})
                for path, content in repository.commits[commit].items()
            ]
            answer = {"id": name, "sha": commit, "private": repository.private}
            if (config := repository.commits[commit].get("config.json")) is not None:
                with suppress(ValueError):
                    answer["config"] = json.loads(config)
            self.reply_json({**answer, "siblings": siblings})

    def tree(self, query: Any, kind: str, name: str, revision: str, path: str = "") -> None:
        if not (found := self.at(kind, name, revision)):
            return
        files = found[0].commits[found[1]]
        prefix = f"{path}/" if path else ""
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        entries = []
        for file, content in files.items():
            if not file.startswith(prefix):
                continue
            rest = file.removeprefix(prefix)
            if "/" in rest and not recursive:
                folder = prefix + rest.split("/")[0]
                entry = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            else:
                entry = {"type": "file", "path": file, "oid": git_digest(content)}
                entry["size"] = len(content)  # type: ignore[assignment]
                if LARGE.fullmatch(file):
                    oid = hashlib.sha256(content).hexdigest()
                    lfs: Any = {"oid": oid, "size": len(content), "pointerSize": 130}
                    entry["lfs"] = lfs
            if entry not in entries:
                entries.append(entry)
        self.reply_json(entries)

    def resolve(self, query: Any, kind: str | None, name: str, revision: str, path: str) -> None:
        found = self.at((kind or "models/").rstrip("/"), name, revision)
        if not found:
            return
        files = found[0].commits[found[1]]
        path = urllib.parse.unquote(path)
        if path not in files:
            self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=found[1])
            return
        content = files[path]
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        named = {"X_Repo_Commit": found[1], "ETag": tag, "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        code = 200
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            named["Content_Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
            content, code = content[start : end + 1], 206
        if self.command == "GET":
            with self.hub.lock:
                self.hub.sent[path] += len(content)
        if self.hub.slow and self.command == "GET":
            self.trickle(code, content, named)
        else:
            self.reply(code, content, **named)

    def trickle(self, code: int, content: bytes, named: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in named.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for start in range(0, len(content), 200):
            self.wfile.write(content[start : start + 200])
            self.pause()

    def pause(self) -> None:
        """Be slow, unless that has ended meanwhile."""
        end = time.monotonic() + self.hub.slow
        while self.hub.slow and time.monotonic() < end:
            time.sleep(0.02)

    def whoami(self, query: Any) -> None:
        if self.is_known():
            self.reply_json({"name": "user", "type": "user", "orgs": [], "auth": {}})
        else:
            self.reply(401, X_Error_Message="Invalid credentials in Authorization header")

    def create(self, query: Any) -> None:
        asked = self.read_json()
        if not self.is_known():
            self.reply(401, X_Error_Message="Invalid credentials in Authorization header")
            return
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.hub.repositories:
            self.reply(409, json.dumps({"url": f"{self.hub.address}/{name}"}).encode())
            return
        hidden = asked.get("private", False) or asked.get("visibility") == "private"
        first = {COMMIT: {".gitattributes": b"*.safetensors filter=lfs\n"}}
        self.hub.repositories[name] = Repository(first, private=hidden)
        self.reply_json({"url": f"{self.hub.address}/{name}", "name": name, "id": name})

    def validate(self, query: Any) -> None:
        self.body()
        errors = [{"message": message} for message in self.hub.card_errors]
        self.reply_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def may_write(self, name: str) -> Repository | None:
        if not self.is_known():
            self.body()
            self.reply(401, X_Error_Message="Invalid credentials in Authorization header")
            return None
        return self.repository(name)

    def preupload(self, query: Any, name: str, revision: str) -> None:
        repository = self.may_write(name)
        if repository is None:
            return
        commit = repository.commit_at(revision)
        asked = self.read_json()["files"]
        if commit is None:
            self.reply(404, X_Error_Code="RevisionNotFound")
            return
        there = repository.commits[commit]
        self.reply_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if LARGE.fullmatch(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": git_digest(there[file["path"]]) if file["path"] in there else None,
                    }
                    for file in asked
                ]
            }
        )

    def batch(self, query: Any, name: str) -> None:
        if self.may_write(name) is None:
            return
        objects = []
        for asked in self.read_json()["objects"]:
            answer: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.address}/lfs/{asked['oid']}"},
                    "verify": {"href": f"{self.hub.address}/lfs/{asked['oid']}/verify"},
                }
            objects.append(answer)
        self.reply_json({"transfer": "basic", "objects": objects})

    def upload(self, query: Any, oid: str) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if self.hub.slow and size:
            pieces = []
            for start in range(0, size, 200):
                pieces.append(self.rfile.read(min(200, size - start)))
                self.pause()
            content = b"".join(pieces)
        else:
            content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            self.reply(400)
            return
        with self.hub.lock:
            self.hub.objects[oid] = content
            self.hub.sent[oid] += len(content)
        self.reply(200)

    def uploaded(self, query: Any, oid: str) -> None:
        self.body()
        self.reply(200 if oid in self.hub.objects else 404)

    def commit(self, query: Any, name: str, revision: str) -> None:
        repository = self.may_write(name)
        if repository is None:
            return
        lines = [json.loads(line) for line in self.body().splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        revision = urllib.parse.unquote(revision)
        with self.hub.lock:
            head = repository.branches.get(revision)
            if head is None:
                self.reply(404, X_Error_Code="RevisionNotFound")
                return
            if header.get("parentCommit") not in (None, head):
                self.reply(412, X_Error_Message="A commit has happened since. Please refresh.")
                return
            files = dict(repository.commits[head])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            oid = hashlib.sha1(repr((head, sorted(files.items()))).encode()).hexdigest()
            repository.commits[oid] = files
            repository.messages[oid] = header["summary"]
            answer = {"commitUrl": f"{self.hub.address}/{name}/commit/{oid}", "commitOid": oid}
            if "create_pr" in query:
                number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
                repository.branches[f"refs/pr/{number}"] = oid
                answer["pullRequestUrl"] = f"{self.hub.address}/{name}/discussions/{number}"
            else:
                repository.branches[revision] = oid
        self.reply_json(answer)

    def refs(self, query: Any, kind: str, name: str) -> None:
        if repository := self.repository(name, kind):
            self.reply_json(
                {
                    what: [
                        {"name": ref, "ref": f"refs/{what}/{ref}", "targetCommit": commit}
                        for ref, commit in named.items()
                        if not ref.startswith("refs/")
                    ]
                    for what, named in (
                        ("branches", repository.branches),
                        ("tags", repository.tags),
                    )
                }
                | {"converts": []}
            )

    def tag(self, query: Any, name: str, revision: str) -> None:
        repository = self.may_write(name)
        if repository is None:
            return
        tag, commit = self.read_json()["tag"], repository.commit_at(revision)
        if commit is None:
            self.reply(404, X_Error_Code="RevisionNotFound")
        elif tag in repository.tags:
            self.reply(409)
        else:
            repository.tags[tag] = commit
            self.reply_json({})

    def branch(self, query: Any, name: str, revision: str) -> None:
        repository = self.may_write(name)
        if repository is None:
            return
        start = self.read_json().get("startingPoint") or "main"
        repository.branches[urllib.parse.unquote(revision)] = repository.commit_at(start) or COMMIT
        self.reply_json({})


_API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_MODEL = r"/api/models/(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("GET", _API, Handler.info),
    ("GET", rf"{_API}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", Handler.tree),
    ("GET", rf"{_API}/refs", Handler.refs),
    (
        "GET",
        r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        Handler.resolve,
    ),
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"{_MODEL}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.upload),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", Handler.uploaded),
    ("POST", rf"{_MODEL}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", rf"{_MODEL}/tag/(?P<revision>[^/]+)", Handler.tag),
    ("POST", rf"{_MODEL}/branch/(?P<revision>[^/]+)", Handler.branch),
]


def run(folder: Path, *arguments: object, **variables: str) -> tuple[int, str, str]:
    """Run the command line against this Hub, or another that the variables name.

    What `--json` writes is held against its schema.
    """
    code, out, err = in_process.consolidate(
        folder, *arguments, variables=environment(folder, **variables)
    )
    if "--json" in arguments and out:
        check_json(str(arguments[0]), json.loads(out))
    return code, out, err


def run_python(folder: Path, *arguments: object, **variables: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """That of a stranger's machine: an empty cache, no login, our tests to import from."""
    tests = Path(__file__).resolve().parent.parent
    paths = os.pathsep.join(map(str, (tests, tests.parent)))
    own = {"HF_HOME": str(folder / "cache"), "PYTHONPATH": paths}
    return {**os.environ, "HF_HUB_DISABLE_XET": "1", **own, **variables}


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # tests connect in 60 threads at once; the default is 5

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that a client or a test cut."""


@contextmanager
def running(port: int = 0) -> Iterator[Hub]:
    """Run an empty Hub; port 0 is any that is free."""
    hub = Hub()
    server = _Server(("127.0.0.1", port), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving(kind: str, root: Path) -> Iterator[str]:
    """Serve a folder as the repository user/name and yield the endpoint."""
    with running() as hub:
        hub.put("user/name" if kind == "models" else f"{kind}/user/name", root)
        yield hub.address
