"""Rows of the last prompts. A prompt that begins with the same rows is appended to them instead of being placed again.

Rows are the same where two plans have the same segments: the same tokens at the same positions, reused from the same caches
or computed. So an answer does not depend on what was asked before; whoever asks on in a conversation pays for the new turn
alone, and whoever asks the same documents in the same order something else, for the question alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvilt.engine.prompts import Fetched
from kvilt.model.model import Model
from kvilt.model.placing import Run
from kvilt.plan import Plan, Segment
from kvilt.types import CacheKey, DocumentCache

ROOM = 512  # rows kept free for the turns to come
LEAST = 16  # rows below which nothing is won
NO_KEY = CacheKey("", "", "", "", "", "", "", "")


@dataclass(eq=False)
class Running(Run):
    """A run that remembers the tokens it was given."""

    given: list[Tensor] = field(default_factory=list)

    def step(self, token: Tensor) -> Tensor:
        """Append one token (1, 1); logits of the next, (1, vocab) float32."""
        logits = super().step(token)
        self.given.append(token[0].cpu())
        return logits


@dataclass(eq=False)
class Held:
    """A prompt whose rows are there: its plan, the tokens behind it, and the buffer, which goes back when `stack` closes."""

    owner: object
    plan: Plan
    run: Running
    stack: ExitStack


class Kept:
    """The last prompts of one model, the latest last, in `budget` bytes. Used by one thread."""

    def __init__(self, model: Model, budget: int) -> None:
        self.model, self.budget = model, budget
        self.held: list[Held] = []

    def take(self, owner: object, plan: Plan, room: int) -> tuple[int, int, Held] | None:
        """The prompt with the most rows in common, how many, and positions; it is taken out. Its buffer has room for all."""
        large = [h for h in self.held if h.owner == owner and h.run.placed.capacity >= len(plan.positions) + room]
        found = [(*shared(h.plan, plan), h) for h in large]
        rows, position, held = max(found, key=lambda f: f[0], default=(0, 0, None))
        if held is None or rows < LEAST:
            return None
        self.held.remove(held)
        return rows, position, held

    def keep(self, held: Held) -> None:
        """Keep a prompt's rows, and let the oldest go where that is too much."""
        self.held.append(held)
        while self.held and sum(h.run.placed.buffer.nbytes for h in self.held) > self.budget:
            self.held.pop(0).stack.close()


class Placing:
    """What `Engine.answer` runs one plan with: looks for rows that are there, and keeps the rows when all went well."""

    plan: Plan  # as the strategy made it
    fetched: Fetched

    def __init__(self, kept: Kept, owner: object) -> None:
        self.kept, self.owner = kept, owner
        self.rows = 0  # that were there
        self._found: Held | None = None

    def ready(self, plan: Plan, fetched: Fetched, room: int) -> Plan:
        """The plan, what is there already as its first segment."""
        self.plan, self.fetched, self.rows = plan, fetched, 0
        found = self.kept.take(self.owner, plan, room)
        if found is None:
            return plan
        self.rows, position, self._found = found
        return continued(plan, self.rows, position)

    @contextmanager
    def run(self, plan: Plan, room: int) -> Iterator[Run]:
        """As `Model.run`."""
        held, self._found = self._found, None
        with ExitStack() as stack:
            if held is None:
                run = stack.enter_context(self.kept.model.run(plan, room + ROOM))
                running = Running(run.placed, run.logits, run.after)
            else:
                stack.push(held.stack.__exit__)
                running = self._append(held.run, plan)
            yield running
            answered = torch.cat([torch.zeros(0, dtype=torch.long), *running.given])
            whole = replace(self.plan, segments=(*self.plan.segments, Segment(answered, self.plan.end, name="answer")))
            self.kept.keep(Held(self.owner, whole, running, stack.pop_all()))

    def _append(self, run: Running, plan: Plan) -> Running:
        """Go back to the rows in common, and compute what follows."""
        placed, tokens = run.placed, plan.computed_tokens
        placed.length, placed.position, placed.bytes_loaded = self.rows, plan.segments[0].length, 0
        logits = self.kept.model.after(tokens, placed, 1)[-1]
        placed.advance(len(tokens))
        return Running(placed, logits, run.after)


def shared(held: Plan, plan: Plan) -> tuple[int, int]:
    """How many first rows of a plan, and positions, are those of a plan that was run; 0 where they cannot be appended to.

    Everything behind them must be computed, one position after the other, and nothing of what was run may have seen more."""
    served = plan.context_rows is None and plan.reader is None and held.blend == plan.blend
    if not served or held.learned is not plan.learned:
        return 0, 0
    rows = position = 0
    for a, b in zip(_joined(plan.segments), _joined(held.segments), strict=False):
        if not a.start == b.start == position:
            break
        same = _equal(a.tokens, b.tokens)
        if same == a.length == b.length and _source(a) == _source(b) and torch.equal(a.computed, b.computed):
            rows, position = rows + len(a.places), position + a.length
            continue
        if a.cache is b.cache is None:
            rows, position = rows + same, position + same
        break
    if position == plan.end:  # something must be computed
        rows, position = rows - 1, position - 1
    asked = plan.computed_tokens[plan.computed_rows >= rows]
    in_order = (
        torch.equal(plan.positions[rows:], torch.arange(position, plan.end)) and len(asked) == plan.end - position
    )
    unseen = bool((held.positions[rows:] >= position).all()) and int(asked.min()) >= 0
    return (rows, position) if in_order and unseen else (0, 0)


def continued(plan: Plan, rows: int, position: int) -> Plan:
    """The same plan with its first rows, up to a position, as one reused segment: for the account of it."""
    tokens = torch.cat([s.tokens for s in plan.segments])[:position]
    there = Segment(tokens, 0, DocumentCache(tokens, plan.positions[:rows], position, NO_KEY), name="kept")
    rest = [Segment(s.tokens[max(0, position - s.start) :], max(s.start, position), name=s.name) for s in plan.segments]
    return replace(plan, segments=(there, *(s for s in rest if s.length)))


def _joined(segments: tuple[Segment, ...]) -> list[Segment]:
    """Segments, those that are computed and follow each other as one."""
    made: list[Segment] = []
    for s in segments:
        last = made[-1] if made else None
        if last is not None and last.cache is s.cache is None and last.start + last.length == s.start:
            made[-1] = Segment(torch.cat([last.tokens, s.tokens]), last.start)
        elif s.length:
            made.append(s)
    return made


def _equal(a: Tensor, b: Tensor) -> int:
    """How many tokens two texts (tokens,) begin with in common."""
    length = min(len(a), len(b))
    differ = (a[:length] != b[:length]).nonzero()
    return int(differ[0]) if len(differ) else length


def _source(s: Segment) -> str | None:
    return s.cache.key.digest if s.cache else None
