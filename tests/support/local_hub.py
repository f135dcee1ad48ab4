"""A Hugging Face hub on this machine, which holds one model: what of the hub's HTTP interface a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api

REPOSITORY = "org/model"


class Hub(ThreadingHTTPServer):
    """Serves a folder as `org/model`. `sent` has the names of files that were asked for whole, in order, and
    `peeked_at` those of which a range was. While it is `closed`, it refuses all."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.sent: list[str] = []
        self.peeked_at: list[str] = []
        self.closed = False
        names = [path_in(folder, file) for file in files_of(folder)]
        self.commit = hashlib.sha1("\n".join(names).encode()).hexdigest()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def weights_sent(self) -> set[str]:
        return {name for name in self.sent if name.endswith(".safetensors")}


@contextmanager
def serving(folder: Path):
    hub = Hub(folder)
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def join(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Let the hub's client of this process ask that hub, and keep what it fetches in that cache."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(hf_api.api, "endpoint", hub.url)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.closed:
            self.answer(403, b"")
        elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self.answer(200, json.dumps({"id": REPOSITORY, "sha": self.server.commit, "siblings": []}).encode())
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            files = [describe(self.server.folder, file) for file in files_of(self.server.folder)]
            self.answer(200, json.dumps(files).encode())
        elif found := re.fullmatch(f"/{REPOSITORY}/resolve/[^/]+/(.+)", path):
            self.send_file(self.server.folder / found[1])
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, file: Path) -> None:
        if not file.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.server.commit})
            return
        content = file.read_bytes()
        headers = {"X-Repo-Commit": self.server.commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part:
            size, begin, end = len(content), int(part[1]), int(part[2] or len(content)) + 1
            content = content[begin:end]
            headers["Content-Range"] = f"bytes {begin}-{begin + len(content) - 1}/{size}"
        if self.command == "GET":
            (self.server.peeked_at if part else self.server.sent).append(file.name)
        self.answer(206 if part else 200, content, headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def path_in(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def describe(folder: Path, file: Path) -> dict:
    content = file.read_bytes()
    path, size, oid = path_in(folder, file), len(content), hashlib.sha1(content).hexdigest()
    entry = {"type": "file", "path": path, "size": size, "oid": oid}
    if file.suffix == ".safetensors":
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 100}
    return entry
