"""Tokens that vLLM answers with Kvilt's connector equal those of Kvilt's own engine, for every served strategy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_kit import DOCUMENTS, NEW, QUESTION, Reference, Served, document, receipt, same, tokens

from kvilt.engine.engine import Engine
from kvilt.types import Answer, Document

ORDERS = [[0, 1, 2, 3], [3, 1, 0], [2, 2, 1], [1]]
# strategy, compression: a new served strategy is one line here
SERVED = [
    ("naive", ""),
    ("block", ""),
    ("block:sink=system", ""),
    ("block:sink=4", "keydiff:keep=0.5+int4"),
    ("kv_packet:wrapper=PACKET", ""),
    ("linked_packet:wrapper=LINKED,layout=tail", ""),
    ("linked_packet:wrapper=LINKED,layout=slots", ""),
    ("kvlink:links=0", ""),
    ("kvlink:links=2", ""),
    ("kvlink:links=5", "int8"),
    ("anchors:chunk=8,anchors=2", ""),
    ("turborag", ""),
    ("turborag:positions=composite", ""),
    ("prompt_cache:slot=512", ""),
    ("prompt_cache:consecutive=true", "fp8"),
    ("epic:tokens=1", ""),
    ("epic:tokens=17,sink=system", ""),
    ("random:ratio=0.05", ""),
    ("random:ratio=0.3,seed=1", ""),  # more holes than seats: computed in parts
    ("writer:adapter=WRITER", ""),
    ("ranked", ""),
    ("ranked:ratio=0.3,join=0,sink=none", "int8"),
    ("ape:temperature=1,scale=1", ""),
]
REFUSED = [
    "full",
    "cacheblend",
    "cacheblend:ratio=0.4,stages=3",
    "a3",
    "prophetkv",
    "infoflow",
    "sam_kv",
    "ape",
    "query_lora:adapter=WRITER",
]


def named(place: Path, spec: str) -> str:
    """A specification with its files' paths."""
    for word in ("PACKET", "LINKED", "WRITER"):
        spec = spec.replace(word, str(place / f"{word.lower()}.safetensors"))
    return spec


def answers(engine: Engine, orders: list[list[int]]) -> list[Answer]:
    """The engine's answers to the same question over documents in several orders."""
    return [engine.answer(QUESTION, [DOCUMENTS[i] for i in o], max_new_tokens=NEW) for o in orders]


@pytest.mark.parametrize(("spec", "compress"), SERVED)
def test_answers_equal_the_engines(place: Path, reference: Reference, served: Served, spec: str, compress: str) -> None:
    """Danger: vLLM serves rows at wrong places, of wrong documents, or in the wrong order of computing."""
    spec = named(place, spec)
    engine = reference.engine(spec, compress)
    engine.encode(DOCUMENTS)
    orders = [o for o in ORDERS if "prompt_cache:slot" not in spec or len(set(o)) == len(o)]
    wanted = answers(engine, orders)
    served.use(spec, compress=compress)
    prompts = [reference.prompt(engine, [DOCUMENTS[i] for i in o]) for o in orders]
    alone = [served.ask([p])[0] for p in prompts]
    assert [same(o, a) for o, a in zip(alone, wanted, strict=True)] == [True] * len(orders)
    assert all(receipt(o)["hits"] == len(i) and not receipt(o)["misses"] for o, i in zip(alone, orders, strict=True))
    again = served.ask(prompts)  # now partly from vLLM's own cache, under our salt
    assert all(same(o, a) for o, a in zip(again, wanted, strict=True))
    assert any(receipt(o)["cached_tokens"] for o in again)
    served.llm.reset_prefix_cache()
    together = served.ask((prompts * 12)[:12])  # and several that share blocks in one step
    assert all(same(o, a) for o, a in zip(together, (wanted * 12)[:12], strict=True))


@pytest.mark.parametrize("spec", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(place: Path, served: Served, spec: str) -> None:
    """Danger: a method that would look at the model first is served as something else."""
    from kvilt.errors import SpecError

    with pytest.raises(SpecError, match=spec.partition(":")[0]):
        served.use(named(place, spec))


@pytest.fixture
def naive(reference: Reference, served: Served) -> Iterator[Engine]:
    """The simplest strategy, with everything encoded."""
    engine = reference.engine("naive")
    engine.encode(DOCUMENTS)
    served.use("naive")
    yield engine
    served.look()


def full(reference: Reference, documents: list[Document]) -> Answer:
    """The answer of full attention."""
    return reference.engine("full").answer(QUESTION, documents, max_new_tokens=NEW)


def test_a_plain_request_never_meets_composed_rows(reference: Reference, served: Served, naive: Engine) -> None:
    """Danger: vLLM's prefix cache hands approximate rows to requests that did not ask for them."""
    prompt = reference.prompt(naive, DOCUMENTS)
    composed = served.ask([prompt])[0]
    hidden, served.ends.index = served.ends.index, type(served.ends.index)()
    served.ends.documents.index = served.ends.index  # nothing is known: the same tokens, asked plainly
    try:
        plain = served.ask([prompt])[0]
    finally:
        served.ends.index = served.ends.documents.index = hidden
    wanted = full(reference, DOCUMENTS)
    assert same(plain, wanted)
    assert tokens(composed) != tokens(plain)
    assert not receipt(plain)


def test_without_the_salt_plain_requests_would_be_wrong(
    reference: Reference, served: Served, naive: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: the test above passes because nothing was shared at all."""
    from kvilt.integrations.vllm import scheduling

    whole = scheduling._write
    monkeypatch.setattr(scheduling, "_write", lambda request, tokens, salt: whole(request, tokens, None))
    prompt = reference.prompt(naive, DOCUMENTS)
    composed = served.ask([prompt])[0]
    hidden, served.ends.documents.index = served.ends.documents.index, type(served.ends.index)()
    try:
        plain = served.ask([prompt])[0]
    finally:
        served.ends.documents.index = hidden
        served.llm.reset_prefix_cache()
    assert not same(plain, full(reference, DOCUMENTS))
    assert tokens(composed) == tokens(plain)


def test_nothing_stored_is_served_plainly(reference: Reference, served: Served, naive: Engine) -> None:
    """Danger: unknown documents cost more than without Kvilt, or get a salt that splits vLLM's own cache."""
    unknown = [document(50, 90), document(51, 120)]
    prompt = reference.prompt(naive, unknown)
    first, second = served.ask([prompt])[0], served.ask([prompt])[0]
    assert same(first, full(reference, unknown))
    assert tokens(first) == tokens(second)
    assert not receipt(first)
    assert second.num_cached_tokens > 0


def test_a_missing_document_is_computed_where_it_stands(reference: Reference, served: Served, naive: Engine) -> None:
    """Danger: a hole first, or between documents, sees what it must not, or hides what it must see."""
    missing = document(60, 150)
    for at in range(3):
        documents = [DOCUMENTS[1], DOCUMENTS[3]]
        documents.insert(at, missing)
        wanted = naive.answer(
            QUESTION, [Document(d.text, d.title, store=d is not missing) for d in documents], max_new_tokens=NEW
        )
        answer = served.ask([reference.prompt(naive, documents)])[0]
        assert same(answer, wanted), at
        assert receipt(answer)["holes"] == (0 if at == 2 else 1)
        assert receipt(answer)["computed_tokens"] >= len(naive.text.document_ids(missing))


def test_a_missing_system_part_is_computed(reference: Reference, served: Served, naive: Engine) -> None:
    """Danger: a system text of the client's own shifts or spoils the documents behind it."""
    other = reference.engine("naive")
    other = type(other)(
        other.model, other.text.of(other.text.tokenizer, "Be brief, be kind."), other.strategy, other.store
    )
    answer = served.ask([reference.prompt(other, DOCUMENTS)])[0]  # nothing is stored for this system text
    assert receipt(answer)["holes"] == 1
    assert same(answer, other.answer(QUESTION, DOCUMENTS, max_new_tokens=NEW))


def test_a_prompt_that_ends_with_a_document(reference: Reference, served: Served, naive: Engine) -> None:
    """Danger: a hit of 100 % leaves nothing to compute, which ends vLLM's engine."""
    text = naive.text
    prompt = [int(i) for part in (text.system_ids(), text.document_ids(DOCUMENTS[1])) for i in part]
    answer = served.ask([prompt])[0]
    assert receipt(answer)["computed_tokens"] == 1
    assert len(tokens(answer)) == NEW
    assert tokens(served.ask([prompt])[0]) == tokens(answer)


def test_what_our_plugin_names_and_what_the_index_finds_are_the_same(
    reference: Reference, served: Served, naive: Engine
) -> None:
    """Danger: two ways to the same documents give two answers."""
    prompt = reference.prompt(naive, DOCUMENTS)
    at, places = len(naive.text.system_ids()), []
    for d in DOCUMENTS:
        length = len(naive.text.document_ids(d))
        places.append([at, at + length, d.title, 0])
        at += length
    content = served.ask([prompt])[0]
    hint = served.ask([prompt], hints=[{"documents": places}])[0]
    assert tokens(content) == tokens(hint)
    wanted = {k: v for k, v in receipt(content).items() if k in ("documents", "hits", "charged", "strategy")}
    assert wanted == {k: v for k, v in receipt(hint).items() if k in wanted}
    assert receipt(hint)["cached_tokens"] > 0  # the same salt
