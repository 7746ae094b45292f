"""A hub on this machine, which speaks as much of the Hugging Face hub's protocol as downloading a model needs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_member"


@dataclasses.dataclass
class Repo:
    """A repository of the hub.

    Attributes:
      revisions: branch, tag or commit -> commit.
      commits: commit -> (path -> content).
      access: "public", "gated" (known to all, read by members) or "private" (unknown to others).
    """

    revisions: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    access: str = "public"

    def commit(self, files: dict[str, bytes], *revisions: str) -> str:
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name] = files
        self.revisions |= dict.fromkeys((name, *revisions), name)
        return name


def files_of(directory: Path) -> dict[str, bytes]:
    """path -> content."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


class Hub:
    """Repositories by name, and what was asked of the hub: "GET path" or "HEAD path".

    `cut` ends each answer of a file's content after so many bytes.
    """

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.cut: int | None = None

    def repo(self, name: str, files: dict[str, bytes], access: str = "public") -> Repo:
        self.repos[name] = Repo(access=access)
        self.repos[name].commit(files, "main")
        return self.repos[name]

    def downloads(self) -> set[str]:
        """Names of the files whose content was asked for."""
        gets = [r.removeprefix("GET ") for r in self.requests if r.startswith("GET ")]
        return {path.split("/", 5)[5] for path in gets if "/resolve/" in path}


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A running hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *_):
        pass

    def _answer(self):
        hub: Hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, name, what, revision, *rest = [*(parts[2:] if is_api else parts), *["", "main"]][:99]
        repo = hub.repos.get(f"{owner}/{name}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != TOKEN:
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        if repo is None or (repo.access == "private" and not token):
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.access == "gated" and not token and not (is_api and what == "revision"):
            return self._refuse(401, "GatedRepo", f"Access to model {owner}/{name} is restricted.")
        commit = repo.revisions.get(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if is_api and what == "tree":
            listed = [_entry(path, content) for path, content in sorted(files.items())]
            return self._send_json(listed)
        if is_api:
            siblings = [{"rfilename": path} for path in sorted(files)]
            return self._send_json({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings})
        content = files.get("/".join(r for r in rest if r not in ("", "main")))
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        return self._send_file(content, commit)

    def _send_json(self, values):
        content = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_file(self, content: bytes, commit: str):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            cut = self.server.hub.cut
            self.wfile.write(content[start : None if cut is None else start + cut])
            if cut is not None and len(content) - start > cut:
                self.close_connection = True

    def _refuse(self, status: int, code: str | None, message: str):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = hashlib.sha1(content).hexdigest()
    if path.endswith((".safetensors", ".bin")):
        entry["lfs"] = {
            "oid": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": 134,
        }
    return entry
