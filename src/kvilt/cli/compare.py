"""`kvilt verify`: the gates, and every strategy's answer beside that of full recompute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvilt import registry
from kvilt.check import gates as gates_module
from kvilt.check.gates import GateResult
from kvilt.cli import talk
from kvilt.engine.engine import Engine
from kvilt.errors import UserError
from kvilt.stores.store import Store as MemoryStore
from kvilt.types import Answer, Document

REFERENCE = "full"
SAMPLES = [
    Document(
        "The ferry to Hven leaves from Landskrona at a quarter past nine and takes thirty minutes.",
        "Ferries",
        "ferries",
    ),
    Document("Tycho Brahe built his observatory Uraniborg on the island of Hven in 1576.", "Hven", "hven"),
    Document("A quilt is sewn from patches that were made one by one, often by many hands.", "Quilts", "quilts"),
]


@dataclass(frozen=True)
class Closeness:
    """How close a strategy comes to full recompute over the tokens of its answer, or why it was not tried (`note`)."""

    strategy: str
    text: str = ""
    agreement: float = 0.0  # share of tokens that full recompute would have chosen too
    max_logit_difference: float = 0.0
    charged: float = 0.0  # in units of full recompute
    note: str = ""


def some(documents: list[Document], limit: int) -> list[Document]:
    """The first of the documents; that there are more is told."""
    if len(documents) > limit:
        talk.say(f"using the first {limit} of {len(documents):,} documents (--limit).")
    return documents[:limit]


def in_memory(engine: Engine) -> Engine:
    """The same engine with a store of its own: checks leave the user's untouched."""
    return Engine(engine.model, engine.text, engine.strategy, MemoryStore(), engine.namespace, engine.compression)


def gates(engine: Engine, documents: Sequence[Document], question: str) -> list[GateResult]:
    """All correctness gates."""
    with talk.status("running the gates"):
        return gates_module.run(engine, documents, question)


def strategies(engine: Engine, spec: str, documents: Sequence[Document], question: str, tokens: int) -> list[Closeness]:
    """The engine's strategy, which `spec` describes, and all others with default options, against full recompute."""
    full = engine.with_strategy(REFERENCE, compress="")
    answer = full.answer(question, documents, max_new_tokens=tokens)
    wanted = full.score(question, documents, answer.tokens)
    others = [name for name in registry.names("strategy") if name not in (REFERENCE, registry.parse(spec)[0])]
    with talk.status("comparing strategies"):
        rows = [_named(engine, name, question, documents, answer, wanted) for name in others]
        return [_compare(engine, question, documents, answer, wanted), *rows]


def _named(
    engine: Engine, name: str, question: str, documents: Sequence[Document], answer: Answer, wanted: Tensor
) -> Closeness:
    try:
        return _compare(engine.with_strategy(name), question, documents, answer, wanted)
    except UserError as error:  # it needs a wrapper or a checkpoint of its own, or does not fit these documents
        return Closeness(name, note=f"not tried: {error}")


def _compare(engine: Engine, question: str, documents: Sequence[Document], answer: Answer, wanted: Tensor) -> Closeness:
    """Teacher-forced over full recompute's answer, so that one early difference does not count for all later tokens."""
    own = engine.answer(question, documents, max_new_tokens=len(answer.tokens))
    found = engine.score(question, documents, answer.tokens)
    agreement = float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
    return Closeness(own.strategy, own.text, agreement, float((found - wanted).abs().max()), own.usage.charged)
