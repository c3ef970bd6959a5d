"""docs/extending.md: the method shown there is short, runs as printed, and passes what our own have to pass."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core_kit import DOCUMENTS, QUESTION, TOLERANCE, ask, engine_of, off
from kvilt import registry
from kvilt.check import gates

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
METHOD, USE = (code for language, code in BLOCKS if language == "python")
(DECLARED,) = (tomllib.loads(code) for language, code in BLOCKS if language == "toml")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's module in a folder of its own, declared as an installed package would declare it."""
    points = DECLARED["project"]["entry-points"]
    lines = [f"[{group}]\n" + "\n".join(f"{n} = {v}" for n, v in found.items()) for group, found in points.items()]
    about = tmp_path / "glance-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: glance\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join(lines))
    (tmp_path / "glance.py").write_text(METHOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("glance")
    del sys.modules["glance"]


def test_a_method_is_at_most_25_lines() -> None:
    """Danger: adding a method becomes work, and nobody does."""
    assert len([line for line in METHOD.splitlines() if not line.startswith("#")]) <= 25


def test_the_page_runs_as_printed(installed: Any, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Danger: the first thing a contributor tries fails."""
    exec(compile(USE.replace('"builtin"', repr(str(model_dir))), "extending.md", "exec"), {"__name__": "page"})
    assert "glance:sink=none,share=0.2" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "glm-interleaved"])
def test_it_passes_the_gates_under_its_name(installed: Any, family: str) -> None:
    """Danger: the example is wrong, and every method made after it."""
    engine = engine_of("glance:share=0.3,sink=2", family=family)
    assert engine.strategy.encoding is not None
    assert "glance" in registry.names("strategy")
    assert not [r for r in gates.run(engine, DOCUMENTS, QUESTION) if not r.passed]


def test_it_does_what_it_says(installed: Any) -> None:
    """Danger: an example that recomputes nothing, or whose looking is free, passes every gate."""

    engine = engine_of("full")
    engine.with_strategy("block").answer(QUESTION, DOCUMENTS, max_new_tokens=1)  # encodes what all of them reuse
    full, block = ask(engine), ask(engine.with_strategy("block"))
    some, most = (ask(engine.with_strategy(installed.Glance(share=s))) for s in (0.25, 1.0))
    assert block.usage.computed_tokens < some.usage.computed_tokens < most.usage.computed_tokens
    assert block.usage.charged < some.usage.charged < full.usage.charged == 1.0
    assert off(most.logits, full.logits) < TOLERANCE  # the system part is an exact prefix
    assert off(some.logits, full.logits) > 1e-2
