"""One query: tokenise, key, fetch, plan, place, run, decode, answer."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvilt import registry
from kvilt.compress.base import Compression
from kvilt.engine.encoder import KNOWN, NOTHING, Encoder, EncodeReport, Flights, Item
from kvilt.engine.prompts import Fetched, opened, parts_of
from kvilt.engine.streaming import stream
from kvilt.engine.text import TextFormat
from kvilt.errors import DamagedCache, DocumentError, PromptError, StoreUnavailable, UnreadableCache
from kvilt.model.decoding import Settings, check_ids, generate
from kvilt.model.loading import load_model, wrap
from kvilt.model.model import Model
from kvilt.model.placing import Run
from kvilt.model.probe import ModelProbe
from kvilt.plan import Plan, Segment, prefill_cost
from kvilt.stores.store import Store
from kvilt.strategies.base import Strategy
from kvilt.types import Answer, Clock, Document, Encoding, Prompt, Usage

T = TypeVar("T")
logger = logging.getLogger("kvilt")


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
        system = tuple(text.system_ids().tolist())
        self.info = model.info(system=system, sink=text.sink(), reserved=text.reserved())
        self.strategy = strategy.bind(self.info)
        self.label = str(self.strategy)
        self.compression = Compression.of(compress)
        self.flights = flights or Flights()
        encoding = self.strategy.encoding or Encoding()
        self.encoder = Encoder(
            model, text, store, encoding, namespace, compression=self.compression, flights=self.flights
        )
        self._plain = replace(self.encoder, encoding=Encoding(), compression=Compression())  # of the system part
        ids = torch.tensor(system, dtype=torch.long)
        self._system = Item(Document("", title="system"), ids, model.key(ids, Encoding(), namespace=namespace))
        self._item = functools.lru_cache(KNOWN)(self.encoder.item)  # tokenising takes about a millisecond a document
        self._told: dict[str, Engine] = {}  # by system text

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
        built = registry.build("strategy", strategy), registry.build("store", store)
        return cls(loaded, TextFormat.of(tokenizer, system), *built, namespace, smaller)

    @classmethod
    def of(
        cls, hf: Any, tokenizer: Any, strategy: str = registry.DEFAULT, store: str = "disk", **options: Any
    ) -> Engine:
        """An engine over a transformers model and tokenizer of one's own; `options` as of `Engine`.

        Raises ModelError where the model cannot be served exactly."""
        model, text = wrap(hf, tokenizer), TextFormat.of(tokenizer, options.pop("system", None))
        return cls(model, text, registry.build("strategy", strategy), registry.build("store", store), **options)

    def with_strategy(self, strategy: str | Strategy, compress: str | Compression | None = None) -> Engine:
        """The same model and store with another strategy, and another compression if one is given."""
        same = self.compression if compress is None else compress
        built = registry.build("strategy", strategy)
        return Engine(self.model, self.text, built, self.store, self.namespace, same, self.flights)

    def with_system(self, system: str) -> Engine:
        """The same engine with another system text. Strategies that encode documents behind it encode them anew."""
        text = self.text.told(system)
        engine = self if system == self.text.system else self._told.get(system)
        if engine is None:
            if len(self._told) > 16:
                self._told.clear()
            given = (self.strategy, self.store, self.namespace, self.compression, self.flights)
            engine = self._told[system] = Engine(self.model, text, *given)
        return engine

    def encode(self, documents: Sequence[Any], **options: Any) -> EncodeReport:
        """Encode and store documents, and the system part, ahead of any question (`Encoder.encode` has the options)."""
        self._fetch([], ())
        return self.encoder.encode(self.text.documents(documents), **options)

    def answer(
        self,
        question: str | Sequence[Any],
        documents: Sequence[Document | str | dict[str, Any]] = (),
        *,
        system: str | None = None,
        max_new_tokens: int = 128,
        allow_empty: bool = False,
        streamer: Any = None,
        through: Callable[[Run], Run] = lambda run: run,
        placing: Any = None,
        **sampling: Any,
    ) -> Answer:
        """Answer a question or a chat over documents; greedy unless sampling options of transformers' generate are given.

        A chat is a list of {"role", "content"}. Documents, texts or {"text", "title", "id"}, stand in front of the first thing
        the user says, or among the texts of a content that is a list. `system` is another system text for this answer.
        `max_new_tokens` is cut to what the context holds; `streamer.put` gets every token as it is picked. What is decoded goes
        `through` something that may know the next steps already. `placing` may change the plan (`ready(plan, fetched, room)`)
        and runs it in place of the model. Raises PromptError before anything is computed where question or options cannot be
        served."""
        system, question = (system, question) if isinstance(question, str) else opened(question, system)
        if system is not None and system != self.text.system:
            given = {"max_new_tokens": max_new_tokens, "allow_empty": allow_empty, "streamer": streamer, **sampling}
            return self.with_system(system).answer(question, documents, through=through, placing=placing, **given)
        clock, settings = Clock(), Settings.of(self.model.hf, sampling, self.text.tokenizer)

        def attempt(lost: dict[str, bool]) -> Answer:
            plan, caches, probed = self.ready(question, documents, allow_empty, max_new_tokens, clock, lost)
            room = self._room(plan.end, max_new_tokens)
            plan = placing.ready(plan, caches, room) if placing else plan
            if streamer is not None:
                streamer.put(torch.empty(0, dtype=torch.long))  # a reader who went away stops the work here
            with (placing or self.model).run(plan, room) as computed:
                clock.lap("run")
                run, prompt = through(computed), torch.cat([s.tokens for s in plan.segments])
                tokens = generate(run, prompt, room, settings, clock.mark_first, streamer)
                clock.lap("decode")
            counts = plan.reused_count, len(plan.computed_rows), len(tokens)
            found, loaded = (caches.hits, len(caches.missing), sum(lost.values())), run.bytes_loaded + probed
            charged = plan.charged(self.info.linear_cost)
            usage = Usage(*counts, charged, *found, loaded, clock.first, clock.steps, plan.note)
            return Answer(self.text.decode(tokens), tokens, usage, self.label, run.logits.cpu())

        return self._until_sound(attempt)

    def answers(
        self, asked: Sequence[tuple[Any, Sequence[Any]]], progress: bool = True, **options: Any
    ) -> list[Answer]:
        """Answers to many questions, each (question, documents), with one progress bar; `options` as of `answer`.

        Documents that are not stored are encoded first, in batches. Raises what `answer` raises, at the first that fails."""
        from rich.progress import track

        if self.strategy.encoding is not None:
            self.encode([document for _, documents in asked for document in documents])
        return [self.answer(*pair, **options) for pair in track(asked, "answering", disable=not progress)]

    def stream(
        self, question: str | Sequence[Any], documents: Sequence[Any] = (), **options: Any
    ) -> Iterator[str | Answer]:
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
        count, forced = len(continuation), torch.tensor(list(continuation[:-1]), dtype=torch.long)

        def attempt(lost: dict[str, bool]) -> Tensor:
            plan = self.ready(question, documents, allow_empty, count, Clock(), lost, least=count)[0]
            self._room(plan.end, count, least=count)
            added = (Segment(forced, plan.end, name="answer"),) if len(forced) else ()
            return self.model.score(replace(plan, segments=(*plan.segments, *added)), count)

        return self._until_sound(attempt)

    def plan(self, question: str | Sequence[Any], documents: Sequence[Any], allow_empty: bool = False) -> Plan:
        """The plan of a prompt, with its caches fetched or made."""
        system, question = opened(question)
        engine = self if system is None else self.with_system(system)
        return engine.ready(question, documents, allow_empty, 1, Clock(), ())[0]

    def ready(
        self,
        question: Any,
        documents: Sequence[Any],
        allow_empty: bool,
        wanted: int,
        clock: Clock,
        lost: Collection[str],
        least: int = 1,
    ) -> tuple[Plan, Fetched, int]:
        """Tokenise, key, fetch, encode what is missing or lost, plan; the plan, the caches, and the bytes that probing read.

        The plan is charged with what its probe passes and missing documents have cost."""
        documents = self.text.documents(documents, begins=True)
        plain = isinstance(question, str) and (True, documents, self.text.question_ids(question))
        headed, parts, asked = plain or parts_of(self.text, self._system.ids, question, documents)
        if not (documents or parts or allow_empty):
            raise PromptError("no documents: give at least one to answer from.")
        items, front = self._items(parts), len(self._system.ids) if headed else 0
        lengths = [len(i.ids) for i in items]
        documents_end = max(lengths, default=0) if self.strategy.shares_positions else sum(lengths)
        self._room(front + documents_end + len(asked), wanted, least)  # known before anything is encoded
        clock.lap("tokenise")
        caches = self._fetch(items, lost, headed)
        clock.lap("fetch")
        names = tuple(i.document.id or i.document.title or "" for i in items)
        prompt = Prompt(caches.system, tuple(caches.documents), asked, names, sum(i.saved for i in items))
        probe = ModelProbe(self.model, self.info)
        plan, linear = self.strategy.plan(prompt, probe), self.info.linear_cost
        encoding = sum(prefill_cost(n, linear) for n in caches.encoded) / prefill_cost(plan.baseline, linear)
        plan = replace(plan, overhead=plan.overhead + probe.charged + encoding)
        clock.lap("plan")
        return plan, caches, probe.bytes_loaded

    def _items(self, parts: Sequence[Document]) -> list[Item]:
        """Tokens and keys. Raises DocumentError."""
        frame = self.model.key(NOTHING, self.encoder.encoding, namespace=self.namespace)
        try:
            return [self._item(part, frame) for part in parts]
        except DocumentError:
            return self.encoder.items(parts)  # says what is wrong with each of them

    def _fetch(self, items: Sequence[Item], lost: Collection[str], headed: bool = True) -> Fetched:
        """System and document caches, in one request to the store; bare tokens where nothing is to be reused."""
        head = self._system if headed else replace(self._system, ids=NOTHING)
        if self.strategy.encoding is None:
            return Fetched(head.bare, [i.bare for i in items], items, 0)
        if self._system.key.model != (items[0].key.model if items else self.model.digest):  # weights were changed since
            key = self.model.key(self._system.ids, Encoding(), namespace=self.namespace)
            self._system = replace(self._system, key=key)
        stored = [i for i in items if i.document.store]
        front = [self._system] if len(head.ids) else []
        caches = self.store.found([i.key for i in (*front, *stored) if i.key.digest not in lost])
        missing = {i.key.digest: i for i in stored if i.key.digest not in caches}
        lacking = [i for i in front if i.key.digest not in caches]
        if missing:
            caches |= self.encoder.obtain(list(missing.values()), lost)
        if lacking:
            caches |= self._plain.obtain(lacking, lost)
        misses = tuple(i.key.digest for i in stored if i.key.digest in missing)
        documents = [caches[i.key.digest] if i.document.store else i.bare for i in items]
        system = caches[self._system.key.digest] if front else head.bare
        encoded = tuple(len(caches[i.key.digest].tokens) for i in (*lacking, *missing.values()))
        return Fetched(system, documents, items, len(stored) - len(misses), misses, encoded)

    def _room(self, end: int, wanted: int, least: int = 1) -> int:
        """How many tokens can be generated behind a prompt that ends there. Raises PromptError where that is too few."""
        if type(wanted) is not int or wanted < 1:
            raise PromptError(f"max_new_tokens must be a whole number from 1, not {wanted!r:.40}.")
        free = self.model.context_length - end
        if free < least:
            held = f"the model's context holds {self.model.context_length}"
            raise PromptError(f"the prompt takes {end} positions, {held}. Give fewer or shorter documents.")
        return min(wanted, free)

    def _until_sound(self, attempt: Callable[[dict[str, bool]], T]) -> T:
        """Try until no stored document fails; those that do are noted, with whether they are damaged, and encoded anew."""
        lost = dict[str, bool]()
        while True:
            try:
                return attempt(lost)
            except (DamagedCache, UnreadableCache) as error:
                if error.key in lost:
                    raise
                lost[error.key] = isinstance(error, DamagedCache)
                logger.warning("%s", error)
                with contextlib.suppress(StoreUnavailable):
                    if isinstance(error, DamagedCache):
                        self.store.set_aside(error.key, error.reason)
