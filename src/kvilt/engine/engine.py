"""One query: tokenise, key, fetch, plan, place, run, decode, answer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from kvilt import registry
from kvilt.compress.base import Compression
from kvilt.engine.encoder import Encoder, EncodeReport, Flights
from kvilt.engine.prompts import Clock, Prompts, Ready
from kvilt.engine.streaming import stream
from kvilt.engine.text import TextFormat
from kvilt.errors import DamagedCache, PromptError, StoreUnavailable, UnreadableCache
from kvilt.model.decoding import Settings, check_ids, generate
from kvilt.model.loading import load_model, wrap
from kvilt.model.model import Model
from kvilt.model.placing import Run
from kvilt.plan import Plan, Segment
from kvilt.stores.store import Store
from kvilt.strategies.base import Strategy
from kvilt.types import Answer, Document, Encoding, Prompt, Usage

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
        self.prompts = Prompts(model, text, self.strategy, self.info, self.encoder)
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
        built = cast(Strategy, registry.build("strategy", strategy)) if isinstance(strategy, str) else strategy
        keep = cast(Store, registry.build("store", store)) if isinstance(store, str) else store
        return cls(loaded, TextFormat.of(tokenizer, system), built, keep, namespace, smaller)

    @classmethod
    def of(
        cls, hf: Any, tokenizer: Any, strategy: str = registry.DEFAULT, store: str = "disk", **options: Any
    ) -> Engine:
        """An engine over a transformers model and tokenizer of one's own; `options` as of `Engine`.

        Raises ModelError where the model cannot be served exactly."""
        model, text = wrap(hf, tokenizer), TextFormat.of(tokenizer, options.pop("system", None))
        built, keep = registry.build("strategy", strategy), registry.build("store", store)
        return cls(model, text, cast(Strategy, built), cast(Store, keep), **options)

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
        self.prompts.fetch([], {})
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
        clock, settings = Clock(), Settings.of(self.model.hf, sampling, self.text.tokenizer)

        def attempt(lost: dict[str, bool]) -> Answer:
            ready = self.prompts.ready(question, documents, allow_empty, max_new_tokens, clock, lost)
            room = self.prompts.room(ready.plan.end, max_new_tokens)
            if streamer is not None:
                streamer.put(torch.empty(0, dtype=torch.long))  # a reader who went away stops the work here
            with self.model.run(ready.plan, room) as computed:
                clock.lap("run")
                run, prompt = through(computed), torch.cat([s.tokens for s in ready.plan.segments])
                tokens = generate(run, prompt, room, settings, clock.mark_first, streamer)
                clock.lap("decode")
                usage = self._usage(ready, run, clock, len(tokens), sum(lost.values()))
            return Answer(self.text.decode(tokens), tokens, usage, self.label, run.logits.cpu())

        return self._until_sound(attempt)

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
        count, forced = len(continuation), torch.tensor(list(continuation[:-1]), dtype=torch.long)

        def attempt(lost: dict[str, bool]) -> Tensor:
            plan = self.prompts.ready(question, documents, allow_empty, count, Clock(), lost, least=count).plan
            self.prompts.room(plan.end, count, least=count)
            added = (Segment(forced, plan.end, name="answer"),) if len(forced) else ()
            return self.model.score(replace(plan, segments=(*plan.segments, *added)), count)

        return self._until_sound(attempt)

    def planned(self, prompt: Prompt) -> Plan:
        """The strategy's plan of a prompt, charged with what its probe passes have cost."""
        return self.prompts.planned(prompt)

    def plan(self, question: str, documents: Sequence[Any]) -> Plan:
        """The plan of a prompt, with its caches fetched or made."""
        return self.prompts.ready(question, documents, False, 1, Clock(), ()).plan

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
