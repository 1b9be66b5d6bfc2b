"""A stand-in for the Hugging Face Hub: a threaded HTTP server that the real huggingface_hub client talks to.

It speaks what the client needs to look at, fill and read model and data set repositories: whoami, create, info, tree,
validate-yaml, pre-upload, LFS batch (one PUT, or parts when `part_size` is set) and verify, commit, and resolve with
HEAD, GET and Range. It has accounts by token, private and gated repositories, and faults to order. It does not speak
the xet protocol, knows no branches but `main`, and keeps everything in memory.

    with HubServer() as hub:
        hub.add_repo("tester/tiny", "model", {"config.json": b"{}"}, private=True)
        hub.fail("PUT /lfs/", reset_after=1000)
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token}
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_ABOVE_BYTES = 1 << 20
LFS_SUFFIXES = (".safetensors", ".bin", ".gz", ".parquet", ".model")
NAME = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
API = rf"/api/(?P<kind>models|datasets)/{NAME}"
FILES = rf"/(?:(?P<kind>models|datasets)/)?{NAME}"


def git_blob(content: bytes) -> str:
    """The id that git gives to a file: sha1 over `blob <size>\\0` and the content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (size > LFS_ABOVE_BYTES or path.endswith(LFS_SUFFIXES))


def remote_id(path: str, content: bytes) -> str:
    """What pre-upload and ETag compare: sha256 for a large file, git's sha1 for a small one."""
    return hashlib.sha256(content).hexdigest() if is_lfs(path, len(content)) else git_blob(content)


@dataclass
class Repo:
    """A repository: its commits as (sha, message, all files), newest last."""

    repo_id: str
    repo_type: str
    private: bool = False
    gated: bool = False
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{self.repo_id} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((sha, message, files))
        return sha


@dataclass
class Request:
    """One line of the log; `status` is 0 where the connection was reset."""

    method: str
    path: str
    token: str | None
    size: int
    status: int


@dataclass
class Fault:
    """What `fail` has ordered for requests whose `METHOD path` matches `pattern`."""

    pattern: re.Pattern[str]
    status: int
    times: int
    headers: dict[str, str]
    message: str
    reset_after: int | None


@dataclass
class Call:
    """A request on its way through a route; `match` holds the route's groups."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    user: str | None
    match: re.Match[str]

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """A refusal with the Hub's `X-Error-Code` and `X-Error-Message`."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        extra = {"X-Error-Code": code} if code else {}
        self.reply = Reply(status, json.dumps({"error": message}).encode(), {"X-Error-Message": message, **extra})


def answer(content: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


class HubServer:
    """A running stand-in: `endpoint`, `token` (of the user `tester`), `repos`, `requests`.

    Args:
        part_size: large files are sent in parts of this many bytes; None for one PUT each.
    """

    user = "tester"
    token = "hf_stand_in_token_of_tester"

    def __init__(self, part_size: int | None = None) -> None:
        self.part_size = part_size
        self.accounts = {self.token: self.user}
        self.granted: set[tuple[str, str]] = set()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def add_repo(
        self,
        repo_id: str,
        repo_type: str = "model",
        files: dict[str, bytes] | None = None,
        *,
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        """Put a repository there, as somebody had made it before; `files` maps paths to contents."""
        repo = Repo(repo_id, repo_type, private, gated)
        repo.commit("initial commit", dict(files or {}))
        self.repos[repo_type, repo_id] = repo
        return repo

    def fail(
        self,
        pattern: str,
        *,
        status: int = 500,
        times: int = 1,
        message: str = "ordered by the test",
        headers: dict[str, str] | None = None,
        reset_after: int | None = None,
    ) -> None:
        """Let the next `times` requests whose `METHOD path` matches `pattern` (a regular expression) fail.

        With `reset_after` the connection is reset after so many bytes of the request's body were read (PUT, POST), or
        just ends after so many of the answer's were sent (GET); otherwise the answer is `status` with `headers`.
        """
        self.faults.append(Fault(re.compile(pattern), status, times, headers or {}, message, reset_after))

    def seen(self, pattern: str) -> list[Request]:
        """The requests so far whose `METHOD path` matches `pattern`."""
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.pattern.search(f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return None

    def account(self, token: str | None) -> str | None:
        if token is None:
            return None
        if token not in self.accounts:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return self.accounts[token]

    def repo(self, call: Call, *, write: bool = False, content: bool = False) -> Repo:
        """The repository that a route names, or the Hub's refusal."""
        kind = (call.match.groupdict().get("kind") or "models").removesuffix("s")
        name = call.match["repo"]
        repo = self.repos.get((kind, name))
        owner = call.user is not None and name.startswith(f"{call.user}/")
        granted = owner or (call.user or "", name) in self.granted
        if repo is None or (repo.private and not granted):
            raise HubError(404 if call.user else 401, "RepoNotFound", "Repository not found")
        if write and not owner:
            raise HubError(403 if call.user else 401, None, "You do not have write access to this repository")
        if content and repo.gated and not granted:
            message = f"Access to {kind} {name} is restricted and you are not in the authorized list."
            raise HubError(403 if call.user else 401, "GatedRepo", message)
        return repo

    def snapshot(self, call: Call, repo: Repo) -> tuple[str, dict[str, bytes]]:
        """(sha, files) of the revision that a route names; `main` or a commit."""
        revision = unquote(call.match.groupdict().get("revision") or "main")
        for sha, _, files in reversed(repo.commits):
            if revision in ("main", sha):
                return sha, files
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # Routes. Each takes a `Call` and answers or raises HubError.

    def whoami(self, call: Call) -> Reply:
        if call.user is None:
            raise HubError(401, None, "Invalid username or password.")
        return answer({"type": "user", "name": call.user, "orgs": [], "auth": {"type": "access_token"}})

    def validate_yaml(self, call: Call) -> Reply:
        front = re.match(r"\s*---\n(.*?)\n---", call.json()["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError as error:
            return answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if isinstance(metadata, dict) else [{"message": "empty or missing yaml metadata"}]
        return answer({"errors": [], "warnings": warnings})

    def create(self, call: Call) -> Reply:
        wanted = call.json()
        owner = wanted.get("organization") or call.user
        repo_id, kind = f"{owner}/{wanted['name']}", wanted.get("type") or "model"
        if call.user is None:
            raise HubError(401, None, "Invalid username or password.")
        if owner != call.user:
            raise HubError(403, None, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        url = f"{self.endpoint}/{repo_id}"
        with self.lock:
            if (kind, repo_id) in self.repos:
                return answer({"error": f"You already created this {kind} repo", "url": url}, 409)
            self.add_repo(repo_id, kind, {".gitattributes": b""}, private=wanted.get("visibility") == "private")
        return answer({"url": url, "name": repo_id})

    def info(self, call: Call) -> Reply:
        repo = self.repo(call)
        sha, files = self.snapshot(call, repo)
        author = repo.repo_id.split("/")[0]
        siblings = [{"rfilename": path} for path in sorted(files)]
        head = {"id": repo.repo_id, "modelId": repo.repo_id, "author": author, "sha": sha, "disabled": False}
        gated = "manual" if repo.gated else False
        return answer({**head, "private": repo.private, "gated": gated, "tags": [], "siblings": siblings})

    def _entries(self, files: dict[str, bytes]) -> Iterator[dict[str, Any]]:
        for path, content in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
            if is_lfs(path, len(content)):
                entry["lfs"] = {"oid": remote_id(path, content), "size": len(content), "pointerSize": 134}
            yield entry

    def tree(self, call: Call) -> Reply:
        repo = self.repo(call, content=True)
        return answer(list(self._entries(self.snapshot(call, repo)[1])))

    def paths_info(self, call: Call) -> Reply:
        repo = self.repo(call, content=True)
        is_form = "json" not in call.headers.get("content-type", "")
        paths = parse_qs(call.body.decode())["paths"] if is_form else call.json()["paths"]
        entries = self._entries(self.snapshot(call, repo)[1])
        return answer([entry for entry in entries if entry["path"] in paths])

    def preupload(self, call: Call) -> Reply:
        _, files = self.snapshot(call, self.repo(call, write=True))
        return answer({"files": [self._upload_mode(entry, files) for entry in call.json()["files"]]})

    def _upload_mode(self, wanted: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        path = wanted["path"]
        oid = remote_id(path, files[path]) if path in files else None
        mode = "lfs" if is_lfs(path, wanted["size"]) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def lfs_batch(self, call: Call) -> Reply:
        repo = self.repo(call, write=True)
        verify = {"href": f"{self.endpoint}/{repo.repo_id}.git/info/lfs/objects/verify"}
        objects = []
        for wanted in call.json()["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                entry["actions"] = {"upload": self._upload_action(**entry), "verify": verify}
            objects.append(entry)
        return answer({"transfer": "multipart" if self.part_size else "basic", "objects": objects})

    def _upload_action(self, oid: str, size: int) -> dict[str, Any]:
        href = f"{self.endpoint}/lfs/{oid}"
        if self.part_size is None:
            return {"href": href}
        parts = range(1, -(-size // self.part_size) + 1)
        urls = {str(part): f"{href}/{part}" for part in parts}
        return {"href": f"{href}/complete", "header": {"chunk_size": str(self.part_size), **urls}}

    def lfs_put(self, call: Call) -> Reply:
        self._store(call.match["oid"], call.body)
        return Reply()

    def lfs_part(self, call: Call) -> Reply:
        self.parts[call.match["oid"], int(call.match["part"])] = call.body
        return Reply(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})

    def lfs_complete(self, call: Call) -> Reply:
        oid = call.match["oid"]
        self._store(oid, b"".join(self.parts.pop((oid, part["partNumber"])) for part in call.json()["parts"]))
        return answer({})

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, None, "the content does not have this sha256")
        self.objects[oid] = content

    def lfs_verify(self, call: Call) -> Reply:
        wanted = call.json()
        if len(self.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, None, "the object is not there, or has another size")
        return answer({})

    def commit(self, call: Call) -> Reply:
        repo = self.repo(call, write=True)
        lines = [json.loads(line) for line in call.body.splitlines()]
        header = lines[0]["value"]
        with self.lock:
            if header.get("parentCommit") not in (None, repo.sha):
                raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.files)
            for line in lines[1:]:
                self._apply(line["key"], line["value"], files)
            sha = repo.commit(header["summary"], files)
        url = f"{self.endpoint}/{repo.repo_id}/commit/{sha}"
        return answer({"success": True, "commitOid": sha, "commitUrl": url})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, bytes]) -> None:
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.objects:
                raise HubError(400, None, f"LFS pointer to an object that was never uploaded: {value['path']}")
            files[value["path"]] = self.objects[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise HubError(400, None, f"unknown operation {key}")

    def resolve(self, call: Call) -> Reply:
        repo = self.repo(call, content=True)
        sha, files = self.snapshot(call, repo)
        path = unquote(call.match["path"])
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path not in files:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return Reply(404, b"Entry not found", headers | message)
        content = files[path]
        etag = f'"{remote_id(path, content)}"'
        headers["ETag"] = etag
        if is_lfs(path, len(content)):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
        if span is None:
            return Reply(200, content, headers)
        first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Reply(206, content[first : last + 1], headers)

    ROUTES: tuple[tuple[str, str, Callable[[HubServer, Call], Reply]], ...] = (
        ("GET", r"/api/whoami-v2", whoami),
        ("POST", r"/api/validate-yaml", validate_yaml),
        ("POST", r"/api/repos/create", create),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)", tree),
        ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", paths_info),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", preupload),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", commit),
        ("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?", info),
        ("POST", rf"{FILES}\.git/info/lfs/objects/batch", lfs_batch),
        ("POST", rf"{FILES}\.git/info/lfs/objects/verify", lfs_verify),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", lfs_part),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", lfs_complete),
        ("GET", rf"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    )

    def handle(self, call_for: Callable[[re.Match[str]], Call], method: str, path: str) -> Reply:
        """The first route that fits; HEAD is answered as GET."""
        wanted = "GET" if method == "HEAD" else method
        try:
            for verb, pattern, route in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if verb == wanted and match:
                    return route(self, call_for(match))
            raise HubError(404, None, f"Sorry, no {method} {path} here")
        except HubError as refusal:
            return refusal.reply


class _Handler(BaseHTTPRequestHandler):
    """The HTTP of it: bodies with a length or in chunks, kept connections, the ordered faults, the log."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `hub.requests`, not stderr."""

    def _chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0 and (block := self.rfile.read(min(left, 1 << 16))):
            left -= len(block)
            yield block

    def _reset(self) -> None:
        """Close so that the other side sees `connection reset`, not an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True
        self.connection.close()

    def _read(self, limit: int | None) -> bytes | None:
        """The request's body, or None where `limit` bytes of it came and the rest is not wanted."""
        body = bytearray()
        for block in self._chunks():
            body += block
            if limit is not None and len(body) >= limit:
                return None
        return bytes(body)

    def _serve(self) -> None:
        url = urlsplit(self.path)
        bearer = self.headers.get("Authorization", "")
        token = bearer.removeprefix("Bearer ") if bearer.startswith("Bearer ") else None
        fault = self.hub.fault_for(self.command, url.path)
        sends_body = self.command in ("PUT", "POST")
        cut = fault.reset_after if fault else None
        body = self._read(cut if sends_body else None)
        request = Request(self.command, url.path, token, len(body or b""), 0)
        self.hub.requests.append(request)
        if body is None or (sends_body and cut is not None):
            return self._reset()
        if fault and cut is None:
            reply = HubError(fault.status, None, fault.message).reply
            reply.headers |= fault.headers
        else:
            reply = self._reply(url.path, url.query, token, body)
        request.status = 0 if cut is not None else reply.status
        self._send(reply, cut)

    def _reply(self, path: str, query: str, token: str | None, body: bytes) -> Reply:
        headers = {name.lower(): value for name, value in self.headers.items()}

        def call_for(match: re.Match[str]) -> Call:
            user = self.hub.account(token)
            return Call(self.command, path, parse_qs(query), headers, body, user, match)

        return self.hub.handle(call_for, self.command, path)

    def _send(self, reply: Reply, cut: int | None) -> None:
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[:cut])
        self.close_connection = self.close_connection or cut is not None

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - the names that http.server calls
