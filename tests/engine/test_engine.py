"""One query: what it reuses, what it says it took, and that nothing a store does costs an answer or its correctness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import zoo
from core_kit import DOCUMENTS, QUESTION, TOLERANCE, engine_of, off, wrapper_file
from kvilt.engine.engine import Engine
from kvilt.errors import DamagedCache, DocumentError, PromptError, SpecError, StoreUnavailable
from kvilt.stores.disk import DiskStore
from kvilt.stores.memory import MemoryStore
from kvilt.types import CacheKey, Document, DocumentCache, Encoding

SPECS = ["full", "block", "kvlink:links=5", "kv_packet:wrapper=WRAPPER", "prompt_cache:slot=64", "epic:tokens=3"]
ROW_BYTES = 4 * 2 * 2 * 16 * 4  # layers, K and V, heads, head_dim, float32


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Engine]:
    def of(spec: str = "block", **more: object) -> Engine:
        return engine_of(spec.replace("WRAPPER", str(wrapper_file(tmp_path))), **more)  # type: ignore[arg-type]

    return of


def sizes(engine: Engine) -> tuple[int, list[int], int]:
    text = engine.text
    return len(text.system_ids()), [len(text.document_ids(d)) for d in DOCUMENTS], len(text.question_ids(QUESTION))


# --- what it took ---


def test_usage_of_a_plain_strategy_is_what_can_be_counted_by_hand(make: Callable[..., Engine]) -> None:
    """Danger: numbers that users pay and decide by are off by the system part, or by one."""
    engine = make("block")
    system, documents, question = sizes(engine)
    first = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=4, min_new_tokens=4).usage
    second = engine.answer(QUESTION, DOCUMENTS[::-1], max_new_tokens=4, min_new_tokens=4).usage
    rows, computed = system + sum(documents), question
    for usage in (first, second):
        assert (usage.reused_tokens, usage.computed_tokens, usage.generated_tokens) == (rows, computed, 4)
        assert usage.bytes_loaded == rows * ROW_BYTES
        total, linear = rows + computed, engine.info.linear_cost
        seen = sum(range(rows + 1, total + 1))
        assert usage.charged == pytest.approx((computed * linear + seen) / (total * linear + total * (total + 1) / 2))
        assert 0 < usage.ttft_s < sum(usage.steps_s.values())
        assert set(usage.steps_s) == {"tokenize", "fetch", "plan", "run", "decode"}
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 3, 3, 0)


@pytest.mark.parametrize(
    ("spec", "reused", "computed"),
    [
        ("full", lambda s, d, q: 0, lambda s, d, q: s + sum(d) + q),
        ("kvlink:links=5", lambda s, d, q: s + sum(d), lambda s, d, q: q + 3 * 5 + 2),
        ("kv_packet:wrapper=WRAPPER", lambda s, d, q: s + sum(d) + 3 * 16, lambda s, d, q: q),
        ("epic:tokens=3", lambda s, d, q: s + sum(d) - 3 * 3, lambda s, d, q: q + 3 * 3),
    ],
)
def test_usage_of_each_kind_of_strategy(
    make: Callable[..., Engine], spec: str, reused: Callable[..., int], computed: Callable[..., int]
) -> None:
    """Danger: links, headers or recomputed tokens are left out of what was computed."""
    engine = make(spec)
    usage = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=1).usage
    assert (usage.reused_tokens, usage.computed_tokens) == (reused(*sizes(engine)), computed(*sizes(engine)))
    assert (usage.charged == pytest.approx(1.0)) == (spec == "full")


@pytest.mark.parametrize("spec", SPECS)
def test_documents_stand_in_any_order_and_nothing_is_encoded_twice(make: Callable[..., Engine], spec: str) -> None:
    """Danger: a cache depends on its place, so another order encodes again, or answers for the old one."""
    engine = make(spec)
    engine.encode(DOCUMENTS)
    for order in (DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS[1:]):
        answer = engine.answer(QUESTION, order, max_new_tokens=1)
        assert answer.usage.misses == 0
        plan = engine.plan(QUESTION, order)
        wanted = engine.model.dense(plan.dense(), plan.learned)[-1]
        assert answer.logits is not None
        assert off(answer.logits, wanted) < TOLERANCE


def test_the_same_document_twice_is_encoded_once_and_stands_twice(make: Callable[..., Engine]) -> None:
    """Danger: the second copy overwrites the first, or is charged as another miss of the store."""
    engine = make("block")
    answer = engine.answer(QUESTION, [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0]], max_new_tokens=1)
    system, sizes_of, _ = sizes(engine)
    assert answer.usage.reused_tokens == system + 2 * sizes_of[0] + sizes_of[1]
    assert engine.store.stats().entries == 3  # two documents and the system part
    again = engine.answer(QUESTION, [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0]], max_new_tokens=1).usage
    assert (answer.usage.misses, again.hits, again.misses) == (3, 3, 0)  # counted by document of the prompt
    plan = engine.plan(QUESTION, [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0]])
    assert answer.logits is not None
    assert off(answer.logits, engine.model.dense(plan.dense())[-1]) < TOLERANCE


def test_a_document_that_must_not_be_stored_never_is(make: Callable[..., Engine]) -> None:
    """Danger: a customer's record that was marked private lies in a shared store."""
    engine = make("block")
    private = Document("Account 4711 is overdrawn.", store=False)
    engine.encode([private, DOCUMENTS[0]])
    usage = engine.answer(QUESTION, [DOCUMENTS[0], private], max_new_tokens=1).usage
    assert (usage.hits, usage.misses) == (1, 0)
    key = engine.encoder.items([private])[0].key.digest
    assert not engine.store.contains([key])
    report = engine.encode([private])
    assert (report.documents, report.encoded) == (0, 0)


def test_full_recompute_is_transformers_own_greedy_generation(make: Callable[..., Engine]) -> None:
    """Danger: the reference that every method is measured against is not the model's own answer."""
    engine = make("full")
    answer = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=12)
    ids = torch.cat([s.tokens for s in engine.plan(QUESTION, DOCUMENTS).segments])[None]
    raw = zoo.hf_model("llama")
    wanted = raw.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert list(answer.tokens) == wanted[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("spec", SPECS)
def test_scores_are_the_logits_of_decoding_step_by_step(make: Callable[..., Engine], spec: str) -> None:
    """Danger: fidelity is measured on other logits than the answer was made from."""
    engine = make(spec)
    answer = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=6, min_new_tokens=6)
    scores = engine.score(QUESTION, DOCUMENTS, answer.tokens)
    assert scores.shape == (6, zoo.VOCABULARY)
    assert scores[0].argmax() == answer.tokens[0]
    assert answer.logits is not None
    assert off(scores[0], answer.logits) < TOLERANCE
    logits, placed = engine.model.run(engine.plan(QUESTION, DOCUMENTS), room=6)
    for i, token in enumerate(answer.tokens[:-1]):
        logits = engine.model.step(torch.tensor([[token]]), placed)[0]
        assert off(scores[i + 1], logits) < TOLERANCE


# --- what stores do ---


def damage(folder: Path, key: str) -> None:
    """Flip one bit in the last layer's values: found only when that layer is read."""
    (path,) = folder.rglob(f"{key}*.safetensors")
    with path.open("r+b") as file:
        file.seek(-3, 2)
        byte = file.read(1)[0]
        file.seek(-3, 2)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_file_damaged_in_its_last_layer_is_set_aside_and_encoded_again(
    tmp_path: Path, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: found in the middle of the pass: the answer is lost, or half the layers are another document's."""
    folder = tmp_path / "store"
    engine = engine_of("block", DiskStore(str(folder)))
    run = engine.model.run
    monkeypatch.setattr(engine.model, "run", lambda plan, room: run(plan, room, overlap))
    wanted = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=4)
    damage(folder, engine.encoder.items(DOCUMENTS)[1].key.digest)
    found = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=4)
    assert found.tokens == wanted.tokens
    assert found.logits is not None
    assert wanted.logits is not None
    assert torch.equal(found.logits, wanted.logits)
    assert (found.usage.damaged, found.usage.hits, found.usage.misses) == (1, 2, 1)
    again = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=4)
    assert (again.usage.damaged, again.usage.hits) == (0, 3)
    assert again.tokens == wanted.tokens


class Stubborn(MemoryStore):
    """Serves one damaged document whatever is done about it, like a store that cannot be written."""

    def __init__(self, bad: str) -> None:
        super().__init__()
        self.bad, self.tried = bad, 0

    def get(self, key: CacheKey) -> DocumentCache | None:
        if key.digest != self.bad:
            return super().get(key)
        self.tried += 1
        raise DamagedCache(self.bad, "a bit flipped")

    def set_aside(self, key: str, reason: str) -> None:
        raise StoreUnavailable("read-only")


def test_a_damaged_file_that_cannot_be_set_aside_costs_one_more_read(make: Callable[..., Engine]) -> None:
    """Danger: the engine meets the same damage again and again until it gives up."""
    wanted = make("block").answer(QUESTION, DOCUMENTS, max_new_tokens=3)
    store = Stubborn(make("block").encoder.items(DOCUMENTS)[0].key.digest)
    answer = engine_of("block", store).answer(QUESTION, DOCUMENTS, max_new_tokens=3)
    assert answer.tokens == wanted.tokens
    assert (answer.usage.damaged, store.tried) == (1, 1)


class Unavailable(MemoryStore):
    """A store whose disk is full, read-only or gone."""

    def get(self, key: CacheKey) -> DocumentCache | None:
        raise StoreUnavailable("gone")

    def put(self, cache: DocumentCache, **_: object) -> None:
        raise StoreUnavailable("no space left")


@pytest.mark.parametrize("spec", ["block", "kv_packet:wrapper=WRAPPER"])
def test_a_store_that_cannot_be_used_costs_no_answer(make: Callable[..., Engine], spec: str) -> None:
    """Danger: a full disk takes the service down."""
    wanted = make(spec).answer(QUESTION, DOCUMENTS, max_new_tokens=3)
    answer = make(spec, store=Unavailable()).answer(QUESTION, DOCUMENTS, max_new_tokens=3)
    assert answer.tokens == wanted.tokens
    assert (answer.usage.hits, answer.usage.misses) == (0, 3)


def test_engines_of_two_strategies_share_what_is_the_same(make: Callable[..., Engine]) -> None:
    """Danger: every strategy stores a copy of its own of the same plain cache, or takes one that is not plain."""
    engine = make("block")
    engine.encode(DOCUMENTS)
    assert engine.with_strategy("prompt_cache:slot=64").answer(QUESTION, DOCUMENTS, max_new_tokens=1).usage.hits == 3
    assert engine.with_strategy("block:sink=4").answer(QUESTION, DOCUMENTS, max_new_tokens=1).usage.hits == 0


# --- bad input ---


def test_questions_and_prompts_that_cannot_be_answered_say_why(make: Callable[..., Engine]) -> None:
    """Danger: an answer about nothing, or a crash deep in torch."""
    engine = make("block")
    for question in ("", " \n\t"):
        with pytest.raises(PromptError, match="question is empty"):
            engine.answer(question, DOCUMENTS)
    with pytest.raises(PromptError, match="no documents"):
        engine.answer(QUESTION, [])
    assert engine.answer(QUESTION, [], allow_empty=True, max_new_tokens=1).usage.reused_tokens == sizes(engine)[0]
    with pytest.raises(PromptError, match="max_new_tokens"):
        engine.answer(QUESTION, DOCUMENTS, max_new_tokens=0)
    for text in ("", "  \n"):
        with pytest.raises(DocumentError, match="empty"):
            engine.answer(QUESTION, [Document(text, id="x")])
    with pytest.raises(PromptError, match="continuation is empty"):
        engine.score(QUESTION, DOCUMENTS, [])


def test_what_is_longer_than_the_context_is_said_before_it_is_computed(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: positions the model has never seen give fluent rubbish; or the answer is cut without a word."""
    engine = make("block")
    total = engine.plan(QUESTION, DOCUMENTS).end
    monkeypatch.setattr(type(engine.model), "context_length", property(lambda _: total + 3))
    assert engine.answer(QUESTION, DOCUMENTS, max_new_tokens=50, min_new_tokens=3).usage.generated_tokens == 3
    with pytest.raises(PromptError, match=f"{total} positions"):
        engine.score(QUESTION, DOCUMENTS, [70] * 4)
    monkeypatch.setattr(type(engine.model), "context_length", property(lambda _: total))
    with pytest.raises(PromptError, match=f"takes {total} positions"):
        engine.answer(QUESTION, DOCUMENTS)
    with pytest.raises(DocumentError, match="Split it"):
        engine.answer(QUESTION, [Document("word " * 4000, title="long")])


def test_names_that_are_no_strategy_or_store_are_refused() -> None:
    """Danger: a typing error loads a model for minutes first."""
    with pytest.raises(SpecError, match="Did you mean 'block'"):
        engine_of("blok")
    assert engine_of("block").encoder.encoding.digest == Encoding().digest
