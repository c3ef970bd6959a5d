"""What encoding costs, what documents take in a store, and what goes when there is too much."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli_kit import data, error, run, stored, write_documents
from core_kit import DOCUMENTS
from kvilt.cli.cache import parse_span
from kvilt.corpora import tidy
from kvilt.corpora.estimate import estimate
from kvilt.engine.engine import Engine
from kvilt.errors import UserError
from kvilt.stores.entry import Entry
from kvilt.types import Document

PRICES: dict[str, Any] = {"gb_month": 0.023, "gpu_hour": 1.79, "per_request": 10}


def entry(key: str, size: int, used: float, *, model: str = "m", pinned: bool = False, hits: int = 0) -> Entry:
    """A stored document."""
    fields = {"model": model, "dtype": "float32", "encoding": "plain", "compression": ""}
    return Entry(key, size, 10, key, used=used, created=used, hits=hits, pinned=pinned, fields=fields)


def test_a_dry_run_foresees_bytes_and_prices_and_stores_nothing(tmp_path: Path) -> None:
    """Danger: the estimate fills the user's store, or its sums are of something else than the prices say."""
    engine = Engine.load("builtin", store=f"disk:path={tmp_path / 'store'}")
    documents = [Document(d.text * 20, d.title, d.id) for d in DOCUMENTS]
    made = estimate(engine, documents, gb_month=1000.0, gpu_hour=3600.0, per_request=4)
    assert not stored(tmp_path / "store")
    assert made.report.bytes == engine.encode(documents).bytes
    assert made.storage_month == pytest.approx(made.report.bytes / 1e6)
    assert made.encoding == pytest.approx(made.report.seconds)
    assert made.prefill_million == pytest.approx(made.prefill_s * 1e6)
    mean = sum(len(i.ids) for i in engine.encoder.items(documents)) / 3
    assert made.request_tokens == round(4 * mean)
    assert 0 < made.reuse_s < made.prefill_s
    assert made.break_even_month == pytest.approx(made.storage_month / (made.prefill_s - made.reuse_s))


def test_what_cannot_be_measured_is_not_made_up() -> None:
    """Danger: a division by zero, or a price for a request of no documents."""
    engine = Engine.load("builtin", store="memory")
    assert estimate(engine, [], **PRICES).request_tokens == 0
    engine.encode(DOCUMENTS)
    known = estimate(engine, DOCUMENTS, **PRICES)
    assert (known.report.encoded, known.encoding) == (0, 0.0)
    assert known.prefill_s > 0


def test_the_command_line_tells_costs(model_dir: Path, store: str, tmp_path: Path) -> None:
    """Danger: prices of the command line never reach the sum."""
    write_documents(tmp_path / "docs", 4)
    common = ("encode", tmp_path / "docs", "--store", store, "--model", model_dir, "--dry-run")
    told = data(*common, "--price-gb", 5e9, "--price-gpu-hour", 0)
    assert told["costs"]["storage_month"] == pytest.approx(5 * told["bytes"])
    assert told["costs"]["encoding"] == told["costs"]["prefill_million"] == 0
    assert "to keep, a month" in run(*common).stdout


def test_du_groups_by_what_made_a_document() -> None:
    """Danger: documents of two models are one line, and nobody sees what the old one still takes."""
    held = tidy.shares([entry("a", 100, 1), entry("b", 50, 7), entry("c", 400, 3, model="other")])
    assert [(s.model, s.documents, s.tokens, s.bytes, s.used) for s in held] == [
        ("other", 1, 10, 400, 3),
        ("m", 2, 20, 150, 7),
    ]


def test_orders() -> None:
    """Danger: the smallest documents are shown as the largest."""
    some = [entry("a", 1, 30, hits=5), entry("b", 3, 10, hits=1), entry("c", 2, 20, hits=9)]
    for order, wanted in {"size": "bca", "used": "acb", "hits": "cab", "age": "bca", "": "abc"}.items():
        assert "".join(e.key for e in tidy.ordered(some, order)) == wanted, order
    with pytest.raises(UserError, match="Did you mean 'size'"):
        tidy.ordered(some, "siz")


def test_prune_takes_the_right_ones_and_never_a_pinned_one() -> None:
    """Danger: what is in use goes before what is not, or a pin does not hold."""
    now = time.time()
    some = [entry(str(i), 100, now - i * 86400) for i in range(5)]
    some[4] = replace(some[4], pinned=True)
    assert [e.key for e in tidy.surplus(some, budget=300)] == ["3", "2"]
    assert [e.key for e in tidy.surplus(some, unused=1.5 * 86400)] == ["2", "3"]
    assert [e.key for e in tidy.surplus(some, budget=100, unused=2.5 * 86400)] == ["3", "2", "1", "0"]
    assert tidy.surplus([*some, entry("x", 1, now, model="old")], model="ol")[0].key == "x"
    assert tidy.surplus(some, budget=10_000) == []
    with pytest.raises(UserError, match="say what goes"):
        tidy.surplus(some)


def test_prune_on_a_real_store(model_dir: Path, store: str, tmp_path: Path) -> None:
    """Danger: the command says that it deleted, and the files are there; or a dry run deletes."""
    write_documents(tmp_path / "docs", 4)
    run("encode", tmp_path / "docs", "--store", store, "--model", model_dir)
    before = data("cache", "du", "--store", store)
    assert sum(s["documents"] for s in before) == len(stored(tmp_path / "store")) == 4
    largest = data("cache", "ls", "--sort", "size", "--store", store)[0]
    assert largest["bytes"] == max(p.stat().st_size for p in stored(tmp_path / "store"))
    assert data("cache", "prune", "--unused", "1d", "--store", store)["removed"] == 0
    assert data("cache", "prune", "--budget", 1, "--dry-run", "--store", store)["removed"] == 4
    assert len(stored(tmp_path / "store")) == 4
    assert data("cache", "prune", "--model", before[0]["model"], "--store", store)["removed"] == 4
    assert not stored(tmp_path / "store")
    assert "say what goes" in error("cache", "prune", "--store", store)
    assert "is no time" in error("cache", "prune", "--unused", "soon", "--store", store)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5h", 5400), ("2w", 1209600)])
def test_times(text: str, seconds: float) -> None:
    """Danger: minutes are read as months."""
    assert parse_span(text) == seconds
