"""A hub on this machine that takes uploads: repositories with branches and commits, and a store of large files.

It speaks what the client of the hub speaks: create, branch, preupload, the batch interface of Git LFS with its uploads,
and commits as lines of JSON. A token is required for everything that changes something.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from helpers.fake_hub import FakeHub

TOKEN = "hf_secret_of_a_test"
Answer = tuple[int, dict[str, str], bytes]
# The hub's own rule is 10 MB; this one lets tiny models have large files.
LARGE = 4096


@dataclass
class Repository:
    """Files by commit, and the last commit of each branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        number = f"{branch} {message} {len(self.commits)} {sorted(files)}"
        name = hashlib.sha1(number.encode()).hexdigest()
        self.commits[name], self.branches[branch], self.messages[name] = files, name, message
        return name

    def head(self, revision: str = "main") -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.head(revision) or ""]


class WritableHub(FakeHub):
    """Several repositories.

    Attributes:
        repositories: by hub id.
        objects: the store of large files, by SHA-256.
        uploads: SHA-256 of each large file that was sent, in order.
        storing: called with the SHA-256 of a large file before it is stored; it may raise ConnectionError to drop it.
        token: what may write.
    """

    def __init__(self) -> None:
        super().__init__("", {})
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.storing: Callable[[str], None] = lambda digest: None
        self.token = TOKEN

    def response(self, path: str) -> Answer:
        if special := self.answer(path):
            return special
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        found = self.repositories.get("/".join(parts[2:4] if api else parts[:2]))
        if found is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if api:
            kind = parts[4] if len(parts) > 4 else "revision"
            revision = "/".join(parts[5:]) or "main"
            head = found.head(revision)
            if head is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            name = "/".join(parts[2:4])
            return _json(_tree(found.commits[head]) if kind == "tree" else _info(name, found, head))
        revision, file = parts[3], "/".join(parts[4:])
        head = found.head(revision)
        if head is None or file not in found.commits[head]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = found.commits[head][file]
        return 200, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": head}, data

    def received(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        if special := self.answer(path):
            return special
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[0] == "store":
            return self._store(parts[1], body)
        if {name.lower(): value for name, value in headers.items()}.get("authorization") != f"Bearer {self.token}":
            return 401, {}, b"{}"
        values = json.loads(body) if body and parts[-2:] != ["objects", "batch"] and "commit" not in parts else {}
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(values)
        if parts[:2] == ["api", "validate-yaml"]:
            return _json({"errors": [], "warnings": []})
        if parts[-1] == "batch":
            return self._batch(json.loads(body))
        owner = "/".join(parts[2:4])
        repository = self.repositories[owner]
        action, revision = parts[4], "/".join(parts[5:])
        if action == "branch":
            if revision in repository.branches:
                return 409, {}, b"{}"
            repository.branches[revision] = repository.branches["main"]
            return _json({})
        if action == "preupload":
            return _json({"files": [_mode(repository.files(revision), file) for file in values["files"]]})
        return self._commit(owner, revision, body)

    def _create(self, values: dict[str, Any]) -> Answer:
        name = "/".join(filter(None, (values.get("organization"), values["name"])))
        if name in self.repositories:
            return 409, {}, _encoded({"error": "You already created it", "url": f"{self.endpoint}/{name}"})
        made = self.repositories[name] = Repository(values.get("visibility") == "private")
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs"}, "initial commit")
        return _json({"url": f"{self.endpoint}/{name}", "name": name, "id": name})

    def _batch(self, values: dict[str, Any]) -> Answer:
        objects: list[dict[str, Any]] = []
        for wanted in values["objects"]:
            upload = {"upload": {"href": f"{self.endpoint}/store/{wanted['oid']}"}}
            there = wanted["oid"] in self.objects
            objects.append({**wanted, **({} if there else {"actions": upload})})
        return _json({"transfer": "basic", "objects": objects})

    def _store(self, digest: str, body: bytes) -> Answer:
        self.storing(digest)
        assert hashlib.sha256(body).hexdigest() == digest
        self.uploads.append(digest)
        self.objects[digest] = body
        return 200, {}, b""

    def _commit(self, owner: str, revision: str, body: bytes) -> Answer:
        repository = self.repositories[owner]
        files, message = dict(repository.files(revision)), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                del files[value["path"]]
        name = repository.commit(revision, files, message)
        return _json({"success": True, "commitOid": name, "commitUrl": f"{self.endpoint}/{owner}/commit/{name}"})


def _is_large(size: int) -> bool:
    return size >= LARGE


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _is_large(len(data)) else _git_oid(data)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _mode(files: dict[str, bytes], file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if _is_large(file["size"]) else "regular"
    present = files.get(file["path"])
    oid = None if present is None else _oid(present)
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    listed = []
    for path, data in files.items():
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
        if _is_large(len(data)):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        listed.append(entry)
    return listed


def _info(name: str, repository: Repository, head: str) -> dict[str, Any]:
    siblings = [{"rfilename": path} for path in repository.commits[head]]
    return {"id": name, "modelId": name, "sha": head, "private": repository.private, "siblings": siblings}


def _json(values: object) -> Answer:
    return 200, {"Content-Type": "application/json"}, _encoded(values)


def _encoded(values: object) -> bytes:
    return json.dumps(values).encode()
