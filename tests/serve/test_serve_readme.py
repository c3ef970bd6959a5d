"""The README's client, as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serve_kit import serving

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_client_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Danger: the first thing that a user of the server types does not work, or nothing is reused the second time."""
    (code,) = re.findall(r"^```py\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    (model,) = re.findall(r'model="([\w-]+)"', code)
    assert f"kvilt serve {model}" in README.read_text("utf-8")
    with serving("builtin", "--store", f"disk:path={tmp_path / 'store'}", log=tmp_path / "log") as server:
        here = code.replace("http://127.0.0.1:8000", server.url).replace(model, "builtin")
        for _ in range(2):
            exec(compile(here, "README.md", "exec", dont_inherit=True), {"__name__": "readme"})
    first, second = (line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert first[0] == second[0]
    assert "Tavik" in first[0]
    assert int(second[1]) > 20
