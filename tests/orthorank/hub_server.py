"""A small Hub on this machine, which speaks what `huggingface_hub` asks of the real one to fetch and to push files."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest


@dataclass
class Repo:
    """Commits (files by name) and what points at them; ``gated``: nobody may read it; ``private``: with a token."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str = "main", message: str = "") -> str:
        """``files`` on top of what is at ``ref``; returns the commit."""
        whole = self.commits.get(self.refs.get(ref, ""), {}) | files
        oid = hashlib.sha1(f"{sorted(whole.items())}".encode()).hexdigest()
        self.commits[oid], self.refs[ref] = whole, oid
        self.messages.append(message)
        return oid


@dataclass
class Hub:
    """What the server has, and what it was asked: method, path and (of GET) bytes that it gave."""

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    endpoint: str = ""
    fails: int | None = None  # a status that every answer has
    tells_size: bool = True

    def given(self) -> list[str]:
        """The paths of what was downloaded."""
        return [path for method, path, size in self.asked if method == "GET" and size]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if self.hub.tells_size or self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.hub.asked.append((self.command, self.path, len(body) if status == 200 else 0))

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        self._file()

    def _file(self) -> None:
        """/ORG/NAME/resolve/REVISION/FILE, or /api/models/ORG/NAME/tree/REVISION/FOLDER, of which there is none."""
        parts = self.path.strip("/").split("/")
        if self.hub.fails is not None:
            return self._answer(self.hub.fails)
        if parts[:2] == ["api", "models"]:
            return self._answer(404, X_Error_Code="EntryNotFound")
        repo = self.hub.repos.get("/".join(parts[:2]))
        if repo is None or (repo.private and self.headers.get("authorization") is None):
            return self._answer(401, X_Error_Code="RepoNotFound")
        if repo.gated:
            return self._answer(403, X_Error_Code="GatedRepo")
        revision = unquote(parts[3])
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            return self._answer(404, X_Error_Code="RevisionNotFound")
        name = "/".join(parts[4:])
        if name not in repo.commits[oid]:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        body = repo.commits[oid][name]
        return self._answer(200, body, X_Repo_Commit=oid, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if self.headers.get("authorization") != "Bearer hf_writes":
            return self._answer(401)
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            url = json.dumps({"url": f"{self.hub.endpoint}/{name}"}).encode()
            if name in self.hub.repos:
                return self._answer(409, url)
            self.hub.repos[name] = Repo(
                {"0" * 40: {}},
                {"main": "0" * 40},
                private=asked.get("visibility") == "private" or bool(asked.get("private")),
            )
            return self._answer(200, url)
        repo, what, ref = self.hub.repos["/".join(parts[2:4])], parts[4], unquote(parts[5])
        if what == "branch":
            repo.refs.setdefault(ref, repo.refs["main"])
            return self._answer(200)
        if what == "preupload":
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in _files(body)]
            return self._answer(200, json.dumps({"files": files}).encode())
        lines: list[Any] = [json.loads(line) for line in body.splitlines()]
        added = {line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"}
        oid = repo.commit(
            {name: base64.b64decode(value["content"]) for name, value in added.items()},
            ref,
            lines[0]["value"]["summary"],
        )
        url = f"{self.hub.endpoint}/{'/'.join(parts[2:4])}/commit/{oid}"
        return self._answer(200, json.dumps({"commitUrl": url, "commitOid": oid}).encode())

    def log_message(self, *args: Any) -> None:
        """Nothing on the terminal."""


def _files(body: bytes) -> list[dict[str, Any]]:
    return list(json.loads(body)["files"])


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers at its ``endpoint``, until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def look_at(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: str, offline: bool = False) -> None:
    """For this process: what HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE set for a new one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
