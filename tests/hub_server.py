"""A small Hugging Face Hub on this machine: what its client calls to publish a model and to load it again.

Repositories, commits and large files are kept in memory. It can lose the connection, or fail, in the middle.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png")  # what the Hub keeps outside git
PART = 100_000  # bytes per part; a larger file goes up in parts
WRITE, READ, FINE = "hf_write", "hf_read", "hf_fine"  # the tokens it knows, all of ann
ROLES = {WRITE: "write", READ: "read", FINE: "fineGrained"}
USER, ORGANISATION = "ann", "acme"


@dataclass
class Commit:
    """What one commit says, changes and leaves."""

    message: str
    added: set[str]
    deleted: set[str]
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.message, sorted(self.files.items()))).encode()).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(
        default_factory=lambda: [
            Commit("initial commit", {".gitattributes"}, set(), {".gitattributes": b"*.safetensors filter=lfs\n"})
        ]
    )

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files

    def last_change(self, path: str) -> dict[str, Any]:
        """Of a file: the last commit that gave it other content, each of which is a second after the one before."""
        contents = [commit.files.get(path) for commit in self.commits]
        last = max(i for i, content in enumerate(contents) if i == 0 or content != contents[i - 1])
        date = datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=last)
        commit = {"id": self.commits[last].sha, "title": "x", "date": date.strftime("%Y-%m-%dT%H:%M:%S.000Z")}
        return {"lastCommit": commit}


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` serves at `hub.url` until the end of the block.

    repositories: by "user/name". lost_after: how many uploads of large files (or parts) get through before the
    connection is lost, each time anew. commit_status: with what commits are answered instead of being made. on_upload:
    what happens, once, when files are announced.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.uploads: list[str] = []  # SHA-256 of the large files and parts that came through
        self.lost_after: int | None = None
        self.commit_status: int | None = None
        self.on_upload: Callable[[], object] | None = None
        self.lock = threading.Lock()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is not worth a traceback."""


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        self.body = self._read_body()
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        try:
            with self.server.lock:
                self._route(path)
        except _Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send(json.dumps({"error": refusal.message}).encode(), refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _role(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in ROLES:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return ROLES.get(token)

    def _repository(self, name: str) -> Repository:
        found = self.server.repositories.get(name)
        if found is None or (found.private and self._role() is None):
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return found

    def _may_write(self, owner: str) -> None:
        if self._role() not in ("write", "fineGrained") or owner not in (USER, ORGANISATION):
            raise _Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")

    def _route(self, path: list[str]) -> None:
        match [self.command, *path]:
            case ["GET", "api", "whoami-v2"]:
                self._whoami()
            case ["POST", "api", "repos", "create"]:
                self._create(json.loads(self.body))
            case ["POST", "api", "validate-yaml"]:
                self._validate(json.loads(self.body)["content"])
            case ["GET", "api", "models", owner, name]:
                self._info(f"{owner}/{name}")
            case ["GET", "api", "models", owner, name, "revision", _]:
                self._info(f"{owner}/{name}")
            case ["GET", "api", "models", owner, name, "tree", _]:
                repository = self._repository(f"{owner}/{name}")
                expand = "expand=true" in urlsplit(self.path).query.lower()
                files = repository.files.items()
                self._json([_entry(*file) | (repository.last_change(file[0]) if expand else {}) for file in files])
            case ["POST", "api", "models", owner, name, "preupload", _]:
                self._may_write(owner)
                self._preupload(self._repository(f"{owner}/{name}"), json.loads(self.body)["files"])
            case ["POST", owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self._may_write(owner)
                self._json({"objects": [self._where_to(wanted) for wanted in json.loads(self.body)["objects"]]})
            case ["PUT", "large", sha, *part]:
                self._upload(sha, part)
            case ["POST", "large", sha]:
                parts = self.server.parts.pop(sha)
                self._keep(sha, b"".join(parts[number] for number in sorted(parts)))
            case ["POST", "api", "models", owner, name, "commit", _]:
                self._may_write(owner)
                self._commit(f"{owner}/{name}")
            case ["GET" | "HEAD", owner, name, "resolve", _, *parts]:
                self._resolve(self._repository(f"{owner}/{name}"), "/".join(parts))
            case _:
                raise _Refusal(404, f"{self.command} {self.path} is not part of this Hub", "EntryNotFound")

    def _whoami(self) -> None:
        role = self._role()
        orgs = [] if role == "fineGrained" else [{"name": ORGANISATION, "roleInOrg": "write"}]
        self._json({"type": "user", "name": USER, "orgs": orgs, "auth": {"accessToken": {"role": role}}})

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked["organization"] or USER
        self._may_write(owner)
        name = f"{owner}/{asked['name']}"
        if name in self.server.repositories:
            return self._json({"url": f"{self.server.url}/{name}", "error": "You already created this model repo"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repositories[name] = Repository(private)
        self._json({"url": f"{self.server.url}/{name}"})

    def _validate(self, card: str) -> None:
        """The rules of the real Hub that llm_snp could break."""
        try:
            metadata = yaml.safe_load(card.split("---\n")[1])
            for model in metadata.get("model-index", ()):
                assert model["name"], "model-index needs a name"
                for result in model["results"]:
                    assert result["task"]["type"], "a result needs a task"
                    assert result["dataset"]["name"], "a result needs the name of a dataset"
                    assert result["dataset"]["type"], "a result needs a dataset"
                    assert all("value" in metric and metric["type"] for metric in result["metrics"])
        except (yaml.YAMLError, AssertionError, LookupError, AttributeError) as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        self._json({"errors": [], "warnings": []})

    def _info(self, name: str) -> None:
        repository = self._repository(name)
        files = [{"rfilename": file} for file in repository.files]
        sha = repository.commits[-1].sha
        self._json({"id": name, "sha": sha, "siblings": files, "private": repository.private, "tags": []})

    def _preupload(self, repository: Repository, files: list[dict[str, Any]]) -> None:
        answer = []
        for path in (file["path"] for file in files):
            there = _entry(path, repository.files[path])["oid"] if path in repository.files else None
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there})
        self._json({"files": answer})
        if self.server.on_upload is not None:
            happens, self.server.on_upload = self.server.on_upload, None
            happens()

    def _where_to(self, wanted: dict[str, Any]) -> dict[str, Any]:
        sha, size = wanted["oid"], wanted["size"]
        if sha in self.server.large:
            return wanted
        href = f"{self.server.url}/large/{sha}"
        upload: dict[str, Any] = {"href": href}
        if size > PART:
            parts = {str(i + 1): f"{href}/{i + 1}" for i in range(-(-size // PART))}
            upload["header"] = {"chunk_size": str(PART)} | parts
        return wanted | {"actions": {"upload": upload}}

    def _upload(self, sha: str, part: list[str]) -> None:
        if self.server.lost_after is not None and len(self.server.uploads) >= self.server.lost_after:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.server.uploads.append(sha)
        if part:
            self.server.parts.setdefault(sha, {})[int(part[0])] = self.body
            self._send(b"", headers={"ETag": f'"{part[0]}"'})
        else:
            self._keep(sha, self.body)

    def _keep(self, sha: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha:
            raise _Refusal(400, "the content is not what was announced")
        self.server.large[sha] = content
        self._send(b"")

    def _commit(self, name: str) -> None:
        repository = self._repository(name)
        if self.server.commit_status is not None:
            raise _Refusal(self.server.commit_status, "Internal Error - We're working hard to fix this")
        lines = [json.loads(line) for line in self.body.splitlines()]
        files, added, deleted, message = dict(repository.files), set(), set(), ""
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", repository.commits[-1].sha) != repository.commits[-1].sha:
                    raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "deletedFile":
                del files[value["path"]]
                deleted.add(value["path"])
            else:
                large = key == "lfsFile"
                files[value["path"]] = self.server.large[value["oid"]] if large else base64.b64decode(value["content"])
                added.add(value["path"])
        repository.commits.append(Commit(message, added, deleted, files))
        sha = repository.commits[-1].sha
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    def _resolve(self, repository: Repository, path: str) -> None:
        if path not in repository.files:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        content, sha = repository.files[path], repository.commits[-1].sha
        self._send(content, headers={"ETag": f'"{_entry(path, content)["oid"]}"', "X-Repo-Commit": sha})


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it: the hash of git's blob, or of the content of a large file."""
    size = len(content)
    if path.endswith(LARGE):
        sha = hashlib.sha256(content).hexdigest()
        return {
            "type": "file",
            "path": path,
            "size": size,
            "oid": sha,
            "lfs": {"oid": sha, "size": size, "pointerSize": 1},
        }
    return {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(b"blob %d\0" % size + content).hexdigest()}
