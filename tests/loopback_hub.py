"""A small Hub on the loopback address: the routes that reading one repository, user/name, takes."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    kind: str  # "datasets" or "models"
    root: Path  # the repository's files

    def reply(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = urllib.parse.urlparse(self.path).path
        api = f"/api/{self.kind}/user/name"
        files = "/datasets/user/name/resolve/" if self.kind == "datasets" else "/user/name/resolve/"
        names = [p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file()]
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in names]
            self.reply_json({"id": "user/name", "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"{api}/revision/"):
            self.reply(404, X_Error_Code="RevisionNotFound")
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            folder = self.root / path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
            recursive = "recursive=true" in self.path.lower()
            self.reply_json(
                [
                    {
                        "type": "directory" if p.is_dir() else "file",
                        "path": p.relative_to(self.root).as_posix(),
                        "oid": "0" * 40,
                        "size": p.stat().st_size,
                    }
                    for p in (folder.rglob("*") if recursive else folder.iterdir())
                ]
            )
        elif path.startswith(files):
            file = self.root / path.removeprefix(files).partition("/")[2]
            if not file.is_file():
                self.reply(404, X_Error_Code="EntryNotFound")
                return
            content = file.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.reply(200, content, X_Repo_Commit=COMMIT, ETag=tag)
        else:
            self.reply(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815, the name http.server calls

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(kind: str, root: Path) -> Iterator[str]:
    """Serve a repository and yield the endpoint."""
    handler = type("Handler", (Hub,), {"kind": kind, "root": root})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
