"""``gpt2x.export.push`` uploads a whole directory or nothing, and needs a login. The Hub is that of hub_server."""

import contextlib
import itertools
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import termios
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from checkpoints import random_checkpoint
from hub_server import HANGS, SIGNATURE, environment, running

from converters import DestinationError
from gpt2x import export_onnx
from gpt2x.cli import explain
from gpt2x.export.push import check_push, push

BIG = bytes(range(256)) * 45_000  # above the Hub's limit without LFS; the file's suffix does not imply LFS


@pytest.fixture
def hub(tmp_path):
    with running(tmp_path / "repositories") as hub:
        yield hub


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export, with a large file added."""
    directory = tmp_path_factory.mktemp("exported") / "an export"
    export_onnx(random_checkpoint(), directory, need_tokenizer=False)
    (directory / "onnx" / "model_q4.onnx_data").write_bytes(BIG)
    (directory / "vocab.json").write_text('{"Ġé": 0}', encoding="utf-8")
    (directory / "onnx" / "empty.txt").touch()
    return directory


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


SEVERAL = """if True:
    import json, os, sys, time
    from pathlib import Path
    from converters import ConversionError
    from gpt2x.export.push import check_push, push
    time.sleep = lambda seconds: None  # between the attempts of huggingface_hub
    def fetch(name):
        import huggingface_hub
        huggingface_hub.utils.disable_progress_bars()
        return huggingface_hub.snapshot_download(name)
    do = {"check": check_push, "push": lambda name, directory: push(Path(directory), name), "fetch": fetch}
    results = []
    for action, login, *arguments in json.loads(sys.argv[1]):
        os.environ.pop("HF_TOKEN", None)
        if login:
            os.environ["HF_TOKEN"] = login
        try:
            results.append(do[action](*arguments))
        except ConversionError as error:
            results.append(str(error))
    print(json.dumps(results))
"""


@pytest.fixture
def client(hub, tmp_path):
    """The environment of a client that uses this Hub, with an empty cache."""
    return environment(hub.url, tmp_path / "hf-home", PYTHONWARNINGS="error::ResourceWarning")


@pytest.fixture
def run(client):
    """Run several steps in one new process, which takes less time: (action, login, name[, directory])."""

    def run(*steps, **more):
        command = [sys.executable, "-c", SEVERAL, json.dumps(steps, default=str)]
        done = subprocess.run(command, capture_output=True, text=True, env={**client, **more}, timeout=HANGS)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    return run


def written(hub):
    return [request for request in hub.requests if request.method not in ("GET", "HEAD")]


def paths(hub, part):
    return [request.path for request in hub.requests if part in request.path]


# ------------------------------------------------------------------------------------------------------ uploads


def test_a_directory_is_uploaded_unchanged_without_private_files(hub, run, exported, tmp_path):
    directory = tmp_path / "export"
    shutil.copytree(exported, directory)
    unrelated = ("notes.txt", "checkpoint-500/optimizer.pt", "training_args.bin")
    for hidden in (".env", ".cache/huggingface/x.lock", "onnx/.part", "onnx/__pycache__/a.pyc", *unrelated):
        (directory / hidden).parent.mkdir(parents=True, exist_ok=True)
        (directory / hidden).write_text("secret")
    name = "me/a.b_c-2"
    steps = ("check", "hf_test", name), ("push", "hf_test", name, directory), ("fetch", None, name)
    checked, url, fetched = run(*steps)
    assert (checked, url) == (None, f"{hub.url}/{name}")
    assert contents(hub.root / name) == contents(exported)
    assert contents(Path(fetched)) == contents(exported)
    assert len(paths(hub, "/commit/")) == 1
    assert len(paths(hub, "/lfs/me/")) == 3  # the graph, its weights and the large file
    assert all(request.authorized for request in written(hub) if not request.path.startswith("/lfs/"))


def test_a_temporary_fault_is_retried_without_printing_a_signature(hub, run, exported):
    hub.faults["PUT /lfs/"] = iter([503, 500])
    assert run(("push", "hf_test", "me/x", exported)) == [f"{hub.url}/me/x"]  # and nothing on stderr
    assert [request.status for request in hub.requests if request.method == "PUT"].count(200) == 3


def test_progress_bars_are_shown_on_a_terminal(hub, client, exported):
    steps = json.dumps([["push", "hf_test", "me/x", str(exported)]])
    terminal, end = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = subprocess.Popen([sys.executable, "-c", SEVERAL, steps], stdout=subprocess.PIPE, stderr=end, env=client)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(terminal, 4096):
            shown += data
    os.close(terminal)
    assert json.loads(command.communicate()[0]) == [f"{hub.url}/me/x"]
    drawn = shown.decode(errors="replace")
    assert "model.onnx" in drawn
    assert "hf_test" not in drawn
    assert SIGNATURE not in drawn


# ------------------------------------------------------------------------------------------ refused before a write


@pytest.mark.parametrize(
    "name",
    ["", "gpt2", "me/", "/x", "me/x/y", "me//x", "me/x ", "me/x\n", "me/a--b", "a--b/x", "me/a..b", "../x", "me/..", "me/.x", "-me/x", "me/x.",
     "me/x.git", "me/ä", "me/" + "x" * 97, "m" * 97 + "/x", "hf://me/x", "https://huggingface.co/me/x", "me/x@main", "me\\x", "me/x?y"],
)  # fmt: skip
def test_an_invalid_repository_name_is_refused(name):
    with pytest.raises(DestinationError, match=r"not a valid repository name, which is OWNER/NAME"):
        check_push(name)
    with pytest.raises(DestinationError, match=r"not a valid repository name, which is OWNER/NAME"):
        push(Path(), name)


REFUSED = (
    (None, "me/new", "me/new: uploading needs a login: log in (hf auth login) or set HF_TOKEN"),
    ("hf_wrong", "me/new", "me/new: the Hub rejects this login: log in again (hf auth login), or correct or unset HF_TOKEN"),
    ("hf_new\x01line", "me/new", "me/new: the Hub rejects this login"),
    ("hf_é", "me/new", "me/new: the Hub rejects this login"),
    ("hf_read", "me/new", "me/new: this login can only read"),
    ("hf_test", "you/new", "you/new: you does not belong to this login: use its own name, me, or one of its organizations"),
    ("hf_test", "Me/new", "Me/new: the owner's name on the Hub is me: use me/new"),
    ("hf_fine", "TEAM/new", "TEAM/new: the owner's name on the Hub is team: use team/new"),
    ("hf_test", "me/there", "me/there: already exists on the Hub"),
    ("hf_test", "me/There", "me/There: already exists on the Hub"),
    ("hf_fine", "you/there", "you/there: already exists on the Hub"),
)  # fmt: skip


def test_check_push_refuses_in_one_line_and_writes_nothing(hub, run):
    for name in ("me/there", "you/there"):
        (hub.root / name).mkdir(parents=True)
    errors = run(*(("check", login, name) for login, name, _ in REFUSED))
    for error, (login, _, words) in zip(errors, REFUSED, strict=True):
        assert error.startswith(words)
        assert "\n" not in error
        assert not login or login not in error
    assert written(hub) == []
    assert sorted(path.name for path in hub.root.glob("*/*")) == ["there", "there"]


def test_a_login_with_write_access_is_accepted(hub, run, exported):
    steps = [("check", "hf_test", "team/x"), ("check", "hf_test", "me/X"), ("check", "hf_fine", "you/x")]
    *checked, none = run(*steps, ("push", None, "me/x", exported))
    assert checked == [None, None, None]  # what a fine-grained login can write to, the Hub says only when it is used
    assert none == "me/x: uploading needs a login: log in (hf auth login) or set HF_TOKEN"
    assert written(hub) == []


def test_a_hub_that_cannot_be_reached_is_reported(run, exported):
    offline = run(("check", "hf_test", "me/x"), HF_HUB_OFFLINE="1")
    assert offline == ["me/x: HF_HUB_OFFLINE is set, so nothing is requested; unset it"]
    steps = ("check", "hf_test", "me/x"), ("push", "hf_test", "me/x", exported)
    check, upload = run(*steps, HF_ENDPOINT="http://127.0.0.1:9")
    assert check == "me/x: cannot connect to the Hub; is there a network? HF_ENDPOINT selects a mirror"
    assert (
        upload
        == f"{check}. Nothing was uploaded; {exported} is complete. Upload it with: hf upload OWNER/NAME '{exported}'"
    )


def test_a_missing_library_says_what_to_install(monkeypatch, exported):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for ask in (lambda: check_push("me/x"), lambda: push(exported, "me/x")):
        with pytest.raises(ModuleNotFoundError) as missing:
            ask()
        assert explain(missing.value) == "this needs huggingface_hub: pip install 'gpt2x[hub]'"


def test_importing_push_imports_no_http_library():
    code = "import gpt2x.export.push, sys; assert not {'huggingface_hub', 'httpx2', 'http.client', 'urllib.request'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def outside(directory):
    (directory / "onnx/x.bin").symlink_to("/etc/hostname")


def a_folder(directory):
    (directory / "onnx/x").symlink_to(".")


def nothing(directory):
    (directory / "onnx/x.bin").symlink_to("no-such-file")


def above(directory):
    (directory / "onnx/x.bin").symlink_to("../../other")
    directory.with_name("other").write_text("")


def the_configuration(directory):
    (directory / "config.json").rename(directory.with_name("blob"))
    (directory / "config.json").symlink_to("../blob")  # as in the Hub's cache


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        (outside, "a link to a file outside of the directory, /etc/hostname"),
        (a_folder, "a link to a folder"),
        (nothing, "a broken link"),
        (above, "a link to a file outside of the directory, /.*/other"),
        (the_configuration, "a link to a file outside of the directory, /.*/blob"),
    ],
)
def test_a_link_that_leaves_the_directory_is_not_followed(link, fault, tmp_path):
    directory = tmp_path / "export"
    (directory / "onnx").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    link(directory)
    with pytest.raises(
        DestinationError, match=rf"/(x|x\.bin|config\.json): {fault}, which is not uploaded: replace it by a copy"
    ):
        push(directory, "me/x")


def test_a_file_without_permission_to_read_it_is_named_before_anything_is_written(hub, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "config.json")
    with pytest.raises(DestinationError, match=r"config.json: no permission to read it: change its permissions"):
        push(tmp_path, "me/x")
    assert hub.requests == []


def test_an_empty_directory_and_a_name_that_is_not_printable_are_refused(tmp_path):
    with pytest.raises(DestinationError, match="no files to upload"):
        push(tmp_path / "none", "me/x")
    (tmp_path / "onnx").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/onnx/odd\xff")).touch()
    with pytest.raises(DestinationError, match="characters that are not printable"):
        push(tmp_path, "me/x")


# ------------------------------------------------------------------------------------------------ failed uploads

BROKEN = (
    ("stored", "PUT /lfs/me/stored", 501, "the Hub answers with status 501"),
    ("denied", "PUT /lfs/me/denied", 403, "the Hub refuses the upload with status 403: This is a fault"),
    ("closed", "PUT /lfs/me/closed", "close", "the connection to the Hub was lost"),
    (
        "moved",
        "POST /api/models/me/moved/preupload",
        400,
        "the Hub refuses the upload with status 400: This is a fault",
    ),
    ("commit", "POST /api/models/me/commit/commit", 500, "the Hub answers with status 500"),
    ("lost", "POST /api/models/me/lost/commit", "close", "the connection to the Hub was lost"),
)


@pytest.mark.slow
def test_a_failed_upload_reports_the_situation_and_the_command_to_continue(hub, run, client, exported):
    before = contents(exported)
    for _, requests, fault, _ in BROKEN:
        hub.faults[requests] = itertools.repeat(fault)
    errors = run(*(("push", "hf_test", f"me/{name}", exported) for name, *_ in BROKEN))
    for error, (name, _, _, words) in zip(errors, BROKEN, strict=True):
        assert error.startswith(f"me/{name}: {words}"), error
        assert (
            f". The repository exists now, and may be empty or incomplete; {exported} is complete. Upload it with: "
            in error
        )
        assert "hf_test" not in error
        assert SIGNATURE not in error
        assert "\n" not in error
        assert contents(hub.root / "me" / name) == {}
    assert contents(exported) == before

    hub.faults.clear()
    program, *arguments = shlex.split(errors[0].split("Upload it with: ")[1])
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    again = subprocess.run(command, capture_output=True, text=True, env={**client, "HF_TOKEN": "hf_test"})
    assert again.returncode == 0, again.stderr
    assert contents(hub.root / "me/stored") == before


def test_a_refusal_by_the_hub_changes_nothing(hub, run, exported):
    (hub.root / "me/x").mkdir(parents=True)
    (hub.root / "me/x/config.json").write_text("somebody made it meanwhile")
    there, denied = run(("push", "hf_test", "me/x", exported), ("push", "hf_fine", "you/x", exported))
    nothing = f". Nothing was uploaded; {exported} is complete. Upload it with: hf upload OWNER/NAME '{exported}'"
    assert there.startswith("me/x: already exists on the Hub")
    assert denied.startswith("you/x: this login cannot create or change the repository: check OWNER")
    assert there.endswith(nothing)
    assert denied.endswith(nothing)
    assert contents(hub.root) == {"me/x/config.json": b"somebody made it meanwhile"}
    assert [request.path for request in written(hub)] == ["/api/repos/create"] * 2


def test_a_mirror_without_xet_is_reported(hub, run, exported):
    pytest.importorskip("hf_xet")
    (error,) = run(("push", "hf_test", "me/x", exported), HF_HUB_DISABLE_XET="0")
    assert error.startswith("me/x: cannot connect to the Hub's storage of large files (Xet): set HF_HUB_DISABLE_XET=1")


# ------------------------------------------------------------------------------------------------- the local Hub


def ask(hub, path, method="GET", data=None, **headers):
    request = urllib.request.Request(hub.url + path, data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=HANGS) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def test_the_local_hub_serves_files_ranges_and_pages_of_other_origins(hub):
    file = hub.root / "me/x/onnx/model.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"0123456789")
    where = "/me/x/resolve/main/onnx/model.onnx"
    status, headers, data = ask(hub, where)
    assert (status, data) == (200, b"0123456789")
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert "X-Linked-ETag" in headers["Access-Control-Expose-Headers"]
    assert re.fullmatch('"[0-9a-f]{64}"', headers["ETag"])
    assert ask(hub, where, "HEAD")[1]["Content-Length"] == "10"
    for wanted, part in (("bytes=2-4", b"234"), ("bytes=7-", b"789"), ("bytes=-2", b"89"), ("bytes=8-99", b"89")):
        status, headers, data = ask(hub, where, Range=wanted)
        assert (status, data) == (206, part)
        assert headers["Content-Range"].endswith("/10")
    assert ask(hub, where, Range="bytes=10-")[0] == 416
    assert ask(hub, where, "OPTIONS")[0] == 204
    listing = json.loads(ask(hub, "/api/models/me/x/tree/main?recursive=true")[2])
    assert [row["path"] for row in listing] == ["onnx", "onnx/model.onnx"]
    commit = json.loads(ask(hub, "/api/models/me/x")[2])["sha"]
    assert ask(hub, f"/me/x/resolve/{commit}/onnx/model.onnx")[0] == 200
    for path, code in (
        ("/me/x/resolve/main/onnx/none", "EntryNotFound"),
        ("/me/x/resolve/main/%2e%2e/x", "EntryNotFound"),
        ("/me/x/resolve/v1/onnx/model.onnx", "RevisionNotFound"),
        ("/api/models/me/none", "RepoNotFound"),
    ):
        status, headers, _ = ask(hub, path)
        assert (status, headers["X-Error-Code"]) == (404, code)


def test_the_local_hub_rejects_uploads_without_a_login_and_damaged_objects(hub):
    (hub.root / "me/x").mkdir(parents=True)
    line = b'{"key": "header", "value": {"summary": "x"}}\n'
    assert ask(hub, "/api/models/me/x/commit/main", "POST", line)[0] == 401
    assert ask(hub, "/api/models/me/x/commit/main", "POST", line, Authorization="Bearer hf_wrong")[0] == 401
    assert ask(hub, "/api/models/me/x/commit/main", "POST", line, Authorization="Bearer hf_read")[0] == 403
    escape = line + b'{"key": "file", "value": {"path": "../y", "content": "", "encoding": "base64"}}'
    assert ask(hub, "/api/models/me/x/commit/main", "POST", escape, Authorization="Bearer hf_test")[0] == 400
    assert ask(hub, f"/lfs/me/x/{'0' * 64}/3?{SIGNATURE}", "PUT", b"abc")[0] == 400
    assert ask(hub, f"/lfs/me/x/{'0' * 64}/3", "PUT", b"abc")[0] == 403
    assert contents(hub.root) == {}
