"""Compression composed: one specification, every strategy, every gate."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import zoo
from core_kit import DOCUMENTS, MATRIX, QUESTION, ask, engine_of, off, store_of, text_format, wrapper_file
from kvilt.check import gates
from kvilt.compress.base import Compression
from kvilt.corpora.estimate import dry_run
from kvilt.engine.engine import Engine
from kvilt.errors import SpecError
from kvilt.model.model import Model
from kvilt.model.placing import Piece, Staging
from kvilt.rows.codec import QuantisedRows
from kvilt.types import Document

SMALLER = ["int8", "keydiff:keep=0.5", "kvzip:keep=0.7+int4", "random:keep=0.6+fp8"]


def smaller(spec: str, compress: str, folder: Path, family: str = "llama") -> Engine:
    return engine_of(spec.replace("WRAPPER", str(wrapper_file(folder, 4))), family=family, compress=compress)


@functools.cache
def noise_of(model: Model) -> float:
    """The model's own noise on the prompt, measured once."""
    engine = Engine(model, text_format(), engine_of("full").strategy, store_of())
    return gates.Case.of(engine, DOCUMENTS, QUESTION).floor


def failed(engine: Engine, *names: str) -> list[gates.GateResult]:
    case = gates.Case.of(engine, DOCUMENTS, QUESTION, noise_of(engine.model))
    return [r for r in gates.results(case, *names) if not r.passed]


@pytest.mark.parametrize("spec", MATRIX)
def test_every_strategy_passes_over_pruned_and_quantised_documents(spec: str, tmp_path: Path) -> None:
    """Danger: a strategy that recomputes or probes takes a dropped row for a kept one, or a byte for a number."""
    assert not failed(smaller(spec, "cur:keep=0.6+int4", tmp_path), "G4", "G9")


@pytest.mark.parametrize("compress", ["int8", "keydiff:keep=0.5"])
@pytest.mark.parametrize(
    "spec", ["kv_packet:wrapper=WRAPPER", "cacheblend", "prophetkv:sink=system", "sam_kv:init=2,local=4,block=3"]
)
def test_strategies_pass_over_documents_that_are_one_of_both(spec: str, compress: str, tmp_path: Path) -> None:
    """Danger: what holds for rows that are pruned and quantised holds for no others."""
    assert not failed(smaller(spec, compress, tmp_path), "G4", "G6", "G7", "G9")


@pytest.mark.parametrize("compress", ["kvzip:keep=0.7+int4", "random:keep=0.6+fp8"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_passes(family: str, compress: str, tmp_path: Path) -> None:
    """Danger: partial, interleaved or scaled rotations are taken off and put on differently."""
    assert not failed(smaller("epic:tokens=3", compress, tmp_path, family), "G7", "G9")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes(dtype: torch.dtype) -> None:
    """Danger: rows are decoded and rotated in the model's dtype."""
    model = Model(zoo.hf_model("llama").to(dtype))
    engine = Engine(model, text_format(), engine_of().strategy, store_of(), compress="keydiff:keep=0.7+int8")
    assert not failed(engine)


def test_the_gates_notice_wrong_quantised_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: for quantised rows a gate compares a run with itself."""
    ordinary = Piece.place

    def wrong(self: Piece, layers: slice, buffer: Tensor, staging: Staging | None) -> None:
        ordinary(self, layers, buffer, staging)
        if isinstance(self.rows, QuantisedRows):
            buffer[:, 0, :, self.into] += 0.1

    monkeypatch.setattr(Piece, "place", wrong)
    assert {r.gate for r in failed(engine_of(compress="int8"), "G6", "G9")} == {"G6", "G9"}
    assert not failed(engine_of(), "G6", "G9")


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
    ask(plain)
    assert ask(plain.with_strategy("block", "int8")).usage.misses == 3
    assert ask(plain.with_strategy("naive")).usage.misses == 0


def test_keeping_everything_changes_nothing() -> None:
    """Danger: a press that keeps all rows loses or reorders some."""
    plain, whole = ask(engine_of()), ask(engine_of(compress="kvzip:keep=1"))
    assert off(whole.logits, plain.logits) < 1e-6
    assert whole.usage.reused_tokens == plain.usage.reused_tokens


@pytest.mark.parametrize("compress", SMALLER)
def test_usage_and_reports_count_what_is_stored(compress: str, tmp_path: Path) -> None:
    """Danger: bytes are those of plain rows, in usage, in a dry run or in what encoding reports."""
    plain = engine_of("block:sink=4")
    engine = engine_of("block:sink=4", store_of(f"disk:path={tmp_path}"), compress=compress)
    documents = [Document(d.text * 9, d.title, d.id) for d in DOCUMENTS]
    foreseen = dry_run(engine.encoder, documents, sample=3)
    done = engine.encode(documents)
    caches = engine.store.get_many([i.key for i in engine.encoder.items(documents)])
    assert done.bytes == sum(c.nbytes for c in caches if c is not None)
    assert foreseen.bytes == pytest.approx(done.bytes, rel=0.02)
    assert done.bytes < 0.75 * dry_run(plain.encoder, documents).bytes
    stored = [e for e in engine.store.entries() if e.title != "system"]
    assert len(stored) == 3
    assert sum(e.bytes for e in stored) - done.bytes < 3 * 20000
    used = ask(engine, documents).usage
    system = len(engine.info.system) * engine.model.bytes_per_token
    assert used.hits == 3
    assert used.bytes_loaded == done.bytes + system
    assert all(e.fields["compression"].startswith(compress.partition(":")[0]) for e in stored)


def test_full_recompute_is_the_same_with_any_rows_or_numbers() -> None:
    """Danger: the reference itself is compressed."""
    engine = engine_of("full")
    assert torch.equal(ask(engine).logits, ask(engine.with_strategy("full", "knorm+int4")).logits)  # type: ignore[arg-type]
