"""Documents that run: the README's commands and code, and what it promises to be short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_quick_start_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Python: the code block, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert any((tmp_path / "caches").rglob("*.safetensors"))


def test_commands_run_as_printed(tmp_path: Path) -> None:
    """On the command line: every `kvilt` line of the README, one after the other."""
    passages = tmp_path / "passages"
    passages.mkdir()
    (passages / "ada.txt").write_text("Ada Lorn was born in Tavik. Ada Lorn works for Brint Labs.")
    (passages / "brint.txt").write_text("Brint Labs is based in Orsa.")
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("kvilt ")]
    assert {line.split()[1] for line in commands} == {"encode", "ask", "verify", "doctor"}
    for line in commands:
        run = line.split("#")[0].replace("kvilt ", f"{sys.executable} -c 'from kvilt.cli import main; main()' ", 1)
        done = subprocess.run(
            run, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        expected = (0, 1) if line.split()[1] == "doctor" else (0,)  # doctor reports 1 when it finds something to say
        assert done.returncode in expected, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("name", ["benchmark_tables.py", "quality_tables.py"])
def test_figures_are_those_of_the_results(name: str) -> None:
    """README and benchmarks/ hold what the JSON results beside them say."""
    script = [sys.executable, str(ROOT / "scripts" / name), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
