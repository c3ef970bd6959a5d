"""`kvilt demo` asks with everything that ships and draws its plot."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvilt import builtin
from kvilt.lab import demo


def test_the_demo_shows_every_method_that_ships(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: the first thing a new user runs leaves out the trained methods, or fails without a terminal."""
    pytest.importorskip("matplotlib")
    few = dict(list(builtin.documents().items())[:20])
    monkeypatch.setattr(demo, "_encoded", lambda: list(few.values()))
    demo.demo("builtin", 5, tmp_path / "demo.png", "")
    table = capsys.readouterr().out
    for name in (*demo.UNTRAINED, *demo.WRAPPERS, "kvlink:links=0", "kvlink:links=5"):
        assert name.split(":")[0] in table
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
