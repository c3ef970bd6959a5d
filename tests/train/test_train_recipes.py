"""The recipes run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import train_kit as kit

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_packet(model_dir, tmp_path, monkeypatch, capsys):
    """Danger: the recipe does not run."""
    data = kit.write(tmp_path / "a.jsonl", kit.rows())
    module = recipe("packet")
    monkeypatch.setattr(module, "RECIPES", {"linked": kit.QUICK})
    monkeypatch.setattr(
        sys, "argv", ["packet.py", "linked", "--model", str(model_dir), "--out", str(tmp_path / "out"), data]
    )
    module.main()
    assert '"loss"' in capsys.readouterr().out


def test_kvlink(model_dir, tmp_path, monkeypatch, capsys):
    """Danger: the recipe does not run."""
    kit.write(tmp_path / "qa.jsonl", kit.rows())
    kit.write(tmp_path / "text.jsonl", [{"text": f"text {i}"} for i in range(4)])
    module = recipe("kvlink")
    monkeypatch.setattr(module, "RECIPES", {"mixture": module.Recipe(kit.LINKED)})
    arguments = ["mixture", "--model", str(model_dir), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["kvlink.py", *arguments])
    module.main()
    told = capsys.readouterr()
    assert str(tmp_path / "out") in told.out
    assert "no sft.jsonl" in told.err


@pytest.mark.parametrize("name", ["packet", "kvlink"])
def test_settings_are_valid(name):
    """Danger: a recipe's settings are refused."""
    for made in recipe(name).RECIPES.values():
        (made if name == "packet" else made.config).check()
