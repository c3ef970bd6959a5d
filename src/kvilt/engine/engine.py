"""One query: tokenise, key, fetch, plan, place, run, decode, answer."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from kvilt import registry
from kvilt.compress.base import Compression
from kvilt.engine.encoder import Encoder, EncodeReport, Flights, Item
from kvilt.engine.streaming import stream
from kvilt.engine.text import TextFormat
from kvilt.errors import DamagedCache, PromptError, StoreUnavailable, UnreadableCache
from kvilt.model.decoding import Settings, check_ids, generate
from kvilt.model.loading import load_model
from kvilt.model.model import Model, Run
from kvilt.model.probe import ModelProbe
from kvilt.plan import Plan, Segment, prefill_cost
from kvilt.stores.store import Store
from kvilt.strategies.base import Strategy
from kvilt.types import Answer, CacheKey, Document, DocumentCache, Encoding, Prompt, Usage

KNOWN = 1 << 16  # documents whose tokens and keys are remembered

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


class Engine:
    """Answers questions over documents with one model, one strategy and one store.

    Raises UserError for whatever the caller got wrong; a damaged or unusable store never costs an answer."""

    def __init__(
        self,
        model: Model,
        text: TextFormat,
        strategy: Strategy,
        store: Store,
        namespace: str = "shared",
        compress: str | Compression = "",
        flights: Flights | None = None,
    ) -> None:
        self.model, self.text, self.store, self.namespace = model, text, store, namespace
        self.info = model.info(
            system=tuple(text.system_ids().tolist()),
            sink=text.sink(),
            reserved=text.reserved(),
        )
        self.strategy = strategy.bind(self.info)
        self.label = str(self.strategy)
        self.compression = Compression.of(compress)
        self.flights = flights or Flights()
        encoding = self.strategy.encoding or Encoding()
        self.encoder = Encoder(
            model, text, store, encoding, namespace, compression=self.compression, flights=self.flights
        )
        self._plain = Encoder(model, text, store, Encoding(), namespace, flights=self.flights)
        self._known: dict[tuple[str | None, str], Item] = {}  # by title and text
        self._told: dict[str, Engine] = {}  # by system text
        ids = torch.tensor(self.info.system, dtype=torch.long)
        self._system = Item(Document("", title="system"), ids, model.key(ids, Encoding(), namespace=namespace))

    @classmethod
    def load(
        cls,
        model: str,
        strategy: str | Strategy = registry.DEFAULT,
        store: str | Store = "disk",
        *,
        system: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        namespace: str = "shared",
        compress: str | Compression = "",
        trust_remote_code: bool = False,
    ) -> Engine:
        """Load a model (hub name or folder), a strategy, a store and a compression from specification strings.

        `dtype` "auto" is what this machine computes fastest in; documents are stored in the checkpoint's own."""
        smaller = Compression.of(compress)  # before the model: mistakes show at once
        loaded, tokenizer = load_model(model, dtype, device, trust_remote_code=trust_remote_code)
        built = cast(Strategy, registry.build("strategy", strategy)) if isinstance(strategy, str) else strategy
        keep = cast(Store, registry.build("store", store)) if isinstance(store, str) else store
        return cls(loaded, TextFormat.of(tokenizer, system), built, keep, namespace, smaller)

    def with_strategy(self, strategy: str | Strategy, compress: str | Compression | None = None) -> Engine:
        """The same model and store with another strategy, and another compression if one is given."""
        built = cast(Strategy, registry.build("strategy", strategy)) if isinstance(strategy, str) else strategy
        same = self.compression if compress is None else compress
        return Engine(self.model, self.text, built, self.store, self.namespace, same, self.flights)

    def with_system(self, system: str) -> Engine:
        """The same engine with another system text. Strategies that encode documents behind it encode them anew."""
        text = self.text.told(system)
        engine = self._told.get(system)
        if engine is None:
            if len(self._told) > 16:
                self._told.clear()
            given = (self.strategy, self.store, self.namespace, self.compression, self.flights)
            engine = self._told[system] = Engine(self.model, text, *given)
        return engine

    def encode(self, documents: Sequence[Any], **options: Any) -> EncodeReport:
        """Encode and store documents, and the system part, ahead of any question (`Encoder.encode` has the options)."""
        self._fetch([], {})
        return self.encoder.encode(self.text.documents(documents), **options)

    def answer(
        self,
        question: str,
        documents: Sequence[Document | str | dict[str, Any]],
        *,
        system: str | None = None,
        max_new_tokens: int = 128,
        allow_empty: bool = False,
        streamer: Any = None,
        through: Callable[[Run], Run] = lambda run: run,
        **sampling: Any,
    ) -> Answer:
        """Answer a question over documents; greedy unless sampling options of transformers' generate are given.

        A document may be a text or {"text", "title", "id"}; `system` is another system text for this answer.
        `max_new_tokens` is cut to what the model's context holds; `streamer.put` gets every token as it is picked. What is
        decoded goes `through` something that may know the next steps already (the evaluation does).
        Raises PromptError before anything is computed where question or options cannot be served."""
        if system is not None:
            given = {"max_new_tokens": max_new_tokens, "allow_empty": allow_empty, "streamer": streamer, **sampling}
            return self.with_system(system).answer(question, documents, through=through, **given)
        clock, lost = Clock(), dict[str, bool]()
        settings = Settings.of(self.model.hf, sampling, self.text.tokenizer)
        while True:
            try:
                ready = self._ready(question, documents, allow_empty, max_new_tokens, clock, lost)
                room = self._room(ready.plan.end, max_new_tokens)
                if streamer is not None:
                    streamer.put(torch.empty(0, dtype=torch.long))  # a reader who went away stops the work here
                with self.model.run(ready.plan, room) as computed:
                    clock.lap("run")
                    run, prompt = through(computed), torch.cat([s.tokens for s in ready.plan.segments])
                    tokens = generate(run, prompt, room, settings, clock.mark_first, streamer)
                    clock.lap("decode")
                    usage = self._usage(ready, run, clock, len(tokens), sum(lost.values()))
                return Answer(self.text.decode(tokens), tokens, usage, self.label, run.logits.cpu())
            except (DamagedCache, UnreadableCache) as error:
                self._give_up(error, lost)

    def stream(self, question: str, documents: Sequence[Any], **options: Any) -> Iterator[str | Answer]:
        """Pieces of the answer's text as they are generated; the last item is the Answer itself.

        The pieces join to its text. Close the iterator to stop early."""
        return stream(lambda pieces: self.answer(question, documents, streamer=pieces, **options), self.text.tokenizer)

    def score(
        self, question: str, documents: Sequence[Any], continuation: Sequence[int], *, allow_empty: bool = False
    ) -> Tensor:
        """Teacher-forced logits under the strategy, (len(continuation), vocab) float32; row i predicts continuation[i]."""
        if not len(continuation):
            raise PromptError("nothing to score: the continuation is empty.")
        check_ids("the continuation", list(continuation), self.info.vocab_size)
        lost = dict[str, bool]()
        while True:
            try:
                count = len(continuation)
                plan = self._ready(question, documents, allow_empty, count, Clock(), lost, least=count).plan
                self._room(plan.end, count, least=count)
                forced = Segment(torch.tensor(list(continuation[:-1]), dtype=torch.long), plan.end, name="answer")
                if forced.length:
                    plan = replace(plan, segments=(*plan.segments, forced))
                return self.model.score(plan, count)
            except (DamagedCache, UnreadableCache) as error:
                self._give_up(error, lost)

    def plan(self, question: str, documents: Sequence[Any]) -> Plan:
        """The plan of a prompt, with its caches fetched or made."""
        return self._ready(question, documents, False, 1, Clock(), ()).plan

    def planned(self, prompt: Prompt) -> Plan:
        """The strategy's plan of a prompt, charged with what its probe passes have cost."""
        return self._planned(prompt, ModelProbe(self.model, self.info))

    def _planned(self, prompt: Prompt, probe: ModelProbe) -> Plan:
        plan = self.strategy.plan(prompt, probe)
        return replace(plan, overhead=plan.overhead + probe.charged) if probe.charged else plan

    def _ready(
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
        self._room(self._least_end(items, asked), wanted, least)
        clock.lap("tokenise")
        caches = self._fetch(items, lost)
        clock.lap("fetch")
        names = tuple(d.id or d.title or "" for d in documents)
        prompt = Prompt(caches.system, tuple(caches.documents), asked, names, sum(i.saved for i in items))
        probe = ModelProbe(self.model, self.info)
        plan = self._planned(prompt, probe)
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

    def _fetch(self, items: Sequence[Item], lost: Collection[str]) -> Fetched:
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
            caches |= self._plain.obtain(lacking, lost)
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

    def _room(self, end: int, wanted: int, least: int = 1) -> int:
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

    def _give_up(self, error: DamagedCache | UnreadableCache, lost: dict[str, bool]) -> None:
        """Note a stored document that cannot be used, and whether it is damaged; the answer encodes it anew."""
        if error.key in lost:
            raise error
        lost[error.key] = isinstance(error, DamagedCache)
        if not isinstance(error, DamagedCache):
            logger.warning("%s", error)
            return
        with contextlib.suppress(StoreUnavailable):
            self.store.set_aside(error.key, error.reason)

    def _usage(self, ready: Ready, run: Run, clock: Clock, generated: int, damaged: int) -> Usage:
        plan, caches = ready.plan, ready.caches
        return Usage(
            reused_tokens=plan.reused_count,
            computed_tokens=len(plan.computed_rows),
            generated_tokens=generated,
            charged=plan.charged(self.info.linear_cost),
            hits=caches.hits,
            misses=caches.misses,
            damaged=damaged,
            bytes_loaded=run.bytes_loaded + ready.probe_bytes,
            ttft_s=clock.first,
            steps_s=clock.steps,
            note=plan.note,
        )
