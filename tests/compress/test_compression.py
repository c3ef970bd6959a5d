"""Compression composed: one specification, every strategy, every gate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_gates import MATRIX

import zoo
from core_kit import DOCUMENTS, QUESTION, engine_of, off, wrapper_file
from kvilt.check import gates
from kvilt.compress.base import Compression
from kvilt.engine.engine import Engine
from kvilt.errors import SpecError
from kvilt.model.model import Model
from kvilt.stores.disk import DiskStore
from kvilt.types import Answer, Document

SMALLER = ["int8", "keydiff:keep=0.5", "kvzip:keep=0.7+int4", "random:keep=0.6+fp8"]


def answer(engine: Engine) -> Answer:
    return engine.answer(QUESTION, DOCUMENTS, max_new_tokens=2)


def smaller(spec: str, compress: str, folder: Path, family: str = "llama") -> Engine:
    spec = spec.replace("WRAPPER", str(wrapper_file(folder, 4)))
    return engine_of(spec, family=family).with_strategy(spec, compress)


@pytest.mark.parametrize("compress", ["int8", "keydiff:keep=0.5", "cur:keep=0.6+int4"])
@pytest.mark.parametrize("spec", MATRIX)
def test_gates_of_every_strategy(spec: str, compress: str, tmp_path: Path) -> None:
    """Danger: a strategy that recomputes or probes takes a dropped row for a kept one, or packed keys for rotated ones."""
    failed = [r for r in gates.run(smaller(spec, compress, tmp_path), DOCUMENTS, QUESTION) if not r.passed]
    assert not failed


@pytest.mark.parametrize("compress", SMALLER)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_gates_of_every_family(family: str, compress: str, tmp_path: Path) -> None:
    """Danger: partial, interleaved or scaled rotations are taken off and put on differently."""
    engine = smaller("epic:tokens=3", compress, tmp_path, family)
    assert not [r for r in gates.run(engine, DOCUMENTS, QUESTION) if not r.passed]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_in_half_precision(dtype: torch.dtype) -> None:
    """Danger: rows are decoded into the model's dtype before they are rotated."""
    plain = engine_of()
    model = Model(zoo.hf_model("llama").to(dtype))
    engine = Engine(model, plain.text, plain.strategy, plain.store, compress="keydiff:keep=0.7+int8")
    assert not [r for r in gates.run(engine, DOCUMENTS, QUESTION) if not r.passed]


def test_the_gates_notice_wrong_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: for packed rows a gate compares a run with itself."""
    from kvilt.model.rope import Turned

    engine = engine_of().with_strategy("block", "int8")
    ordinary = Turned.fetch
    monkeypatch.setattr(Turned, "fetch", lambda self, i, w, out=None: ordinary(self, i, w, out) + 0.1)
    assert {r.gate for r in gates.run(engine, DOCUMENTS, QUESTION) if not r.passed} >= {"G6", "G9"}


def test_order_and_defaults_do_not_matter() -> None:
    """Danger: the same compression written otherwise encodes everything again."""
    one, other = Compression.of("keydiff+int8"), Compression.of("int8+keydiff:sinks=4,keep=0.5")
    assert str(one) == str(other) == "keydiff:keep=0.5,sinks=4+int8"
    assert str(Compression.of("")) == ""


@pytest.mark.parametrize("spec", ["int8+fp8", "keydiff+knorm", "int9", "int8:bits=3", "int8+", "block"])
def test_wrong_specifications(spec: str) -> None:
    """Danger: one of two codecs is dropped in silence."""
    with pytest.raises(SpecError):
        Compression.of(spec)


def test_compressed_and_plain_copies_share_no_key() -> None:
    """Danger: a pruned cache is served to somebody who asked for the whole one."""
    plain = engine_of()
    keys = {
        plain.with_strategy("block", c).encoder.items(DOCUMENTS)[1].key.digest
        for c in (
            "",
            "int8",
            "int4",
            "keydiff",
            "keydiff:keep=0.6",
            "keydiff:sinks=5",
            "keydiff+int8",
            "keydiff:keep=1",
        )
    }
    assert len(keys) == 8
    answer(plain)
    assert answer(plain.with_strategy("block", "int8")).usage.misses == 3
    assert answer(plain.with_strategy("naive")).usage.misses == 0


def test_keeping_everything_changes_nothing() -> None:
    """Danger: a press that keeps all rows loses or reorders some."""
    plain, whole = answer(engine_of()), answer(engine_of().with_strategy("block", "kvzip:keep=1"))
    assert plain.logits is not None
    assert whole.logits is not None
    assert off(whole.logits, plain.logits) < 1e-6
    assert whole.usage.reused_tokens == plain.usage.reused_tokens


@pytest.mark.parametrize("compress", SMALLER)
def test_usage_and_reports_count_what_is_stored(compress: str, tmp_path: Path) -> None:
    """Danger: bytes are those of plain rows, in usage, in a dry run or in what encoding reports."""
    plain, store = engine_of("block:sink=4"), DiskStore(str(tmp_path))
    engine = Engine(plain.model, plain.text, plain.strategy, store, compress=compress)
    documents = [Document(d.text * 9, d.title, d.id) for d in DOCUMENTS]
    foreseen = engine.encoder.dry_run(documents, sample=3)
    done = engine.encode(documents)
    assert done.bytes == sum(c.nbytes for c in engine.encoder.fetch(engine.encoder.items(documents))[0])
    assert foreseen.bytes == pytest.approx(done.bytes, rel=0.02)
    assert done.bytes < 0.75 * plain.encoder.dry_run(documents).bytes
    assert sum(e.bytes for e in store.entries()) - done.bytes < 3 * 20000
    used = engine.answer(QUESTION, documents, max_new_tokens=1).usage
    system = len(engine.info.system) * engine.model.bytes_per_token
    assert used.hits == 3
    assert used.bytes_loaded == done.bytes + system
    assert {e.fields["compression"] for e in store.entries()} - {""}


def test_full_recompute_is_the_same_with_any_rows_or_numbers() -> None:
    """Danger: the reference itself is compressed."""
    engine = engine_of("full")
    assert torch.equal(answer(engine).logits, answer(engine.with_strategy("full", "knorm+int4")).logits)
