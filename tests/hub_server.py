"""A Hugging Face Hub on 127.0.0.1: the part of its HTTP API that pushing and pulling a model takes.

The real `huggingface_hub` talks to it, through `HF_ENDPOINT`. Repositories are in memory. Large files (`*.safetensors`)
go through git LFS, as on the Hub; Xet, its newer storage, is not spoken (`HF_HUB_DISABLE_XET=1`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard

LARGE_FILES = ".safetensors"


@dataclass(frozen=True)
class File:
    content: bytes
    is_large: bool

    @cached_property
    def oid(self) -> str:
        """SHA-256 of a large file; of others git's SHA-1."""
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    owner: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {})

    def commit(self, ref: str, files: dict[str, File]) -> str:
        tree = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}\n{tree}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class Refusal(Exception):
    """An answer that is an error; `code` is what the Hub's clients look at."""

    def __init__(self, status: int, code: str | None, message: str, **content: Any):
        self.status, self.code, self.message, self.content = status, code, message, content


class Hub(ThreadingHTTPServer):
    """The server.

    Args:
        users: names by access token.

    Attributes:
        repositories: by "owner/name".
        requests: "METHOD path" of all requests so far.
        failures: how many of the next commits to a repository fail, by "owner/name".
    """

    daemon_threads = True

    def __init__(self, users: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = users
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.failures: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub(users: dict[str, str]) -> Iterator[Hub]:
    with Hub(users) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass  # `Hub.requests` has it

    def answer(self) -> None:
        self.url = urlsplit(self.path)
        self.query = parse_qs(self.url.query)
        self.body = self.read_body()
        self.server.requests.append(f"{self.command} {unquote(self.url.path)}")
        try:
            for methods, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, self.url.path)
                if match and self.command in methods:
                    return handle(self, **{name: unquote(value) for name, value in match.groupdict().items()})
            raise Refusal(404, None, f"The test hub does not know {self.command} {self.path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send_json({"error": refusal.message, **refusal.content}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_content(body, status, {"Content-Type": "application/json", **(headers or {})})

    def send_content(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # -- who may do what -------------------------------------------------------------------------------------------

    def user(self) -> str | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.server.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return user

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        user = self.user()
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and user != repository.owner):
            # a stranger does not learn whether a private repository exists
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and user != repository.owner:
            raise Refusal(403 if user else 401, None, "You don't have the rights to write to this repository")
        return repository

    # -- answers ---------------------------------------------------------------------------------------------------

    def who_am_i(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        self.send_json({"type": "user", "name": user, "orgs": []})

    def create_repository(self) -> None:
        wish, user = json.loads(self.body), self.user()
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        owner = wish.get("organization") or user
        repo_id = f"{owner}/{wish['name']}"
        url = f"{self.server.url}/{repo_id}"
        if owner != user:
            raise Refusal(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
        if repo_id in self.server.repositories:
            raise Refusal(409, None, "You already created this model repo", url=url)
        self.server.repositories[repo_id] = Repository(owner, wish.get("visibility") == "private")
        self.send_json({"url": url, "name": repo_id})

    def validate_card(self) -> None:
        """Metadata that the library cannot parse, or without a licence's and a task's proper types, is refused."""
        try:
            data = ModelCard(json.loads(self.body)["content"]).data
        except ValueError as error:
            raise Refusal(400, None, str(error), errors=[{"message": str(error)}], warnings=[]) from error
        errors = [
            {"message": f'"{name}" must be a string'}
            for name in ("license", "library_name", "pipeline_tag")
            if not isinstance(data.get(name), (str, type(None)))
        ]
        if errors:
            raise Refusal(400, None, "Invalid metadata", errors=errors, warnings=[])
        self.send_json({"errors": [], "warnings": []})

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        repository = self.repository(repo_id)
        sha = repository.resolve(revision)
        files = sorted(repository.commits[sha])
        self.send_json(
            {
                "id": repo_id,
                "sha": sha,
                "private": repository.private,
                "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def tree(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id)
        entries = []
        for path, file in sorted(repository.commits[repository.resolve(revision)].items()):
            entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
            if file.is_large:
                entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 130}
            entries.append(entry)
        self.send_json(entries)

    def preupload(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write="create_pr" not in self.query)
        present = repository.commits[repository.resolve(revision)]
        answers = []
        for wish in json.loads(self.body)["files"]:
            path = wish["path"]
            mode = "lfs" if path.endswith(LARGE_FILES) else "regular"
            oid = present[path].oid if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send_json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        repository = self.repository(repo_id)
        objects = []
        for wish in json.loads(self.body)["objects"]:
            if wish["oid"] not in repository.large_files:
                wish["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{repo_id}/{wish['oid']}"}}
            objects.append(wish)
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, repo_id: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, None, "The content does not have this SHA-256")
        self.server.repositories[repo_id].large_files[oid] = self.body
        self.send_json({})

    def commit(self, repo_id: str, revision: str) -> None:
        wants_pr = "create_pr" in self.query
        repository = self.repository(repo_id, write=not wants_pr)
        if self.server.failures.get(repo_id, 0) > 0:
            self.server.failures[repo_id] -= 1
            raise Refusal(503, None, "Service unavailable")
        files = dict(repository.commits[repository.resolve(revision)])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_large=False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in repository.large_files:
                    raise Refusal(400, None, f"{value['path']} was not uploaded")
                files[value["path"]] = File(repository.large_files[value["oid"]], is_large=True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] != "header":
                raise Refusal(400, None, f"The test hub does not know the operation {item['key']}")
        ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repository.refs)}" if wants_pr else revision
        sha = repository.commit(ref, files)
        self.send_json(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}",
                "pullRequestUrl": f"{self.server.url}/{repo_id}/discussions/{ref.split('/')[-1]}" if wants_pr else None,
            }
        )

    def tag(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write=True)
        repository.refs[json.loads(self.body)["tag"]] = repository.resolve(revision)
        self.send_json({})

    def file(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(repo_id)
        sha = repository.resolve(revision)
        file = repository.commits[sha].get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.is_large:
            headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.send_content(file.content, 200, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(file.content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(file.content)}"
        return self.send_content(file.content[first : last + 1], 206, headers)


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"

ROUTES = [
    (("GET",), r"/api/whoami-v2", Handler.who_am_i),
    (("POST",), r"/api/repos/create", Handler.create_repository),
    (("POST",), r"/api/validate-yaml", Handler.validate_card),
    (("GET",), rf"/api/models/{_REPO}", Handler.model_info),
    (("GET",), rf"/api/models/{_REPO}/revision/{_REVISION}", Handler.model_info),
    (("GET",), rf"/api/models/{_REPO}/tree/{_REVISION}", Handler.tree),
    (("POST",), rf"/api/models/{_REPO}/preupload/{_REVISION}", Handler.preupload),
    (("POST",), rf"/api/models/{_REPO}/commit/{_REVISION}", Handler.commit),
    (("POST",), rf"/api/models/{_REPO}/tag/{_REVISION}", Handler.tag),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), rf"/lfs/{_REPO}/(?P<oid>[0-9a-f]+)", Handler.lfs_upload),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", Handler.file),
]
