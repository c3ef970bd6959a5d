"""The model around a plan: encoding in batches, keys, decoding after a run, precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import zoo
from core_kit import TOLERANCE, cache_of, fake, ids, layout, off, pruned, rotated, rows_of, run, watched
from kvilt.model.model import Model
from kvilt.plan import Plan
from kvilt.rows.rows import TensorRows
from kvilt.types import Encoding

Q = ids(5, 99)


# --- encoding ---


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(before=(0, 0)), Encoding((7, 8), (9,), keep=True)])
def test_a_padded_batch_encodes_each_document_as_if_alone(model: Model, encoding: Encoding) -> None:
    """Danger: padding, or a longer neighbour, changes a document that is stored for good."""
    documents = [ids(n, n) for n in (3, 17, 9)]
    for tokens, batched in zip(documents, model.encode(documents, encoding), strict=True):
        alone = cache_of(model, tokens, encoding)
        assert batched.key == alone.key
        assert (batched.length, batched.dropped) == (alone.length, alone.dropped)
        assert off(rows_of(batched), rows_of(alone)) < 1e-5


def test_stored_rows_keep_no_batch_alive() -> None:
    """Danger: one short document pins the tensors of a batch of thousands of tokens."""
    rows = zoo.model_of("llama").encode([ids(3, 1), ids(40, 2)], Encoding())[0].rows
    assert isinstance(rows, TensorRows)
    assert rows.data.untyped_storage().nbytes() == rows.data.nbytes == rows.nbytes


@pytest.mark.parametrize("family", ["llama3-rope", "glm-interleaved", "phi-partial-rotary", "llama-yarn-tied-mha"])
def test_stored_keys_say_nothing_of_where_they_were_encoded(family: str) -> None:
    """Danger: the sink's rows are stored, or the document's keys stay where the sink pushed them."""
    model, tokens = zoo.model_of(family), ids(6, 1)
    behind = cache_of(model, tokens, Encoding(before=(0, 0, 0)))
    whole = cache_of(model, torch.cat([torch.zeros(3, dtype=torch.long), tokens]))
    assert behind.placed_tokens.tolist() == tokens.tolist()
    assert (behind.length, behind.dropped, behind.offsets.tolist()) == (6, 3, list(range(6)))
    assert off(rows_of(behind), rows_of(whole)[..., 3:, :]) < 1e-5
    again = cache_of(model, torch.full((40,), 90))
    keys = rows_of(again)[0, 0]  # the same token forty times, in layer 0
    assert off(keys, keys[:, :1].expand_as(keys)) < 1e-5


def test_the_key_names_everything_that_was_run() -> None:
    """Danger: two caches that differ share one address."""
    model, tokens = zoo.model_of("llama"), ids(6, 1)
    learned = [torch.randn(2, 64), torch.randn(2, 64)]
    encodings = [Encoding(), Encoding(before=(0,)), Encoding(before=(0,), keep=True), Encoding(after=(0,))]
    encodings += [Encoding((-1,), (-2,), keep=True, learned=t) for t in learned]
    digests = [model.key(tokens, e).digest for e in encodings]
    digests += [model.key(tokens + 1, Encoding()).digest, model.key(tokens, Encoding(), "int8").digest]
    digests += [model.key(tokens, Encoding(), namespace="mine").digest]
    digests += [zoo.model_of(f).key(tokens, Encoding()).digest for f in ("llama3-rope", "qwen2")]
    digests += [Model(zoo.hf_model("llama").to(torch.bfloat16)).key(tokens, Encoding()).digest]
    assert len(set(digests)) == len(digests)
    assert model.key(tokens, Encoding(), namespace="shared").digest == digests[0]  # sharing is the default


def test_same_weights_under_another_configuration_are_another_address() -> None:
    """Danger: a changed norm epsilon, multiplier or YaRN scaling serves keys made under the old one."""
    one = Model(zoo.hf_model("llama"))
    raw = zoo.hf_model("llama")
    raw.config.rms_norm_eps = 1e-2
    other = Model(raw)
    assert one.key(Q, Encoding()).digest != other.key(Q, Encoding()).digest


def test_a_bfloat16_checkpoint_is_the_same_model_in_float32() -> None:
    """Danger: vectors trained on a GPU in bfloat16 are refused on a CPU that loads the same file in float32."""
    raw = zoo.hf_model("llama").to(torch.bfloat16)
    half, full, other = Model(raw), Model(zoo.hf_model("llama").to(torch.bfloat16).float()), zoo.model_of("llama")
    assert half.digest == full.digest != other.digest
    assert half.key(Q, Encoding()).digest != full.key(Q, Encoding()).digest  # each stores what it computes


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
    plan, said = make(model), ids(5, 50)
    made = layout(Q)
    made.segments, made.at = list(plan.segments), plan.end
    anew = model.score(made.compute(said).plan())[-len(said) :]
    with model.run(plan, room=len(said)) as one:
        buffer = one.placed.buffer.data_ptr()
        assert off(one.logits, model.score(plan, 1)[0]) < 1e-6
        ahead = one.peek(said)  # all at once, and the run stays where it is
        assert (one.placed.get_seq_length(), one.placed.length) == (plan.end, len(plan.positions))
        for i, token in enumerate(said):
            assert one.placed.get_seq_length() == plan.end + i  # transformers' arithmetic counts positions, not rows
            logits = one.step(token[None, None])
            assert logits.shape == (1, zoo.VOCABULARY)
            assert off(logits[0], anew[i]) < TOLERANCE
            assert off(ahead[i], anew[i]) < TOLERANCE
        assert one.placed.buffer.data_ptr() == buffer  # nothing was reallocated, nothing copied
        assert one.placed.length == len(plan.positions) + len(said)


def test_peeking_goes_on_from_where_the_run_stands() -> None:
    """Danger: guesses are scored behind the prompt instead of behind the answer so far, or leave rows behind."""
    model = zoo.model_of("llama")
    plan, said, wrong = _after_links(model), ids(5, 50), ids(4, 51)
    with model.run(plan, room=9) as one:
        one.peek(wrong)
        first = one.step(said[:1][None])
        one.peek(wrong)
        rest = one.peek(said[1:])
        alone = one.peek(said[1:2])
    forced = layout(Q)
    forced.segments, forced.at = list(plan.segments), plan.end
    wanted = model.score(forced.compute(said).plan(), 5)
    assert off(torch.cat([first, rest]), wanted) < TOLERANCE
    assert off(alone[0], wanted[1]) < TOLERANCE


def test_stored_rows_survive_being_placed_rotated_and_decoded_after() -> None:
    """Danger: a rotation in place, or a buffer that is the stored tensor, changes the store for every later prompt."""
    model = zoo.model_of("llama")
    cache = cache_of(model, ids(9, 1))
    before = rows_of(cache)
    for at in (0, 7):
        with model.run(layout(Q).reuse(cache, at=at).ask().plan(), room=2) as one:
            one.step(torch.tensor([[70]]))
            one.placed.buffer.fill_(0)
    assert torch.equal(rows_of(cache), before)


# --- precision ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_stays_near_its_dense_reference(dtype: torch.dtype, tolerance: float) -> None:
    """Danger: caches in half precision are rounded more than once on their way."""
    model = Model(zoo.hf_model("llama3-rope").to(dtype))
    for make in (_after_gaps, _after_pruning, _after_links):
        plan = make(model)
        assert rows_of(cache_of(model, Q)).dtype == dtype
        assert off(run(model, plan), model.dense(plan.dense())[-1]) < tolerance


def test_keys_stored_without_rotation_are_as_near_as_rounding_allows() -> None:
    """Danger: taking the rotation off and putting it on costs bfloat16 more than the model's own rounding does."""
    model = Model(zoo.hf_model("llama3-rope").to(torch.bfloat16))
    tokens, seen = ids(40, 1), list[Tensor]()
    from kvilt.model import attention

    with torch.no_grad(), attention.using(lambda layer, query, key, *_: seen.append(key[0].clone())):
        model.hf.base_model(tokens[None], use_cache=False)
    stored = rows_of(cache_of(model, tokens))
    for layer, own in enumerate(seen):
        again = rotated(model, stored[layer, 0], torch.arange(40))
        error = (again.float() - own.float()).norm() / own.float().norm()
        assert error < 2**-8  # one rounding to eight bits is 2^-9 at most, and there are two


def test_a_plan_of_fakes_is_never_needed_to_look_at_a_plan() -> None:
    """Danger: looking at a plan (kvilt ask --explain) reads rows from the store."""

    def never(_: range) -> None:
        raise AssertionError("rows were read")

    plan = layout(Q).reuse(watched(fake([1, 2, 3]), never)).ask().plan()
    assert (plan.reused_count, plan.is_suffix, len(plan.dense().tokens)) == (3, True, 8)
