"""A stand-in for the Hugging Face hub on this machine: what huggingface_hub asks of it for an upload."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "stand" * 7


@dataclass
class Repository:
    """One repository. files: name -> content."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the stand-in holds. asked: all requests. failing: the part of a path that answers 500."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    failing: str | None = None
    large: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """Return status and JSON of one request."""
        self.asked.append(f"{method} {path}")
        if self.failing is not None and self.failing in path:
            return 400, {"error": "the stand-in fails here"}
        if path.startswith("/upload/"):
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "forge", "orgs": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        return self._of_repository(method, path, body)

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        there = name in self.repositories
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.repositories.setdefault(name, Repository(private=bool(private)))
        return (409 if there else 200), {"url": f"{self.url}/{name}", "id": name}

    def _of_repository(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2]).removesuffix(".git")
        repository = self.repositories.get(name)
        if repository is None:
            return 404, {"error": "Repository not found"}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                if item["oid"] not in self.large:
                    item["actions"] = {"upload": {"href": f"{self.url}/upload/{item['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [_mode(file) for file in names]}
        if "/commit/" in path:
            return self._commit(name, repository, body)
        if method == "GET" and path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
            siblings = [{"rfilename": file} for file in repository.files]
            return 200, {
                "id": name,
                "private": repository.private,
                "siblings": siblings,
                "tags": [],
                "sha": "0",
            }
        return 404, {"error": "Entry not found"}

    def _commit(self, name: str, repository: Repository, body: bytes) -> tuple[int, Any]:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.commits.append(value["summary"])
            elif entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                repository.files[value["path"]] = content
        return 200, {"commitOid": "1" * 40, "commitUrl": f"{self.url}/{name}/commit/{'1' * 40}"}


def _mode(name: str) -> dict[str, Any]:
    mode = "lfs" if name.endswith((".safetensors", "tokenizer.json")) else "regular"
    return {"path": name, "uploadMode": mode, "shouldIgnore": False}


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """Serve a stand-in on a free port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self._chunks()
            path = self.path.partition("?")[0]
            status, data = hub.answer(self.command, path, body, self.headers.get("Authorization"))
            text = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status >= 400:
                self.send_header("X-Error-Message", str(data.get("error", "")))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        def _chunks(self) -> bytes:
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        do_GET = do_POST = do_PUT = do_HEAD = _serve

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
