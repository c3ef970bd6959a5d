"""Placing: a plan's rows in one buffer, read in few calls, rotated once, loaded ahead, and handed back whatever happens."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from core_kit import (
    Watched,
    ask,
    cache_of,
    engine_of,
    ids,
    layout,
    make_key,
    off,
    placed_rows,
    pruned,
    rotated,
    rows_of,
    run,
    watched,
)
from kvilt.errors import DamagedCache
from kvilt.model import loader, placing
from kvilt.model.model import Model
from kvilt.model.placing import BufferPool, PlacedCache, Shape
from kvilt.plan import Plan
from kvilt.rows.codec import CODECS, QuantisedRows
from kvilt.rows.rows import Rotation, TensorRows, select, whole
from kvilt.types import DocumentCache, Encoding

Q = ids(5, 99)


def quantised(cache: DocumentCache, name: str = "int8") -> DocumentCache:
    assert cache.rows is not None
    return dataclasses.replace(cache, rows=QuantisedRows.of(cache.rows, CODECS[name]))


def mixed(model: Model) -> Plan:
    """A document recomputed in part, a pruned one, a question."""
    marks = torch.tensor([True, False, False, True, False, False])
    made = layout(Q).reuse(cache_of(model, ids(6, 1)), marks)
    return made.reuse(pruned(cache_of(model, ids(9, 2)), torch.tensor([0, 4]))).ask().plan()


# --- what lies where ---


SOME = torch.tensor([1, 4, 5, 8])
KINDS: dict[str, Callable[[DocumentCache], DocumentCache]] = {
    "raw": lambda cache: cache,
    "selected": lambda cache: select(cache, SOME),
    "pruned": lambda cache: pruned(cache, SOME),
    "quantised": quantised,
    "int4": lambda cache: quantised(cache, "int4"),
    "selected of quantised": lambda cache: select(quantised(cache), SOME),
    "quantised of pruned": lambda cache: quantised(pruned(cache, SOME)),
    "bfloat16": lambda cache: dataclasses.replace(cache, rows=TensorRows(rows_of(cache).bfloat16())),
}
MARKS: dict[str, Tensor | None] = {
    "reused": None,
    "scattered": torch.arange(9) % 3 == 1,
    "its middle computed": (torch.arange(9) > 2) & (torch.arange(9) < 6),
    "all computed": torch.ones(9, dtype=torch.bool),
}


def everywhere(model: Model, cache: DocumentCache, marks: Tensor | None, blend: float = 1.0) -> Plan:
    """A prompt in which a document stands twice, between computed tokens, a gap and another document."""
    made = layout(Q).compute(ids(2, 5)).reuse(cache, marks).reuse(cache_of(model, ids(4, 6)), at=30)
    return dataclasses.replace(made.reuse(cache, marks).compute(ids(2, 7), at=60).ask().plan(), blend=blend)


def check(plan: Plan, found: Tensor, model: Model) -> None:
    """Every reused row of every segment is the stored one, its key rotated to its position."""
    for segment, base in zip(plan.segments, plan.bases, strict=True):
        if segment.cache is None or segment.cache.rows is None:
            continue
        stored = whole(segment.cache.rows).to(found.dtype)
        source = segment.reused[segment.cache.offsets]
        rows = base + segment.reused[segment.places].nonzero()[:, 0]
        at = segment.start + segment.cache.offsets[source]
        assert torch.equal(found[:, 1][..., rows, :], stored[:, 1][..., source, :])
        assert torch.equal(found[:, 0][..., rows, :], rotated(model, stored[:, 0][..., source, :], at))


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "glm-interleaved"])
def test_reused_rows_lie_at_their_places_rotated_once(family: str, kind: str, marks: str) -> None:
    """Danger: rows land beside their place, keep the last prompt's rotation, or are rotated with their neighbour's angle."""
    model = zoo.model_of(family)
    plan = everywhere(model, KINDS[kind](cache_of(model, ids(9, 1))), MARKS[marks])
    assert not plan.is_suffix
    check(plan, placed_rows(model, plan), model)


@pytest.mark.parametrize("marks", ["reused", "scattered"])
@pytest.mark.parametrize("kind", KINDS)
def test_staged_uploads_place_what_direct_reading_places(
    kind: str, marks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: what only a GPU runs is found by its users: selected rows of quantised documents had another size there."""
    model = zoo.model_of("llama")
    monkeypatch.setattr(placing, "GROUP_BYTES", 2000)  # several groups, the last one smaller
    plan = everywhere(model, KINDS[kind](cache_of(model, ids(9, 1))), MARKS[marks])
    direct = placed_rows(model, plan)
    with model.placed(plan) as placed:
        assert 1 <= placed.group < 4
        placed.load_ahead(staged=True)
        model.forward(plan, placed, 1)
        assert torch.equal(placed.buffer[:, :, :, : placed.length], direct)


def test_staging_takes_what_is_uploaded_as_it_is_stored() -> None:
    """Danger: quantised rows are decoded on the host and uploaded in four times their bytes."""
    staging = loader.Staging(1 << 16, torch.device("cpu"))
    cache = cache_of(zoo.model_of("llama"), ids(9, 1))
    taken = {name for name, make in KINDS.items() if staging.takes(make(cache).rows)}  # type: ignore[arg-type]
    assert taken == {"raw", "selected", "pruned", "bfloat16"}


def test_an_upload_waits_for_the_buffer_it_uses_again() -> None:
    """Danger: a host buffer is filled again while it is still being sent."""
    staging, seen = placing.Staging(1 << 12, torch.device("cpu"), count=2), list[str]()

    class Event:
        def __init__(self, name: int) -> None:
            self.name = name

        def synchronize(self) -> None:
            seen.append(f"wait {self.name}")

        def record(self) -> None:
            seen.append(f"sent {self.name}")

    staging._uploads = [Event(0), Event(1)]
    targets = [torch.empty(2, 2, 1, 3, 4) for _ in range(3)]
    for i, target in enumerate(targets):
        rows = Watched(TensorRows(torch.full((2, 2, 1, 3, 4), float(i))), lambda _: seen.append("read"))
        staging.upload(rows, slice(0, 2), target)
    assert [float(t.mean()) for t in targets] == [0, 1, 2]
    assert seen == [f"{what}" for n in (1, 0, 1) for what in (f"wait {n}", "read", f"sent {n}")]


def test_a_cache_of_another_dtype_is_rounded_once_into_the_buffer() -> None:
    """Danger: keys stored in bfloat16 are rounded a second time after they were rotated for a float32 model."""
    model = Model(zoo.hf_model("llama"))
    cache = cache_of(model, ids(9, 1))
    half = dataclasses.replace(cache, rows=TensorRows(rows_of(cache).bfloat16()))
    found = placed_rows(model, layout(Q).reuse(half, at=5).ask().plan())
    wanted = rotated(model, rows_of(half)[:, 0].float(), 5 + torch.arange(9))
    assert torch.equal(found[:, 0, :, :9], wanted)
    assert not torch.equal(wanted, wanted.bfloat16().float())


def test_rows_of_an_earlier_prompt_never_reach_a_later_one() -> None:
    """Danger: a reused buffer still holds another user's rows, or NaN from a broken run."""
    model = Model(zoo.hf_model("llama"))
    for plan in (mixed(model), layout(Q).compute(ids(4, 4)).reuse(cache_of(model, ids(9, 1)), at=50).ask().plan()):
        wanted = run(model, plan)
        for rubbish in (1e4, float("nan")):
            with model.pool.lend(len(plan.positions) + 4) as buffer:
                buffer.fill_(rubbish)
            with model.run(plan, room=4) as one:
                assert torch.equal(one.logits, wanted)
                assert bool(torch.isfinite(one.step(torch.tensor([[70]]))).all())


# --- few calls ---


def deep(layers: int = 32) -> Any:
    """The cache of twenty documents of one row each in a deep model, without that model."""
    shape = Shape(layers, 8, 64, torch.float32, torch.device("cpu"))
    made = []
    for i in range(20):
        token = torch.tensor([i])
        rows = Watched(TensorRows(torch.randn(layers, 2, 8, 1, 64)))
        made.append(DocumentCache(token, torch.tensor([0]), 1, make_key(token), rows))
    plan = layout(Q)
    for document in made:
        plan.reuse(document)
    rotation = Rotation(1.0 / 10000 ** (torch.arange(0, 64, 2) / 64))
    return shape, plan.ask().plan(), rotation, made


def test_twenty_small_documents_are_placed_in_twenty_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: 20 documents x 32 layers x 2 sides of dispatch: 58 ms for rows that a single copy moves in one."""
    shape, plan, rotation, documents = deep()
    rotations, times, rotate = [], [], Rotation.rotate
    monkeypatch.setattr(Rotation, "rotate", lambda *args, **more: rotations.append(1) or rotate(*args, **more))
    pool = BufferPool(shape)
    for _ in range(5):
        with pool.lend(len(plan.positions)) as buffer:
            placed = PlacedCache(plan, buffer, rotation)
            assert placed.group == 32  # one group of layers: few calls for a small prompt
            rotations.clear()
            began = time.perf_counter()
            for layer in range(32):
                placed._wait(layer)
            times.append(time.perf_counter() - began)
            assert len(rotations) <= 2
            for number in (0, 19):
                stored = documents[number].rows.inner.data
                assert torch.equal(buffer[:, 1, :, number], stored[:, 1, :, 0])
                wanted = rotation.rotate(stored[:, 0], rotation.angles(torch.tensor([number])))
                assert torch.equal(buffer[:, 0, :, number], wanted[:, :, 0])
    assert [d.rows.reads for d in documents] == [[range(32)] * 5] * 20
    assert min(times) < 6e-3  # about 0.6 ms; 58 ms when every layer and side was a call of its own


def test_large_documents_are_read_in_groups_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a long prompt's rows are all read before the first layer is computed, and leave the processor's cache."""
    model = zoo.model_of("llama")
    cache = watched(cache_of(model, ids(30, 1)))
    plan = layout(Q).reuse(cache).reuse(cache).ask().plan()
    wanted = run(model, plan)
    assert cache.rows.reads == [range(4)] * 2  # type: ignore[union-attr]
    monkeypatch.setattr(placing, "GROUP_BYTES", plan.reused_count * model.bytes_per_token // 2)
    cache.rows.reads.clear()  # type: ignore[union-attr]
    assert torch.equal(run(model, plan), wanted)
    assert cache.rows.reads == [range(2)] * 2 + [range(2, 4)] * 2  # type: ignore[union-attr]


def test_a_pass_that_ends_early_reads_no_layer_behind_its_end() -> None:
    """Danger: a probe of one layer reads all thirty-two."""
    model = zoo.model_of("llama")
    cache = watched(cache_of(model, ids(30, 1)))
    plan = layout(Q).reuse(cache).ask().plan()
    with model.placed(plan, depth=2) as placed:
        for layer in range(2):
            placed._wait(layer)
    assert cache.rows.reads == [range(2)]  # type: ignore[union-attr]


# --- loading ahead ---


def slow(plan: Plan, seconds: float = 0.002) -> Plan:
    """The plan over rows that take their time."""
    parts = [
        dataclasses.replace(s, cache=watched(s.cache, lambda _: time.sleep(seconds)) if s.cache else None)
        for s in plan.segments
    ]
    return dataclasses.replace(plan, segments=tuple(parts))


def test_loading_ahead_changes_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the pass reaches a layer whose rows are not there yet."""
    monkeypatch.setattr(placing, "GROUP_BYTES", 1)  # layer by layer
    plan, token = mixed(model), torch.tensor([[70]])
    with model.run(slow(plan), room=2, overlap=True) as ahead:
        found = ahead.logits, ahead.step(token)
    with model.run(plan, room=2, overlap=False) as plain:
        wanted = plain.logits, plain.step(token)
    assert all(map(torch.equal, found, wanted))


def loaders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "kvilt-loader"]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_damaged_layer_is_raised_from_the_pass(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: an error in the loading thread is lost, and the pass waits for ever or runs over garbage."""
    monkeypatch.setattr(placing, "GROUP_BYTES", 1)
    model = Model(zoo.hf_model("llama"))

    def broken(layers: range) -> None:
        if 2 in layers:
            raise DamagedCache("0" * 64, "a bit flipped")

    plan = layout(Q).reuse(watched(cache_of(model, ids(9, 1)), broken)).ask().plan()
    with pytest.raises(DamagedCache, match="a bit flipped"):
        run(model, plan, overlap=overlap)
    assert not loaders()


# --- one owner of the buffer ---


@contextmanager
def lent(model: Model) -> Iterator[list[str]]:
    """What happens to the model's buffers, in order."""
    seen: list[str] = []
    lend = model.pool.lend

    @contextmanager
    def watching(rows: int) -> Iterator[Tensor]:
        with lend(rows) as buffer:
            seen.append("out")
            try:
                yield buffer
            finally:
                seen.append("back" if not loaders() else "back while it is being filled")

    model.pool.lend = watching  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        model.pool.lend = lend  # type: ignore[method-assign]


@pytest.mark.parametrize("overlap", [True, False])
def test_the_buffer_comes_back_from_every_exit(overlap: bool) -> None:
    """Danger: a pass fails, its buffer is lost or handed on, and the loading thread still writes into it."""
    model = Model(zoo.hf_model("llama"))
    plan = slow(mixed(model), 0.01)
    broken = dataclasses.replace(plan, learned=torch.zeros(1, 3))  # vectors of the wrong width: the pass fails at once
    with lent(model) as seen:
        run(model, plan, overlap=overlap)
        with pytest.raises(RuntimeError):
            run(model, broken, overlap=overlap)
        with pytest.raises(KeyError, match="mine"), model.run(plan, overlap=overlap):
            raise KeyError("mine")
        with model.run(plan, room=3, overlap=overlap) as one:
            one.step(torch.tensor([[70]]))
            assert seen[-1] == "out"
        model.score(plan)
        with pytest.raises(RuntimeError):
            model.score(broken)
    assert seen == ["out", "back"] * 6
    assert model.pool._free is not None


def test_two_runs_at_once_have_two_buffers_and_the_larger_one_is_kept() -> None:
    """Danger: two prompts share a buffer; or every prompt touches fresh memory."""
    pool = BufferPool(Shape(2, 2, 4, torch.float32, torch.device("cpu")))
    sizes = []
    for rows in (1, 256, 257):
        with pool.lend(rows) as buffer:
            sizes.append(buffer.shape[3])
    assert sizes == [256, 256, 512]
    with pool.lend(10) as one, pool.lend(1000) as other:
        assert one.shape[3] == 512  # the kept one
        assert one.data_ptr() != other.data_ptr()
        large = other.data_ptr()
    with pool.lend(5) as one, pool.lend(5) as other:
        assert one.data_ptr() == large
        assert other.data_ptr() != large
    pool.clear()
    with pool.lend(5) as one:
        assert one.shape[3] == 256


def test_inference_mode_may_come_and_go() -> None:
    """Danger: one request under torch.inference_mode, and every later one outside it fails on the buffer it has left."""
    engine = engine_of("epic:tokens=3")
    engine.model.pool.clear()
    with torch.inference_mode():
        first = ask(engine, tokens=3)
        again = ask(engine, tokens=3)
    assert first.tokens == again.tokens == ask(engine, tokens=3).tokens
    with torch.inference_mode():
        assert ask(engine, tokens=3).tokens == first.tokens


def test_a_run_inside_a_run_changes_neither() -> None:
    """Danger: a second prompt that is asked while the first one is decoded writes into its rows."""
    model = Model(zoo.hf_model("llama"))
    first, second = mixed(model), layout(Q).reuse(cache_of(model, ids(12, 8)), at=4).ask().plan()
    token = torch.tensor([[70]])
    with model.run(first, room=2) as one:
        wanted = one.step(token)
    with model.run(first, room=2) as one:
        with model.run(second, room=2) as other:
            other.step(token)
        assert torch.equal(one.step(token), wanted)


def test_threads_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the buffer of one prompt is lent to another while it is in use."""
    model = Model(zoo.hf_model("llama"))
    plans = [slow(layout(Q).reuse(cache_of(model, ids(n, n)), at=n).ask().plan(), 0.001) for n in (6, 9, 30)]
    wanted = [run(model, plan) for plan in plans]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: run(model, plans[i % 3], overlap=bool(i % 2)), range(18), timeout=60))
    assert all(torch.equal(logits, wanted[i % 3]) for i, logits in enumerate(found))


def test_what_a_probe_takes_has_memory_of_its_own() -> None:
    """Danger: another request's thread gets the buffer, and tokens are selected by its rows."""
    model = Model(zoo.hf_model("llama"))
    plan = layout(Q).reuse(cache_of(model, ids(6, 1)), at=3).ask().plan()
    with model.placed(plan) as placed:
        model.forward(plan, placed, 1)
        parts = [placed.taken(s, b, 2, make_key(Q)) for s, b in zip(plan.segments, plan.bases, strict=True)]
    with model.pool.lend(20) as buffer:
        buffer.fill_(torch.nan)
    document, question = parts
    assert off(rows_of(document), rows_of(cache_of(model, ids(6, 1)))[:2]) < 1e-5  # their rotation is off again
    assert rows_of(question).shape == (2, 2, 2, 5, 16)
    assert bool(rows_of(question).isfinite().all())
    assert document.offsets.tolist() == list(range(6))


def test_anchors_that_stand_around_a_document_leave_no_hole_in_the_buffer() -> None:
    """Danger: a document of few rows and many positions is placed by position."""
    model = zoo.model_of("llama")
    cache = cache_of(model, ids(20, 1), Encoding(chunk=4, anchors=(8,)))
    plan = layout(Q).reuse(cache, at=7).ask().plan()
    with model.run(plan) as one:
        assert one.placed.length == 5 + len(Q)
        assert one.bytes_loaded == cache.nbytes == 5 * model.bytes_per_token
        check(plan, one.placed.buffer[:, :, :, : one.placed.length].clone(), model)
