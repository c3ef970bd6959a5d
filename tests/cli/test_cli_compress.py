"""`--compress`: the same flag on every verb that runs a model, and what the store's verbs say of it."""

from __future__ import annotations

from pathlib import Path

from cli_kit import data, error, run


def test_compressed_caches_are_made_used_and_shown(model_dir: Path, docs: list[Path], store: str) -> None:
    """Danger: a verb encodes or looks for the plain copy instead."""
    spec = ["--compress", "keydiff:keep=0.5+int8"]
    place = ["--model", model_dir, "--store", store]
    foreseen = data("encode", *docs, *place, *spec, "--dry-run")
    done = data("encode", *docs, *place, *spec)
    plain = data("encode", *docs, *place, "--dry-run")
    assert done["encoded"] == plain["encoded"] == len(docs)
    assert done["bytes"] < 0.4 * plain["bytes"]
    assert abs(foreseen["bytes"] - done["bytes"]) < 0.1 * done["bytes"]
    usage = data("ask", "Where?", "--docs", *docs, *place, *spec)["usage"]
    assert (usage["hits"], usage["misses"]) == (len(docs), 0)
    (shown,) = {e["fields"]["compression"] for e in data("cache", "ls", "--store", store) if e["title"] == str(docs[0])}
    assert shown == "keydiff:keep=0.5,sinks=4+int8"
    assert shown in run("cache", "ls", "--store", store).stdout
    assert shown in run("cache", "show", docs[0], "--store", store).stdout
    assert data("cache", "verify", "--store", store) == {"damaged": [], "whole": len(docs) + 1}
    assert all(v["reused"] for v in data("doctor", *docs, *place, *spec)["documents"])
    assert shown in run("doctor", *docs, *place, code=1).stdout


def test_gates_hold_on_the_users_model(model_dir: Path, docs: list[Path]) -> None:
    """Danger: packed rows are held to the tolerance of plain ones, and `verify` always fails."""
    found = data("verify", *docs, "--model", model_dir, "--compress", "kvzip:keep=0.6+int4", "--tokens", 2,
                 "--question", "Where?")  # fmt: skip
    assert found["passed"]
    assert found["strategies"][1]["kl"] > 0


def test_mistakes_show_before_a_model_is_loaded() -> None:
    """Danger: a minute of loading, and then a typing error."""
    assert "Did you mean 'keydiff'?" in error("verify", "--model", "none", "--compress", "keydif:keep=1")
    assert {"int8", "kvzip"} <= {c["name"] for c in data("list", "compress")["compress"]}
