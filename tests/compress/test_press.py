"""Presses: what each method keeps, and what none of them may drop."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from core_kit import DOCUMENTS, QUESTION, engine_of, make_key, off_dense, rotated, rows_of, wrapper_file
from kvilt.check import gates
from kvilt.compress.base import Made
from kvilt.compress.press import Cur, KeyDiff, KNorm, KVzip, Leverage, Press, Random, leverage
from kvilt.errors import DocumentError, SpecError
from kvilt.model.attention import weights
from kvilt.model.probe import ModelProbe
from kvilt.rows.rows import TensorRows
from kvilt.types import Document, DocumentCache, Encoding

PRESSES = ["keydiff", "knorm", "leverage", "cur", "kvzip", "random"]
LONG = Document("Brint Labs is in Orsa, on the river Sel, which runs from Orsa to the sea.", title="Brint", id="brint")


def made(keys: Tensor, values: Tensor | None = None, around: tuple[int, int] = (0, 0), title: int = 0) -> Made:
    """A document of one layer with these rows (heads, rows, dim), whose keys look alike wherever they stand."""
    places = torch.arange(keys.shape[1])
    rows = TensorRows(torch.stack([keys, keys if values is None else values])[None])
    cache = DocumentCache(places + 100, places, len(places), make_key(places), rows)
    nothing: Any = None
    return Made(cache, around, title, lambda keys, at: keys, nothing, nothing, 4096)


def kept(press: Press, found: Made) -> list[int]:
    return press.press(found).offsets.tolist()


def alike(rows: int, *odd: int) -> Tensor:
    """Keys that point one way, but for the `odd` ones, (2, rows, 8)."""
    keys = torch.zeros(2, rows, 8)
    keys[..., 0] = 1.0
    for i, row in enumerate(odd):
        keys[:, row] = torch.eye(8)[i + 1]
    return keys + 1e-3 * torch.randn(keys.shape, generator=torch.Generator().manual_seed(0))


# --- what each one keeps ---


def test_keydiff_keeps_keys_unlike_the_mean() -> None:
    """Danger: the sign is turned, and the most redundant keys stay. Lengths must not count."""
    keys = alike(20, 7, 13) * torch.linspace(1, 50, 20)[:, None]
    assert kept(KeyDiff(keep=0.1, sinks=0), made(keys)) == [7, 13]


def test_keydiff_compares_keys_as_they_stand_in_the_document() -> None:
    """Danger: the paper's similarity is that of rotated keys; without rotation it keeps others."""

    def rotate(keys: Tensor, at: Tensor) -> Tensor:
        return torch.where((at == 5)[:, None], keys.flip(-1), keys)

    found = dataclasses.replace(made(alike(20, 7)), rotate=rotate)
    assert kept(KeyDiff(keep=0.1, sinks=0), found) == [5, 7]


def test_knorm_keeps_small_keys_and_every_head_counts_alike() -> None:
    """Danger: large norms stay, or the head with the largest keys decides alone."""
    keys = torch.ones(2, 10, 4)
    keys[0, 3], keys[1] = 0.1, 1000.0
    keys[1, 8] = 10.0
    assert kept(KNorm(keep=0.2, sinks=0), made(keys)) == [3, 8]


def test_leverage_is_that_of_the_row_space() -> None:
    """Danger: length is taken for leverage; with fewer rows than channels all scores are the same."""
    rows = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(1))
    u = torch.linalg.svd(rows.double(), full_matrices=False)[0].square().sum(-1)
    assert torch.allclose(leverage(rows), u / u.sum(1, keepdim=True), atol=1e-3)
    few = leverage(alike(6, 4)[:, :, :8] + 0.3 * torch.randn(2, 6, 8))
    assert few.std(1).min() > 1e-3
    assert kept(Leverage(keep=0.1, sinks=0), made(alike(20, 7, 13))) == [7, 13]


def test_leverage_takes_keys_without_their_rotation() -> None:
    """Danger: the same key at many places looks like many directions."""
    model, flat = zoo.model_of("llama"), torch.zeros(2, 60, 16)
    flat[..., 0], flat[:, 41, 0], flat[:, 41, 8] = 1.0, 0.0, 1.0  # channels 0 and 8 turn into each other
    turning = dataclasses.replace(made(flat), rotate=lambda keys, at: rotated(model, keys, at))
    assert kept(Leverage(keep=0.01, sinks=0), turning) == [41]


def test_cur_needs_leverage_in_keys_and_values() -> None:
    """Danger: one side alone decides."""
    keys, values = alike(20, 7, 13), alike(20, 13, 2)
    assert kept(Cur(keep=0.05, sinks=0), made(keys, values)) == [13]


def test_kvzip_scores_are_the_most_attention_while_the_document_is_repeated() -> None:
    """Danger: other queries than the repetition's count, or the repetition sees what it should not."""
    model, engine = zoo.model_of("llama"), engine_of()
    ids = engine.text.document_ids(LONG)
    asked = engine.text.plain_ids("\nRepeat the previous context:\n")
    cache = model.encode([ids], Encoding())[0]
    probe = ModelProbe(model, model.info()).attention
    found = Made(
        cache, (0, 0), 0, lambda k, at: rotated(model, k, at), probe, engine.text.plain_ids, model.context_length
    )
    seen: list[Tensor] = []

    def hook(_: int, query: Tensor, key: Tensor, __: Tensor, mask: Tensor | None, scale: float | None) -> None:
        seen.append(weights(query, key, mask, scale)[:, -len(ids) - 1 :, : len(ids)].amax((0, 1)))

    from kvilt.model.attention import using

    with using(hook), torch.no_grad():  # one ordinary pass over document, instruction and document
        model.hf(torch.cat([ids, asked, ids])[None], use_cache=False)
    assert torch.allclose(KVzip().scores(found), torch.stack(seen).amax(0), atol=1e-5)


def test_kvzip_repeats_long_documents_in_parts_and_says_when_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the repetition runs beyond the positions the model was made for."""
    from kvilt.compress import press

    monkeypatch.setattr(press, "CHUNK", 30)
    engine = engine_of(compress="kvzip")
    assert not [r for r in gates.run(engine, DOCUMENTS, QUESTION) if not r.passed]
    found = engine.encoder.make(engine.encoder.items([LONG]))[0]
    full = Made(
        found, (0, 0), 0, lambda k, b: k, ModelProbe(engine.model, engine.info).attention, engine.text.plain_ids, 100
    )
    with pytest.raises(DocumentError, match="no room to repeat it in 100"):
        KVzip().press(full)


def test_random_depends_on_the_tokens_and_the_seed_alone() -> None:
    """Danger: an evicted document comes back with other rows under the same key."""
    one, other = made(torch.ones(2, 30, 4)), made(torch.ones(2, 31, 4))
    assert kept(Random(), one) == kept(Random(), one)
    assert kept(Random(), one) != kept(Random(seed=1), one)
    assert kept(Random(), one) != kept(Random(), other)[:15]


# --- what all of them must do ---


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75, 1.0])
def test_the_share_is_kept_with_sinks_and_title(name: str, keep: float) -> None:
    """Danger: another share than asked for; a document without its first tokens or its title."""
    engine = engine_of(compress=f"{name}:keep={keep},sinks=2")
    cache = engine.encoder.make(engine.encoder.items([LONG]))[0]
    plain = engine_of().encoder.make(engine_of().encoder.items([LONG]))[0]
    title = len("Brint\n")  # one token a byte
    assert cache.offsets.tolist() == sorted(set(cache.offsets.tolist()))
    assert len(cache.offsets) == -(-plain.length * keep // 1)
    assert set(range(title)) <= set(cache.offsets.tolist())
    assert cache.length == plain.length
    assert torch.allclose(rows_of(cache), rows_of(plain)[..., cache.offsets, :], atol=1e-4)


@pytest.mark.parametrize("name", PRESSES)
def test_header_and_trailer_stay(name: str, tmp_path: Any) -> None:
    """Danger: a packet loses the vectors that were trained for it."""
    spec = f"kv_packet:wrapper={wrapper_file(tmp_path)}"
    engine = engine_of(spec, compress=f"{name}:keep=0.1,sinks=3")
    cache = engine.encoder.make(engine.encoder.items([Document(LONG.text)]))[0]
    own = cache.length - 16
    assert set(range(8 + 3)) | set(range(8 + own, 16 + own)) <= set(cache.offsets.tolist())
    assert len(cache.offsets) == 16 + -(-own // 10)
    plan = engine.plan(QUESTION, [LONG, *DOCUMENTS])
    assert off_dense(engine.model, plan) < 1e-4
    assert plan.reused_count < engine_of(spec).plan(QUESTION, [LONG, *DOCUMENTS]).reused_count


def test_presses_differ() -> None:
    """Danger: a share of the same rows whatever the method."""
    found = {}
    for name in PRESSES:
        encoder = engine_of(compress=f"{name}:keep=0.3").encoder
        found[tuple(encoder.make(encoder.items([LONG]))[0].offsets.tolist())] = name
    assert len(found) == len(PRESSES)


@pytest.mark.parametrize("name", PRESSES)
def test_neighbours_in_a_batch_change_nothing(name: str) -> None:
    """Danger: which rows a stored document has depends on what was encoded together with it."""
    encoder = engine_of(compress=f"{name}:keep=0.3").encoder
    items = encoder.items([LONG, *DOCUMENTS])
    together = encoder.make(items)
    for item, cache in zip(items, together, strict=True):
        assert torch.equal(encoder.make([item])[0].offsets, cache.offsets)


def test_a_title_has_a_key_of_its_own() -> None:
    """Danger: two documents of the same tokens, of which one has them as its title, share rows."""
    encoder = engine_of(compress="keydiff:keep=0.2").encoder
    titled, plain = encoder.items([Document("Orsa", title="Brint"), Document("Brint\nOrsa")])
    assert torch.equal(titled.ids, plain.ids)
    assert titled.key.digest != plain.key.digest
    ordinary = engine_of().encoder.items([Document("Orsa", title="Brint"), Document("Brint\nOrsa")])
    assert ordinary[0].key == ordinary[1].key


@pytest.mark.parametrize("spec", ["keydiff:keep=0", "keydiff:keep=1.1", "knorm:sinks=-1", "random:keep=x"])
def test_wrong_options(spec: str) -> None:
    """Danger: an empty document, or more rows than there are."""
    with pytest.raises(SpecError, match="option"):
        engine_of(compress=spec)
