"""The benchmarks can be run as the documents say. What they measure is no test."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from paths import ROOT

from gpt2x.cli import main as gpt2x

FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if "__main__" in path.read_text())
PAGE = ROOT / "docs" / "benchmarks.md"


class Parsed(BaseException):
    """A command line was accepted. The program takes no exception of this kind for an error of its own."""


@pytest.fixture(autouse=True)
def their_modules(monkeypatch):
    """They import one another by names such as ``convert``, which other tests must not find."""
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.fixture
def parse(monkeypatch):
    """Run a script until it has parsed its command line."""

    def stop(*_):
        raise Parsed

    def parse_args(self, *args):
        if self.parse_known_args(*args)[1]:
            self.error("unknown arguments")
        raise Parsed

    def run(path, arguments):
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")

    command = click.Command.invoke
    monkeypatch.setattr(
        click.Command, "invoke", lambda self, ctx: stop() if type(self) is click.Command else command(self, ctx)
    )
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    return run


def commands(text):
    """The commands of a page that run benchmarks: in blocks after ``$``, and in code spans."""
    spans = re.findall(r"^\$ (.+)$|`([^`]+)`", re.sub(r"```\w*", "", text), re.M)
    found = [" ".join((block or span).split()) for block, span in spans]
    return [
        shlex.split(command, comments=True)
        for command in found
        if re.match(r"make bench|python benchmarks/|gpt2x bench", command)
    ]


@pytest.fixture(scope="module")
def made():
    """What each target of the Makefile runs: scripts with their options, and ``ARGS`` in place of more."""
    targets = sorted(set(re.findall(r"\bbench-\w+", (ROOT / "Makefile").read_text())))
    make = ["make", "-n", *targets, "ARGS=ARGS"]
    shown = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout.replace("\\\n", " ")
    runs = [shlex.split(line) for line in re.findall(r"/python (benchmarks/.+)$", shown, re.M)]
    assert [f"bench-{Path(script).stem}" for script, *_ in runs] == targets
    return dict(zip(targets, runs, strict=True))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_benchmark_says_what_it_takes(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code
    assert "usage: " in capsys.readouterr().out.lower()


def test_make_runs_every_benchmark_alone_or_as_a_part_of_another(made):
    run = {script for script, *_ in made.values()}
    assert run == {f"benchmarks/{path.name}" for path in SCRIPTS} - {"benchmarks/to_gguf.py"}
    assert '"to_gguf.py"' in (FOLDER / "decode.py").read_text()
    assert set(re.search(r"^bench:([^#]+)##", (ROOT / "Makefile").read_text(), re.M)[1].split()) <= set(made)


@pytest.mark.parametrize("page", ["benchmarks", "quantization"])
def test_the_commands_of_the_documents_are_accepted(page, parse, made):
    found = commands((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    assert found
    for program, *arguments in found:
        if program == "gpt2x":
            with pytest.raises(Parsed):
                gpt2x(arguments)
        elif program == "python":
            parse(ROOT / arguments[0], arguments[1:])
        elif arguments != ["bench"]:
            target, *variables = arguments
            given = dict(variable.split("=", 1) for variable in variables)
            script, *options = made[target]
            options[options.index("ARGS") :] = shlex.split(given.get("ARGS", ""))
            parse(ROOT / script, options)


def test_the_page_names_the_command_of_every_table():
    parts = {command[1] for command in commands(PAGE.read_text(encoding="utf-8")) if command[0] == "make"}
    assert {
        f"bench-{name}" for name in ("convert", "export", "decode", "score", "soak", "speculate", "adapters")
    } <= parts


def test_a_command_that_is_not_accepted_is_noticed(parse, capsys):
    with pytest.raises(SystemExit):
        parse(FOLDER / "score.py", ["--round", "x", "--unknown"])
    with pytest.raises(SystemExit):
        parse(FOLDER / "speculate.py", ["FOLDER", "--unknown"])
    assert capsys.readouterr().err


def test_the_plot_is_that_of_the_table():
    import plot

    assert plot.PICTURE.read_text() == plot.draw(PAGE.read_text(encoding="utf-8")), "run python benchmarks/plot.py"


def test_the_plot_shows_every_row_with_its_numbers():
    import plot

    page = PAGE.read_text(encoding="utf-8")
    drawn = plot.draw(page)
    table = plot.rows(page)
    assert len(table) >= 17
    assert {row.group for row in table} == set(plot.GROUPS)
    for row in table:
        assert f">{row.name}<" in drawn
    changed = page.replace("| 389, 263 |", "| 400, 263 |", 1)
    assert changed != page
    assert ">263 to 400<" in plot.draw(changed)
    with pytest.raises(ValueError, match="no table"):
        plot.draw(page.replace(plot.SECTION, "### Another"))
