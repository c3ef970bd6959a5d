"""Keeps the help texts in docs/cli.md those of the command line: `python tests/cli/cli_docs.py` writes them."""

from __future__ import annotations

import re
from pathlib import Path

from cli_kit import run

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
MARKED = re.compile(r"(<!-- help: kvilt ([\w ]+) -->\n)(.*?)(<!-- end of help -->)", re.DOTALL)


def help_of(verb: str) -> str:
    """What `kvilt VERB --help` prints."""
    return "\n".join(line.rstrip() for line in run(*verb.split(), "--help").stdout.strip().splitlines())


def updated(page: str) -> str:
    """The page with every help text as it is now."""
    return MARKED.sub(lambda m: f"{m[1]}```text\n{help_of(m[2])}\n```\n{m[4]}", page)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
