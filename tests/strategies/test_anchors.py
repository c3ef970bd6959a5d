"""Anchors: what is seen while a document is encoded in chunks, what is kept of it, and which checkpoints serve it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import zoo
from core_kit import (
    DOCUMENTS,
    QUESTION,
    TOLERANCE,
    cache_of,
    engine_of,
    ids,
    layout,
    off,
    off_dense,
    prompt,
    pruned,
    rows_of,
    store_of,
)
from kvilt.corpora.estimate import dry_run
from kvilt.engine.engine import Engine
from kvilt.errors import SpecError
from kvilt.plan import Plan, Segment
from kvilt.strategies.anchors import Anchors
from kvilt.strategies.full import recompute
from kvilt.strategies.kvlink import DESCRIPTION, LinkTokens
from kvilt.types import Document, DocumentCache, Encoding, ModelInfo, digest_of

CODES = Encoding(chunk=4, anchors=(8, 9))
Q = ids(3, seed=9)
INSIDE = torch.tensor([4, 5, 10, 11, 14])  # the anchors' places in a document of ten tokens


def asked(cache: DocumentCache) -> Plan:
    return layout(Q, cache).reuse(cache).ask().plan()


def test_who_sees_whom() -> None:
    """Danger: a token sees an earlier chunk, or the question sees a token that was dropped."""
    text = ids(10)
    dense = asked(cache_of(zoo.model_of("llama"), text, CODES)).dense()
    assert dense.tokens.tolist() == [*text[:4], 8, 9, *text[4:8], 8, 9, *text[8:], 8, *Q]
    sees = [set(row.nonzero()[:, 0].tolist()) for row in dense.mask]
    assert sees[2] == {0, 1, 2}
    assert sees[5] == {0, 1, 2, 3, 4, 5}
    assert sees[7] == {4, 5, 6, 7}
    assert sees[11] == {4, 5, 6, 7, 8, 9, 10, 11}
    assert sees[14] == {4, 5, 10, 11, 12, 13, 14}
    assert sees[15] == {4, 5, 10, 11, 14, 15}
    assert dense.positions.tolist() == list(range(18))


@pytest.mark.parametrize("family", ["llama", "glm-interleaved"])
def test_a_chunk_is_encoded_behind_the_anchors_of_the_chunks_before_it_alone(family: str) -> None:
    """Danger: the mask is written as it should be, but not used. Chunk after chunk, by plans, must give the same rows."""
    model, text = zoo.model_of(family), ids(10)
    whole = cache_of(model, text, CODES)
    first = cache_of(model, torch.cat([text[:4], torch.tensor([8, 9])]))
    before = [Segment(first.tokens, 0, pruned(first, torch.tensor([4, 5])))]
    for start, tokens in ((6, [*text[4:8], 8, 9]), (12, [*text[8:], 8])):
        segment = Segment(torch.tensor(tokens), start)
        plan = Plan((*before, segment), baseline=1)
        with model.run(plan) as made:
            seen = made.placed.taken(segment, plan.bases[-1], model.shape.layers, whole.key)
        places = torch.tensor([4, 5] if start == 6 else [2])
        kept = pruned(dataclasses.replace(seen, offsets=torch.arange(len(tokens))), places)
        before.append(Segment(segment.tokens, start, kept))
    parts = [rows_of(part.cache) for part in before if part.cache is not None]
    assert off(rows_of(whole), torch.cat(parts, 3)) < TOLERANCE


def test_documents_of_unlike_length_are_encoded_together_as_alone() -> None:
    """Danger: padding, or another document's chunks, reach a shorter document through the batch's mask."""
    model, texts = zoo.model_of("llama"), [ids(n, seed=n) for n in (9, 3, 17, 8)]
    for text, cache in zip(texts, model.encode(texts, CODES), strict=True):
        alone = cache_of(model, text, CODES)
        assert torch.equal(cache.offsets, alone.offsets)
        assert off(rows_of(cache), rows_of(alone)) < TOLERANCE


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 4), (10, 5)])
def test_rows_and_bytes_shrink_to_the_share(tokens: int, rows: int) -> None:
    """Danger: the last chunk, or a document shorter than one, keeps more than the others, or nothing at all."""
    model = zoo.model_of("llama")
    cache = cache_of(model, ids(tokens), CODES)
    assert cache.length == tokens + rows == tokens + CODES.anchors_of(tokens)
    assert cache.placed_tokens[cache.offsets].tolist() == ([8, 9] * rows)[:rows]
    assert cache.nbytes == rows * model.bytes_per_token
    with model.run(asked(cache)) as made:
        assert made.placed.length == rows + len(Q)
    assert asked(cache).baseline == tokens + len(Q)  # anchors are no part of the ordinary prompt
    assert recompute(prompt(Q, cache)).computed_tokens.tolist() == [*ids(tokens), *Q]


def test_what_stands_around_the_document_stays() -> None:
    """Danger: a header's or trailer's rows are dropped with the chunks, or a dropped sink is hidden from later ones."""
    model = zoo.model_of("llama")
    packet = Encoding((-1,), (-2,), True, torch.randn(2, 64, generator=torch.Generator().manual_seed(3)), 4, (8, 9))
    cache = cache_of(model, ids(10), packet)
    assert cache.offsets.tolist() == [0, *(1 + INSIDE).tolist(), 16]
    plan = dataclasses.replace(asked(cache), learned=packet.learned)
    assert off_dense(model, plan) < TOLERANCE
    behind = cache_of(model, ids(10), Encoding((0, 0), chunk=4, anchors=(8, 9)))
    assert torch.equal(behind.offsets, INSIDE)
    dense = asked(behind).dense()
    assert dense.mask[dense.tokens == 9][:, :2].all()
    assert off_dense(model, asked(behind)) < TOLERANCE
    assert len(packet.digest) == 64
    assert packet.digest != dataclasses.replace(packet, anchors=(9, 8)).digest


def test_anchors_may_be_pruned() -> None:
    """Danger: who saw whom is read off the rows that are left, and changes when some of them go."""
    model = zoo.model_of("llama")
    cache = pruned(cache_of(model, ids(10), CODES), INSIDE[1:])
    assert off_dense(model, asked(cache)) < TOLERANCE


def test_plain_documents_keep_their_address() -> None:
    """Danger: every document stored before is encoded again."""
    assert Encoding((1,), (2,), True).digest == digest_of(json.dumps([[1], [2], True]), b"")


def test_stored_anchors_come_back_as_they_were(tmp_path: Path) -> None:
    """Danger: a store forgets the chunks, and the stored document has no dense pass any more; titles are part of it."""
    spec, titled = (
        "anchors:chunk=8,anchors=2,links=1",
        [*DOCUMENTS, Document("A river.", title="A title of many tokens")],
    )
    engine = engine_of(spec, store_of(f"disk:path={tmp_path}"))
    guess, stored = dry_run(engine.encoder, titled).bytes, engine.encode(titled).bytes
    assert guess == pytest.approx(stored, rel=0.05)
    again = Engine(engine.model, engine.text, Anchors(1, 8, 2), store_of(f"disk:path={tmp_path}"))
    answer = again.answer(QUESTION, titled, max_new_tokens=2)
    assert (answer.usage.hits, answer.usage.misses) == (4, 0)
    plan = again.plan(QUESTION, titled)
    caches = [s.cache for s in plan.segments if s.name == "document" and s.cache is not None]
    assert sum(c.nbytes for c in caches) == stored
    assert all(c.chunks is not None for c in caches)
    assert off_dense(again.model, plan) < TOLERANCE


def info(folder: Path | None = None, reserved: int = 10) -> ModelInfo:
    return ModelInfo("digest", 64, 326, 4, 10.0, reserved=tuple(range(6, 6 + reserved)), directory=str(folder or ""))


def test_the_checkpoint_says_which_anchors_it_was_trained_with(tmp_path: Path) -> None:
    """Danger: a checkpoint is served with chunks it never saw, or one without anchors with untrained ones."""
    tokens = LinkTokens(((20, 21),), (5,), (6,), (30, 31, 32), 16)
    (tmp_path / DESCRIPTION).write_text(tokens.to_json())
    bound = Anchors(links=2).bind(info(tmp_path))
    assert bound.encoding is not None
    assert (bound.tokens, bound.encoding.digest) == (tokens, Encoding(chunk=16, anchors=(30, 31, 32)).digest)
    assert repr(bound) == "Anchors(links=2, chunk=16, anchors=3)"
    assert Anchors(chunk=16, anchors=3).bind(info(tmp_path)).tokens == tokens
    for wrong in (Anchors(chunk=8), Anchors(anchors=2), Anchors(links=3)):
        with pytest.raises(SpecError, match="this checkpoint"):
            wrong.bind(info(tmp_path))
    (tmp_path / DESCRIPTION).write_text(LinkTokens(((20, 21),), (5,), (6,)).to_json())
    with pytest.raises(SpecError, match="has chunk=0"):
        Anchors().bind(info(tmp_path))
    (tmp_path / DESCRIPTION).write_text('{"ids": [], "start": [], "end": [], "anchors": [7]}')
    with pytest.raises(SpecError, match="anchors a chunk"):
        Anchors().bind(info(tmp_path))


def test_without_a_description_anchors_are_reserved_tokens(caplog: pytest.LogCaptureFixture) -> None:
    """Danger: an anchor is also a link token, or nobody says that it is untrained."""
    found = Anchors(links=1, chunk=8, anchors=4).bind(info())
    assert "its anchor tokens are untrained" in caplog.text
    assert found.tokens.anchors == (12, 13, 14, 15)
    assert found.tokens.ids == ((8,), (9,), (10,), (11,))
    with pytest.raises(SpecError, match="anchors=25: this tokenizer has 10 reserved tokens"):
        Anchors().bind(info())
    with pytest.raises(SpecError, match="want 0 or more"):
        Anchors(chunk=-1)


def test_the_answer_goes_on_behind_the_anchors() -> None:
    """Danger: decoding counts rows where it must count positions, since most rows of a document are gone."""
    engine = engine_of("anchors:chunk=8,anchors=2")
    answer = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=4)
    plan = engine.plan(QUESTION, DOCUMENTS)
    forced = Segment(torch.tensor(answer.tokens[:-1]), plan.end, name="answer")
    whole = dataclasses.replace(plan, segments=(*plan.segments, forced))
    logits = engine.model.dense(whole.dense())[-len(answer.tokens) :]
    assert logits.argmax(-1).tolist() == list(answer.tokens)
