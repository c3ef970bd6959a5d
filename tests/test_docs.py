"""Documents that run: every command and every program of the README and the pages, in order, in a folder of its own.

What needs another machine (a GPU, a download, hours) begins with a comment that says so: "# example: ...". It is not run, but
it must be a command with options that exist, or a program that compiles."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from cli_kit import run
from kvilt.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|console|python|\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLE = "# example:"
ELSEWHERE = ("pip ", "make ", "git ")  # what sets a machine up


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every program and command block."""
    return [(m[1], m[2]) for m in BLOCK.finditer(page.read_text()) if m[1] in ("bash", "console", "python")]


def shortened(text: str) -> str:
    """The same with few steps and samples, on the built-in model."""
    return re.sub(r"\b(steps|limit)( ?= ?|[ =])\d+", r"\1\g<2>2", text).replace("MODEL", "builtin")


def commands(language: str, text: str) -> list[str]:
    """The lines of a block that are commands, with continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ") for line in lines if language == "bash" or line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the pages' commands find where they run."""
    (tmp_path / "passages").mkdir()
    texts = ["Ada Lorn was born in Tavik. Ada Lorn works for Brint Labs.", "Brint Labs is based in Orsa."]
    for number, text in enumerate(texts * 2):
        (tmp_path / "passages" / f"{number:02}.txt").write_text(f"{text} This is text {number}.")
    asked = {"question": "How much?", "answers": ["More"]}
    more = [{"text": f"More of it: {n}.", "title": f"More {n}", "id": f"more-{n}", **asked} for n in range(4)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    rows = [{"documents": texts, "question": f"Where was Ada {n} born?", "answers": ["Tavik"]} for n in range(6)]
    for name in ("questions.jsonl", "train.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "questions.txt").write_text("Where was Ada Lorn born?\nWho is based in Orsa?\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_run_as_printed(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the first thing that a reader types does not work."""
    names = vars(types.ModuleType(page.stem))
    monkeypatch.setitem(sys.modules, page.stem, sys.modules[__name__])  # dataclasses look their module up
    for language, text in blocks(page):
        example = text.startswith(EXAMPLE)
        if language == "python":
            code = compile(shortened(text), str(page), "exec", dont_inherit=True)
            if named := re.match(r"# (\w+\.py)\n", text):
                (folder / named[1]).write_text(shortened(text))
            elif not example:
                exec(code, names)
            continue
        for line in commands(language, text):
            if line.startswith("kvilt "):
                _command(line, example)
            elif line.startswith("mkdir "):
                subprocess.run(line, shell=True, check=True, cwd=folder)
            else:
                assert line.startswith(ELSEWHERE), line


def _command(line: str, example: bool) -> None:
    """Run a command in this process, or only read its options."""
    if example:
        arguments = shlex.split(line, comments=True)[1:]
        context = get_command(app).make_context("kvilt", arguments, resilient_parsing=False)
        while getattr(context.command, "commands", None):
            name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, rest, parent=context)
        return
    files = re.match(r"(.*?)< (\S+)(.*)", line)
    given = Path(files[2]).read_text() if files else None
    line = shortened(files[1] + files[3] if files else line)
    line += (
        " --set steps=2 --set batch=2 --set micro_batch=2 --set held_out=0.3" if line.startswith("kvilt train ") else ""
    )
    run(*shlex.split(line, comments=True)[1:], input=given, KVILT_MODEL="builtin", KVILT_STORE="disk:path=caches")


def test_the_quick_start_answers_and_reuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Danger: the first program gives other answers than the page promises, or `doctor` looks into another store."""
    (code,) = (text for language, text in blocks(ROOT / "README.md") if language == "python")
    exec(compile(code, "README.md", "exec", dont_inherit=True), {"__name__": "readme"})
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"print\(.*\.text\)  # (.*)", code)
    assert len(promised) == 2
    assert set(promised) <= set(printed)
    assert any((folder / "caches").rglob("*.safetensors"))
    said = [block for block in blocks(ROOT / "README.md") if not block[1].startswith(EXAMPLE)]
    lines = [line for language, text in said for line in commands(language, text)]
    kvilt = [line for line in lines if line.startswith("kvilt ")]
    assert {line.split()[1] for line in kvilt} >= {"encode", "ask", "verify", "doctor"}
    for line in kvilt:
        if line.split()[1] in ("encode", "doctor"):
            done = run(*shlex.split(line, comments=True)[1:])
    assert "4 of 4 documents will be reused" in done.stdout


def test_links_lead_somewhere() -> None:
    """Danger: a page that was moved."""
    for page in [*PAGES, *(ROOT / "benchmarks").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", ["benchmark_tables.py", "quality_tables.py", "real_tables.py", "bench_stores.py"])
def test_figures_are_those_of_the_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: README and benchmarks/ say other figures than the JSON results beside them."""
    monkeypatch.setattr(sys, "argv", [name, "--check"])
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
