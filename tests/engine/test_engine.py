"""One query: what it reuses, what it says it took, and that nothing a store does costs an answer or its correctness."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from core_kit import DOCUMENTS, QUESTION, TOLERANCE, ask, engine_of, off, store_of, text_format, wrapper_file
from kvilt.engine.engine import Engine
from kvilt.engine.text import TextFormat
from kvilt.errors import DamagedCache, DocumentError, PromptError, SpecError, StoreUnavailable, UserError
from kvilt.model.loading import load_model
from kvilt.model.model import Model
from kvilt.plan import prefill_cost
from kvilt.registry import build
from kvilt.rows.rows import FileRows
from kvilt.stores.memory import MemoryStore
from kvilt.stores.store import Store
from kvilt.types import CacheKey, Document, DocumentCache, Encoding

SPECS = ["full", "block", "kvlink:links=5", "kv_packet:wrapper=WRAPPER", "prompt_cache:slot=64", "epic:tokens=3"]
ROW_BYTES = 4 * 2 * 2 * 16 * 4  # layers, K and V, heads, head_dim, float32


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Engine]:
    def of(spec: str = "block", **more: object) -> Engine:
        return engine_of(spec.replace("WRAPPER", str(wrapper_file(tmp_path))), **more)  # type: ignore[arg-type]

    return of


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokens of everything that is encoded from now on, by their key's digest of them."""
    seen: list[str] = []
    encode = Model.encode

    def counted(self: Model, documents: Sequence[Tensor], *args: Any) -> list[DocumentCache]:
        caches = encode(self, documents, *args)
        seen.extend(cache.key.tokens for cache in caches)
        return caches

    monkeypatch.setattr(Model, "encode", counted)
    return seen


def sizes(engine: Engine) -> tuple[int, list[int], int]:
    text = engine.text
    return len(text.system_ids()), [len(text.document_ids(d)) for d in DOCUMENTS], len(text.question_ids(QUESTION))


# --- what it took ---


def test_usage_of_a_plain_strategy_is_what_can_be_counted_by_hand(make: Callable[..., Engine]) -> None:
    """Danger: numbers that users pay and decide by are off by the system part, or by one; a miss seems to cost nothing."""
    engine = make("block")
    system, documents, question = sizes(engine)
    first = ask(engine, tokens=4, min_new_tokens=4).usage
    second = ask(engine, DOCUMENTS[::-1], tokens=4, min_new_tokens=4).usage
    rows, computed = system + sum(documents), question
    total, linear = rows + computed, engine.info.linear_cost
    seen = sum(range(rows + 1, total + 1))
    plan = (computed * linear + seen) / (total * linear + total * (total + 1) / 2)
    encoding = sum(prefill_cost(n, linear) for n in (system, *documents)) / prefill_cost(total, linear)
    for usage in (first, second):
        assert (usage.reused_tokens, usage.computed_tokens, usage.generated_tokens) == (rows, computed, 4)
        assert usage.bytes_loaded == rows * ROW_BYTES
        assert 0 < usage.ttft_s < sum(usage.steps_s.values())
        assert set(usage.steps_s) == {"tokenise", "fetch", "plan", "run", "decode"}
    assert second.charged == pytest.approx(plan)
    assert first.charged == pytest.approx(plan + encoding)
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 3, 3, 0)
    third = ask(engine, [*DOCUMENTS, Document("One that is new.")]).usage
    assert (third.hits, third.misses) == (3, 1)
    assert third.charged > ask(engine, [*DOCUMENTS, Document("One that is new.")]).usage.charged


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
    ask(engine)
    usage = ask(engine).usage
    assert (usage.reused_tokens, usage.computed_tokens) == (reused(*sizes(engine)), computed(*sizes(engine)))
    assert (usage.charged == pytest.approx(1.0)) == (spec == "full")


@pytest.mark.parametrize(
    ("spec", "passes"),
    [
        ("prophetkv:ratio=0.3", 1.0),  # the question over everything, in all layers
        ("a3:ratio=0.3", 0.25),  # in one of four
        ("infoflow:ratio=0.3,layers=2-2", 0.75),
        ("cacheblend:ratio=0.3", 0.5),
    ],
)
def test_what_a_probe_reads_is_counted(make: Callable[..., Engine], spec: str, passes: float) -> None:
    """Danger: a method that reads every row two to eight times over says that it read it once."""
    engine = make(spec)
    ask(engine)
    usage = ask(engine).usage
    system, documents, _ = sizes(engine)
    front = system if spec.startswith("cacheblend") else system + sum(documents)  # it computes the documents anew
    assert usage.bytes_loaded == (system + sum(documents)) * ROW_BYTES + front * ROW_BYTES * passes
    block = make("block", store=engine.store)
    assert usage.charged > ask(block).usage.charged


def test_what_sam_kv_reads_is_counted(make: Callable[..., Engine]) -> None:
    """Danger: keys that are compared, and anchors that are run, come from a store for nothing."""
    engine = make("sam_kv:init=2,local=4,block=4,layers=3-3")
    ask(engine)
    usage = ask(engine).usage
    system, documents, _ = sizes(engine)
    keys_of_a_layer = sum(documents) * ROW_BYTES // 4
    anchors = (system + 3 * 6) * ROW_BYTES
    alone = sum(documents) * ROW_BYTES  # every document's last tokens ask the rest of it
    assert usage.bytes_loaded == system * ROW_BYTES + keys_of_a_layer + anchors + alone


@pytest.mark.parametrize("spec", SPECS)
def test_documents_stand_in_any_order_and_nothing_is_encoded_twice(make: Callable[..., Engine], spec: str) -> None:
    """Danger: a cache depends on its place, so another order encodes again, or answers for the old one."""
    engine = make(spec)
    engine.encode(DOCUMENTS)
    for order in (DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS[1:]):
        answer = ask(engine, order)
        assert answer.usage.misses == 0
        plan = engine.plan(QUESTION, order)
        assert off(answer.logits, engine.model.dense(plan.dense(), plan.learned)[-1]) < TOLERANCE


def test_the_same_document_twice_is_encoded_once_and_stands_twice(
    make: Callable[..., Engine], encoded: list[str]
) -> None:
    """Danger: the second copy overwrites the first, or is charged as another miss of the store."""
    engine, documents = make("block"), [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0]]
    answer = ask(engine, documents)
    system, sizes_of, _ = sizes(engine)
    assert answer.usage.reused_tokens == system + 2 * sizes_of[0] + sizes_of[1]
    assert len(encoded) == len(set(encoded)) == engine.store.stats().entries == 3  # two documents and the system part
    again = ask(engine, documents).usage
    assert (answer.usage.misses, again.hits, again.misses) == (3, 3, 0)  # counted by document of the prompt
    plan = engine.plan(QUESTION, documents)
    assert off(answer.logits, engine.model.dense(plan.dense())[-1]) < TOLERANCE


def test_a_document_that_must_not_be_stored_never_is(make: Callable[..., Engine]) -> None:
    """Danger: a customer's record that was marked private lies in a shared store, or is remembered as storable."""
    engine = make("block")
    private = Document("Account 4711 is overdrawn.", store=False)
    engine.encode([private, DOCUMENTS[0]])
    usage = ask(engine, [DOCUMENTS[0], private]).usage
    assert (usage.hits, usage.misses) == (1, 0)
    key = engine.encoder.items([private])[0].key.digest
    assert not engine.store.contains([key])
    report = engine.encode([private])
    assert (report.documents, report.encoded) == (0, 0)
    public = dataclasses.replace(private, store=True)
    assert [ask(engine, [d]).usage.misses for d in (public, private, public)] == [1, 0, 0]
    assert ask(engine, [private]).usage.reused_tokens == sizes(engine)[0]


def test_full_recompute_is_transformers_own_greedy_generation(make: Callable[..., Engine]) -> None:
    """Danger: the reference that every method is measured against is not the model's own answer."""
    engine = make("full")
    answer = ask(engine, tokens=12)
    ids = torch.cat([s.tokens for s in engine.plan(QUESTION, DOCUMENTS).segments])[None]
    raw = zoo.hf_model("llama")
    wanted = raw.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert list(answer.tokens) == wanted[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("spec", SPECS)
def test_scores_are_the_logits_of_decoding_step_by_step(make: Callable[..., Engine], spec: str) -> None:
    """Danger: fidelity is measured on other logits than the answer was made from."""
    engine = make(spec)
    answer = ask(engine, tokens=6, min_new_tokens=6)
    scores = engine.score(QUESTION, DOCUMENTS, answer.tokens)
    assert scores.shape == (6, zoo.VOCABULARY)
    assert scores[0].argmax() == answer.tokens[0]
    assert off(scores[0], answer.logits) < TOLERANCE
    with engine.model.run(engine.plan(QUESTION, DOCUMENTS), room=6) as run:
        for i, token in enumerate(answer.tokens[:-1]):
            assert off(scores[i + 1], run.step(torch.tensor([[token]]))[0]) < TOLERANCE


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
    engine = engine_of("block", store_of(f"disk:path={tmp_path}"))
    run = engine.model.run
    monkeypatch.setattr(engine.model, "run", lambda plan, room: run(plan, room, overlap))
    wanted = ask(engine, tokens=4)
    damage(tmp_path, engine.encoder.items(DOCUMENTS)[1].key.digest)
    found = ask(engine, tokens=4)
    assert found.tokens == wanted.tokens
    assert torch.equal(found.logits, wanted.logits)  # type: ignore[arg-type]
    assert (found.usage.damaged, found.usage.hits, found.usage.misses) == (1, 2, 1)
    again = ask(engine, tokens=4)
    assert (again.usage.damaged, again.usage.hits) == (0, 3)
    assert again.tokens == wanted.tokens


def test_scores_survive_damage_too(tmp_path: Path) -> None:
    """Danger: an evaluation of hours ends at one rotten file."""
    engine = engine_of("block", store_of(f"disk:path={tmp_path}"))
    wanted = engine.score(QUESTION, DOCUMENTS, [70, 80])
    damage(tmp_path, engine.encoder.items(DOCUMENTS)[1].key.digest)
    assert torch.equal(engine.score(QUESTION, DOCUMENTS, [70, 80]), wanted)


class Rotten:
    """Rows that cannot be read, whatever is done about it."""

    def __init__(self, rows: Any, error: Exception) -> None:
        self.rows, self.error, self.tried = rows, error, 0
        self.shape, self.dtype, self.nbytes = rows.shape, rows.dtype, rows.nbytes

    def read(self, layers: slice, out: Tensor) -> None:
        self.tried += 1
        raise self.error


class Stubborn(MemoryStore):
    """Gives one rotten document again and again, like a store that cannot be written."""

    def __init__(self, bad: str, error: Exception) -> None:
        super().__init__()
        self.bad, self.error, self.given = bad, error, list[Rotten]()
        self.aside = list[str]()

    def get_many(self, keys: Sequence[CacheKey], **options: Any) -> list[DocumentCache | None]:
        caches = super().get_many(keys, **options)
        for i, (key, cache) in enumerate(zip(keys, caches, strict=True)):
            if key.digest == self.bad and cache is not None:
                self.given.append(Rotten(cache.rows, self.error))
                caches[i] = dataclasses.replace(cache, rows=self.given[-1])
        return caches

    def set_aside(self, digest: str, reason: str) -> None:
        self.aside.append(digest)
        raise StoreUnavailable("read-only")


def test_a_damaged_file_that_cannot_be_set_aside_costs_one_more_read(make: Callable[..., Engine]) -> None:
    """Danger: the engine meets the same damage again and again until it gives up."""
    wanted = ask(make("block"), tokens=3)
    bad = make("block").encoder.items(DOCUMENTS)[0].key.digest
    store = Stubborn(bad, DamagedCache(bad, "a bit flipped"))
    engine = engine_of("block", store)
    engine.encode(DOCUMENTS)
    for _ in range(2):
        answer = ask(engine, tokens=3)
        assert answer.tokens == wanted.tokens
        assert (answer.usage.damaged, answer.usage.hits, answer.usage.misses) == (1, 2, 1)
    assert store.aside == [bad, bad]
    assert [rows.tried for rows in store.given] == [1, 1]


def test_a_document_that_cannot_be_read_just_now_is_a_miss_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Danger: one error of a network disk in the middle of a pass costs the answer, or a sound file."""
    engine = engine_of("block", store_of(f"disk:path={tmp_path}"))
    wanted = ask(engine, tokens=3)
    before = sorted(tmp_path.rglob("*.safetensors"))
    read, bad = FileRows._read, engine.encoder.items(DOCUMENTS)[1].key.digest

    class Failing:
        def read(self, *_: Any) -> None:
            raise OSError(116, "Stale file handle")

    def failing(self: FileRows, name: str, span: Any, layers: range, out: Tensor) -> None:
        if self.header.key == bad and 2 in layers:
            self.blob = Failing()  # type: ignore[assignment]
        read(self, name, span, layers, out)

    monkeypatch.setattr(FileRows, "_read", failing)
    answer = ask(engine, tokens=3)
    assert answer.tokens == wanted.tokens
    assert (answer.usage.damaged, answer.usage.hits, answer.usage.misses) == (0, 2, 1)
    assert "Stale file handle" in caplog.text
    assert sorted(tmp_path.rglob("*.safetensors")) == before


class Unavailable(MemoryStore):
    """A store whose disk is full, read-only or gone."""

    def get_many(self, keys: Sequence[CacheKey], **_: Any) -> list[DocumentCache | None]:
        raise StoreUnavailable("gone")

    def put(self, cache: DocumentCache, **_: Any) -> bool:
        raise StoreUnavailable("no space left")


@pytest.mark.parametrize("spec", ["block", "kv_packet:wrapper=WRAPPER"])
def test_a_store_that_cannot_be_used_costs_no_answer(make: Callable[..., Engine], spec: str) -> None:
    """Danger: a full disk takes the service down."""
    wanted = ask(make(spec), tokens=3)
    answer = ask(make(spec, store=Unavailable()), tokens=3)
    assert answer.tokens == wanted.tokens
    assert (answer.usage.hits, answer.usage.misses) == (0, 3)


def test_engines_of_two_strategies_share_what_is_the_same(make: Callable[..., Engine]) -> None:
    """Danger: every strategy stores a copy of its own of the same plain cache, or takes one that is not plain."""
    engine = make("block")
    engine.encode(DOCUMENTS)
    assert ask(engine.with_strategy("prompt_cache:slot=64")).usage.hits == 3
    assert ask(engine.with_strategy("block:sink=4")).usage.hits == 0


# --- many at once ---


def test_six_identical_cold_requests_encode_every_document_once(
    make: Callable[..., Engine], encoded: list[str]
) -> None:
    """Danger: a burst on a new document computes it as often as it is asked for."""
    engine = make("epic:tokens=3")
    wanted, gate = ask(make("epic:tokens=3"), tokens=3).tokens, threading.Barrier(6)
    encoded.clear()

    def request(number: int) -> Any:
        gate.wait(10)
        return ask(engine if number % 2 else engine.with_strategy("block"), tokens=3)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(request, range(6), timeout=60))
    assert {a.tokens for a in answers[1::2]} == {wanted}
    assert len({a.tokens for a in answers[::2]}) == 1
    assert len(encoded) == len(set(encoded)) == 4
    assert {a.usage.hits + a.usage.misses for a in answers} == {3}


def test_one_that_fails_to_encode_leaves_the_others_a_chance(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: the thread that encodes dies, and all who wait for it wait for ever."""
    engine, encode, failed = make("block"), Model.encode, threading.Event()
    ready = threading.Barrier(3)

    def once(self: Model, documents: Sequence[Tensor], *args: Any) -> list[DocumentCache]:
        if len(documents) > 1 and not failed.is_set():
            failed.set()
            raise MemoryError("no memory")
        return encode(self, documents, *args)

    monkeypatch.setattr(Model, "encode", once)

    def request(_: int) -> object:
        ready.wait(10)
        try:
            return ask(engine, [Document(f"Document number {i}") for i in range(4)]).tokens
        except MemoryError:
            return "failed"

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(request, range(3), timeout=60))
    assert answers.count("failed") == 1
    assert len(set(answers)) == 2


@pytest.mark.parametrize("spec", ["block", "epic:tokens=3"])
def test_two_threads_get_right_answers(spec: str) -> None:
    """Danger: two prompts at once share a buffer, a plan or a tokenizer's state."""
    engine = engine_of(spec)
    orders = [DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS[1:], [DOCUMENTS[0], DOCUMENTS[0]]]
    wanted = [ask(engine, order, 4).tokens for order in orders]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: ask(engine, orders[i % 4], 4).tokens, range(8), timeout=60))
    assert found == [wanted[i % 4] for i in range(8)]


def test_known_documents_are_not_tokenised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: twenty documents cost 24 ms of tokenising in every request, or one with other fields is taken for a known one."""
    engine, other = engine_of(), dataclasses.replace(DOCUMENTS[0], store=False)
    items = engine._items(DOCUMENTS)
    assert [i.document for i in engine._items([other, *DOCUMENTS])] == [other, *DOCUMENTS]
    monkeypatch.setattr(TextFormat, "plain_ids", lambda *_: pytest.fail("tokenised again"))
    assert all(a is b for a, b in zip(engine._items([dataclasses.replace(d) for d in DOCUMENTS]), items, strict=True))


# --- who finds what ---


def test_keys_of_another_namespace_never_hit(encoded: list[str]) -> None:
    """Danger: one tenant's documents, or the fact that they are stored, are another's."""
    store = store_of()
    mine, theirs, shared = (
        engine_of("block", store, **more) for more in ({"namespace": "mine"}, {"namespace": "theirs"}, {})
    )
    mine.encode(DOCUMENTS)
    ask(mine)
    encoded.clear()
    for engine in (theirs, shared):
        usage = ask(engine).usage
        assert (usage.hits, usage.misses) == (0, 3)
    assert len(encoded) == 2 * 4  # the system part, too
    assert ask(mine.with_strategy("prompt_cache")).usage.hits == 3
    keys = [{e._system.key.digest, *(i.key.digest for i in e.encoder.items(DOCUMENTS))} for e in (mine, theirs, shared)]
    assert len(set.union(*keys)) == 12
    for wrong in ("", "\udcff", "a\nb", "x" * 5000):
        with pytest.raises(UserError, match="namespace"):
            engine_of("block", store, namespace=wrong)


def test_the_stored_dtype_belongs_to_the_key_and_the_computations_does_not(encoded: list[str], tmp_path: Path) -> None:
    """Danger: a corpus encoded in bfloat16 on a GPU is encoded again on a CPU, or float32 rows are served as bfloat16."""
    zoo.hf_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    half, full = (load_model(str(tmp_path), dtype=dtype)[0] for dtype in ("bfloat16", "float32"))
    fine = Model(zoo.hf_model("llama").to(torch.bfloat16).float())
    strategy: Any = build("strategy", "block:sink=system")

    def engine(model: Model, store: Store) -> Engine:
        return Engine(model, text_format(), strategy, store)

    exact = ask(engine(fine, store_of()))
    for first, second in ((half, full), (full, half)):
        store = store_of()
        made = engine(first, store)
        assert ask(made).usage.misses == 3
        assert {i.key.dtype for i in made.encoder.items(DOCUMENTS)} == {"bfloat16"}
        encoded.clear()
        served = ask(engine(second, store))
        assert (served.usage.hits, encoded) == (3, [])
        assert served.usage.bytes_loaded == served.usage.reused_tokens * ROW_BYTES // 2
        assert off(served.logits, exact.logits) < 0.1
        assert ask(engine(fine, store)).usage.misses == 3  # stored in float32: another document


# --- bad input ---


def test_questions_and_prompts_that_cannot_be_answered_say_why(make: Callable[..., Engine], encoded: list[str]) -> None:
    """Danger: an answer about nothing, a crash deep in torch, or documents encoded and stored for a request that fails."""
    engine = make("block")
    for question in ("", " \n\t"):
        with pytest.raises(PromptError, match="question is empty"):
            engine.answer(question, DOCUMENTS)
    with pytest.raises(PromptError, match="no documents"):
        engine.answer(QUESTION, [])
    for options in ({"max_new_tokens": 0}, {"max_new_tokens": -3}, {"num_beams": 3}, {"temperatur": 1.0}):
        with pytest.raises(PromptError, match=next(iter(options))):
            engine.answer(QUESTION, DOCUMENTS, **options)  # type: ignore[arg-type]
    for text in ("", "  \n"):
        with pytest.raises(DocumentError, match="empty"):
            engine.answer(QUESTION, [*DOCUMENTS, Document(text, id="x")])
    with pytest.raises(DocumentError, match="name of more than 4096 bytes"):
        engine.answer(QUESTION, [*DOCUMENTS, Document("A text.", id="x" * 5000)])
    with pytest.raises(PromptError, match="continuation is empty"):
        engine.score(QUESTION, DOCUMENTS, [])
    assert encoded == []
    assert engine.store.stats().entries == 0
    assert ask(engine, [], allow_empty=True).usage.reused_tokens == sizes(engine)[0]
    unstored = Document("A text.", id="x" * 5000, store=False)
    assert ask(engine, [unstored]).usage.reused_tokens == sizes(engine)[0]


def test_what_is_longer_than_the_context_is_said_before_it_is_computed(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, encoded: list[str]
) -> None:
    """Danger: positions the model has never seen give fluent rubbish; or the answer is cut without a word."""
    engine = make("block")
    total = engine.plan(QUESTION, DOCUMENTS).end
    fresh = make("block")
    encoded.clear()
    monkeypatch.setattr(type(engine.model), "context_length", property(lambda _: total + 3))
    with pytest.raises(PromptError, match=f"{total} positions"):
        fresh.score(QUESTION, DOCUMENTS, [70] * 4)
    monkeypatch.setattr(type(engine.model), "context_length", property(lambda _: total))
    with pytest.raises(PromptError, match=f"takes {total} positions"):
        fresh.answer(QUESTION, DOCUMENTS)
    with pytest.raises(DocumentError, match="Split it"):
        fresh.answer(QUESTION, [*DOCUMENTS, Document("word " * 4000, title="long")])
    assert encoded == []
    monkeypatch.setattr(type(engine.model), "context_length", property(lambda _: total + 3))
    assert ask(engine, tokens=50, min_new_tokens=3).usage.generated_tokens == 3
    assert len(engine.score(QUESTION, DOCUMENTS, [70] * 3)) == 3


def test_names_that_are_no_strategy_or_store_are_refused() -> None:
    """Danger: a typing error loads a model for minutes first."""
    with pytest.raises(SpecError, match="Did you mean 'block'"):
        engine_of("blok")
    assert engine_of("block").encoder.encoding.digest == Encoding().digest


def test_the_next_batch_is_computed_while_one_is_written(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: every document waits for the disk, or an error of the disk is lost with the thread that had it."""
    engine, computing = make("naive"), threading.Event()
    texts = [Document("word " * n) for n in (5, 80)]  # of different length: two batches, beside the system text
    put, encode = engine.store.put, engine.model.encode

    def late(cache: DocumentCache, **more: Any) -> Any:
        assert cache.length > 20 or computing.wait(20), "nothing was computed meanwhile"
        return put(cache, **more)

    def second(documents: Sequence[Tensor], *more: Any) -> list[DocumentCache]:
        if len(documents[0]) > 50:
            computing.set()
        return encode(documents, *more)

    monkeypatch.setattr(engine.store, "put", late)
    monkeypatch.setattr(engine.model, "encode", second)
    assert engine.encode(texts).encoded == 2
    assert len(engine.store.entries()) == 3  # with the system text

    def full(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("the disk is full.")

    monkeypatch.setattr(engine.store, "put", full)
    with pytest.raises(StoreUnavailable, match="disk is full"):
        engine.encode([Document("other " * n) for n in (5, 50)])
