"""From a question and documents to a plan: tokenise, key, fetch, encode what is missing, plan."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvilt.compress.base import Compression
from kvilt.engine.encoder import Encoder, Item
from kvilt.engine.text import TextFormat
from kvilt.errors import PromptError, StoreUnavailable
from kvilt.model.model import Model
from kvilt.model.probe import ModelProbe
from kvilt.plan import Plan, prefill_cost
from kvilt.strategies.base import Strategy
from kvilt.types import CacheKey, Document, DocumentCache, Encoding, ModelInfo, Prompt

KNOWN = 1 << 16  # documents whose tokens and keys are remembered

logger = logging.getLogger("kvilt")


class Clock:
    """Seconds since the start, and of every step."""

    def __init__(self) -> None:
        self.start = self._last = time.perf_counter()
        self.steps: dict[str, float] = {}
        self.first = 0.0

    def lap(self, step: str) -> None:
        """Charge the time since the last lap to a step."""
        now = time.perf_counter()
        self.steps[step] = self.steps.get(step, 0.0) + now - self._last
        self._last = now

    def mark_first(self) -> None:
        """The first token is there."""
        self.first = time.perf_counter() - self.start


@dataclass(frozen=True, eq=False)
class Fetched:
    """The caches of a prompt, and how they came."""

    system: DocumentCache
    documents: list[DocumentCache]
    hits: int
    misses: int
    encoded: tuple[int, ...]  # tokens of everything that had to be encoded


@dataclass(frozen=True, eq=False)
class Ready:
    """A planned prompt and what it took so far."""

    plan: Plan
    caches: Fetched
    probe_bytes: int


class Prompts:
    """Prepares prompts for one model, strategy and store; what was tokenised and keyed before is remembered."""

    def __init__(self, model: Model, text: TextFormat, strategy: Strategy, info: ModelInfo, encoder: Encoder) -> None:
        self.model, self.text, self.strategy, self.info, self.encoder = model, text, strategy, info, encoder
        self.store, self.namespace = encoder.store, encoder.namespace
        self.plain = replace(encoder, encoding=Encoding(), compression=Compression())  # of the system part
        self._known: dict[tuple[str | None, str], Item] = {}  # by title and text
        ids = torch.tensor(info.system, dtype=torch.long)
        key = model.key(ids, Encoding(), namespace=self.namespace)
        self._system = Item(Document("", title="system"), ids, key)

    def planned(self, prompt: Prompt, probe: ModelProbe | None = None) -> Plan:
        """The strategy's plan of a prompt, charged with what its probe passes have cost."""
        probe = probe or ModelProbe(self.model, self.info)
        plan = self.strategy.plan(prompt, probe)
        return replace(plan, overhead=plan.overhead + probe.charged) if probe.charged else plan

    def ready(
        self,
        question: str,
        documents: Sequence[Any],
        allow_empty: bool,
        wanted: int,
        clock: Clock,
        lost: Collection[str],
        least: int = 1,
    ) -> Ready:
        """Tokenise, key, fetch, encode what is missing or lost, plan."""
        if not documents and not allow_empty:
            raise PromptError("no documents: give at least one to answer from.")
        asked, documents = self.text.question_ids(question), self.text.documents(documents, begins=True)
        items = self._items(documents)
        self.room(self._least_end(items, asked), wanted, least)
        clock.lap("tokenise")
        caches = self.fetch(items, lost)
        clock.lap("fetch")
        names = tuple(d.id or d.title or "" for d in documents)
        prompt = Prompt(caches.system, tuple(caches.documents), asked, names, sum(i.saved for i in items))
        probe = ModelProbe(self.model, self.info)
        plan = self.planned(prompt, probe)
        if caches.encoded:
            linear = self.info.linear_cost
            cost = sum(prefill_cost(n, linear) for n in caches.encoded) / prefill_cost(plan.baseline, linear)
            plan = replace(plan, overhead=plan.overhead + cost)
        clock.lap("plan")
        return Ready(plan, caches, probe.bytes_loaded)

    def _items(self, documents: Sequence[Document]) -> list[Item]:
        """Tokens and keys; those of known documents are remembered."""
        if self._system.key.model != self.model.digest:  # weights or adapters were changed since
            self._known.clear()
            key = self.model.key(self._system.ids, Encoding(), namespace=self.namespace)
            self._system = replace(self._system, key=key)
        names = [(d.title, d.text) for d in documents]
        known = {name: item for name in names if (item := self._known.get(name)) is not None}
        new = {name: d for name, d in zip(names, documents, strict=True) if name not in known}
        if new:
            if len(self._known) + len(new) > KNOWN:
                self._known.clear()
            made = dict(zip(new, self.encoder.items(new.values()), strict=True))
            self._known.update(made)
            known |= made  # read here alone: another thread may have cleared the others
        items = [known[name] for name in names]
        return [
            i if i.document.store is d.store else replace(i, document=d) for i, d in zip(items, documents, strict=True)
        ]

    def fetch(self, items: Sequence[Item], lost: Collection[str]) -> Fetched:
        """System and document caches, in one request to the store; bare tokens where nothing is to be reused."""
        if self.strategy.encoding is None:
            return Fetched(self._bare(self._system), [self._bare(i) for i in items], 0, 0, ())
        stored = [i for i in items if i.document.store]
        front = [self._system] if len(self._system.ids) else []
        caches = self._stored([i.key for i in (*front, *stored) if i.key.digest not in lost])
        missing = {i.key.digest: i for i in stored if i.key.digest not in caches}
        lacking = [i for i in front if i.key.digest not in caches]
        if missing:
            caches |= self.encoder.obtain(list(missing.values()), lost)
        if lacking:
            caches |= self.plain.obtain(lacking, lost)
        misses = sum(i.key.digest in missing for i in stored)
        documents = [caches[i.key.digest] if i.document.store else self._bare(i) for i in items]
        system = caches[self._system.key.digest] if front else self._bare(self._system)
        encoded = tuple(len(caches[i.key.digest].tokens) for i in (*lacking, *missing.values()))
        return Fetched(system, documents, len(stored) - misses, misses, encoded)

    def _stored(self, keys: Sequence[CacheKey]) -> dict[str, DocumentCache]:
        try:
            caches = self.store.get_many(keys)
        except StoreUnavailable as error:
            logger.warning("not read: %s", error)
            return {}
        return {key.digest: cache for key, cache in zip(keys, caches, strict=True) if cache is not None}

    def _bare(self, item: Item) -> DocumentCache:
        return DocumentCache(item.ids, torch.arange(len(item.ids)), len(item.ids), item.key)

    def _least_end(self, items: Sequence[Item], asked: Tensor) -> int:
        """Positions that the prompt takes at least, known before anything is encoded."""
        lengths = [len(i.ids) for i in items]
        documents = max(lengths, default=0) if self.strategy.shares_positions else sum(lengths)
        return len(self._system.ids) + documents + len(asked)

    def room(self, end: int, wanted: int, least: int = 1) -> int:
        """How many tokens can be generated behind a prompt that ends there. Raises PromptError where that is too few."""
        if type(wanted) is not int or wanted < 1:
            raise PromptError(f"max_new_tokens must be a whole number from 1, not {wanted!r:.40}.")
        free = self.model.context_length - end
        if free < least:
            raise PromptError(
                f"the prompt takes {end} positions, the model's context holds {self.model.context_length}. "
                "Give fewer or shorter documents."
            )
        return min(wanted, free)
