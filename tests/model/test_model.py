"""The model around a plan: encoding in batches, placing, decoding, probing, threads and precision."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from kvilt.model.placed import BufferPool, Shape
from torch import Tensor

import zoo
from core_kit import DOCUMENTS, QUESTION, TOLERANCE, cache_of, engine_of, fake, ids, layout, off, pruned
from kvilt.errors import DamagedCache
from kvilt.model.model import Model
from kvilt.plan import Plan
from kvilt.types import DocumentCache, Encoding, TensorLayers, Which

Q = ids(5, 99)


def held(cache: DocumentCache) -> TensorLayers:
    assert isinstance(cache.layers, TensorLayers)
    return cache.layers


@dataclasses.dataclass(frozen=True, eq=False)
class Watched:
    """Layers that do something when a layer is fetched."""

    inner: TensorLayers
    on_fetch: Callable[[int], None]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def fetch(self, layer: int, which: Which, out: Tensor | None = None) -> Tensor:
        self.on_fetch(layer)
        return self.inner.fetch(layer, which, out)


def watched(cache: DocumentCache, on_fetch: Callable[[int], None]) -> DocumentCache:
    return dataclasses.replace(cache, layers=Watched(held(cache), on_fetch))


# --- encoding ---


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(before=(0, 0)), Encoding((7, 8), (9,), keep=True)])
def test_a_padded_batch_encodes_each_document_as_if_alone(model: Model, encoding: Encoding) -> None:
    """Danger: padding, or a longer neighbour, changes a document that is stored for good."""
    documents = [ids(n, n) for n in (3, 17, 9)]
    for tokens, batched in zip(documents, model.encode(documents, encoding), strict=True):
        alone = cache_of(model, tokens, encoding)
        assert batched.key == alone.key
        assert (batched.length, batched.dropped) == (alone.length, alone.dropped)
        for one, other in zip(
            held(batched).keys + held(batched).values, held(alone).keys + held(alone).values, strict=True
        ):
            assert off(one, other) < 1e-5


def test_stored_rows_keep_no_batch_alive() -> None:
    """Danger: one short document pins the tensors of a batch of thousands of tokens."""
    caches = zoo.model_of("llama").encode([ids(3, 1), ids(40, 2)], Encoding())
    for tensor in held(caches[0]).keys + held(caches[0]).values:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_dropped_prefix_leaves_no_rows_and_the_document_at_position_zero() -> None:
    """Danger: the sink's rows are stored, or the document's keys stay where the sink pushed them."""
    model, tokens = zoo.model_of("llama3-rope"), ids(6, 1)
    behind = cache_of(model, tokens, Encoding(before=(0, 0, 0)))
    whole = cache_of(model, torch.cat([torch.zeros(3, dtype=torch.long), tokens]))
    assert behind.placed_tokens.tolist() == tokens.tolist()
    assert (behind.length, behind.dropped, behind.offsets.tolist()) == (6, 3, list(range(6)))
    for layer in range(4):
        back = model.rope.move(held(whole).keys[layer][:, 3:], -3)
        assert off(held(behind).keys[layer], back) < 1e-5


def test_the_key_names_everything_that_was_run() -> None:
    """Danger: two caches that differ share one address."""
    model, tokens = zoo.model_of("llama"), ids(6, 1)
    learned = [torch.randn(2, 64), torch.randn(2, 64)]
    encodings = [Encoding(), Encoding(before=(0,)), Encoding(before=(0,), keep=True), Encoding(after=(0,))]
    encodings += [Encoding((-1,), (-2,), keep=True, learned=t) for t in learned]
    digests = [model.key(tokens, e).digest for e in encodings]
    digests += [model.key(tokens + 1, Encoding()).digest, model.key(tokens, Encoding(), "int8").digest]
    digests += [zoo.model_of(f).key(tokens, Encoding()).digest for f in ("llama3-rope", "qwen2")]
    assert len(set(digests)) == len(digests)


def test_same_weights_under_another_configuration_are_another_address() -> None:
    """Danger: a changed norm epsilon, multiplier or YaRN scaling serves keys made under the old one."""
    one = Model(zoo.hf_model("llama"))
    raw = zoo.hf_model("llama")
    raw.config.rms_norm_eps = 1e-2
    other = Model(raw)
    assert one.digest == other.digest
    assert one.key(Q, Encoding()).digest != other.key(Q, Encoding()).digest


def test_a_bfloat16_checkpoint_is_the_same_model_in_float32() -> None:
    """Danger: vectors trained on a GPU in bfloat16 are refused on a CPU that loads the same file in float32."""
    raw = zoo.hf_model("llama").to(torch.bfloat16)
    half, full, other = Model(raw), Model(zoo.hf_model("llama").to(torch.bfloat16).float()), zoo.model_of("llama")
    assert half.digest == full.digest != other.digest
    assert half.key(Q, Encoding()).digest != full.key(Q, Encoding()).digest  # their caches are not


def test_learned_ids_without_vectors_are_an_error() -> None:
    """Danger: an id below zero is silently read as token 0."""
    with pytest.raises(ValueError, match="learned vectors"):
        zoo.model_of("llama").embed(torch.tensor([3, -1]))


# --- decoding ---


def _after_gaps(m: Model) -> Plan:
    return layout(Q).reuse(cache_of(m, ids(6, 1)), at=30).reuse(cache_of(m, ids(7, 2)), at=90).ask().plan()


def _after_links(m: Model) -> Plan:
    made = layout(Q).reuse(cache_of(m, ids(6, 1))).compute(ids(2, 3))
    return made.reuse(cache_of(m, ids(7, 2))).compute(ids(2, 4)).ask().plan()


def _after_pruning(m: Model) -> Plan:
    return layout(Q).reuse(pruned(cache_of(m, ids(9, 1)), torch.tensor([1, 2, 7]))).ask().plan()


def _everything(m: Model) -> Plan:
    return layout(Q).compute(ids(11, 1)).ask().plan()


@pytest.mark.parametrize("make", [_after_gaps, _after_links, _after_pruning, _everything])
def test_each_decoded_token_equals_computing_the_plan_anew(model: Model, make: Callable[[Model], Plan]) -> None:
    """Danger: after a gap or link tokens the answer is decoded at the wrong positions, which shows in late tokens only."""
    plan, said = make(model), ids(6, 50)
    _, placed = model.run(plan, room=len(said))
    buffer = placed.buffer.data_ptr()
    made = layout(Q)
    made.segments, made.at = list(plan.segments), plan.end
    for i, token in enumerate(said):
        assert placed.get_seq_length() == plan.end + i  # transformers' own arithmetic counts positions, not rows
        logits = model.step(token[None, None], placed)[0]
        again = made.compute(said[i : i + 1]).plan()
        assert off(logits, model.run(again)[0]) < TOLERANCE
    assert placed.buffer.data_ptr() == buffer  # nothing was reallocated, nothing copied
    assert placed.length == len(plan.positions) + len(said)


def test_the_buffer_has_room_for_the_whole_answer_and_hardly_more() -> None:
    """Danger: decoding grows the cache by copying the context; or the buffer wastes memory."""
    pool = BufferPool(Shape(2, 2, 4, torch.float32, torch.device("cpu")))
    assert [pool.take(n).shape[3] for n in (1, 256, 257)] == [256, 256, 512]
    small, large = pool.take(10), pool.take(1000)
    pool.give(large)
    pool.give(small)
    assert pool.take(5).data_ptr() == large.data_ptr()
    assert pool.take(5).data_ptr() != large.data_ptr()  # two prompts at once never share one


def test_rows_of_an_earlier_prompt_never_reach_a_later_one() -> None:
    """Danger: a reused buffer still holds another user's rows, or NaN from a broken run."""
    model = Model(zoo.hf_model("llama"))
    plan = _after_pruning(model)
    wanted, placed = model.run(plan, room=4)
    for rubbish in (1e4, float("nan")):
        model.pool.give(placed.buffer.fill_(rubbish))
        found, placed = model.run(plan, room=4)
        assert torch.equal(found, wanted)
        step = model.step(torch.tensor([[70]]), placed)
        assert bool(torch.isfinite(step).all())


def test_stored_rows_survive_being_placed_moved_and_decoded_after() -> None:
    """Danger: a rotation in place, or a buffer that is the stored tensor, changes the store for every later prompt."""
    model = zoo.model_of("llama")
    cache = cache_of(model, ids(9, 1))
    before = [t.clone() for t in held(cache).keys + held(cache).values]
    for at in (0, 7):
        _, placed = model.run(layout(Q).reuse(cache, at=at).ask().plan(), room=2)
        model.step(torch.tensor([[70]]), placed)
        placed.buffer.fill_(0)
    assert all(map(torch.equal, before, held(cache).keys + held(cache).values))


# --- loading ahead ---


def _mixed(m: Model) -> Plan:
    marks = torch.tensor([True, False, False, True, False, False])
    made = layout(Q).reuse(cache_of(m, ids(6, 1)), marks)
    return made.reuse(pruned(cache_of(m, ids(9, 2)), torch.tensor([0, 4]))).ask().plan()


def test_loading_ahead_changes_nothing(model: Model) -> None:
    """Danger: the pass reaches a layer whose rows are not there yet."""
    plan = _mixed(model)
    slow = dataclasses.replace(
        plan,
        segments=tuple(
            dataclasses.replace(s, cache=watched(s.cache, lambda _: time.sleep(0.002)) if s.cache else None)
            for s in plan.segments
        ),
    )
    ahead, placed = model.run(slow, room=2, overlap=True)
    plain, other = model.run(plan, room=2, overlap=False)
    assert torch.equal(ahead, plain)
    token = torch.tensor([[70]])
    assert torch.equal(model.step(token, placed), model.step(token, other))


@pytest.mark.parametrize("overlap", [True, False])
def test_a_damaged_layer_is_raised_from_the_pass(overlap: bool) -> None:
    """Danger: an error in the loading thread is lost, and the pass waits for ever or runs over garbage."""
    model = Model(zoo.hf_model("llama"))

    def broken(layer: int) -> None:
        if layer == 2:
            raise DamagedCache("0" * 64, "a bit flipped")

    plan = layout(Q).reuse(watched(cache_of(model, ids(9, 1)), broken)).ask().plan()
    with pytest.raises(DamagedCache, match="a bit flipped"):
        model.run(plan, overlap=overlap)
    assert not [t for t in threading.enumerate() if t.name == "kvilt-loader"]


def test_a_buffer_goes_back_only_when_nothing_loads_into_it() -> None:
    """Danger: the pass fails, its buffer is handed to the next prompt, and the loading thread still writes into it."""
    model = Model(zoo.hf_model("llama"))
    slow = watched(cache_of(model, ids(9, 1)), lambda _: time.sleep(0.05))
    plan = layout(Q).reuse(slow).ask().plan()
    broken = dataclasses.replace(plan, learned=torch.zeros(1, 3))  # vectors of the wrong width: the pass fails at once
    with pytest.raises(RuntimeError):
        model.run(broken, overlap=True)
    assert not [t for t in threading.enumerate() if t.name == "kvilt-loader"]


# --- precision and threads ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_stays_near_its_dense_reference(dtype: torch.dtype, tolerance: float) -> None:
    """Danger: caches in half precision are rounded more than once on their way."""
    model = Model(zoo.hf_model("llama3-rope").to(dtype))
    for make in (_after_gaps, _mixed, _after_links):
        plan = make(model)
        assert held(cache_of(model, Q)).dtype == dtype
        assert off(model.run(plan)[0], model.dense(plan.dense())[-1]) < tolerance


def test_a_cache_of_another_dtype_is_rounded_once_into_the_buffer() -> None:
    """Danger: keys stored in bfloat16 are rounded a second time after they were moved for a float32 model."""
    model = Model(zoo.hf_model("llama"))
    cache = cache_of(model, ids(9, 1))
    stored = [tuple(t.bfloat16() for t in side) for side in (held(cache).keys, held(cache).values)]
    half = dataclasses.replace(cache, layers=TensorLayers(*stored))
    _, placed = model.run(layout(Q).reuse(half, at=5).ask().plan())
    assert torch.equal(placed.buffer[1, 0, :, :9], model.rope.move(stored[0][1].float(), 5))
    some = pruned(half, torch.tensor([1, 4]))
    _, placed = model.run(layout(Q).reuse(some, torch.arange(9) == 3, at=5).ask().plan())
    assert torch.equal(placed.buffer[1, 0, :, [0, 2]], model.rope.move(stored[0][1][:, [1, 4]].float(), 5))


@pytest.mark.parametrize("spec", ["block", "epic:tokens=3"])
def test_two_threads_get_right_answers(spec: str) -> None:
    """Danger: two prompts at once share a buffer, a plan or a tokenizer's state."""
    engine = engine_of(spec)
    orders = [DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS[:1], DOCUMENTS[1:]]
    wanted = [engine.answer(QUESTION, d, max_new_tokens=6).tokens for d in orders]

    def ask(i: int) -> Any:
        return engine.answer(QUESTION, orders[i % 4], max_new_tokens=6).tokens

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(16), timeout=60))
    assert found == [wanted[i % 4] for i in range(16)]


def test_a_plan_of_fakes_is_never_needed_to_look_at_a_plan() -> None:
    """Danger: looking at a plan (kvilt ask --explain) reads rows from the store."""

    def never(_: int) -> None:
        raise AssertionError("rows were read")

    plan = layout(Q).reuse(watched(fake([1, 2, 3]), never)).ask().plan()
    assert (plan.reused_count, plan.is_suffix, len(plan.dense().tokens)) == (3, True, 8)
