"""One query: tokenise, key, fetch, plan, place, run, decode, answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from kvilt import registry
from kvilt.compress.base import Compression
from kvilt.engine.encoder import Encoder, EncodeReport, Item
from kvilt.engine.streaming import stream
from kvilt.engine.text import TextFormat
from kvilt.errors import DamagedCache, PromptError, StoreUnavailable
from kvilt.model.decoding import Scores, Settings, generate
from kvilt.model.loading import load_model
from kvilt.model.model import Model
from kvilt.model.placed import PlacedCache
from kvilt.model.probe import ModelProbe
from kvilt.plan import Plan, Segment
from kvilt.stores.base import CacheStore
from kvilt.strategies.base import Strategy
from kvilt.types import Answer, Document, DocumentCache, Encoding, Prompt, Usage

logger = logging.getLogger("kvilt")


@dataclass
class Clock:
    """Seconds since the start, and of every step."""

    start: float = field(default_factory=time.perf_counter)
    steps: dict[str, float] = field(default_factory=dict)
    first: float = 0.0
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, step: str) -> None:
        """Charge the time since the last lap to a step."""
        now = time.perf_counter()
        self.steps[step] = self.steps.get(step, 0.0) + now - self._last
        self._last = now

    def mark_first(self) -> None:
        """The first token is there."""
        self.first = time.perf_counter() - self.start


@dataclass(frozen=True, eq=False)
class Ready:
    """A prompt whose caches are at hand, and its plan."""

    prompt: Prompt
    plan: Plan
    hits: int
    misses: int


class Engine:
    """Answers questions over documents with one model, one strategy and one store.

    Raises UserError for whatever the caller got wrong; a damaged or unusable store never costs an answer."""

    def __init__(
        self,
        model: Model,
        text: TextFormat,
        strategy: Strategy,
        store: CacheStore,
        namespace: str = "default",
        compress: str | Compression = "",
    ) -> None:
        self.model, self.text, self.store, self.namespace = model, text, store, namespace
        self.info = model.info(
            system=tuple(text.system_ids().tolist()),
            sink=text.sink(),
            reserved=text.reserved(),
            directory=getattr(model.hf, "name_or_path", None) or None,
        )
        self.strategy = strategy.bind(self.info)
        self.compression = Compression.of(compress)
        encoding = self.strategy.encoding or Encoding()
        self.encoder = Encoder(model, text, store, encoding, namespace, compression=self.compression)
        self._plain = Encoder(model, text, store, Encoding(), namespace)

    @classmethod
    def load(
        cls,
        model: str,
        strategy: str | Strategy = "block",
        store: str | CacheStore = "disk",
        *,
        system: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        namespace: str = "default",
        compress: str | Compression = "",
    ) -> Engine:
        """Load a model (hub name or folder), a strategy, a store and a compression from specification strings.

        `dtype` "auto" is the checkpoint's own on CUDA and float32 on a CPU, where it is fastest."""
        smaller = Compression.of(compress)  # before the model: mistakes show at once
        loaded, tokenizer = load_model(model, dtype, device)
        built = cast(Strategy, registry.build("strategy", strategy)) if isinstance(strategy, str) else strategy
        keep = cast(CacheStore, registry.build("store", store)) if isinstance(store, str) else store
        return cls(loaded, TextFormat.of(tokenizer, system), built, keep, namespace, smaller)

    def with_strategy(self, strategy: str | Strategy, compress: str | Compression | None = None) -> Engine:
        """The same model and store with another strategy, and another compression if one is given."""
        built = cast(Strategy, registry.build("strategy", strategy)) if isinstance(strategy, str) else strategy
        same = self.compression if compress is None else compress
        return Engine(self.model, self.text, built, self.store, self.namespace, same)

    def encode(self, documents: Sequence[Document], **options: Any) -> EncodeReport:
        """Encode and store documents ahead of any question."""
        return self.encoder.encode(documents, **options)

    def answer(
        self,
        question: str,
        documents: Sequence[Document],
        *,
        max_new_tokens: int = 128,
        allow_empty: bool = False,
        streamer: Any = None,
        draft: Sequence[int] = (),
        **sampling: Any,
    ) -> Answer:
        """Answer a question over documents; greedy unless sampling options of transformers' generate are given.

        `max_new_tokens` is cut to what the model's context holds; `streamer.put` gets every token as it is picked.
        `draft` is a guess of the answer's tokens: right ones are generated in one pass, wrong ones change nothing.
        Raises PromptError before anything is computed where question or options cannot be served."""
        clock, refused = Clock(), set[str]()
        settings = Settings.of(self.model.hf, sampling)
        while True:
            try:
                ready = self._ready(question, documents, clock, allow_empty, refused)
                room = self._room(ready.plan, max_new_tokens)
                logits, placed = self.model.run(ready.plan, room)
                break
            except DamagedCache as error:
                self._repair(error, refused)
        clock.lap("run")
        try:
            ids, tokenizer = _ids(ready.plan), self.text.tokenizer
            ahead = Scores(self.model, placed, draft[:room])
            tokens = generate(
                self.model, logits, placed, ids, room, settings, clock.mark_first, streamer, tokenizer, ahead
            )
            drafted = torch.cat([logits[None], ahead.of_draft()[:-1]]) if draft else None
            clock.lap("decode")
            usage = self._usage(ready, placed, clock, len(tokens), len(refused))
        finally:
            self.model.pool.give(placed.buffer)
        return Answer(self.text.decode(tokens), tokens, usage, repr(self.strategy), logits.cpu(), drafted)

    def stream(self, question: str, documents: Sequence[Document], **options: Any) -> Iterator[str | Answer]:
        """Pieces of the answer's text as they are generated; the last item is the Answer itself.

        The pieces join to its text. Close the iterator to stop early."""
        return stream(lambda pieces: self.answer(question, documents, streamer=pieces, **options), self.text.tokenizer)

    def score(
        self, question: str, documents: Sequence[Document], continuation: Sequence[int], *, allow_empty: bool = False
    ) -> Tensor:
        """Teacher-forced logits under the strategy, (len(continuation), vocab) float32; row i predicts continuation[i]."""
        refused = set[str]()
        if not len(continuation):
            raise PromptError("nothing to score: the continuation is empty.")
        while True:
            try:
                plan = self._ready(question, documents, Clock(), allow_empty, refused).plan
                self._room(plan, len(continuation), least=len(continuation))
                forced = Segment(torch.tensor(list(continuation[:-1]), dtype=torch.long), plan.end, name="answer")
                if forced.length:
                    plan = replace(plan, segments=(*plan.segments, forced), begun=None)
                return self.model.score(plan, len(continuation))
            except DamagedCache as error:
                self._repair(error, refused)

    def plan(self, question: str, documents: Sequence[Document]) -> Plan:
        """The plan of a prompt, with its caches fetched or made."""
        return self._ready(question, documents, Clock(), False, set()).plan

    def planned(self, prompt: Prompt) -> Plan:
        """The strategy's plan of a prompt, charged with what its probes have cost."""
        probe = ModelProbe(self.model, self.info)
        plan = self.strategy.plan(prompt, probe)
        return replace(plan, overhead=plan.overhead + probe.charged)

    def _ready(
        self, question: str, documents: Sequence[Document], clock: Clock, allow_empty: bool, refused: set[str]
    ) -> Ready:
        if not documents and not allow_empty:
            raise PromptError("no documents: give at least one to answer from.")
        asked = self.text.question_ids(question)
        items = self.encoder.items(documents)
        clock.lap("tokenize")
        system, caches, hits = self._caches(items, refused)
        clock.lap("fetch")
        names = tuple(d.id or d.title or "" for d in documents)
        prompt = Prompt(system, tuple(caches), asked, names, sum(i.saved for i in items))
        plan = self.planned(prompt)
        clock.lap("plan")
        stored = sum(c.layers is not None for c in caches)
        return Ready(prompt, plan, hits, stored - hits)

    def _caches(self, items: Sequence[Item], refused: set[str]) -> tuple[DocumentCache, list[DocumentCache], int]:
        """System and document caches; only tokens where the strategy reuses nothing or a document says so."""
        system_ids = torch.tensor(self.info.system, dtype=torch.long)
        if self.strategy.encoding is None:
            return self._bare(system_ids), [self._bare(i.ids) for i in items], 0
        system = self._system(system_ids, refused)
        kept = [i for i in items if i.document.store]
        found, hits = self.encoder.fetch(kept, refused)
        rest = iter(found)
        return system, [next(rest) if i.document.store else self._bare(i.ids) for i in items], hits

    def _system(self, ids: Tensor, refused: set[str]) -> DocumentCache:
        """The system part: an exact prefix, cached like a document."""
        if len(ids) == 0:
            return self._bare(ids)
        key = self.model.key(ids, Encoding())
        found = self._plain.get(key, refused)
        if found is None:
            found = self.model.encode([ids], Encoding())[0]
            self._plain.put(found, "system")
        return found

    def _bare(self, ids: Tensor) -> DocumentCache:
        return DocumentCache(ids, torch.arange(len(ids)), len(ids), self.model.key(ids, Encoding()))

    def _room(self, plan: Plan, wanted: int, least: int = 1) -> int:
        free = self.model.context_length - plan.end
        if free < least:
            raise PromptError(
                f"the prompt takes {plan.end} positions, the model's context holds {self.model.context_length}. "
                "Give fewer or shorter documents."
            )
        if wanted < 1:
            raise PromptError(f"max_new_tokens must be at least 1, not {wanted}.")
        return min(wanted, free)

    def _repair(self, error: DamagedCache, refused: set[str]) -> None:
        """Take a damaged document out of service, in this answer even if the store cannot."""
        if error.key in refused:
            raise error
        refused.add(error.key)
        try:
            self.store.set_aside(error.key, error.reason)
        except StoreUnavailable as unavailable:
            logger.warning("not set aside: %s", unavailable)

    def _usage(self, ready: Ready, placed: PlacedCache, clock: Clock, generated: int, damaged: int) -> Usage:
        plan = ready.plan
        return Usage(
            reused_tokens=plan.reused_count,
            computed_tokens=len(plan.computed_rows),
            generated_tokens=generated,
            charged=plan.charged(self.info.linear_cost),
            hits=ready.hits,
            misses=ready.misses,
            damaged=damaged,
            bytes_loaded=placed.bytes_loaded,
            ttft_s=clock.first,
            steps_s=clock.steps,
            note=plan.note,
        )


def _ids(plan: Plan) -> Tensor:
    return torch.cat([s.tokens for s in plan.segments])
