"""What the documents say is true: their commands and programs run."""

import re
import shlex
import shutil

import pytest
from adapters import write_adapter
from checkpoints import random_checkpoint
from paths import FIXTURES, ROOT

from converters import WRITERS, open_checkpoint, save_checkpoint
from gpt2x import SHAKESPEARE, ExportOptions, export_onnx

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


@pytest.mark.slow
def test_every_command_of_the_readme_runs(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHAKESPEARE, "models/124M")
    shutil.copy(FIXTURES / "nanogpt/ckpt.pt", "ckpt.pt")
    lines = [line for block in blocks(ROOT / "README.md", "console") for line in block.splitlines()]
    commands = [line.removeprefix("$ gpt2x ") for line in lines if line.startswith("$ gpt2x ")]
    assert len(commands) >= 9
    for command in commands:
        result = gpt2x(*shlex.split(command, comments=True))
        assert result.exit_code == 0, (command, result.output)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """The base and the adapter of docs/adapters.md, in the current directory."""
    monkeypatch.chdir(tmp_path)
    base = open_checkpoint(SHAKESPEARE)
    save_checkpoint(base, "gpt2-hf")
    for name in ("lora", "lora-fr", "lora-poems"):
        write_adapter(tmp_path / name, base)


@pytest.mark.slow
def test_every_command_on_adapters_runs(gpt2x, tuned):
    lines = [line for block in blocks(ROOT / "docs" / "adapters.md", "console") for line in block.splitlines()]
    assert len(lines) == 9
    for line in lines:
        result = gpt2x(*shlex.split(line.removeprefix("$ gpt2x "), comments=True))
        assert result.exit_code == 0, (line, result.output)


def test_the_programs_on_adapters_run(tuned, capfd):
    merging, choosing, genai = blocks(ROOT / "docs" / "adapters.md", "python")
    exec(compile(merging, "adapters.md", "exec"), {})
    assert "merged a LoRA adapter, lora: 4 matrices of rank 4" in capfd.readouterr().out
    options = ExportOptions(adapters={"french": "lora-fr", "poems": "lora-poems"})
    export_onnx(open_checkpoint("gpt2-hf"), "gpt2-onnx", options)
    exec(compile(choosing, "adapters.md", "exec"), {})
    assert "('french', 'poems')" in capfd.readouterr().out
    pytest.importorskip("onnxruntime_genai")
    exec(compile(genai, "adapters.md", "exec"), {})
    assert capfd.readouterr().out.startswith("ROMEO:")


def test_every_command_of_the_page_on_scoring_runs(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_onnx(open_checkpoint(SHAKESPEARE), "gpt2-onnx", ExportOptions(("fp32", "int8")))
    (tmp_path / "book.txt").write_text("To be, or not to be.")
    (tmp_path / "texts.jsonl").write_text('{"text": "To be, or not to be."}')
    block = blocks(ROOT / "docs/scoring.md", "text")[0]
    for command in block.splitlines():
        result = gpt2x(*shlex.split(command.removeprefix("gpt2x "), comments=True))
        assert result.exit_code == 0, (command, result.output)


def test_the_two_commands_of_the_readme_are_those_of_the_makefile():
    rules = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(), re.M)
    targets = {target for rule in rules for target in rule.split()}
    made = re.findall(r"(?:^\$ |`)make ([\w-]+)", "".join(path.read_text() for path in DOCS), re.M)
    assert {"demo", "test"} <= set(made) <= targets


@pytest.mark.parametrize(
    "program",
    [code for page in ("README.md", "docs/generation.md", "docs/scoring.md") for code in blocks(ROOT / page, "python")],
    ids=lambda code: code.splitlines()[-1][:40],
)
def test_every_program_of_the_readme_and_of_two_pages_runs(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")  # torch's word on TorchScript itself
def test_the_programs_on_running_exports_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    programs = blocks(ROOT / "docs" / "export.md", "python")
    assert len(programs) == 9
    for program in programs:
        exec(compile(program, "export.md", "exec"), {})
    ids = [int(i) for i in capsys.readouterr().out.splitlines()[-1].split()]
    assert len(ids) == 20


def test_the_example_of_the_package_runs(capsys):
    import gpt2x

    code = "\n".join(line[4:] for line in gpt2x.__doc__.splitlines() if line.startswith("    "))
    exec(compile(code, "<documentation>", "exec"), {})
    assert capsys.readouterr().out.startswith("ROMEO:")


def test_the_error_that_the_readme_shows_is_the_real_one(gpt2x, tmp_path, monkeypatch):
    import safetensors.numpy

    monkeypatch.chdir(tmp_path)
    from converters import GPT2Config

    arrays = {
        n: t.read()
        for n, t in random_checkpoint(GPT2Config(n_layer=12, n_head=1, n_embd=2, n_ctx=3, n_vocab=5)).tensors.items()
    }
    arrays["h.0.attn.rotary"] = arrays.pop("h.11.ln_2.bias")
    safetensors.numpy.save_file(arrays, "model.safetensors")
    shown = next(block for block in blocks(ROOT / "README.md", "text") if block.startswith("Error"))
    assert gpt2x("convert", "model.safetensors", "out.bin").stderr == shown


def anchors(path):
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere():
    for path in DOCS:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            page = path.parent / name if name else path
            assert page.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(page), f"{path.name}: {target}"


def test_every_file_that_a_document_names_is_there():
    for path in DOCS:
        for name in re.findall(
            r"`((?:tests|examples|converters|gpt2x|docs|benchmarks)/[\w/.]+\.\w+)`", path.read_text(encoding="utf-8")
        ):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_the_tables_of_the_formats_are_those_of_the_code(monkeypatch):
    import sys

    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_formats

    text = make_formats.PAGE.read_text()
    assert text == make_formats.page(text), "run python docs/make_formats.py"
    assert "`blk.{i}.attn_qkv.weight` **T**" in text
    del sys.modules["make_formats"]


def test_the_measures_count_comments_alone_in_their_line_and_follow_a_reader_for_two_levels(monkeypatch):
    import sys

    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import measure_code

    text = "# one\nx = 1  # beside code\nif x:\n    # two\n    y = '# no comment'\n"
    assert measure_code.own_comments(text) == 2
    path = measure_code.path_of(lambda: open_checkpoint(SHAKESPEARE))
    assert path[:2] == ["converters.opening", "converters.opening.find"]
    assert "converters.opening.select_entry" in path  # called by the step that opens the container
    assert "converters.containers.tf_bundle" not in path  # the third level
    del sys.modules["measure_code"]


def test_every_command_is_in_the_readme():
    from gpt2x.cli import main

    text = (ROOT / "README.md").read_text()
    assert all(f"gpt2x {name}" in text or f"make {name}" in text for name in main.commands)


def test_the_training_example_trains_and_saves_what_can_be_used(gpt2x, tmp_path, monkeypatch):
    """A few steps of the example that made the shipped model, on a small text."""
    import sys

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from click.testing import CliRunner
    from train_shakespeare import main

    words = "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer\n"
    (tmp_path / "text.txt").write_text("".join(f"{words[i % 40 :]}{i}\n" for i in range(400)))
    options = [
        "--steps",
        "3",
        "--batch-size",
        "2",
        "--vocab",
        "300",
        "--context",
        "16",
        "--width",
        "12",
        "--layers",
        "1",
        "--heads",
        "2",
    ]
    out = tmp_path / "out"
    result = CliRunner().invoke(main, [str(tmp_path / "text.txt"), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    assert "held out" in result.output
    assert gpt2x("generate", out, "To be", "--max-new-tokens", 5).exit_code == 0
    del sys.modules["train_shakespeare"]


def test_a_tiny_model_is_enough_for_every_format(tmp_path):
    for kind in WRITERS:
        save_checkpoint(random_checkpoint(), tmp_path / kind, kind)


def test_the_list_of_commands_cuts_no_line(gpt2x):
    from gpt2x.cli import main

    lines = gpt2x("--help").stdout.split("Commands:")[1].split("Exit codes")[0].strip().splitlines()
    assert len(lines) == len(main.commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)
