"""How close every strategy comes to full recompute on somebody's own documents: whole answers to several questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from kvilt import registry
from kvilt.engine.engine import Engine
from kvilt.errors import UserError
from kvilt.model import proof
from kvilt.types import Document

REFERENCE = "full"
REQUEST = "Write one short question that the text above answers. Reply with the question only."
QUESTION_TOKENS = 32
TEXTS = {
    "Ferries": "The ferry to Hven leaves from Landskrona at a quarter past nine and takes thirty minutes.",
    "Hven": "Tycho Brahe built his observatory Uraniborg on the island of Hven in 1576.",
    "Quilts": "A quilt is sewn from patches that were made one by one, often by many hands.",
}
SAMPLES = [Document(text, title, title.lower()) for title, text in TEXTS.items()]


@dataclass(frozen=True)
class Closeness:
    """How close a strategy comes to full recompute, mean over all questions, or why it was not tried (`note`)."""

    strategy: str
    same_answers: float = 0.0  # share of questions with the same answer
    agreement: float = 0.0  # share of tokens of full recompute's answers that the strategy would have chosen too
    kl: float = 0.0  # KL(full recompute || strategy) over those tokens, nats per token
    charged: float = 0.0  # compute in units of full recompute
    text: str = ""  # its answer to the first question
    note: str = ""


@dataclass(frozen=True, eq=False)
class Target:
    """Full recompute's answer to one question, and its logits there, (tokens, vocab)."""

    question: str
    text: str
    tokens: tuple[int, ...]
    logits: Tensor


def made_up(engine: Engine, documents: Sequence[Document]) -> list[str]:
    """A question about each document, asked by the model itself; where it asks nothing, a plain one."""
    full = engine.with_strategy(REFERENCE, compress="")
    texts = [full.answer(REQUEST, [d], max_new_tokens=QUESTION_TOKENS).text.strip() for d in documents]
    asked = [text.splitlines()[0] if text else "What is said there?" for text in texts]
    return list(dict.fromkeys(asked))


def targets(engine: Engine, documents: Sequence[Document], questions: Sequence[str], tokens: int) -> list[Target]:
    """Full recompute's answers."""
    full, made = engine.with_strategy(REFERENCE, compress=""), []
    for question in questions:
        answer = full.answer(question, documents, max_new_tokens=tokens)
        made.append(Target(question, answer.text, answer.tokens, full.score(question, documents, answer.tokens)))
    return made


def floor(engine: Engine, documents: Sequence[Document], against: Sequence[Target]) -> Closeness:
    """Full recompute beside the model's own attention, in a batch of two: what rounding alone makes of the figures."""
    full, scored = engine.with_strategy(REFERENCE, compress=""), []
    for t in against:
        prompt = [s.tokens for s in full.plan(t.question, documents).segments]
        ids = torch.cat([*prompt, torch.tensor(t.tokens[:-1], dtype=torch.long)])  # (prompt and answer,)
        scored.append(proof.logits(engine.model.hf, ids, ids.flip(0))[-len(t.tokens) :].cpu())
    return _closeness("full, the model's own way", against, scored, 1.0, against[0].text)


def compare(
    engine: Engine, spec: str, documents: Sequence[Document], against: Sequence[Target],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Closeness]:  # fmt: skip
    """The engine's strategy, which `spec` describes, and all others with default options, against full recompute."""
    names = [n for n in registry.names("strategy") if n not in (REFERENCE, registry.parse(spec)[0])]
    rows = [_compared(engine, documents, against)]
    for number, name in enumerate(names, 1):
        on_progress(number, len(names) + 1)
        try:
            rows.append(_compared(engine.with_strategy(name), documents, against))
        except UserError as error:  # it needs a wrapper or a checkpoint of its own, or does not fit these documents
            rows.append(Closeness(name, note=f"not tried: {error}"))
    return rows


def _compared(engine: Engine, documents: Sequence[Document], against: Sequence[Target]) -> Closeness:
    """Scored over full recompute's answers, so that one early difference does not count for all later tokens."""
    scored = [engine.score(t.question, documents, t.tokens) for t in against]
    own = engine.answer(against[0].question, documents, max_new_tokens=len(against[0].tokens))
    return _closeness(own.strategy, against, scored, own.usage.charged, own.text)


def _closeness(name: str, against: Sequence[Target], scored: Sequence[Tensor], charged: float, text: str) -> Closeness:
    wanted, given = torch.cat([t.logits for t in against]).float(), torch.cat(list(scored)).float()  # (tokens, vocab)
    agree = given.argmax(-1) == wanted.argmax(-1)
    parts = torch.split(agree, [len(t.tokens) for t in against])  # where all agree, the greedy answers are the same
    same = [bool(part.all()) for part in parts]
    kl = kl_div(given.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    return Closeness(name, sum(same) / len(same), float(agree.float().mean()), max(float(kl), 0.0), charged, text)
