"""``hf://`` and ``openai://``, against a local server that has the paths of both, and faults on request."""

import contextlib
import hashlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import safetensors.numpy
from adapters import write_adapter
from checkpoints import assert_same_bytes, random_checkpoint
from commands import SEVERAL, Done, assert_refused, done
from hub_server import HANGS, environment, serving
from paths import FIXTURES, ROOT, files_of

from converters import ChecksumError, ConversionError, UnsafeError, open_checkpoint, save_checkpoint
from gpt2x import SHAKESPEARE, fetch
from gpt2x.download import openai as bucket
from gpt2x.download import transfer
from gpt2x.download.hub import parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATA, INDEX = bucket.DATA, bucket.INDEX
SIZE = (SHAKESPEARE / DATA).stat().st_size


# ---------------------------------------------------------------------------------------------------- the server


class Server(ThreadingHTTPServer):
    """Serves files by path. ``faults`` lists the faults of a path; each is used once, unless it ends in "!"."""

    daemon_threads = True
    block_on_close = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.repos: dict[str, dict] = {}
        self.faults: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str, str]] = []  # method, path, range
        self.version = "1"
        self.released = threading.Event()  # the fault "held" waits for it
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # some tests interrupt clients

    def paths(self, name=""):
        return [path for _, path, _ in self.asked if name in path]

    def fault(self, path):
        """Return the next fault of a path, or an empty string."""
        faults = self.faults.get(path, [])
        if faults and faults[0].endswith("!"):
            return faults[0][:-1]
        return faults.pop(0) if faults else ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.split("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Range", "")))
        if path.startswith("/api/models/"):
            self.about(path.removeprefix("/api/models/"))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*found.groups())
        else:
            self.file(path)

    def about(self, path):
        name, _, revision = path.partition("/revision/")
        repo = self.server.repos.get(name)
        if repo is None or repo.get("gated"):
            code = "GatedRepo" if repo else "RepoNotFound"
            return self.send(403 if repo else 401, b"{}", {"X-Error-Code": code})
        if repo.get("status"):
            return self.send(repo["status"], b"{}")
        if revision not in ("", "main", COMMIT):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in repo["files"]]
        return self.send(200, json.dumps({"id": name, "sha": repo.get("sha", COMMIT), "siblings": siblings}).encode())

    def resolve(self, name, revision, file):
        data = self.server.repos[name]["files"].get(file)
        if data is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        digest = hashlib.sha256(data).hexdigest()
        large = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest}"'} if len(data) > 100_000 else {}
        return self.send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', **large})

    def send(self, status, data, headers=None):
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def file(self, path):
        data, fault = self.server.files.get(path), self.server.fault(path)
        plain = {"Content-Type": "application/octet-stream"}
        if fault.isdigit() or data is None:
            return self.send(int(fault or 404), b"{}")
        if fault == "page":
            return self.send(200, b"<!doctype html><p>Log in", {"Content-Type": "text/html; charset=utf-8"})
        if fault == "hidden page":
            return self.send(200, b"<!doctype html><p>Log in", plain)
        if fault.startswith("to "):
            return self.send(302, b"", {"Location": fault[3:]})
        if fault == "short":
            return self.send(200, data[:-100], plain)
        if fault == "flipped":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        if fault == "compressed":
            plain["Content-Encoding"] = "gzip"
        if fault == "endless":
            return self.endless(plain)
        return self.ranged(data, fault, plain)

    def endless(self, headers):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")

    def ranged(self, data, fault, headers):
        version = f'"{self.server.version}"'
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        valid = self.headers.get("If-Range") in (None, version) or fault == "ignores If-Range"
        if wanted and valid and fault != "ignores Range":
            start = int(wanted[1])
            if start >= len(data):
                return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}", "ETag": version})
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if fault == "other range":
                headers["Content-Range"] = f"bytes {start + 1}-{len(data)}/{len(data) + 1}"
        else:
            start = 0
        self.send_response(206 if "Content-Range" in headers else 200)
        for key, value in {**headers, "Content-Length": str(len(data) - start), "ETag": version}.items():
            if key != "ETag" or fault != "no version":
                self.send_header(key, value)
        self.end_headers()
        end = start + (len(data) - start) // 2 if fault in ("dropped", "no version") else len(data)
        held = len(data) // 2 if fault == "held" else start
        self.wfile.write(data[start:held])
        if fault == "held":
            self.server.released.wait()
        self.wfile.write(data[held:end])
        if end < len(data):
            self.wfile.flush()
            self.close_connection = True
        return None


@pytest.fixture
def server():
    with serving(Server()) as server:
        for name in bucket.FILES:
            server.files[f"/124M/{name}"] = (SHAKESPEARE / name).read_bytes()
        yield server
        server.released.set()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory and a cache of its own, no proxy, and no pauses."""
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("GPT2X_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "PAUSE", 0.001)


@pytest.fixture
def mirror(server, monkeypatch):
    monkeypatch.setenv("GPT2X_OPENAI_URL", server.url)
    return server


def cached(name=DATA):
    return Path("cache/openai/124M", name)


def same_as_shipped(folder):
    return all((folder / name).read_bytes() == (SHAKESPEARE / name).read_bytes() for name in bucket.FILES)


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("source", ["models/124M", "hf:/x", "", Path("hf://x"), "a b/c.bin", "C:/x", "./openai:x"])
def test_a_path_is_returned_unchanged(source):
    assert fetch(source) is source


@pytest.mark.parametrize("source", ["https://huggingface.co/gpt2", "ftp://x/y", "file:///etc/passwd", "s3://bucket/x"])
def test_an_address_with_another_scheme_is_refused_with_a_list_of_the_supported_ones(gpt2x, source):
    assert_refused(gpt2x("convert", source, "out.bin"), "cannot download from", "hf://OWNER/NAME", "openai://124M")


@pytest.mark.parametrize(
    "rest",
    ["", "gpt2", "../x/y", "a/..", "a/b/../c", "a/b@", "a/b@../x", "a/b@main/..", "a/b/c?d", "a/b#c", "a b/c", "a/b\n", "a/b/c//d",
     "a/b/%2e%2e", "/a/b", "a//b", "u:p@h/x", "a/b\\c", "a/b--c", "ä/b", "a/.b", "-a/b", "a..b/c", "a/b/c..d", "a/b/" + "c" * 400],
)  # fmt: skip
def test_an_invalid_address_is_refused_before_any_request(rest):
    with pytest.raises(ConversionError, match="not a valid address of a model on the Hub"):
        fetch(f"hf://{rest}")


def test_the_parts_of_an_address():
    a = parse("", "o/n")
    assert (a.repo, a.revision, a.path) == ("o/n", "main", "")
    a = parse("", "o/n@v1.0/sub/x.bin")
    assert (a.repo, a.revision, a.path) == ("o/n", "v1.0", "sub/x.bin")
    a = parse("", "o/n@refs/pr/3/x.bin")
    assert (a.repo, a.revision, a.path) == ("o/n", "refs/pr/3", "x.bin")
    with pytest.raises(ConversionError, match="GPT-2 small is hf://openai-community/gpt2"):
        fetch("hf://gpt2")


@pytest.mark.parametrize("rest", ["", "117M", "124m", "124M/..", "124M/x", "../124M", "1558M?"])
def test_openai_published_four_sizes(rest):
    with pytest.raises(ConversionError, match="124M, 355M, 774M or 1558M"):
        fetch(f"openai://{rest}")
    assert not Path("cache").exists()


def test_a_plain_conversion_opens_no_socket_and_loads_no_client(tmp_path):
    code = f"""if True:
        import sys
        def refuse(event, args):
            if event.startswith("socket."):
                raise SystemExit(f"a socket: {{event}} {{args}}")
        sys.addaudithook(refuse)
        from gpt2x.cli import main
        main(["convert", {str(SHAKESPEARE)!r}, "out"], standalone_mode=False)
        main(["inspect", "out"], standalone_mode=False)
        main(["--help"], standalone_mode=False)
        loaded = {{"huggingface_hub", "httpx2", "filelock", "urllib.request", "http.client", "gpt2x.download.fetch"}}
        assert not loaded & set(sys.modules)
        if "--provoke" in sys.argv:
            import socket
            socket.socket()
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    shutil.rmtree("out")
    provoked = subprocess.run([sys.executable, "-c", code, "--provoke"], capture_output=True, text=True)
    assert "a socket" in provoked.stderr


# ---------------------------------------------------------------------------------------------------- openai://


def test_a_checkpoint_is_downloaded_once(gpt2x, mirror):
    result = done(gpt2x("convert", "openai://124M", "a.safetensors", "--json"))
    assert json.loads(result.stdout)["source"] == "openai://124M"
    assert result.stderr == ""
    assert_same_bytes(open_checkpoint(SHAKESPEARE), open_checkpoint("a.safetensors"))
    assert sorted(mirror.paths()) == sorted(f"/124M/{name}" for name in bucket.FILES)  # and no model.ckpt.meta
    assert same_as_shipped(cached().parent)
    assert not [*cached().parent.glob("*.part*")]
    mirror.asked.clear()
    done(gpt2x("convert", "openai://124M/", "b.safetensors"))
    assert mirror.asked == []


def test_a_file_that_has_changed_in_the_cache_is_verified_again(mirror):
    fetch("openai://124M")
    data = bytearray(cached().read_bytes())
    data[5000] ^= 1
    cached().write_bytes(data)
    mirror.asked.clear()
    warnings = []
    assert same_as_shipped(fetch("openai://124M", warn=warnings.append))
    assert "damaged" in warnings[0]
    assert f"/124M/{DATA}" in mirror.paths()


def test_a_copy_of_the_cache_needs_no_network_and_no_http_library(monkeypatch, mirror):
    shutil.copytree(SHAKESPEARE, cached().parent)
    monkeypatch.setitem(sys.modules, "gpt2x.download.transfer", None)
    assert same_as_shipped(fetch("openai://124M"))
    assert mirror.asked == []


@pytest.mark.parametrize("fault", ["dropped", "ignores Range", "other range", "503", "429"])
def test_a_temporary_fault_is_retried(mirror, fault):
    mirror.faults[f"/124M/{DATA}"] = ["dropped", fault, fault]
    assert same_as_shipped(fetch("openai://124M"))


def test_a_download_is_resumed_after_the_connection_was_lost(mirror):
    mirror.faults[f"/124M/{DATA}"] = ["dropped"]
    assert same_as_shipped(fetch("openai://124M"))
    assert [wanted for _, path, wanted in mirror.asked if DATA in path] == ["", f"bytes={SIZE // 2}-"]


def wait_until(happened, *processes):
    """Wait until something has happened; fail if a process ends before."""
    while not happened():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)


def test_a_download_is_resumed_after_the_command_was_interrupted(mirror):
    mirror.faults[f"/124M/{DATA}"] = ["held"]
    part = cached(f"{DATA}.part")
    command = [sys.executable, "-m", "gpt2x", "convert", "openai://124M", "out.bin"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: part.exists() and part.stat().st_size >= 1 << 20, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(HANGS) != 0
    here = part.stat().st_size
    assert 1 << 20 <= here <= SIZE // 2
    assert not cached().exists()
    assert not Path("out.bin").exists()
    mirror.asked.clear()
    assert same_as_shipped(fetch("openai://124M"))
    assert [wanted for _, path, wanted in mirror.asked] == [f"bytes={here}-"]


@pytest.mark.parametrize(("fault", "requests"), [("", 1), ("ignores If-Range", 2)])
@pytest.mark.parametrize("name", [DATA, "encoder.json"])
def test_a_download_starts_over_if_the_file_has_changed_on_the_server(mirror, name, fault, requests):
    cached().parent.mkdir(parents=True)
    cached(f"{name}.part").write_bytes(b'{"of": "another version"')
    cached(f"{name}.part.version").write_text('"0"')
    mirror.faults[f"/124M/{name}"] = [fault]
    warnings = []
    assert same_as_shipped(fetch("openai://124M", warn=warnings.append))
    assert warnings == []  # it was not a checksum that failed
    assert len(mirror.paths(name)) == requests


def test_a_partial_download_is_kept_when_the_attempts_are_used_up(mirror):
    mirror.faults[f"/124M/{DATA}"] = ["dropped!"]
    with pytest.raises(ConversionError, match="run the same command again to resume"):
        fetch("openai://124M")
    assert cached(f"{DATA}.part").stat().st_size > SIZE // 2
    mirror.faults.clear()
    assert same_as_shipped(fetch("openai://124M"))


@pytest.mark.parametrize("name", [name for name in bucket.FILES if name != DATA])
def test_a_small_file_that_is_damaged_in_the_cache_is_downloaded_again(mirror, name):
    fetch("openai://124M")
    cached(name).write_bytes(b"damaged")
    mirror.asked.clear()
    assert same_as_shipped(fetch("openai://124M"))
    assert mirror.paths() == [f"/124M/{name}"]


def test_an_outdated_index_in_the_cache_is_replaced_by_the_next_call(mirror):
    cached().parent.mkdir(parents=True)
    save_checkpoint(random_checkpoint(), "tiny", "tf")
    shutil.copy(Path("tiny", INDEX), cached(INDEX))
    refused("run the command again to download both")
    assert same_as_shipped(fetch("openai://124M"))


def test_a_download_without_a_version_starts_over(mirror):
    mirror.faults[f"/124M/{DATA}"] = ["no version"]
    assert same_as_shipped(fetch("openai://124M"))
    assert [wanted for _, path, wanted in mirror.asked if DATA in path] == ["", ""]


def test_a_partial_file_that_has_every_byte_is_complete(mirror):
    folder = cached().parent
    folder.mkdir(parents=True)
    for name in ("encoder.json", DATA):
        shutil.copy(SHAKESPEARE / name, folder / f"{name}.part")
        (folder / f"{name}.part.version").write_text('"1"')
    assert same_as_shipped(fetch("openai://124M"))
    assert f"/124M/{DATA}" not in mirror.paths()
    size = (SHAKESPEARE / "encoder.json").stat().st_size
    assert ("GET", "/124M/encoder.json", f"bytes={size}-") in mirror.asked


def test_a_partial_file_that_is_too_long_is_discarded(mirror):
    cached().parent.mkdir(parents=True)
    for name in ("encoder.json", DATA):
        cached(f"{name}.part").write_bytes((SHAKESPEARE / name).read_bytes() + b"more")
        cached(f"{name}.part.version").write_text('"1"')
    assert same_as_shipped(fetch("openai://124M"))


def refused(match, kind=ConversionError):
    with pytest.raises(kind, match=match):
        fetch("openai://124M")
    assert not cached(bucket.VERIFIED).exists()


@pytest.mark.parametrize(
    ("name", "fault", "match"),
    [
        (DATA, "404", "404 .Not Found.; is GPT2X_OPENAI_URL correct"),
        (DATA, "403", "403 .Forbidden."),
        (DATA, "500", "500 .Internal Server Error. .3 attempts."),
        (DATA, "page", "sent a web page instead of the file"),
        (DATA, "hidden page", "8,888,832 bytes expected from the index, the server has 24"),
        (DATA, "short", "8,888,832 bytes expected from the index, the server has 8,888,732"),
        (DATA, "endless", "sends more than the limit of 8,888,832 bytes"),
        (DATA, "compressed", "sent a compressed file"),
        (DATA, "to file:///etc/passwd", "redirects to an address that gpt2x does not follow"),
        (DATA, "to ftp://127.0.0.1/x", "redirects to an address that gpt2x does not follow"),
        (INDEX, "page", "sent a web page instead of the file"),
        (INDEX, "hidden page", "truncated: a TensorFlow index needs 48 bytes, the file has 24"),
        (INDEX, "flipped", "the downloaded file is not valid"),
        (INDEX, "endless", "sends more than the limit of 1,048,576 bytes"),
        ("hparams.json", "hidden page", "invalid JSON"),
        ("encoder.json", "hidden page", "invalid JSON"),
        ("encoder.json", "404", "404 .Not Found."),
        ("vocab.bpe", "hidden page", "not a file of BPE merges"),
        ("checkpoint", "hidden page", "not TensorFlow's checkpoint state file"),
    ],
)
def test_an_invalid_answer_is_refused_and_not_kept(mirror, name, fault, match):
    mirror.faults[f"/124M/{name}"] = [f"{fault}!"]
    refused(match)
    assert not cached(name).exists()
    assert not [path for path in cached().parent.glob("*.part*") if path.stat().st_size]


@pytest.mark.parametrize(("name", "fault"), [(DATA, "short"), (INDEX, "flipped"), ("encoder.json", "hidden page")])
def test_the_next_call_succeeds_after_an_invalid_answer(mirror, name, fault):
    mirror.faults[f"/124M/{name}"] = [fault]
    refused("bytes expected from the index|the downloaded file is not valid")
    assert same_as_shipped(fetch("openai://124M"))


def test_a_checksum_mismatch_is_downloaded_again_once(mirror):
    mirror.faults[f"/124M/{DATA}"] = ["flipped"]
    warnings = []
    assert same_as_shipped(fetch("openai://124M", warn=warnings.append))
    assert "checksum is" in warnings[0]
    shutil.rmtree("cache")
    mirror.faults[f"/124M/{DATA}"] = ["flipped!"]
    mirror.asked.clear()
    refused("checksum is .*\nDownloading it again failed verification, too; the files were removed", ChecksumError)
    assert len(mirror.paths(DATA)) == 2
    assert not cached().exists()


@pytest.mark.parametrize("offset", [0, 5_000_000, SIZE - 1])
def test_a_flipped_byte_anywhere_is_found(mirror, offset):
    data = bytearray(mirror.files[f"/124M/{DATA}"])
    data[offset] ^= 0x10
    mirror.files[f"/124M/{DATA}"] = bytes(data)
    refused("checksum is", ChecksumError)


def test_a_vocabulary_of_another_size_than_the_configurations_is_refused(mirror):
    mirror.files["/124M/hparams.json"] = json.dumps(
        {"n_vocab": 2048, "n_ctx": 256, "n_embd": 192, "n_head": 6, "n_layer": 5}
    ).encode()
    refused("failed verification, too; the files were removed")


def test_an_index_with_an_invalid_size_is_refused_before_the_data_are_requested(mirror, monkeypatch):
    monkeypatch.setattr(bucket, "MAX_DATA", SIZE - 1)
    refused("invalid size of the data: 8,888,832 bytes")
    assert mirror.paths(DATA) == []


def test_a_full_disk_is_reported_before_the_download(mirror, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 5))
    refused("8,888,832 bytes needed, the disk has 5 free; GPT2X_CACHE")
    assert mirror.paths(DATA) == []


def test_a_cache_that_cannot_be_written_is_reported(mirror, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setenv("GPT2X_CACHE", "file/cache")
    refused("file/cache/openai/124M: cannot be written: Not a directory")


def test_redirects_between_web_servers_are_followed(mirror):
    mirror.files["/elsewhere"] = mirror.files[f"/124M/{DATA}"]
    mirror.faults[f"/124M/{DATA}"] = [f"to {mirror.url}/elsewhere!"]
    assert same_as_shipped(fetch("openai://124M"))
    mirror.faults["/elsewhere"] = [f"to {mirror.url}/elsewhere!"]
    shutil.rmtree("cache")
    refused("redirects")


def test_a_server_that_cannot_be_reached_is_reported_without_the_proxys_password(gpt2x, monkeypatch, server):
    monkeypatch.setenv("GPT2X_OPENAI_URL", "http://127.0.0.1:9")
    assert_refused(gpt2x("inspect", "openai://124M"), "http://127.0.0.1:9/124M/checkpoint: cannot connect: Connection refused (3 attempts)")  # fmt: skip
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    result = gpt2x("inspect", "openai://124M")
    assert_refused(result, "cannot connect")
    assert "secret" not in result.output


@pytest.mark.parametrize(
    "proxy", ["socks5://user:secret@127.0.0.1:9", "ftp://user:secret@h", "http://user:secret@h:port"]
)
def test_a_proxy_that_cannot_be_used_is_refused_without_showing_it(gpt2x, monkeypatch, proxy):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("all_proxy", proxy)
    result = gpt2x("inspect", "openai://124M")
    assert_refused(result, "http_proxy, https_proxy or all_proxy: unsupported proxy")
    assert "secret" not in result.output


def test_certificates_that_cannot_be_read_are_named(gpt2x, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "none.pem")
    assert_refused(
        gpt2x("inspect", "openai://124M"), "SSL_CERT_FILE or SSL_CERT_DIR: cannot read the certificates: No such file"
    )


def answer_with(monkeypatch, answer):
    """Let a function answer every request, instead of a server."""
    monkeypatch.setenv("GPT2X_OPENAI_URL", "https://mirror")
    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", lambda transport, request: answer(request))


def test_a_redirect_from_https_to_http_is_not_followed(monkeypatch):
    asked = []

    def answer(request):
        asked.append(str(request.url))
        return httpx2.Response(302, headers={"Location": "http://mirror/other"})

    answer_with(monkeypatch, answer)
    refused("https://mirror/124M/checkpoint: the server redirects to an address that gpt2x does not follow")
    assert asked == ["https://mirror/124M/checkpoint"]


def test_a_certificate_that_is_not_trusted_is_refused_at_once(monkeypatch):
    asked = []

    def answer(request):
        asked.append(str(request.url))
        cause = ssl.SSLCertVerificationError(1, "certificate verify failed")
        cause.verify_message = "self-signed certificate"
        raise httpx2.ConnectError("certificate verify failed") from cause

    answer_with(monkeypatch, answer)
    refused("the server's certificate is not trusted: self-signed certificate")
    assert len(asked) == 1


def test_a_server_that_does_not_answer_in_time_is_tried_again(monkeypatch):
    asked = []

    def answer(request):
        asked.append(request.extensions["timeout"]["read"])
        raise httpx2.ReadTimeout("timed out")

    answer_with(monkeypatch, answer)
    refused(r"the connection was lost: no answer in 30 seconds \(3 attempts\)")
    assert asked == [30, 30, 30]


@pytest.mark.parametrize("url", ["ftp://x/y", "file:///tmp", "http://u:secret@h/x", "https://h/x?sig=secret", "https:///x", "http://h:x/", "h/x", "http://a b"])  # fmt: skip
def test_an_invalid_mirror_is_refused_without_showing_it(gpt2x, monkeypatch, url):
    monkeypatch.setenv("GPT2X_OPENAI_URL", url)
    result = gpt2x("inspect", "openai://124M")
    assert_refused(result, "GPT2X_OPENAI_URL: not a valid mirror; set it to http://HOST/FOLDER")
    assert "secret" not in result.output


def test_several_processes_download_a_model_once(mirror, tmp_path):
    mirror.faults[f"/124M/{DATA}"] = ["held"]
    command = [sys.executable, "-m", "gpt2x", "inspect", "openai://124M", "--json"]
    with contextlib.ExitStack() as stack:
        errors = [stack.enter_context(open(tmp_path / f"errors{i}", "w+")) for i in range(3)]
        running = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True))
            for file in errors
        ]
        stack.callback(mirror.released.set)
        wait_until(lambda: sum("waiting for it" in Path(file.name).read_text() for file in errors) == 2, *running)
        mirror.released.set()
        outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(set(outputs)) == 1
    assert sorted(mirror.paths()) == sorted(f"/124M/{name}" for name in bucket.FILES)


def test_the_environment_selects_the_cache(monkeypatch, tmp_path):
    from gpt2x.download.common import cache_home

    assert cache_home() == tmp_path / "cache"
    monkeypatch.delenv("GPT2X_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "gpt2x"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home() == tmp_path / ".cache" / "gpt2x"


def test_a_progress_bar_counts_every_byte_once(mirror):
    mirror.faults[f"/124M/{DATA}"] = ["dropped", "ignores Range"]
    totals, moves = [], []

    @contextlib.contextmanager
    def bar(total):
        totals.append(total)
        moves.append(0)

        def advance(count):
            moves[-1] += count

        yield advance

    fetch("openai://124M", progress=bar)
    assert totals == moves == [SIZE, SIZE]  # the download, and the checksums
    shutil.rmtree("cache")
    mirror.faults[f"/124M/{DATA}"] = ["held"]  # until the bar is there
    master, slave = pty.openpty()
    command = subprocess.Popen([sys.executable, "-m", "gpt2x", "inspect", "openai://124M"], stdout=subprocess.PIPE, stderr=slave, env={**os.environ, "TERM": "xterm", "COLUMNS": "80"})  # fmt: skip
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(master, 4096):
            shown += data
            if b"8.9 MB" in shown:
                mirror.released.set()
    os.close(master)
    assert command.communicate()[0]
    assert command.returncode == 0
    assert b"/8.9 MB" in shown


# --------------------------------------------------------------------------------------------------- the commands


def test_an_invalid_destination_is_refused_before_the_download(gpt2x, mirror):
    Path("out.bin").write_text("mine")
    Path("folder").mkdir()
    for args, words in (
        (["out.bin"], "out.bin: already exists"),
        (["folder"], "folder: already exists"),
        (["folder", "--to", "safetensors", "--force"], "cannot be replaced by a file"),
        (["out.h5"], "does not write .h5"),
        (["hf://me/mine"], "gpt2x convert does not upload"),
    ):
        assert_refused(gpt2x("convert", "openai://124M", *args), words)
        assert_refused(gpt2x("convert", "hf://a/b", *args), words)
    assert_refused(gpt2x("export", "openai://124M", "--onnx", "folder"), "folder: already exists")
    assert_refused(gpt2x("bench", "openai://124M"), "gpt2x export openai://124M --onnx DIR")
    assert mirror.asked == []
    assert Path("out.bin").read_text() == "mine"
    done(gpt2x("convert", "openai://124M", "out.bin", "--force"))


@pytest.mark.slow
def test_every_command_accepts_an_address(gpt2x, mirror):
    facts = json.loads(done(gpt2x("inspect", "openai://124M", "--json")).stdout)
    assert (facts["path"], facts["format"]) == ("openai://124M", "tf")
    report = json.loads(done(gpt2x("verify", SHAKESPEARE, "openai://124M", "--json", "-")).stdout)
    assert (report["a"], report["b"]) == (str(SHAKESPEARE / "model.ckpt"), "openai://124M")
    result = done(gpt2x("export", "openai://124M", "--onnx", "onnx", "--no-verify", "--json"))
    assert json.loads(result.stdout)["source"] == "openai://124M"


def test_the_commands_and_the_program_of_the_page_run(gpt2x, mirror):
    text = (ROOT / "docs" / "downloads.md").read_text()
    commands = [line for line in text.splitlines() if re.match(r"gpt2x .*openai://", line) and "hf://" not in line]
    assert len(commands) == 3
    for command in commands:
        done(gpt2x(*shlex.split(command)[1:]))
    (program,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(compile(program, "downloads.md", "exec"), names)
    assert_same_bytes(open_checkpoint(SHAKESPEARE), names["checkpoint"])


# ---------------------------------------------------------------------------------------------------------- hf://


@pytest.fixture(scope="module")
def hf_files(tmp_path_factory):
    """The shipped model in Hugging Face's layout: file name -> bytes."""
    folder = tmp_path_factory.mktemp("repo")
    save_checkpoint(open_checkpoint(SHAKESPEARE), folder / "hf")
    return {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """Run ``gpt2x`` in a new process (huggingface_hub reads its environment once), with the server as the Hub."""
    client = environment(server.url, tmp_path / "hf-home", PYTHONWARNINGS="error::ResourceWarning")

    def run_one(*args, **more):
        return Done(process([sys.executable, "-m", "gpt2x", *map(str, args)], more))

    def run_all(commands):
        """Run several commands in one process, which takes less time."""
        return [
            Done(result)
            for result in json.loads(process([sys.executable, "-c", SEVERAL, json.dumps(commands)], {}).stdout)
        ]

    def process(command, more):
        return subprocess.run(command, capture_output=True, text=True, env={**client, **more}, timeout=HANGS)

    run: Any = run_one
    run.all = run_all
    return run


def fetched(server):
    """Return the files that were downloaded."""
    return sorted({path.split(f"/{COMMIT}/")[1] for method, path, _ in server.asked if method == "GET" and "/resolve/" in path})  # fmt: skip


def without_weights(files):
    return {name: data for name, data in files.items() if name != "model.safetensors"}


def test_a_repository_is_downloaded_once(server, hub, hf_files, tmp_path):
    other = dict.fromkeys(("README.md", "pytorch_model.bin", "tf_model.h5", "rust_model.ot", "onnx/decoder_model.onnx", "run/odd name.bin"), b"other")  # fmt: skip
    server.repos["me/mine"] = {"files": {**hf_files, **other, "chat_template.jinja": b"{{ x }}"}}
    result = done(hub("convert", "hf://me/mine", "out", "--json"))
    assert json.loads(result.stdout)["source"] == "hf://me/mine"
    assert result.stderr == ""
    assert fetched(server) == sorted([*hf_files, "chat_template.jinja"])
    assert_same_bytes(open_checkpoint(SHAKESPEARE), open_checkpoint("out"))
    assert Path("out/merges.txt").read_bytes() == hf_files["merges.txt"]
    assert next(Path("hf-home").rglob("model.safetensors")).is_symlink()  # the library's own cache
    assert not Path("cache").exists()

    server.asked.clear()
    done(hub("inspect", "hf://me/mine@main"))
    assert fetched(server) == []
    offline = done(hub("inspect", "hf://me/mine", HF_HUB_OFFLINE="1"))
    assert "hf://me/mine" in offline.stdout
    assert offline.stderr == ""
    unplugged = done(hub("inspect", "hf://me/mine", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "Warning: hf://me/mine: cannot connect to the Hub; using what is in the Hub's cache" in unplugged.stderr


def test_shards_in_the_hubs_cache_are_opened(server, hub, hf_files, tmp_path):
    arrays = [*safetensors.numpy.load(hf_files["model.safetensors"]).items()]
    parts = {"model-1.safetensors": dict(arrays[:30]), "model-2.safetensors": dict(arrays[30:])}
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    server.repos["me/shards"] = {
        "files": {
            **without_weights(hf_files),
            **{file: safetensors.numpy.save(tensors) for file, tensors in parts.items()},
            "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
            "model-3.safetensors": b"of another index",
        }
    }
    done(hub("convert", "hf://me/shards", "out.bin"))
    assert_same_bytes(open_checkpoint(SHAKESPEARE), open_checkpoint("out.bin"))
    assert "model-3.safetensors" not in fetched(server)


@pytest.mark.slow
def test_a_preset_of_keras_hub_is_downloaded_with_its_tokenizer_and_all_its_files(server, hub):
    preset, shards = FIXTURES / "keras_hub", FIXTURES / "keras_hub_shards"
    server.repos["keras/whole"] = {"files": {name: (preset / name).read_bytes() for name in files_of(preset)}}
    server.repos["keras/shards"] = {"files": {name: (shards / name).read_bytes() for name in files_of(shards)}}
    done(hub("convert", "hf://keras/whole", "whole"))
    done(hub("convert", "hf://keras/shards", "shards.bin"))
    for path in ("whole", "shards.bin"):
        assert_same_bytes(open_checkpoint(FIXTURES / "tf_plain"), open_checkpoint(path))
    assert Path("whole/vocab.json").read_bytes() == (preset / "assets/tokenizer/vocabulary.json").read_bytes()


def tiny_repo(kind, name):
    """Return a tiny model with random weights, with its configuration: file name -> bytes."""
    save_checkpoint(random_checkpoint(), f"tiny-{kind}", kind)
    config = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 6, "n_positions": 10, "vocab_size": 13, "bos_token_id": 12, "eos_token_id": 12}  # fmt: skip
    return {name: Path(f"tiny-{kind}").read_bytes(), "config.json": json.dumps(config).encode()}


def test_weights_in_a_subfolder_use_the_configuration_in_the_root(server, hub):
    files = tiny_repo("bin", "step-5/pytorch_model.bin")
    server.repos["me/runs"] = {"files": {**files, "step-6/pytorch_model.bin": b"", "model.safetensors": b""}}
    names = [f"hf://me/runs@{COMMIT}/{name}" for name in ("step-5", "step-5/pytorch_model.bin")]
    for i, result in enumerate(hub.all([["convert", name, f"{i}.safetensors"] for i, name in enumerate(names)])):
        done(result)
        assert_same_bytes(random_checkpoint(), open_checkpoint(f"{i}.safetensors"))
    assert fetched(server) == ["config.json", "step-5/pytorch_model.bin"]


def test_a_tensorflow_checkpoint_on_the_hub(server, hub):
    files = {name: (SHAKESPEARE / name).read_bytes() for name in bucket.FILES}
    server.repos["me/tf"] = {"files": {**files, "model.ckpt.meta": b"", "flax_model.msgpack": b""}}
    done(hub("convert", "hf://me/tf", "out"))
    assert_same_bytes(open_checkpoint(SHAKESPEARE), open_checkpoint("out"))
    assert Path("out/vocab.json").exists()
    assert fetched(server) == sorted(set(bucket.FILES) - {"checkpoint"})


@pytest.mark.slow
def test_an_export_on_the_hub_is_run_by_onnx_runtime(server, hub, gpt2x):
    done(gpt2x("export", SHAKESPEARE, "--onnx", "e", "--precision", "int8", "--no-verify"))
    server.repos["me/onnx"] = {"files": {p.relative_to("e").as_posix(): p.read_bytes() for p in Path("e").rglob("*") if p.is_file()}}  # fmt: skip
    args = ["ROMEO:", "--max-new-tokens", "3", "--temperature", "0"]
    expected = done(gpt2x("generate", "e", *args)).stdout
    one = ["generate", "hf://me/onnx/onnx/model_quantized.onnx", *args]
    bench = ["bench", "hf://me/onnx", "--prompt", "4", "--new", "2"]
    for result in hub.all([one, ["generate", "hf://me/onnx", *args], bench]):
        assert done(result).stdout.startswith((expected, "precision"))


def test_an_adapter_on_the_hub_is_merged_with_its_tokenizer(server, hub, hf_files):
    write_adapter(Path("lora"), open_checkpoint(SHAKESPEARE))
    files = {path.name: path.read_bytes() for path in Path("lora").iterdir()}
    tokenizer = {name: data for name, data in hf_files.items() if name in ("vocab.json", "merges.txt")}
    server.repos["me/lora"] = {"files": {**files, **tokenizer, "optimizer.pt": b"", "README.md": b""}}
    server.repos["me/none"] = {"files": {"README.md": b""}}
    commands = [["convert", str(SHAKESPEARE), "out", "--adapter", f"hf://me/{name}"] for name in ("lora", "none")]
    merged, missing = hub.all(commands)
    done(merged)
    assert_refused(missing, "hf://me/none: no PEFT adapter")
    assert fetched(server) == sorted([*files, *tokenizer])
    assert_same_bytes(open_checkpoint(SHAKESPEARE, adapter="lora"), open_checkpoint("out"))


WRONG = (
    (None, "hf://me/none", "no such repository on the Hub, or a private one"),
    ({"files": {"x": b""}, "gated": True}, "hf://me/gated", "gated repository: accept its terms"),
    ({"files": {"model.safetensors": b""}}, "hf://me/a@v9", "no such revision"),
    ({"files": {"model.safetensors": b""}}, "hf://me/b/model.bin", "no model.bin (it has model.safetensors)"),
    (
        {"files": {"README.md": b"", "weights.pt": b""}},
        "hf://me/c",
        "name a file: hf://me/c/FILE (it has README.md, weights.pt)",
    ),
    ({"files": {"a.gguf": b"", "b.gguf": b""}}, "hf://me/d", "name one: hf://me/d/FILE (it has a.gguf, b.gguf)"),
    ({"files": {}, "status": 403}, "hf://me/e", "this login has no access"),
    ({"files": {"model.safetensors": b""}, "sha": "../../x"}, "hf://me/f", "the server's answer is not the Hub's"),
    ({"files": {"model.safetensors": b"", "config.json": None}}, "hf://me/g", "lists a file that it does not have"),
    ({"files": {}, "status": 500}, "hf://me/h", "the Hub answers with status 500"),
    ({"files": {}, "status": 429}, "hf://me/i", "too many requests"),
)


def test_errors_of_the_hub_are_reported_in_one_line(server, hub):
    for repo, source, _ in WRONG:
        server.repos[re.match(r"hf://([^/]+/[^/@]+)", source)[1]] = repo
    results = hub.all([["inspect", source] for _, source, _ in WRONG])
    for result, (_, source, words) in zip(results, WRONG, strict=True):
        assert_refused(result, source, words)
        assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_model_that_is_not_in_the_cache_needs_a_network(hub):
    assert_refused(hub("inspect", "hf://me/it", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set, so nothing is requested, and the Hub's cache does not have all of it")  # fmt: skip
    assert_refused(hub("inspect", "hf://me/it", HF_ENDPOINT="http://127.0.0.1:9"), "cannot connect to the Hub, and the Hub's cache")  # fmt: skip


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "a/../../b.bin", "", "x\\y.bin", "config.json", "a b.bin"])
def test_an_index_that_names_files_elsewhere_is_refused(name, tmp_path):
    from gpt2x.download.hub import Choice, Snapshot, _shards

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    snapshot = Snapshot(COMMIT, frozenset({index.name, "config.json"}), tmp_path.joinpath, lambda name: None)
    with pytest.raises(UnsafeError, match="which is not a weight file beside it"):
        _shards(parse("hf://o/n", "o/n"), snapshot, Choice("", (index.name,), ""))


def test_weights_are_chosen_in_the_order_in_which_a_directory_is_opened():
    from converters import formats
    from gpt2x.download import hub

    module: Any = hub

    assert tuple(module.WEIGHTS) == tuple(name for name in formats.WEIGHTS if name in module.WEIGHTS)
    names = [*module.WEIGHTS, "model.ckpt.index", "x.gguf", *formats.OTHERS]
    every = {*names, "model.ckpt.data-00000-of-00001", "config.json"}
    for name in names:
        choice = module._choose(parse("hf://o/n", "o/n"), frozenset(every), "weights")
        assert choice.files[0] == name
        every.remove(name)


@pytest.mark.parametrize(("folder", "path"), [("", ""), ("q8/", "/q8"), ("q8/", "/q8/m-00002-of-00003.gguf")])
def test_all_parts_of_a_gguf_file_that_was_split_are_downloaded(folder, path):
    from gpt2x.download.hub import _choose

    parts = tuple(f"{folder}m-{number:05d}-of-00003.gguf" for number in (1, 2, 3))
    others = {"README.md", "other/m-00001-of-00002.gguf", f"{folder}m-00001-of-00002.bin"}
    choice = _choose(parse(f"hf://o/n{path}", f"o/n{path}"), frozenset({*parts, *others}), "weights")
    assert choice.files == parts
    assert choice.opened in parts


def test_the_graph_for_adapters_is_downloaded_with_its_model():
    from gpt2x.download.hub import _choose

    model = ("onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_lora.onnx", "onnx/a.onnx_adapter")
    names = frozenset({*model, "genai_config.json", "onnx/other.onnx", "onnx/other_lora.onnx"})
    assert set(_choose(parse("hf://o/n", "o/n"), names, "onnx").files) == set(model)


@pytest.mark.parametrize(
    ("source", "library"), [("hf://a/b", "huggingface_hub"), ("openai://124M", "httpx2"), ("openai://124M", "filelock")]
)
def test_a_download_without_its_library_says_what_to_install(source, library):
    code = f"import sys; sys.modules[{library!r}] = None; from gpt2x.cli import main; main(['inspect', {source!r}])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert f"this needs {library}: pip install 'gpt2x[hub]'" in result.stderr
