"""What each method's paper says of its layout: slots, unions, links, sinks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from core_kit import (
    DOCUMENTS,
    QUESTION,
    TOLERANCE,
    cache_of,
    engine_of,
    fake,
    ids,
    off,
    placed_rows,
    prompt,
    run,
    wrapper_file,
)
from kvilt.errors import PromptError, SpecError
from kvilt.plan import Layout
from kvilt.registry import build
from kvilt.rows.rows import select
from kvilt.strategies.auto import Auto
from kvilt.strategies.epic import Epic
from kvilt.strategies.kvlink import DESCRIPTION, KVLink, LinkTokens
from kvilt.strategies.prompt_cache import PromptCache, read_schema
from kvilt.types import Document, DocumentCache, Encoding, ModelInfo

Q = torch.tensor([90, 91])
SYSTEM = fake([80, 81, 82])
A, B, C = fake([1, 2, 3, 4]), fake([5, 6]), fake([7, 8, 9])


def starts(plan: Any) -> list[int]:
    return [s.start for s in plan.segments]


def never(*_: Any) -> Any:
    raise AssertionError("this strategy has nothing to look at first")


# --- Prompt Cache ---


def test_prompt_cache_gives_every_document_its_slot() -> None:
    """Danger: a module's place depends on how long the one before it is, so its cache cannot stay where it is."""
    plan = PromptCache(slot=10).plan(prompt(Q, A, B, C, system=SYSTEM), never)
    assert starts(plan) == [0, 3, 13, 23, 26]  # the question follows the last module
    assert plan.is_suffix
    with pytest.raises(PromptError, match="4 tokens do not fit a place of 3 positions"):
        PromptCache(slot=3).plan(prompt(Q, A, system=SYSTEM), never)


def test_prompt_cache_consecutive_has_no_gaps() -> None:
    """Danger: the variant that later papers measured is not the one that runs."""
    plan = PromptCache(consecutive=True).plan(prompt(Q, A, B, C, system=SYSTEM), never)
    assert starts(plan) == [0, 3, 7, 9, 12]


def schema(folder: Path, modules: Any = None) -> str:
    given = modules or [
        {"name": "terms", "length": 6},
        {"union": [{"name": "de", "length": 4}, {"name": "fr", "length": 9}]},
        {"name": "customer", "length": 5},
    ]
    path = folder / "schema.json"
    path.write_text(json.dumps({"modules": given}))
    return str(path)


def test_a_schema_places_modules_unions_and_parameters(tmp_path: Path) -> None:
    """Danger: a union is as long as the member in use, and everything behind it moves."""
    path = schema(tmp_path)
    assert read_schema(path) == {"terms": (0, 6), "de": (6, 4), "fr": (6, 9), "customer": (15, 5)}
    strategy = PromptCache(schema=path)
    for chosen in ("de", "fr"):
        asked = prompt(Q, A, B, C, system=SYSTEM)
        plan = strategy.plan(type(asked)(asked.system, asked.documents, Q, ("terms", chosen, "customer")), never)
        assert starts(plan) == [0, 3, 9, 18, 21]
    parts = (B, C)
    left_out = strategy.plan(type(asked)(SYSTEM, parts, Q, ("customer", "terms")), never)  # any order, any subset
    assert starts(left_out) == [0, 18, 3, 20]


def test_a_schema_refuses_what_has_no_place_in_it(tmp_path: Path) -> None:
    """Danger: a document lands on another one's positions."""
    strategy, asked = PromptCache(schema=schema(tmp_path)), prompt(Q, B, C)
    with pytest.raises(PromptError, match="no module"):
        strategy.plan(type(asked)(SYSTEM, (B, C), Q, ("terms", "mine")), never)
    with pytest.raises(PromptError, match="alternatives of one union"):
        strategy.plan(type(asked)(SYSTEM, (B, C), Q, ("de", "fr")), never)
    with pytest.raises(PromptError, match="do not fit a place of 4 positions"):
        strategy.plan(type(asked)(SYSTEM, (fake(range(5)),), Q, ("de",)), never)
    for twice in (("terms", "terms"), ("terms", "customer", "terms")):
        with pytest.raises(PromptError, match="module 'terms' stands twice"):  # every row twice at the same positions
            strategy.plan(type(asked)(SYSTEM, (B, C, B)[: len(twice)], Q, twice), never)


@pytest.mark.parametrize(
    "modules",
    [
        [{"name": "a"}],
        [{"name": "a", "length": 0}],
        [{"name": "a", "length": 3}, {"name": "a", "length": 4}],
        [{"union": []}],
        [7],
    ],
)
def test_a_schema_that_is_none_is_refused(tmp_path: Path, modules: Any) -> None:
    """Danger: a mistake in the file is found as a crash in the middle of a prompt."""
    path = schema(tmp_path, modules)
    with pytest.raises(SpecError, match="is not readable"):
        read_schema(path)
    with pytest.raises(SpecError, match="is not readable"):
        read_schema(str(tmp_path / "missing.json"))


def test_a_parameter_is_computed_in_its_reserved_place(tmp_path: Path) -> None:
    """Danger: a parameter's text is stored, or what stands behind it moves with its length."""
    path = schema(
        tmp_path, [{"name": "ada", "length": 90}, {"name": "who", "length": 30}, {"name": "sel", "length": 90}]
    )
    engine = engine_of(f"prompt_cache:schema={path}")
    for words in ("Bo", "A much longer name"):
        given = [DOCUMENTS[0], Document(words, id="who", store=False), DOCUMENTS[2]]
        plan = engine.plan(QUESTION, given)
        system = len(engine.text.system_ids())
        assert starts(plan)[:4] == [0, system, system + 90, system + 120]
        assert off(run(engine.model, plan), engine.model.dense(plan.dense())[-1]) < TOLERANCE
    assert engine.store.stats().entries == 3  # the system part and two modules


# --- KVLink ---


def test_links_belong_to_slots_and_are_computed() -> None:
    """Danger: the n-th document gets the links of its content, or shares them with another slot (papers.md 1.4)."""
    tokens = LinkTokens(((101, 102), (103, 104), (105, 106)), (201,), (202,))
    for order in ((A, B, C), (C, A, B)):
        plan = KVLink(links=2, tokens=tokens).plan(prompt(Q, *order, system=SYSTEM), never)
        assert plan.computed_tokens.tolist() == [201, 101, 102, 103, 104, 105, 106, 202, 90, 91]
        assert bool((plan.positions.diff() == 1).all())  # one numbering, links and markers included (1.6)
        names = [s.name for s in plan.segments]
        assert names == [
            "system",
            "start",
            "document",
            "links",
            "document",
            "links",
            "document",
            "links",
            "end",
            "question",
        ]


def test_documents_never_see_links_but_links_see_documents() -> None:
    """Danger: the mask of papers.md 1.5 is not the one that runs."""
    tokens = LinkTokens(((101,), (102,)), (201,), (202,))
    dense = KVLink(links=1, tokens=tokens).plan(prompt(Q, B, C, system=SYSTEM), never).dense()
    at = {int(t): i for i, t in enumerate(dense.tokens)}
    sees = {t: {int(dense.tokens[j]) for j in dense.mask[i].nonzero()[:, 0]} for t, i in at.items()}
    assert sees[201] == {80, 81, 82, 201}
    assert sees[6] == {5, 6}
    assert sees[9] == {7, 8, 9}
    assert sees[101] == {80, 81, 82, 201, 5, 6, 101}
    assert sees[102] == {80, 81, 82, 201, 5, 6, 101, 7, 8, 9, 102}
    assert sees[91] == set(at)


@pytest.mark.parametrize("links", [1, 5, 6, 7, 100])
def test_the_published_layout_is_the_authors_and_never_runs_into_the_markers(links: int) -> None:
    """Danger: link id = 128011 + slot * K + k; with many links the last slots would be markers, or no tokens at all."""
    tokens = LinkTokens.published(links)
    assert tokens.ids[0][0] == 128011
    assert tokens.ids[1][0] == 128011 + links
    assert (tokens.start, tokens.end) == ((128254,), (128255,))
    assert max(map(max, tokens.ids)) < 128254
    assert len(tokens.ids) == (40 if links <= 6 else 243 // links)


def info(**more: Any) -> ModelInfo:
    return ModelInfo("digest", 64, more.pop("vocab_size", 326), 4, 10.0, **more)


def test_link_tokens_come_from_the_checkpoint_then_the_layout_then_what_is_reserved(tmp_path: Path) -> None:
    """Danger: trained links are ignored, and others stand in their place."""
    (tmp_path / DESCRIPTION).write_text(LinkTokens(((7, 8), (9, 10)), (5,), (6,)).to_json())
    described = KVLink(links=2).bind(info(directory=str(tmp_path)))
    assert described.tokens == LinkTokens(((7, 8), (9, 10)), (5,), (6,))
    assert KVLink(links=1).bind(info(directory=str(tmp_path))).tokens.ids == ((7, 8), (9, 10))
    with pytest.raises(SpecError, match="2 link tokens per document"):
        KVLink(links=3).bind(info(directory=str(tmp_path)))
    assert LinkTokens.of(info(vocab_size=128256), 5) == LinkTokens.published(5)
    reserved = LinkTokens.of(info(reserved=tuple(range(10, 20))), 3)
    assert reserved == LinkTokens(((12, 13, 14), (15, 16, 17)), (10,), (11,))
    with pytest.raises(SpecError, match="at least 7 reserved tokens"):
        KVLink(links=5).bind(info(reserved=(1, 2, 3)))


@pytest.mark.parametrize(
    "name", ["Shiyu-Lab/Llama1B-KVLink5", "/cache/models--Shiyu-Lab--Llama3B-KVLink5/snapshots/0a1"]
)
def test_published_checkpoints_are_known_by_name(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Danger: the authors' trained link tokens are called untrained, or a stock Llama's trained."""
    assert KVLink(links=5).bind(info(vocab_size=128256, directory=name)).tokens == LinkTokens.published(5)
    assert Auto().bind(info(vocab_size=128256, directory=name)).method == KVLink(5, tokens=LinkTokens.published(5))
    assert not caplog.text
    KVLink(links=5).bind(info(vocab_size=128256, directory="meta-llama/Llama-3.2-1B-Instruct"))
    assert "untrained" in caplog.text


def test_a_strategy_for_fine_tuned_weights_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Danger: markers that a model never learned are put around every document without a word."""
    build("strategy", "turborag:start=3,end=4").bind(info())  # type: ignore[attr-defined]
    assert "fine-tuned with these markers" in caplog.text


@pytest.mark.parametrize("text", ["{", "[]", '{"ids": [[1], [2, 3]], "start": [], "end": []}', '{"ids": [["x"]]}'])
def test_a_broken_description_is_named(tmp_path: Path, text: str) -> None:
    """Danger: a KeyError from a file nobody knew about."""
    (tmp_path / DESCRIPTION).write_text(text)
    with pytest.raises(SpecError, match=DESCRIPTION):
        KVLink(links=1).bind(info(directory=str(tmp_path)))


def test_more_documents_than_slots_are_refused() -> None:
    """Danger: a document in an untrained slot, or an IndexError."""
    tokens = LinkTokens(((101,), (102,)))
    with pytest.raises(PromptError, match="3 documents, but link tokens for 2 slots"):
        KVLink(links=1, tokens=tokens).plan(prompt(Q, A, B, C), never)
    assert len(KVLink(links=0).plan(prompt(Q, A, B, C), never).segments) == 5


# --- TurboRAG ---


def test_turborag_s_markers_are_stored_with_the_document() -> None:
    """Danger: the markers are computed online, stand outside the document's attention, or are other tokens."""
    engine = engine_of("turborag")
    start, end = engine.info.reserved[:2]
    plan = engine.plan(QUESTION, DOCUMENTS)
    for document, segment in zip(DOCUMENTS, plan.segments[1:], strict=False):
        text = engine.text.document_ids(document).tolist()
        assert segment.tokens.tolist() == [start, *text, end]
        assert segment.reused.all()
    assert plan.is_suffix
    assert bool((plan.positions.diff() == 1).all())
    assert plan.baseline == engine_of("block").plan(QUESTION, DOCUMENTS).baseline  # markers are no part of the prompt
    assert repr(engine_of("turborag:start=9,end=7").strategy) == "TurboRAG(start=9, end=7, positions='reordered')"


def test_composite_positions_restart_after_the_system_part() -> None:
    """Danger: a document begins at position 0 and hides behind the system part, or the question stands among documents."""
    engine = engine_of("turborag:positions=composite")
    unstored = Document("Never stored.", store=False)
    plan = engine.plan(QUESTION, [unstored, *DOCUMENTS])
    system, longest = len(engine.info.system), max(s.length for s in plan.segments[1:4])
    assert starts(plan) == [0, system, system, system, system + longest, system + longest + plan.segments[4].length]
    assert plan.segments[4].tokens[0] == engine.info.reserved[0]  # computed with its markers
    assert plan.segments[4].computed.all()
    assert off(run(engine.model, plan), engine.model.dense(plan.dense())[-1]) < TOLERANCE


def test_turborag_needs_markers() -> None:
    """Danger: a marker that the model has no embedding for, or none at all, is found in the middle of a prompt."""
    for spec in ("turborag:positions=global", "turborag:start=326", "turborag:end=-1"):
        with pytest.raises(SpecError, match="wants"):
            engine_of(spec)
    with pytest.raises(SpecError, match="give start= and end="):
        build("strategy", "turborag:start=3").bind(info(reserved=(1,)))  # type: ignore[attr-defined]
    assert build("strategy", "turborag:start=3,end=4").bind(info()).encoding.before == (3,)  # type: ignore[attr-defined]


# --- sinks, EPIC, options ---


def test_sinks_stand_in_front_and_leave_no_rows() -> None:
    """Danger: a sink is stored with every document, or is another one than the option says."""
    plain, four, system = (engine_of(f"block:sink={s}") for s in ("none", "4", "system"))
    assert plain.encoder.encoding.before == ()
    assert four.encoder.encoding.before == (0, 0, 0, 0)
    assert system.encoder.encoding.before == system.info.system
    positions = [e.plan(QUESTION, DOCUMENTS).positions.tolist() for e in (plain, four, system)]
    assert positions[0] == positions[1] == positions[2]
    with pytest.raises(SpecError, match="option sink"):
        engine_of("block:sink=bos")


def test_epic_recomputes_the_first_tokens_of_all_but_the_prefix() -> None:
    """Danger: the document that is the prompt's prefix is recomputed for nothing, or short documents break."""
    with_system = Epic(tokens=3).plan(prompt(Q, A, B, C, system=SYSTEM), never)
    assert with_system.computed_tokens.tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 90, 91]
    without = Epic(tokens=3).plan(prompt(Q, A, B), never)
    assert without.computed_tokens.tolist() == [5, 6, 90, 91]
    assert engine_of("epic:tokens=0").encoder.encoding.before == (0, 0, 0, 0)


def test_epic_leaves_a_document_alone_that_was_encoded_behind_the_system_part() -> None:
    """Danger: with sink=system the exact prefix is recomputed for nothing; a lossy one is taken for exact."""
    model, system = zoo.model_of("llama"), cache_of(zoo.model_of("llama"), ids(5, 77))
    behind = Encoding(before=tuple(system.tokens.tolist()))
    a, b = cache_of(model, ids(7, 1), behind), cache_of(model, ids(6, 2), behind)
    pressed = dataclasses.replace(a, offsets=torch.arange(6), rows=select(a, torch.arange(6)).rows)
    packed = dataclasses.replace(a, key=dataclasses.replace(a.key, compression="Int4()"))

    def computed(*documents: DocumentCache) -> list[int]:
        plan = Epic(tokens=3, sink="system").plan(prompt(Q, *documents, system=system), never)
        return [int(s.computed.sum()) for s in plan.segments[1:-1]]

    assert computed(a, b, a) == [0, 3, 3]
    assert computed(pressed, b) == computed(packed, b) == [3, 3]
    engine = engine_of("epic:tokens=16,sink=system")
    plan = engine.plan(QUESTION, DOCUMENTS)
    assert [int(s.computed.sum()) for s in plan.segments[1:-1]] == [0, 16, 16]
    whole = torch.cat([s.tokens for s in plan.segments[:2]])  # its rows are those of a full prefill
    full = placed_rows(engine.model, Layout(prompt(Q)).compute(whole).ask().plan())[..., : len(whole), :]
    assert off(placed_rows(engine.model, plan)[..., : len(whole), :], full) < TOLERANCE


@pytest.mark.parametrize("spec", ["kvlink:links=-1", "epic:tokens=-3", "prompt_cache:slot=0"])
def test_options_out_of_range_are_refused(spec: str) -> None:
    """Danger: a negative count cuts from the other end and means something else."""
    with pytest.raises(SpecError, match="wants"):
        engine_of(spec)


def test_a_strategy_s_repr_is_its_configuration(tmp_path: Path) -> None:
    """Danger: a result cannot be told from another one's, or its name holds a table of vectors."""
    path = wrapper_file(tmp_path)
    assert str(engine_of("block:sink=4").strategy) == "block:sink=4"
    assert repr(engine_of("kvlink:links=1").strategy) == "KVLink(links=1)"
    assert repr(engine_of(f"kv_packet:wrapper={path}").strategy) == f"KVPacket(wrapper='{path}')"
    assert repr(zoo.model_of("llama").info()).count("\n") == 0
