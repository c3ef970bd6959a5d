"""`kvilt demo` asks with everything that ships and draws its plot."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_kit import run
from kvilt.lab import demo


def test_the_demo_shows_every_method_that_ships(tmp_path: Path) -> None:
    """Danger: the first thing a new user runs leaves out the trained methods, or fails without a terminal."""
    pytest.importorskip("matplotlib")
    table = run("demo", "--questions", 2, "--out", tmp_path / "demo.png").stdout
    for name in (*demo.STRATEGIES["builtin"], *demo.CHECKPOINTS["builtin"].values()):
        assert name in table
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
