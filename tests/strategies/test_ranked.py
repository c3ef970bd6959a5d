"""Ranked recompute: the order that is made when documents are encoded, stored with them, and followed in prompts."""

from __future__ import annotations

import pytest
import torch

import core_kit as kit
import zoo
from kvilt.errors import SpecError
from kvilt.plan import Plan
from kvilt.rows.file import open_cache, pack
from kvilt.rows.rows import whole
from kvilt.stores.blobs import MemoryBlob
from kvilt.strategies.ranked import Ranked
from kvilt.types import DocumentCache, Encoding


def fresh_of(plan: Plan) -> list[torch.Tensor]:
    """What is computed of each document."""
    return [s.computed for s in plan.segments if s.name == "document"]


def test_documents_carry_an_order_of_all_their_places() -> None:
    """Danger: the order is lost on the way to the store, or names places that are not there."""
    engine = kit.engine_of("ranked")
    for item, cache in zip(items := engine.encoder.items(kit.DOCUMENTS), engine.encoder.make(items), strict=True):
        assert cache.order is not None
        assert sorted(cache.order.tolist()) == list(range(len(item.ids)))
        stored = open_cache(MemoryBlob(b"".join(pack(cache))), cache.key)
        assert stored.order is not None
        assert torch.equal(stored.order, cache.order)
    plain = kit.engine_of("block:sink=system").encoder
    assert plain.make(plain.items(kit.DOCUMENTS))[0].order is None
    assert plain.items(kit.DOCUMENTS)[0].key != items[0].key


def test_the_first_places_are_those_that_move_most() -> None:
    """Danger: the order is that of something else: positions, layer 0, one head."""
    engine = kit.engine_of("ranked:sink=none")
    (item,) = engine.encoder.items(kit.DOCUMENTS[:1])
    (cache,) = engine.encoder.make([item])
    from kvilt.engine.ranking import NEUTRAL

    neutral = tuple(engine.text.plain_ids(NEUTRAL).tolist())
    behind = kit.rows_of(kit.cache_of(engine.model, item.ids, Encoding(before=neutral)))
    moved = (kit.rows_of(cache) - behind).square().sum((2, 4)) / behind.square().sum((2, 4))
    assert cache.order is not None
    assert cache.order[:8].tolist() == moved.sum((0, 1)).sort(descending=True).indices[:8].tolist()


def test_the_share_is_kept_and_gaps_are_closed() -> None:
    """Danger: closing gaps computes twice what was asked for."""
    document = kit.fake(range(80, 180))
    order = torch.tensor([10, 50, 12, 53, 90, 91, 95, *range(100)])
    ranked = DocumentCache(**{**vars(document), "order": order})
    prompt = kit.prompt(kit.ids(4), kit.fake(range(90, 96)), ranked)
    (_, fresh) = fresh_of(Ranked(ratio=0.05, join=1).plan(prompt, None))  # type: ignore[arg-type]
    assert fresh.nonzero()[:, 0].tolist() == [10, 11, 12, 50, 53]
    (_, fresh) = fresh_of(Ranked(ratio=0.05, join=2).plan(prompt, None))  # type: ignore[arg-type]
    assert fresh.nonzero()[:, 0].tolist() == [10, 11, 12, 50, 51, 52, 53]
    (_, fresh) = fresh_of(Ranked(ratio=0.04, join=0).plan(prompt, None))  # type: ignore[arg-type]
    assert fresh.nonzero()[:, 0].tolist() == [10, 12, 50, 53]


def test_all_and_nothing() -> None:
    """Danger: ratio=1 is not full recompute, ratio=0 not plain reuse."""
    full, block = (kit.ask(kit.engine_of(spec)) for spec in ("full", "block:sink=system"))
    assert kit.off(kit.ask(kit.engine_of("ranked:ratio=1")).logits, full.logits) < kit.TOLERANCE
    assert kit.off(kit.ask(kit.engine_of("ranked:ratio=0")).logits, block.logits) < kit.TOLERANCE
    for bad in ("ranked:ratio=1.1", "ranked:join=-1"):
        with pytest.raises(SpecError):
            kit.engine_of(bad)


def test_documents_as_long_as_the_context_are_ordered_too() -> None:
    """Danger: the longest documents cannot be encoded because the neutral text does not fit in front."""
    engine = kit.engine_of("ranked:sink=none")
    ids = kit.ids(engine.model.context_length)
    from kvilt.engine.ranking import ranked

    (cache,) = ranked(engine.model, [kit.cache_of(engine.model, ids)], Encoding(), kit.ids(50))
    assert cache.order is not None
    assert len(cache.order) == len(ids)
    assert len(whole(cache.rows)) == zoo.SHAPE["num_hidden_layers"]  # type: ignore[arg-type]
