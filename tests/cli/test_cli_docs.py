"""docs/cli.md describes every verb and shows its real help. Its examples run in tests/test_docs.py."""

from __future__ import annotations

import typer
from cli_docs import MARKED, PAGE, updated

from kvilt.cli import cache, collections
from kvilt.cli.app import app

ELSEWHERE = {"demo"}  # on the README, and in docs/training.md and docs/evaluation.md the verbs of others


def names(of: typer.Typer) -> set[str]:
    """Names of an app's own verbs."""
    found = {c.name or (c.callback.__name__ if c.callback else "") for c in of.registered_commands}
    return found - ELSEWHERE


def test_help_texts_are_not_stale() -> None:
    """Danger: the page shows options that are gone."""
    page = PAGE.read_text()
    assert page == updated(page), "run: python tests/cli/cli_docs.py"


def test_every_verb_is_described() -> None:
    """Danger: a verb that nobody finds."""
    described = {m[2] for m in MARKED.finditer(PAGE.read_text())}
    assert described == names(app) | {
        f"{group} {name}" for group, of in (("cache", cache.app), ("collection", collections.app)) for name in names(of)
    }
