"""`kvilt calibrate ape`: the temperature and scale that bring APE closest to full recompute on the user's own documents.

Nothing needs labels: what full recompute answers is what APE is held to."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kvilt.engine.engine import Engine
from kvilt.errors import DocumentError, PromptError
from kvilt.lab.evaluate.fidelity import divergence
from kvilt.rows.files import text_lines
from kvilt.strategies.ape import Ape, ApeProfile
from kvilt.types import Document

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
PLAIN = (1.0, 1.0)  # parallel encoding as it is; a point of the grid
SCALES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
QUOTED = 8  # words of a document that a question of ours quotes
FILLED = 0.5  # share of the context that a prompt's documents may take

Pair = tuple[float, float]  # temperature and scale
Ask = tuple[str, list[Document]]  # a question and the documents it is asked about


@dataclass(frozen=True, eq=False)
class Target:
    """One prompt, full recompute's answer to it, and its logits there, (tokens, vocab)."""

    question: str
    documents: list[Document]
    tokens: tuple[int, ...]
    logits: Tensor


def calibrate(
    engine: Engine, prompts: Sequence[Ask], tokens: int = 16,
    on_progress: Callable[[int, str], None] = lambda number, line: None,
) -> ApeProfile:  # fmt: skip
    """Choose by mean KL to full recompute on every second prompt; the others must agree, and give the figures.

    The search starts at plain parallel encoding (1, 1) and stops where no neighbour in the grid is closer. Where the other
    prompts do not find its result better, (1, 1) stays.
    Raises PromptError where there are no prompts, or one cannot be answered."""
    if not prompts:
        raise PromptError("nothing to calibrate on: no questions.")
    full = engine.with_strategy("full")
    targets = [Target(*p, a := full.answer(*p, max_new_tokens=tokens).tokens, full.score(*p, a)) for p in prompts]
    fitted, held_out, tried = targets[::2], targets[1::2] or targets, itertools.count(1)

    @functools.cache
    def kl(temperature: float, scale: float) -> float:
        mean = _distance(engine, fitted, temperature, scale)
        on_progress(next(tried), f"temperature {temperature}, scale {scale}: KL {mean:.4f}")
        return mean

    best = descend(kl, TEMPERATURES, SCALES)
    reached, plain = (_distance(engine, held_out, *setting) for setting in (best, PLAIN))
    if reached >= plain:  # what seemed better was chance
        best, reached = PLAIN, plain
    return ApeProfile(*best, engine.info.digest, reached, plain)


def descend(cost: Callable[[float, float], float], first: Sequence[float], second: Sequence[float]) -> Pair:
    """The pair of the grid that is better than its eight neighbours, found by steps to the best of them from (1, 1).

    The two act through their product, too: steps along one axis at a time would stop in the slanted valley."""
    best = PLAIN
    while True:
        i, j = first.index(best[0]), second.index(best[1])
        near = [(a, b) for a in first[max(i - 1, 0) : i + 2] for b in second[max(j - 1, 0) : j + 2]]
        closest = min([best, *near], key=lambda pair: cost(*pair))
        if closest == best:
            return best
        best = closest


def _distance(engine: Engine, targets: Sequence[Target], temperature: float, scale: float) -> float:
    """Mean KL(full || APE) in nats per token, over full recompute's own answers."""
    one = engine.with_strategy(Ape(temperature, scale))
    return sum(divergence(t.logits, one.score(t.question, t.documents, t.tokens)) for t in targets) / len(targets)


def asked(engine: Engine, documents: Sequence[Document], questions: Sequence[str], group: int) -> list[Ask]:
    """Every question with the documents that share most words with it, in their own order."""
    words = [set(d.content.lower().split()) for d in documents]
    sets = []
    for question in questions:
        shared = [len(w & set(question.lower().split())) for w in words]
        ranked = sorted(range(len(documents)), key=lambda i: -shared[i])
        sets.append((question, [documents[i] for i in sorted(_fitting(engine, documents, ranked)[:group])]))
    return sets


def made_up(engine: Engine, documents: Sequence[Document], count: int, group: int, seed: int = 0) -> list[Ask]:
    """Questions about what follows some words of a document, which stands among others. Raises DocumentError."""
    dice, made = random.Random(seed), []
    long = [i for i, d in enumerate(documents) if len(d.text.split()) > QUOTED]
    if not long:
        raise DocumentError(f"no document has more than {QUOTED} words to ask about: give questions (--questions).")
    for _ in range(count):
        chosen = dice.choice(long)
        others = dice.sample(range(len(documents)), len(documents))
        used = _fitting(engine, documents, [chosen, *(i for i in others if i != chosen)])[:group]
        words = documents[chosen].text.split()
        at = dice.randrange(len(words) - QUOTED)
        quote = " ".join(words[at : at + QUOTED])
        made.append((f'Which words follow "{quote}"?', [documents[i] for i in dice.sample(used, len(used))]))
    return made


def _fitting(engine: Engine, documents: Sequence[Document], order: Sequence[int]) -> list[int]:
    """As many of the documents, in this order, as leave room for the question and the answer; one at least."""
    room = FILLED * engine.model.context_length
    sizes = itertools.accumulate(len(engine.text.document_ids(documents[i])) for i in order)
    return [i for n, (i, taken) in enumerate(zip(order, sizes, strict=True)) if n == 0 or taken <= room]


def lines(file: Path | None) -> list[str] | None:
    """The questions of a text file, one a line. Raises UserError where there are none."""
    if file is None:
        return None
    asked = [line.strip() for line in text_lines(file) if line.strip()]
    if not asked:
        raise PromptError(f"{file} holds no question; write one a line.")
    return asked
