"""A Hugging Face hub on this machine, which holds one model to download, and takes uploads.

It has what of the hub's HTTP interface a download and an upload need.
"""

from __future__ import annotations

import base64
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
#: Whose the token is, as the hub tells it.
ACCOUNT = {
    "name": "me",
    "orgs": [{"name": "org", "roleInOrg": "write"}, {"name": "library", "roleInOrg": "read"}],
    "auth": {"accessToken": {"role": "write"}},
}
TOKEN = "hf_of_me"


class Hub(ThreadingHTTPServer):
    """Serves a folder as `org/model`. `sent` has the names of files that were asked for whole, in order, and
    `peeked_at` those of which a range was. While it is `closed`, it refuses all.

    Of uploads, `repositories` has the files of each by name, `private` which of them are, `commits` what each commit
    brought or, with a minus, took, and `objects` large files by their sha256. While it is `full`, it takes none of
    these.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.sent: list[str] = []
        self.peeked_at: list[str] = []
        self.closed = False
        self.account = ACCOUNT
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[list[str]] = []
        self.objects: dict[str, bytes] = {}
        self.full = False
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
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", TOKEN)


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
        elif path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self.answer(200 if known else 401, json.dumps(self.server.account if known else {}).encode())
        elif (found := re.fullmatch("/api/models/(.+)/tree/main", path)) and found[1] != REPOSITORY:
            self.list_uploaded(found[1])
        elif (found := re.fullmatch("/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)) and found[1] != REPOSITORY:
            content = self.server.repositories.get(found[1], {}).get(found[2])
            etag = {"ETag": '"0"', "X-Repo-Commit": "0" * 40}
            self.answer(404 if content is None else 200, content or b"", etag)
        elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self.answer(200, json.dumps({"id": REPOSITORY, "sha": self.server.commit, "siblings": []}).encode())
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            files = [describe(self.server.folder, file) for file in files_of(self.server.folder)]
            self.answer(200, json.dumps(files).encode())
        elif found := re.fullmatch(f"/{REPOSITORY}/resolve/[^/]+/(.+)", path):
            self.send_file(self.server.folder / found[1])
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if self.server.closed or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(403, b"")
        elif path == "/api/validate-yaml":  # of a model card
            self.tell({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(content))
        elif re.fullmatch("/api/models/.+/preupload/main", path):
            files = [file["path"] for file in json.loads(content)["files"]]
            self.tell({"files": [{"path": name, "uploadMode": mode_of(name), "shouldIgnore": False} for name in files]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.tell({"transfer": "basic", "objects": [self.upload(each) for each in json.loads(content)["objects"]]})
        elif found := re.fullmatch("/api/models/(.+)/commit/main", path):
            self.commit(found[1], [json.loads(line) for line in content.splitlines()])
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.full:
            self.answer(507, b"")
        else:
            self.server.objects[self.path.rpartition("/")[2]] = content
            self.answer(200, b"")

    def create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or self.server.account['name']}/{asked['name']}"
        is_new = name not in self.server.repositories
        if is_new:
            self.server.repositories[name] = {}
            self.server.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.answer(200 if is_new else 409, json.dumps({"url": f"{self.server.url}/{name}"}).encode())

    def upload(self, large: dict) -> dict:
        """What of a large file is to be sent: nothing, where it is here."""
        if large["oid"] in self.server.objects:
            return large
        return large | {"actions": {"upload": {"href": f"{self.server.url}/large/{large['oid']}"}}}

    def commit(self, repository: str, lines: list[dict]) -> None:
        files, told = self.server.repositories[repository], []
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                continue
            told.append(("-" if key == "deletedFile" else "") + value["path"])
            if key == "deletedFile":
                files.pop(value["path"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        self.server.commits.append(told)
        self.tell({"commitUrl": f"{self.server.url}/{repository}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def list_uploaded(self, repository: str) -> None:
        if repository not in self.server.repositories:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        files = self.server.repositories[repository]
        self.tell([{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files])

    def tell(self, what: object) -> None:
        self.answer(200, json.dumps(what).encode())

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
        if self.command != "HEAD":
            self.wfile.write(content)


def mode_of(name: str) -> str:
    return "lfs" if name.endswith(".safetensors") else "regular"


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
