"""Correctness gates: what must hold before anything is timed. Run by the tests and by `kvilt verify` on the user's model.

G1 a rotation there and back changes nothing           G2 one document at its encode position = full prefill
G3 layer 0 of a moved document is exact                G4 100 % recompute = full prefill
G5 a cache does not depend on where it stands          G6 the same document twice in one prompt
G7 zero hits and 100 % hits agree                      G8 the second request equals the first
G9 the cached path = one dense pass under the plan's own mask
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvilt.engine.engine import Engine
from kvilt.model.model import Model
from kvilt.model.proof import TOLERANCE
from kvilt.plan import Layout, Plan, Segment
from kvilt.rows.codec import QuantisedRows
from kvilt.rows.rows import SelectedRows, TensorRows, whole
from kvilt.types import Document, DocumentCache, Encoding, Prompt


@dataclass(frozen=True)
class GateResult:
    """One gate: the worst deviation found, relative to the largest value compared."""

    gate: str
    title: str
    worst: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the deviation is within tolerance."""
        return self.worst <= self.tolerance


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt to test a strategy on: token ids of its parts."""

    engine: Engine
    documents: Sequence[Document]
    question: str

    @property
    def model(self) -> Model:
        return self.engine.model

    def caches(self) -> tuple[DocumentCache, ...]:
        """The documents' caches, encoded now."""
        encoder = self.engine.encoder
        return tuple(encoder.make(encoder.items(self.documents)))

    def prompt(self) -> Prompt:
        """The prompt with freshly made caches."""
        system = torch.tensor(self.engine.info.system, dtype=torch.long)
        names = tuple(d.id or d.title or "" for d in self.documents)
        cached = self.model.encode([system], Encoding())[0]
        return Prompt(cached, self.caches(), self.engine.text.question_ids(self.question), names)


def run(engine: Engine, documents: Sequence[Document], question: str) -> list[GateResult]:
    """All gates for the engine's model and strategy on these documents (at least two)."""
    case = Case(engine, documents, question)
    tolerance = TOLERANCE[engine.model.shape.dtype]
    return [_result(name, gate, case, tolerance) for name, gate in GATES.items()]


def _result(name: str, gate: Callable[[Case], float], case: Case, tolerance: float) -> GateResult:
    return GateResult(name, (gate.__doc__ or "").strip().splitlines()[0], gate(case), tolerance)


def deviation(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest wanted value."""
    scale = float(wanted.float().abs().max()) or 1.0
    return float((found.float() - wanted.float()).abs().max()) / scale


def rotation(case: Case) -> float:
    """A rotation there and back changes nothing."""
    rotation, s = case.model.rotation, case.model.shape
    keys = torch.randn(s.heads, 64, s.head_dim)
    places = [rotation.angles(torch.arange(first, first + 64)) for first in (1, 977, 20011)]
    return max(deviation(rotation.rotate(rotation.rotate(keys, at), at, back=True), keys) for at in places)


def identity(case: Case) -> float:
    """One document at its encode position equals full prefill."""
    ids = case.engine.text.document_ids(case.documents[0])
    cache = case.model.encode([ids], Encoding())[0]
    asked = case.engine.text.question_ids(case.question)
    nothing = torch.zeros(0, dtype=torch.long)
    empty = DocumentCache(nothing, nothing, 0, cache.key)
    plan = Layout(Prompt(empty, (cache,), asked)).reuse(cache).ask().plan()
    return deviation(_last(case.model, plan), _full(case.model, torch.cat([ids, asked])))


def first_layer(case: Case) -> float:
    """Keys and values of layer 0 of a moved document are those of a full prefill."""
    ids = case.engine.text.document_ids(case.documents[0])
    start = 37
    cache = case.model.encode([ids], Encoding())[0]
    behind = Encoding(before=tuple([int(ids[0])] * start), keep=True)
    full = case.model.encode([ids], behind)[0]
    assert cache.rows is not None
    assert full.rows is not None
    alone, behind_others = (whole(rows, slice(0, 1))[0] for rows in (cache.rows, full.rows))
    return deviation(alone, behind_others[..., start:, :])


def recompute_all(case: Case) -> float:
    """The strategy's plan with every token computed equals full prefill of the same tokens."""
    plan = _all_fresh(case.engine.planned(case.prompt()))
    tokens = torch.cat([s.tokens for s in plan.segments])
    if not bool((plan.positions.diff() == 1).all()):  # gaps or shared positions: full prefill at the same positions
        return deviation(_last(case.model, plan), case.model.dense(plan.dense(), plan.learned)[-1])
    return deviation(_last(case.model, plan), _full(case.model, tokens, plan.learned))


def placement(case: Case) -> float:
    """A cache does not depend on where it stands: keys moved to two places and back, and values, are the same."""
    cache = case.caches()[0]
    again = case.caches()[0]
    assert cache.rows is not None
    assert again.rows is not None
    return deviation(whole(again.rows), whole(cache.rows))


def twice(case: Case) -> float:
    """The same document may stand twice in one prompt."""
    pair = Case(case.engine, [case.documents[0], case.documents[0]], case.question)
    prompt = pair.prompt()
    names = (prompt.names[0],) * 2 if prompt.names else ()
    plan = case.engine.planned(replace(prompt, names=names))
    return _against_dense(case.model, plan)


def hits(case: Case) -> float:
    """A prompt with zero hits and one with only hits give the same logits."""
    engine, documents = case.engine, list(case.documents)
    if engine.strategy.encoding is not None:
        for item in engine.encoder.items(documents):
            engine.store.delete(item.key.digest)
    miss = engine.answer(case.question, documents, max_new_tokens=1)
    hit = engine.answer(case.question, documents, max_new_tokens=1)
    assert hit.logits is not None
    assert miss.logits is not None
    return deviation(hit.logits, miss.logits)


def again(case: Case) -> float:
    """The second request equals the first, whatever was asked in between."""
    engine, documents = case.engine, list(case.documents)
    first = engine.answer(case.question, documents, max_new_tokens=1).logits
    engine.answer(case.question, documents[::-1], max_new_tokens=3)
    second = engine.answer(case.question, documents, max_new_tokens=1).logits
    assert first is not None
    assert second is not None
    return deviation(second, first)


def dense(case: Case) -> float:
    """The cached path equals one dense pass under the plan's mask."""
    return _against_dense(case.model, case.engine.planned(case.prompt()))


def _against_dense(model: Model, plan: Plan) -> float:
    decoded = replace(plan, segments=tuple(map(_decoded, plan.segments)))
    if decoded.segments != plan.segments:  # packed rows are not those of a pass: compare with the same rows unpacked
        return deviation(_last(model, plan), _last(model, decoded))
    return deviation(_last(model, plan), model.dense(plan.dense(), plan.learned)[-1])


def _decoded(segment: Segment) -> Segment:
    """The segment with packed rows as plain ones."""
    cache = segment.cache
    rows = None if cache is None else cache.rows
    held = rows.rows if isinstance(rows, SelectedRows) else rows
    if cache is None or rows is None or not isinstance(held, QuantisedRows):
        return segment
    return replace(segment, cache=replace(cache, rows=TensorRows(whole(rows))))


def _last(model: Model, plan: Plan) -> Tensor:
    return model.score(plan, 1)[0]


def _all_fresh(plan: Plan) -> Plan:
    segments = [Segment(s.tokens, s.start, None, None, s.name) for s in plan.segments]
    return replace(plan, segments=tuple(segments))


@torch.no_grad()
def _full(model: Model, tokens: Tensor, learned: Tensor | None = None) -> Tensor:
    """Last logits of a plain forward pass of transformers, no cache of ours involved."""
    return torch.as_tensor(model.hf(inputs_embeds=model.embed(tokens, learned)[None], use_cache=False).logits[0, -1])


GATES: dict[str, Callable[[Case], float]] = {
    "G1": rotation,
    "G2": identity,
    "G3": first_layer,
    "G4": recompute_all,
    "G5": placement,
    "G6": twice,
    "G7": hits,
    "G8": again,
    "G9": dense,
}
