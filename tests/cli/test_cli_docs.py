"""docs/cli.md describes every verb, shows its real help, and its examples work in the order they are printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import typer
from cli_docs import EXAMPLE, MARKED, PAGE, updated
from cli_kit import run, write_documents

from kvilt.cli import cache
from kvilt.cli.app import app

MOUNTED = {"bench", "evaluate", "calibrate", "train", "demo"}


def names(of: typer.Typer) -> set[str]:
    """Names of an app's own verbs."""
    found = {c.name or (c.callback.__name__ if c.callback else "") for c in of.registered_commands}
    return found - MOUNTED


def test_help_texts_are_not_stale() -> None:
    page = PAGE.read_text()
    assert page == updated(page), "run: python tests/cli/cli_docs.py"


def test_every_verb_is_described() -> None:
    described = {m[2] for m in MARKED.finditer(PAGE.read_text())}
    assert described == names(app) | {f"cache {name}" for name in names(cache.app)}


def test_examples_work(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path / "passages", 6)
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": "More of it.", "title": "More", "id": "more"}))
    monkeypatch.chdir(tmp_path)
    examples = [shlex.split(m[1]) for m in EXAMPLE.finditer(PAGE.read_text())]
    used = {e[0] for e in examples}
    assert used == names(app) | {"cache"}
    for example in examples:
        run(*example, KVILT_MODEL=str(model_dir), KVILT_STORE="disk:path=caches")
