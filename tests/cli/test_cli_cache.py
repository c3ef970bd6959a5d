"""`kvilt cache`: everything that can be done to a store without a model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cli_kit import data, error, run, stored


@pytest.fixture
def filled(model_dir: Path, docs: list[Path], store: str) -> str:
    """A store with five documents in namespace `default` and two of them twice, in `other`, in another dtype."""
    run("encode", *docs, "--model", model_dir, "--store", store)
    run("encode", *docs[:2], "--model", model_dir, "--store", store, "--namespace", "other", "--dtype", "bf16")
    return store


def test_ls_and_show(filled: str, docs: list[Path]) -> None:
    """Danger: the list leaves documents out, or shows another one than was asked for."""
    found = data("cache", "ls", "--store", filled)
    assert [e["title"] for e in found[:5]] == [str(p) for p in docs]
    assert len(data("cache", "ls", "--store", filled, "--namespace", "other")) == 2
    text = run("cache", "ls", KVILT_STORE=filled).stdout
    assert found[3]["key"][:12] in text
    assert len(text.splitlines()) == 8
    one = data("cache", "show", found[3]["key"][:10], "--store", filled)
    assert one == found[3]
    assert one["fields"]["dtype"] == "float32"
    assert found[3]["key"] in run("cache", "show", str(docs[3]), "--store", filled).stdout


def test_several_variants_of_one_title(filled: str, docs: list[Path], model_dir: Path, tmp_path: Path) -> None:
    """Danger: three hashes, and no way to tell which of them is the compressed copy; or the wrong one is deleted."""
    run("encode", docs[0], "--model", model_dir, "--store", filled, "--compress", "int8")
    message = error("cache", "show", docs[0], "--store", filled)
    assert "3 documents match" in message
    assert re.search(r"[0-9a-f]{12} float32 \d+ before [0-9a-f]{8} int8 shared", message)
    assert data("cache", "show", docs[0], "--store", filled, "--namespace", "other")["namespace"] == "other"
    assert data("cache", "show", docs[0], "--store", filled, "--variant", "other")["namespace"] == "other"
    assert "3 documents match" in error("cache", "rm", docs[0], "--store", filled, "--variant", "float32")
    assert "match" in error("cache", "rm", docs[0], "--store", filled, "--variant", "nothing")
    shown = run("cache", "show", docs[0], "--variant", "all", "--json", "--store", filled).stdout.splitlines()
    assert len({json.loads(line)["key"] for line in shown}) == 3
    assert data("cache", "pin", docs[0], "--variant", "all", "--store", filled) == {"pinned": 3}
    assert data("cache", "rm", docs[0], "--variant", "other", "--store", filled)["removed"] == 1
    assert len(data("cache", "ls", "--store", filled)) == 7


def test_rm(filled: str, docs: list[Path], tmp_path: Path) -> None:
    """Danger: more is deleted than was named, or another namespace's."""
    gone = data("cache", "rm", docs[2], docs[3], "--store", filled)
    assert gone["removed"] == 2
    assert gone["freed_bytes"] > 0
    assert len(stored(tmp_path / "store")) == 5
    assert data("cache", "rm", "--all", "--namespace", "other", "--store", filled)["removed"] == 2
    assert run("cache", "rm", "--all", "--store", filled).stdout.startswith("3 removed, ")
    assert stored(tmp_path / "store") == []


def test_stats_and_pin_and_gc(filled: str, docs: list[Path]) -> None:
    """Danger: a pinned document is evicted, or `gc` leaves more than the budget."""
    total = data("cache", "stats", "--store", filled)
    assert total["entries"] == 7
    assert total["bytes"] > 0
    assert "entries" in run("cache", "stats", "--store", filled).stdout
    assert data("cache", "pin", docs[4], "--store", filled) == {"pinned": 1}
    assert data("cache", "show", docs[4], "--store", filled)["pinned"] is True
    size = data("cache", "show", docs[4], "--store", filled)["bytes"]
    freed = data("cache", "gc", "--store", f"{filled},budget={size}")["freed_bytes"]
    assert freed == total["bytes"] - size
    assert [e["title"] for e in data("cache", "ls", "--store", filled)] == [str(docs[4])]
    assert data("cache", "pin", "--all", "--release", "--store", filled) == {"unpinned": 1}


def test_verify_reports_and_sets_aside(filled: str, tmp_path: Path) -> None:
    """Danger: a damaged file is called whole."""
    assert data("cache", "verify", "--store", filled) == {"damaged": [], "whole": 7}
    victim = stored(tmp_path / "store")[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    found = data("cache", "verify", "--store", filled, code=1)
    assert [d["key"] for d in found["damaged"]] == [victim.stem]
    assert found["whole"] == 6
    assert run("cache", "verify", "--store", filled).stdout == "6 documents are whole, 0 damaged.\n"


def test_time_to_live(model_dir: Path, docs: list[Path], store: str) -> None:
    """Danger: an expired document is kept, or one that is not is dropped."""
    common = ("encode", *docs, "--model", model_dir, "--store", store)
    assert data(*common, "--ttl", 0.001)["encoded"] == 5
    assert data("cache", "gc", "--store", store)["freed_bytes"] > 0
    assert data(*common, "--ttl", 1000)["encoded"] == 5
    assert "in 1" in run("cache", "show", docs[0], "--store", store).stdout
