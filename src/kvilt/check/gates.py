"""Correctness gates: what must hold before anything is timed. Run by the tests and by `kvilt verify` on the user's model.

G1 a rotation there and back changes nothing           G2 one document at its encode position = full prefill
G3 layer 0 of a moved document is exact                G4 100 % recompute = full prefill
G5 a cache does not depend on where it stands          G6 the same document twice in one prompt
G7 zero hits and 100 % hits agree                      G8 the second request equals the first
G9 the cached path = one dense pass under the plan's own mask

Gates compare all computed tokens (G8, which generates, the first of the answer). G2 and G4 hold Kvilt to the model's own
attention, untouched. What is allowed is a multiple of the model's own noise on this prompt, in its dtype (`proof`). Nothing is
read from the user's store or written to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from kvilt import registry
from kvilt.engine.engine import Engine
from kvilt.model import proof
from kvilt.model.model import Model
from kvilt.model.proof import deviation
from kvilt.plan import Layout, Plan, Segment
from kvilt.rows.rows import TensorRows, whole
from kvilt.stores.store import Store
from kvilt.strategies.base import Strategy
from kvilt.types import Document, DocumentCache, Encoding, Prompt

AWAY = 37  # tokens in front of a moved document
EVERYTHING = {"ratio": 1.0, "tokens": 1 << 20}  # options of strategies that recompute, at their largest


@dataclass(frozen=True)
class GateResult:
    """One gate: the deviation (relative root mean square), the model's own noise, and what is allowed over it."""

    gate: str
    title: str
    worst: float
    floor: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the deviation is within tolerance; one that is not a number is not."""
        return self.worst <= self.tolerance


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt to test a strategy on, over a store of its own that rounds nothing; `floor` is the model's own noise on it."""

    engine: Engine
    documents: Sequence[Document]
    question: str
    floor: float

    @classmethod
    def of(cls, engine: Engine, documents: Sequence[Document], question: str, floor: float = 0.0) -> Case:
        """The same model, strategy and compression as an engine's, over an empty store in memory."""
        model, store = copy.copy(engine.model), cast(Store, registry.build("store", "memory"))
        model.stored = model.shape.dtype
        own = Engine(model, engine.text, engine.strategy, store, engine.namespace, engine.compression)
        items = own.encoder.items(documents)
        text = torch.cat([torch.tensor(own.info.system), *(i.ids for i in items), own.text.question_ids(question)])
        return cls(own, documents, question, floor or proof.own(model.hf, text.long()).floor)

    @property
    def model(self) -> Model:
        return self.engine.model

    @property
    def ids(self) -> list[Tensor]:
        """The tokens of every document, (tokens,) each."""
        return [item.ids for item in self.engine.encoder.items(self.documents)]

    @property
    def asked(self) -> Tensor:
        """The tokens of the question, (tokens,)."""
        return self.engine.text.question_ids(self.question)

    def plan(self, *documents: Document) -> Plan:
        """The strategy's plan of the prompt, or of one with other documents."""
        return self.engine.plan(self.question, documents or self.documents)


def run(engine: Engine, documents: Sequence[Document], question: str) -> list[GateResult]:
    """All gates for the engine's model and strategy on these documents (at least two)."""
    return list(results(Case.of(engine, documents, question)))


def results(case: Case, *names: str) -> Iterator[GateResult]:
    """Some gates (default: all) on one prompt."""
    for name, gate in GATES.items():
        if name in (names or GATES):
            dtype = {"G1": torch.float32, "G3": case.model.shape.dtype}.get(name)  # of rows that were rounded once
            floor = torch.finfo(dtype).eps if dtype else case.floor
            title = (gate.__doc__ or "").strip().splitlines()[0]
            yield GateResult(name, title, gate(case), floor, proof.tolerance(floor))


def rotation(case: Case) -> float:
    """A rotation there and back changes nothing."""
    rotation, s = case.model.rotation, case.model.shape
    keys = torch.randn(s.heads, 64, s.head_dim, generator=torch.Generator().manual_seed(0))
    places = [rotation.angles(torch.arange(first, first + 64)) for first in (1, 977, 20011)]
    return max(deviation(rotation.rotate(rotation.rotate(keys, at), at, back=True), keys) for at in places)


def identity(case: Case) -> float:
    """One document at its encode position equals full prefill."""
    return _against_own(case.model, _alone(case, at=0))


def first_layer(case: Case) -> float:
    """Keys and values of layer 0 of a moved document are those of a full prefill."""
    ids = case.ids[0]
    alone = case.model.encode([ids], Encoding())[0]
    behind = case.model.encode([ids], Encoding(before=(int(ids[0]),) * AWAY, keep=True))[0]
    mine, theirs = (whole(c.rows, slice(0, 1))[0] for c in (alone, behind) if c.rows is not None)
    return max(deviation(a, b) for a, b in zip(mine, theirs[..., AWAY:, :], strict=True))  # keys, values


def recompute_all(case: Case) -> float:
    """The prompt with every token computed equals full prefill, and so does the strategy told to recompute all it can."""
    plan = case.plan()
    fresh = [Segment(s.tokens, s.start, name=s.name) for s in plan.segments]
    worst = _against_own(case.model, replace(plan, segments=tuple(fresh)))
    strategy: Any = case.engine.strategy
    options = {f.name: getattr(strategy, f.name) for f in fields(strategy) if f.name in EVERYTHING}
    most = {name: EVERYTHING[name] for name, value in options.items() if value and isinstance(value, int | float)}
    if most:
        engine = case.engine.with_strategy(cast(Strategy, replace(strategy, **most)))
        worst = max(worst, _against_own(case.model, engine.plan(case.question, case.documents)))
    return worst


def placement(case: Case) -> float:
    """A cache depends neither on where it stands nor on what is encoded with it."""
    encoding, ids = case.engine.strategy.encoding or Encoding(), case.ids
    alone, together = case.model.encode(ids[:1], encoding)[0], case.model.encode(ids, encoding)[0]
    assert alone.rows is not None
    assert together.rows is not None
    far = min(1234, case.model.context_length - len(ids[0]) - len(case.asked))
    moved, unmoved = (case.model.score(_alone(case, at)) for at in (far, 0))
    return max(deviation(whole(together.rows), whole(alone.rows)), deviation(moved, unmoved))


def twice(case: Case) -> float:
    """The same document may stand twice in one prompt."""
    return _against_dense(case.model, case.plan(case.documents[0], case.documents[0]))


def hits(case: Case) -> float:
    """A prompt with zero hits and one with only hits give the same logits."""
    cold = Case.of(case.engine, case.documents, case.question, case.floor)
    misses, stored = (case.model.score(plan) for plan in (cold.plan(), cold.plan()))
    return deviation(stored, misses)


def again(case: Case) -> float:
    """The second request equals the first, whatever was asked in between."""
    engine, documents = case.engine, list(case.documents)
    first = engine.answer(case.question, documents, max_new_tokens=1).logits
    engine.answer(case.question, documents[::-1], max_new_tokens=3)
    second = engine.answer(case.question, documents, max_new_tokens=1).logits
    return math.nan if first is None or second is None else deviation(second, first)


def dense(case: Case) -> float:
    """The cached path equals one dense pass under the plan's mask."""
    return _against_dense(case.model, case.plan())


def _alone(case: Case, at: int) -> Plan:
    """The first document, encoded plainly, at a place, and the question behind it."""
    cache = case.model.encode(case.ids[:1], Encoding())[0]
    nothing = DocumentCache(case.asked[:0], case.asked[:0], 0, cache.key)
    return Layout(Prompt(nothing, (cache,), case.asked)).reuse(cache, at=at).ask().plan()


def _against_own(model: Model, plan: Plan) -> float:
    """How far a plan's logits are from an ordinary pass over all its tokens, with the model's own attention where it can."""
    tokens = torch.cat([s.tokens for s in plan.segments])
    positions = torch.cat([s.start + torch.arange(s.length) for s in plan.segments])
    if plan.reader is None and torch.equal(positions, torch.arange(len(positions))):
        text = tokens if plan.learned is None else model.embed(tokens, plan.learned)
        wanted = proof.logits(model.hf, text)[plan.positions[plan.computed_rows].to(model.shape.device)]
        return deviation(model.score(plan), wanted)
    return _against_dense(model, plan)  # gaps, shared positions, adapters: of those a model's own pass knows nothing


def _against_dense(model: Model, plan: Plan) -> float:
    """How far a plan's logits are from one pass under its mask; of quantised rows, from the same rows as numbers."""
    plain = replace(plan, segments=tuple(map(_decoded, plan.segments)))
    if any(a is not b for a, b in zip(plain.segments, plan.segments, strict=True)):
        return deviation(model.score(plan), model.score(plain))
    return deviation(model.score(plan), model.dense(plan.dense(), plan.learned))


def _decoded(segment: Segment) -> Segment:
    rows = None if segment.cache is None else segment.cache.rows
    if segment.cache is None or rows is None or rows.nbytes >= 2 * math.prod(rows.shape) * rows.dtype.itemsize:
        return segment
    return replace(segment, cache=replace(segment.cache, rows=TensorRows(whole(rows))))


IN_ORDER = (rotation, identity, first_layer, recompute_all, placement, twice, hits, again, dense)
GATES: dict[str, Callable[[Case], float]] = {f"G{number}": gate for number, gate in enumerate(IN_ORDER, 1)}
