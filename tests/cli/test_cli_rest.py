"""`kvilt verify`, `list`, the help, and verbs that other parts of the package bring."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvilt
from cli_kit import data, run
from kvilt import registry
from kvilt.check import gates
from kvilt.cli.options import spread
from kvilt.strategies.base import Plain


def test_verify_on_the_users_own_documents(model_dir: Path, docs: list[Path], store: str, tmp_path: Path) -> None:
    """Danger: four tokens of one answer hide that a strategy loses most answers (all were said to agree)."""
    asked = ("--question", "What stands here?", "--question", "Where?")
    report = data("verify", docs[0].parent, "--model", model_dir, "--store", store, "--tokens", 12, *asked)
    assert report["passed"] is True
    assert report["dtype"] == "float32"
    assert [g["gate"] for g in report["gates"]] == [f"G{i}" for i in range(1, 10)]
    assert [q["question"] for q in report["questions"]] == list(asked[1::2])
    floor, *rows = report["strategies"]
    assert floor["kl"] < 1e-6
    assert floor["agreement"] == 1
    named = {re.split(r"[(:]", r["strategy"])[0]: r for r in rows}
    block = named.get("block") or named["BlockAttention"]
    assert block["kl"] > 100 * floor["kl"]
    assert 0 < block["charged"] < (named.get("epic") or named["Epic"])["charged"] < 1
    assert "needs" in named["kv_packet"]["note"]
    assert not (tmp_path / "store").exists()  # checks leave the user's store alone


def test_verify_makes_up_questions(model_dir: Path, docs: list[Path]) -> None:
    """Danger: without questions of one's own nothing is compared."""
    report = data("verify", *docs[:2], "--model", model_dir, "--tokens", 2)
    assert len(report["questions"]) == 2


def test_a_failed_gate_is_an_exit_code(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a model that is served wrongly passes for sound in a script."""

    def failing(case: gates.Case) -> float:
        """This one fails."""
        return 0.5

    monkeypatch.setattr(gates, "GATES", {"G1": failing})
    monkeypatch.setattr(registry, "names", lambda kind: {"full": "", "naive": ""})
    result = run("verify", "--model", model_dir, "--tokens", 2, "--question", "What?", code=1)
    assert "FAILED" in result.stdout


def test_list() -> None:
    """Danger: the list leaves something out, or shows other defaults than the class has."""
    everything = data("list")
    assert set(everything) == set(registry.TABLE)
    for kind, names in everything.items():
        assert {n["name"] for n in names} == set(registry.TABLE[kind])
        for name in names:
            cls = registry.load(kind, name["name"])
            known = inspect.signature(cls).parameters
            defaults = {o: known[o].default for o in registry.parameters(cls)}
            assert name["options"] == {o: "" if d is inspect.Parameter.empty else d for o, d in defaults.items()}, name
            assert name["summary"] == " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
    text = run("list", "store").stdout
    assert "policy=lru" in text
    assert len(text.splitlines()) == len(everything["store"]) + 2


def test_list_says_what_a_model_can_take(model_dir: Path) -> None:
    """Danger: which of eighteen strategies suit a model is found out one error at a time."""
    fits = {n["name"]: n["fits"] for n in data("list", "strategy", model_dir)["strategy"]}
    assert fits["full"] == "yes"
    assert fits["block"] == "yes, the default with sink=system"
    assert fits["auto"] == "yes, chooses block:sink=system"
    assert "needs vectors" in fits["kv_packet"]
    assert fits["kvlink"].startswith("yes, with a warning: ")
    result = run("list", "strategy", model_dir)
    assert "this model" in result.stdout
    assert "untrained" not in result.stderr


def test_other_packages_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: one broken plug-in takes the whole list away."""
    offered = {"outside": f"{__name__}:Outside", "broken": "nowhere.at_all:Thing", "gone": f"{__name__}:Nothing"}
    monkeypatch.setattr(registry, "names", lambda kind: offered)
    outside, broken, gone = data("list", "strategy")["strategy"]
    assert outside == {"name": "outside", "summary": "Somebody else's.", "options": {"size": 3, "sink": "none"}}
    assert broken["summary"].startswith("not available")
    assert gone["summary"].startswith("not available")


@dataclasses.dataclass(frozen=True)
class Outside(Plain):
    """Somebody else's."""

    size: int = 3


@pytest.mark.parametrize("verb", [("--help",), ("list",), ("cache", "ls", "--store", "disk:path=STORE")])
def test_starting_is_fast(verb: tuple[str, ...], tmp_path: Path) -> None:
    """Danger: seconds of imports that the command does not use."""
    arguments = [a.replace("STORE", str(tmp_path / "store")) for a in verb]
    code = (
        "import sys, time\n"
        f"from kvilt.cli import run\nassert run({arguments!r}) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'too much is imported'\n"
        "print(time.process_time(), file=sys.stderr)"  # whatever else this machine does
    )
    environment = {"PYTHONPATH": str(Path(kvilt.__file__).parents[1]), "PATH": ""}

    def seconds(code: str) -> float:
        """Of the processor, at best: whatever else this machine does."""
        runs = [subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)]
        runs += [subprocess.run(runs[0].args, env=environment, capture_output=True, text=True) for _ in range(2)]
        assert all(done.returncode == 0 for done in runs), runs[0].stderr
        return min(float(done.stderr.splitlines()[-1]) for done in runs)

    alone = seconds("import sys, time, typer, typer._adapters; print(time.process_time(), file=sys.stderr)")
    assert seconds(code) < max(0.3, 2.5 * alone)  # a slow machine is slow with typer alone, too


def test_the_version_is_told() -> None:
    """Danger: `python -m kvilt` is not `kvilt`."""
    done = subprocess.run([sys.executable, "-m", "kvilt", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == run("--version").stdout.strip() == kvilt.__version__


def test_options_with_several_values() -> None:
    """Danger: `--docs *.txt` takes the first file only."""
    assert list(spread(["q", "--docs", "a", "b", "--json", "--docs", "c", "-", "--pick", "1", "--", "-x"])) == (
        ["q", "--docs", "a", "--docs", "b", "--json", "--docs", "c", "--docs", "-", "--pick", "1", "--", "-x"]
    )
