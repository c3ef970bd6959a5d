"""`kvilt bench compression`: what it measures is what is stored."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from kvilt.lab.bench.cli import app


def test_bytes_errors_and_times(model_dir: Path, tmp_path: Path) -> None:
    """Danger: errors against the compressed rows themselves, or bytes of something that is not on the disk."""
    (tmp_path / "text.txt").write_text("The river Sel runs from Orsa to the sea, slowly. " * 8)
    arguments = ["compression", "--model", str(model_dir), "--docs", str(tmp_path / "text.txt"), "--repeats", "1"]
    chosen = [a for c in ("int8", "int4", "fp8", "keydiff:keep=0.25") for a in ("--compress", c)]
    result = CliRunner().invoke(app, [*arguments, *chosen, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "compression.json").read_text())
    rows = found["rows"]
    assert found["tokens"] == 393
    assert rows["none"]["bytes_per_token"] == 2 * 4 * 2 * 16 * 2
    assert rows["none"]["keys_error"] == rows["keydiff:keep=0.25"]["values_error"] == 0
    assert 0.24 < rows["keydiff:keep=0.25"]["bytes_per_token"] / rows["none"]["bytes_per_token"] < 0.27
    for name, error in {"int8": 0.01, "fp8": 0.03, "int4": 0.12}.items():
        assert 0 < rows[name]["keys_error"] < error
        assert 0 < rows[name]["values_error"] < error
        assert rows[name]["bytes_per_token"] < 0.65 * rows["none"]["bytes_per_token"]
        assert rows[name]["load_s"]["median"] > 0
