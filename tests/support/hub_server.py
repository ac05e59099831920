"""A small local Hugging Face Hub for downloads and uploads of models. Its repositories are folders, ROOT/OWNER/NAME.

In a test:      with running(tmp_path) as hub: ...      # hub.url, hub.requests, hub.faults
As a program:   python tests/support/hub_server.py ROOT PORT   # prints its URL, then a line per request; PORT 0 is a free one

Set HF_ENDPOINT to its URL. Downloads need no token; TOKENS are the logins. Uploads use LFS. Xet is not supported:
clients with hf_xet need HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote

# Token -> its role. "team" is an organization of the user "me".
TOKENS = {"hf_test": "write", "hf_read": "read", "hf_fine": "fineGrained"}
USER, ORGANIZATION = "me", "team"

LARGE = 10_000_000  # bytes above which a file is stored with LFS
LFS_SUFFIXES = (".onnx", ".safetensors", ".bin", ".h5", ".msgpack", ".ot", ".pt", ".zip")  # of files that always are
SIGNATURE = "X-Signature=5ec4e7"  # in the URL for the upload of a large file
PIECE = 1 << 18

HANGS = 600  # seconds after which a test gives up on a process or an answer

# The headers that a page of another origin may read, as on the real Hub.
EXPOSED = "X-Repo-Commit, X-Error-Code, X-Error-Message, ETag, Accept-Ranges, Content-Range, Content-Length, X-Linked-Size, X-Linked-ETag"
CROSS_ORIGIN = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": EXPOSED,
    "Cross-Origin-Resource-Policy": "cross-origin",
}

REPO = r"([A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)"
ROUTES = (
    ("GET", rf"/api/models/{REPO}(?:/revision/([^/]+))?", "info"),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)/?(.*)", "tree"),
    ("POST", rf"/api/models/{REPO}/paths-info/([^/]+)", "paths_info"),
    ("GET", rf"/{REPO}/resolve/([^/]+)/(.+)", "resolve"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{REPO}/preupload/main", "preupload"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", rf"/lfs/{REPO}/([0-9a-f]{{64}})/(\d+)", "lfs_put"),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", "lfs_verify"),
    ("POST", rf"/api/models/{REPO}/commit/main", "commit"),
)


@dataclass(frozen=True)
class Request:
    """A request and the status of its answer."""

    method: str
    path: str  # without its query
    status: int  # 0 where the connection was closed instead
    authorized: bool
    range: str


class ApiError(Exception):
    """An error to answer, with the Hub's error code."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class Hub(ThreadingHTTPServer):
    """The server. ``faults`` maps a part of "METHOD /path" to a status, or "close", for each such request.

    ``hub.faults["PUT /lfs/"] = iter([500])`` fails once, ``itertools.repeat(501)`` always.
    """

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0, *, verbose: bool = False):
        super().__init__(("127.0.0.1", port), Handler)
        self.root, self.verbose = Path(root), verbose
        self.requests: list[Request] = []
        self.faults: dict[str, Iterator[int | str]] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._objects = tempfile.TemporaryDirectory(prefix="hub-lfs-")

    def server_close(self) -> None:
        super().server_close()
        self._objects.cleanup()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect; report other errors, which are faults of this server."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def object(self, digest: str) -> Path:
        """Return the path of an uploaded large file."""
        return Path(self._objects.name, digest)

    def folder(self, repo: str) -> Path:
        """Return a repository's folder. Like the real Hub, it ignores the case of the name."""
        for folder in self.root.glob("*/*"):
            if folder.relative_to(self.root).as_posix().lower() == repo.lower():
                return folder
        raise ApiError(404, "Repository not found", "RepoNotFound")

    def files(self, repo: str) -> dict[str, Path]:
        """Return name -> path of a repository's files."""
        folder = self.folder(repo)
        found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return {name: path for name, path in found.items() if is_plain(name)}

    def head(self, repo: str) -> str:
        """Return the repository's commit, which differs after each change of a file."""
        files = ((name, path.stat()) for name, path in self.files(repo).items())
        listing = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in files)
        return hashlib.sha1(f"{repo}\n{listing}".encode()).hexdigest()

    def commit_of(self, repo: str, revision: str) -> str:
        head = self.head(repo)
        if revision not in ("", "main", head):
            raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return head


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def do_OPTIONS(self) -> None:
        """Answer the preflight request that a browser sends for cross-origin requests."""
        allowed = {"Access-Control-Allow-Methods": "GET, HEAD, POST, PUT", "Access-Control-Allow-Headers": "*"}
        self.start(204, {"Content-Length": "0", **allowed})

    def answer(self) -> None:
        self.path, _, self.query = self.path.partition("?")
        self.pieces = self.body()
        try:
            if not self.broken():
                self.route()
        except ApiError as error:
            headers = {"X-Error-Message": str(error), "X-Error-Code": error.code}
            self.json({"error": str(error)}, error.status, {key: value for key, value in headers.items() if value})

    def route(self) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        if self.authorization and self.role is None:
            raise ApiError(401, "Invalid credentials in Authorization header")
        for verb, pattern, name in ROUTES:
            if verb == method and (match := re.fullmatch(pattern, self.path)):
                return getattr(self, name)(*(unquote(group or "") for group in match.groups()))
        raise ApiError(404, "Sorry, we can't find the page you are looking for.")

    def broken(self) -> bool:
        """Whether a fault was set for this request. If so, it is handled here."""
        request = f"{self.command} {self.path}"
        fault = next((next(faults, 0) for part, faults in self.server.faults.items() if part in request), 0)
        if fault == "close":
            next(self.pieces, b"")
            self.record(0)
            self.close_connection = True
        elif fault:
            raise ApiError(int(fault), "This is a fault that a test asked for")
        return bool(fault)

    # -------------------------------------------------------------------------------------------------- reading

    def info(self, repo: str, revision: str) -> None:
        commit = self.server.commit_of(repo, revision)
        files = self.server.files(repo)
        details = "blobs=" in self.query
        siblings = [{"rfilename": name, **(entry(name, files[name]) if details else {})} for name in files]
        self.json({
            "_id": "1", "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit, "siblings": siblings,
            "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "library_name": "onnx", "pipeline_tag": "text-generation",
            "createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z",
        })  # fmt: skip

    def tree(self, repo: str, revision: str, under: str) -> None:
        self.server.commit_of(repo, revision)
        files = self.server.files(repo)
        prefix = f"{under.rstrip('/')}/" if under else ""
        below = {name: path for name, path in files.items() if name.startswith(prefix)}
        if under and not below:
            raise ApiError(404, f'{under} does not exist on "{revision}"', "EntryNotFound")
        folders = {parent.as_posix() for name in below for parent in PurePosixPath(name).parents}
        rows = [folder(name) for name in sorted(folders - {"."}) if name.startswith(prefix)]
        rows += [entry(name, path) for name, path in below.items()]
        if "recursive=true" not in self.query.lower():
            rows = [row for row in rows if "/" not in row["path"].removeprefix(prefix)]
        self.json(rows)

    def paths_info(self, repo: str, revision: str) -> None:
        self.server.commit_of(repo, revision)
        files = self.server.files(repo)
        self.json([entry(name, files[name]) for name in json.loads(self.data())["paths"] if name in files])

    def resolve(self, repo: str, revision: str, name: str) -> None:
        commit = {"X-Repo-Commit": self.server.commit_of(repo, revision)}
        path = self.server.files(repo).get(name)
        if path is None:
            raise ApiError(404, "Entry not found", "EntryNotFound")
        row = entry(name, path)
        tag = {"ETag": f'"{row["lfs"]["oid"] if "lfs" in row else row["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in row:
            tag |= {"X-Linked-Size": str(row["size"]), "X-Linked-ETag": tag["ETag"]}
        self.file(path, {"Content-Type": "application/octet-stream", **commit, **tag})

    def file(self, path: Path, headers: dict[str, str]) -> None:
        """Send a file, or the requested range of it."""
        size, status = path.stat().st_size, 200
        start, end = 0, size
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            start = int(match[1]) if match[1] else max(0, size - int(match[2] or 0))
            end = min(size, int(match[2]) + 1) if match[1] and match[2] else size
            if start >= end:
                self.drain()
                return self.start(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self.drain()
        self.start(status, {**headers, "Content-Length": str(end - start)})
        if self.command == "HEAD":
            return None
        with open(path, "rb") as file:
            file.seek(start)
            for position in range(start, end, PIECE):
                self.wfile.write(file.read(min(PIECE, end - position)))
        return None

    # -------------------------------------------------------------------------------------------------- writing

    def whoami(self) -> None:
        if self.role is None:
            raise ApiError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.role}
        orgs = [{"type": "org", "name": ORGANIZATION, "roleInOrg": "write"}]
        self.json({"type": "user", "name": USER, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}})

    def create(self) -> None:
        wanted = json.loads(self.data())
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        self.need_write(repo)
        if not re.fullmatch(REPO, repo):
            raise ApiError(400, "Invalid repo name")
        if wanted.get("type", "model") != "model":
            raise ApiError(400, "only models are kept here")
        url = f"{self.server.url}/{repo}"
        with suppress(ApiError):
            self.server.folder(repo)
            return self.json({"error": "You already created this model repo", "url": url}, 409)
        (self.server.root / repo).mkdir(parents=True)
        return self.json({"url": url, "name": repo, "id": "1"})

    def validate_yaml(self) -> None:
        content = json.loads(self.data())["content"]
        missing = {"message": "empty or missing yaml metadata in repo card"}
        self.json({"errors": [], "warnings": [] if content.startswith("---\n") else [missing]})

    def preupload(self, repo: str) -> None:
        self.need_write(repo)
        files, modes = self.server.files(repo), []
        for file in json.loads(self.data())["files"]:
            name, sample = file["path"], base64.b64decode(file["sample"])
            mode = "lfs" if is_large(name, file["size"]) or b"\0" in sample else "regular"
            row = entry(name, files[name]) if name in files else {}
            oid = row.get("lfs", row).get("oid")  # None for a new file
            modes.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": modes, "commitOid": self.server.head(repo)})

    def lfs_batch(self, repo: str) -> None:
        self.need_write(repo)
        rows = []
        for wanted in json.loads(self.data())["objects"]:
            digest, size = wanted["oid"], wanted["size"]
            row = {"oid": digest, "size": size, "authenticated": True}
            if not self.server.object(digest).exists():
                upload = {"href": f"{self.server.url}/lfs/{repo}/{digest}/{size}?{SIGNATURE}"}
                row["actions"] = {"upload": upload, "verify": {"href": f"{self.server.url}/{repo}.git/info/lfs/verify"}}
            rows.append(row)
        self.json({"transfer": "basic", "objects": rows})

    def lfs_put(self, repo: str, digest: str, size: str) -> None:
        if self.query != SIGNATURE:
            raise ApiError(403, "SignatureDoesNotMatch")
        place, found = self.server.object(digest), hashlib.sha256()
        part = place.with_name(f"{digest}.{threading.get_ident()}")
        with open(part, "wb") as file:
            for piece in self.pieces:
                found.update(piece)
                file.write(piece)
        if found.hexdigest() != digest or part.stat().st_size != int(size):
            part.unlink()
            raise ApiError(400, "SHA-256 or size mismatch")
        part.replace(place)
        self.json({})

    def lfs_verify(self, repo: str) -> None:
        self.need_write(repo)
        sent = json.loads(self.data())
        place = self.server.object(sent["oid"])
        if not place.exists() or place.stat().st_size != sent["size"]:
            raise ApiError(404, "The object is not here")
        self.json({})

    def commit(self, repo: str) -> None:
        self.need_write(repo)
        folder = self.server.folder(repo)
        lines = [json.loads(line) for line in self.data().splitlines()]
        if not lines or lines[0]["key"] != "header" or not lines[0]["value"]["summary"]:
            raise ApiError(400, "The first line has to be the header, with a summary")
        writes = [
            self.write_of(folder, line["key"], line["value"]) for line in lines[1:]
        ]  # every line is checked before anything is written
        for path, source in writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                path.write_bytes(source)
            else:
                shutil.copyfile(source, path)
        head = self.server.head(repo)
        self.json({"success": True, "commitOid": head, "commitUrl": f"{self.server.url}/{repo}/commit/{head}", "hookOutput": ""})  # fmt: skip

    def write_of(self, folder: Path, key: str, value: dict) -> tuple[Path, bytes | Path]:
        """Return the path that a line of a commit writes, and its bytes or the uploaded file."""
        if not is_plain(value["path"]):
            raise ApiError(400, f"Invalid path: {value['path']}")
        place = folder / value["path"]
        if key == "file":
            data = base64.b64decode(value["content"])
            if is_large(place.name, len(data)):
                raise ApiError(400, f"{value['path']} has to be uploaded with LFS")
            return place, data
        if key == "lfsFile" and self.server.object(value["oid"]).exists():
            return place, self.server.object(value["oid"])
        raise ApiError(400, f"{key} of {value['path']}: not supported, or the object was not uploaded")

    # ------------------------------------------------------------------------------------------- requests, answers

    @property
    def authorization(self) -> str:
        return self.headers.get("Authorization", "")

    @property
    def role(self) -> str | None:
        return TOKENS.get(self.authorization.removeprefix("Bearer "))

    def need_write(self, repo: str) -> None:
        if self.role is None:
            raise ApiError(401, "Invalid username or password.")
        owner = repo.split("/")[0]
        if self.role == "read" or owner not in (USER, ORGANIZATION):
            raise ApiError(403, f"You don't have the rights to create or change a model under the namespace {owner}")

    def body(self) -> Iterator[bytes]:
        """Yield the request's body in pieces."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length") or 0)
            while left:
                piece = self.rfile.read(min(PIECE, left))
                if not piece:
                    raise ConnectionResetError("the client has gone")
                left -= len(piece)
                yield piece

    def data(self) -> bytes:
        return b"".join(self.pieces)

    def drain(self) -> None:
        """Read the rest of the request, so that the connection can be reused."""
        for _ in self.pieces:
            pass

    def json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.drain()
        data = json.dumps(value).encode()
        about = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(data))}
        self.start(status, {**about, **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def start(self, status: int, headers: dict[str, str]) -> None:
        """Send the status and the headers."""
        self.record(status)
        self.send_response(status)
        for key, value in {**CROSS_ORIGIN, **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def record(self, status: int) -> None:
        wanted = self.headers.get("Range", "")
        path = self.path.partition("?")[0]
        self.server.requests.append(Request(self.command, path, status, bool(self.authorization), wanted))
        if self.server.verbose:
            print(self.command, status, path, wanted, flush=True)


def is_plain(name: str) -> bool:
    """Whether a name is that of a visible file inside the repository."""
    return bool(name) and all(part and not part.startswith(".") and "\\" not in part for part in name.split("/"))


def is_large(name: str, size: int) -> bool:
    return size > 0 and (size > LARGE or name.endswith(LFS_SUFFIXES))


def folder(name: str) -> dict:
    return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}


def entry(name: str, path: Path) -> dict:
    """Return a file's entry in the Hub's listing; that of a large file has its SHA-256."""
    stat = path.stat()
    sha1, sha256 = digests(path, stat.st_size, stat.st_mtime_ns)
    row = {"type": "file", "path": name, "size": stat.st_size, "oid": sha1, "blobId": sha1}
    if is_large(name, stat.st_size):
        row["lfs"] = {"oid": sha256, "sha256": sha256, "size": stat.st_size, "pointerSize": 134}
    return row


@cache
def digests(path: Path, size: int, changed: int) -> tuple[str, str]:
    """Return Git's SHA-1 of a file and its SHA-256; the arguments change when the file does."""
    sha1, sha256 = hashlib.sha1(b"blob %d\0" % size), hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            sha1.update(piece)
            sha256.update(piece)
    return sha1.hexdigest(), sha256.hexdigest()


Served = TypeVar("Served", bound=HTTPServer)


@contextmanager
def serving(server: Served) -> Iterator[Served]:
    """Run a server in a thread."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def running(root: Path) -> Iterator[Hub]:
    """A Hub on a free port."""
    with serving(Hub(root)) as hub:
        yield hub


def environment(url: str, home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a client that uses the Hub at ``url``, without a login, with its cache in ``home``."""
    kept = {key: value for key, value in os.environ.items() if not is_of_clients(key.lower())}
    hub = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return {**kept, **hub, **more}


def is_of_clients(variable: str) -> bool:
    return variable.startswith(("hf_", "hugging_face_")) or variable.endswith("_proxy")


def main(arguments: Iterable[str]) -> None:
    root, port = arguments
    with Hub(Path(root), int(port), verbose=True) as hub:
        print(hub.url, flush=True)
        with suppress(KeyboardInterrupt):
            hub.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
