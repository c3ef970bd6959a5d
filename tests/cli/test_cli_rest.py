"""`kvilt verify`, `list`, the help, and verbs that other parts of the package bring."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import typer
from cli_kit import data, run
from typer.testing import CliRunner

import kvilt
from kvilt import registry
from kvilt.check import gates
from kvilt.cli import mount
from kvilt.cli.several import spread


def test_verify_on_the_users_own_documents(model_dir: Path, docs: list[Path], store: str, tmp_path: Path) -> None:
    report = data("verify", docs[0].parent, "--model", model_dir, "--store", store, "--tokens", 4)
    assert report["passed"] is True
    assert [g["gate"] for g in report["gates"]] == [f"G{i}" for i in range(1, 10)]
    rows = {r["strategy"].partition("(")[0]: r for r in report["strategies"]}
    assert {"BlockAttention", "Naive", "KVLink", "Epic"} <= set(rows)
    assert rows["BlockAttention"]["max_logit_difference"] > 0
    assert 0 < rows["BlockAttention"]["charged"] < rows["Epic"]["charged"] < 1
    assert "needs" in rows["kv_packet"]["note"]
    assert not list((tmp_path / "store").glob("??/*.safetensors"))  # checks leave the user's store alone


def test_a_failed_gate_is_an_exit_code(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "FAILED" not in run("verify", "--model", model_dir, "--tokens", 2).stdout

    def failing(case: gates.Case) -> float:
        """This one fails."""
        return 0.5

    monkeypatch.setitem(gates.GATES, "G1", failing)
    result = run("verify", "--model", model_dir, "--tokens", 2, code=1)
    assert "FAILED" in result.stdout


def test_list() -> None:
    everything = data("list")
    assert set(everything) == set(registry.TABLE)
    strategies = {s["name"]: s for s in data("list", "strategy")["strategy"]}
    assert strategies["kvlink"]["options"] == {"links": 5}
    assert strategies["full"]["summary"].startswith("Compute the whole prompt")
    text = run("list", "store").stdout
    assert "disk" in text
    assert "policy=lru" in text


def test_help_is_fast_and_version_is_told() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); sys.argv = ['kvilt', '--help']\n"
        "from kvilt.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'too much is imported'\n"
        "print(time.perf_counter() - began)"
    )
    environment = {"PYTHONPATH": str(Path(kvilt.__file__).parents[1]), "PATH": ""}
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert "encode" in done.stdout
        times.append(float(done.stdout.splitlines()[-1]))
    assert min(times) < 0.5
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "kvilt", "--version"], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == kvilt.__version__
    assert time.monotonic() - began < 10


def test_options_with_several_values() -> None:
    assert list(spread(["q", "--docs", "a", "b", "--json", "--docs", "c", "-", "--pick", "1", "--", "-x"])) == (
        ["q", "--docs", "a", "--docs", "b", "--json", "--docs", "c", "--docs", "-", "--pick", "1", "--", "-x"]
    )


@pytest.mark.parametrize("kind", ["app", "function"])
def test_verbs_of_other_parts(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = types.ModuleType("kvilt.elsewhere")
    inner = typer.Typer()

    def speed(text: str, times: int = 1) -> None:
        if text == "bad":
            raise kvilt.errors.UserError("it is bad.")
        print(text * times)

    inner.command()(speed)
    setattr(module, *(("app", inner) if kind == "app" else ("other", speed)))
    monkeypatch.setitem(sys.modules, "kvilt.elsewhere", module)
    monkeypatch.setattr(mount, "PACKAGE", tmp_path)
    (tmp_path / "elsewhere.py").touch()
    app = typer.Typer()
    mount.add(app, "other", "kvilt.elsewhere", "Something else.")
    mount.add(app, "missing", "kvilt.nowhere", "Not there.")
    app.callback()(lambda: None)
    path = ["other", "speed"] if kind == "app" else ["other"]
    runner = CliRunner()
    assert "missing" not in runner.invoke(app, ["--help"]).output
    assert runner.invoke(app, [*path, "ab", "--times", "2"]).stdout == "abab\n"
    assert runner.invoke(app, [*path, "bad"]).exit_code == 2
    assert runner.invoke(app, [*path, "ab", "--tims", "2"]).exit_code == 2
    assert f"kvilt {' '.join(path)}" in runner.invoke(app, [*path, "--help"]).output
