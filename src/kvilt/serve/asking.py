"""A request as the engine is asked it, and the engines of one model: one for every namespace, strategy and kind of prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvilt import registry
from kvilt.engine.documents import document_of
from kvilt.engine.engine import Engine
from kvilt.engine.prompts import opened
from kvilt.engine.text import TextFormat
from kvilt.errors import KviltError, PromptError
from kvilt.serve.kept import Kept, Placing
from kvilt.serve.receipts import First, Telling, cut, receipt
from kvilt.serve.wire import Invalid
from kvilt.serve.worker import Job
from kvilt.strategies.base import Strategy
from kvilt.types import Answer, CacheKey, Document

ENGINES = 64  # tenants and strategies whose engines are kept
DIGITS = frozenset("0123456789abcdef")


class Unknown(KviltError):
    """Documents named by ids that are not stored, in this namespace, for this model."""

    def __init__(self, ids: Sequence[str]) -> None:
        super().__init__(f"{len(ids)} documents are not stored: send their texts, or add them by POST /v1/documents.")
        self.ids = tuple(ids)


class Raw(TextFormat):
    """Prompts without a template, as /v1/completions reads them; documents stand in front."""

    def system_ids(self) -> Tensor:
        """What the tokenizer puts in front of every text, (tokens,)."""
        return torch.tensor(self.tokenizer.encode(""), dtype=torch.long)

    def question_ids(self, question: str) -> Tensor:
        """The prompt's ids, markers in it being control, (tokens,). Raises PromptError."""
        ids = self.tokenizer.encode(question, add_special_tokens=False)
        if not ids:
            raise PromptError("the prompt is empty.")
        return torch.tensor(ids, dtype=torch.long)


class Engines:
    """The engines of one model: one for every namespace, strategy and way to write prompts. Used by the worker."""

    def __init__(self, engine: Engine, also: Sequence[str] = (), keep: int = 1 << 30) -> None:
        self.base, self.kept = engine, Kept(engine.model, keep)
        specs = [str(engine.strategy), *also, "full"]
        built: list[Strategy] = [engine.strategy, *(registry.build("strategy", spec) for spec in specs[1:])]
        self.strategies = dict(zip(specs, built, strict=True)) | {str(strategy): strategy for strategy in built}
        self._made: OrderedDict[tuple[str, str, bool], Engine] = OrderedDict()

    def check(self, strategy: str | None) -> str:
        """The strategy's own name. Raises Invalid for one that this server was not started with."""
        if strategy is None:
            return self.base.label
        if strategy not in self.strategies:
            known = ", ".join(dict.fromkeys(map(str, self.strategies.values())))
            raise Invalid(f"strategy {strategy!r:.80} is not served here. Served: {known}.", "kvilt.strategy")
        return str(self.strategies[strategy])

    def of(self, namespace: str, strategy: str, raw: bool = False) -> Engine:
        """An engine; `raw` for prompts without a template. Raises UserError for what cannot be a namespace."""
        key = (namespace, strategy, raw)
        if key not in self._made:
            b = self.base
            text = Raw(b.text.tokenizer, b.text.vocabulary, None, "") if raw else b.text
            parts = (self.strategies[strategy], b.store, namespace, b.compression, b.flights)
            self._made[key] = b if key == (b.namespace, b.label, False) else Engine(b.model, text, *parts)
            while len(self._made) > ENGINES:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]


def is_digest(value: object) -> bool:
    """Whether it can be the key of a stored document."""
    return isinstance(value, str) and len(value) == 64 and DIGITS.issuperset(value)


def readable(engine: Engine, fields: Mapping[str, str]) -> bool:
    """Whether a stored document is this model's and tokenizer's."""
    own = engine.model.key(torch.zeros(0, dtype=torch.long), engine.encoder.encoding)
    same = [fields.get(name) == getattr(own, name) for name in ("model", "tokenizer", "rope")]
    return all(same) and fields.keys() == vars(own).keys()


@dataclass
class Question:
    """What a request asks, whatever route it came by."""

    messages: str | list[dict[str, Any]]  # a text is a prompt without template
    documents: list[Any] | None
    namespace: str
    strategy: str
    settings: dict[str, Any] = field(default_factory=dict)  # of Engine.answer
    stops: list[str] = field(default_factory=list)
    encode: bool = True

    def ready(self, engines: Engines) -> tuple[Engine, Any, list[Document]]:
        """The engine, the question or chat without its system text, and the documents. Raises Unknown, UserError."""
        engine = engines.of(self.namespace, self.strategy, isinstance(self.messages, str))
        if isinstance(self.messages, str):
            return engine, self.messages, self._stored_or_not(engine, self._documents(engine, self.documents or [], ""))
        chat = [
            {**m, "content": self._content(engine, m["content"], f"messages[{n}]")} for n, m in enumerate(self.messages)
        ]
        documents = self._documents(engine, self.documents or [], "documents")
        some = bool(documents) or any(isinstance(part, Document) for m in chat for part in m["content"])
        system, rest = opened(chat)
        if system is not None or not some:  # a plain chat says nothing that nobody said
            engine = engine.with_system(system or "")
        if not isinstance(rest, str):
            rest = [(role, self._stored_or_not(engine, said)) for role, said in rest]
        return engine, rest, self._stored_or_not(engine, documents)

    def _content(self, engine: Engine, content: Any, where: str) -> list[str | Document]:
        """The texts and documents of a message."""
        if isinstance(content, str) or content is None:
            return [content or ""]
        made: list[str | Document] = []
        for number, part in enumerate(content):
            place, kind = f"{where}.content[{number}]", part.get("type")
            if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
                made.append(part["text"])
            elif kind == "document":
                made += self._documents(engine, [{k: v for k, v in part.items() if k != "type"}], place)
            else:
                raise Invalid(f"{place}: {kind!r:.40} is not served: messages consist of texts and documents.", place)
        return made

    def _documents(self, engine: Engine, values: Sequence[Any], where: str) -> list[Document]:
        named = [v["id"] for v in values if isinstance(v, Mapping) and set(v) == {"id"}]
        stored = {digest: found for digest in named if is_digest(digest) and (found := self._by_id(engine, digest))}
        if missing := [str(digest) for digest in named if not isinstance(digest, str) or digest not in stored]:
            raise Unknown(missing)
        return [self._document(v, stored, f"{where}[{n}]") for n, v in enumerate(values)]

    def _document(self, value: Any, stored: Mapping[str, Document], where: str) -> Document:
        if isinstance(value, Mapping) and set(value) == {"id"}:
            return stored[value["id"]]
        if isinstance(value, Mapping) and isinstance(source := value.get("source"), Mapping):  # Anthropic's blocks
            value = {"text": source.get("data"), "title": value.get("title"), "id": value.get("id")}
        kept = value.get("store", True) if isinstance(value, Mapping) else True
        if not isinstance(kept, bool):
            raise Invalid(f"{where}.store must be true or false.", where)
        return replace(document_of(value, where), store=kept)

    def _by_id(self, engine: Engine, digest: str) -> Document | None:
        """A stored document as its tokens."""
        entry = engine.store.entry(digest)
        if entry is None or entry.namespace != self.namespace or not readable(engine, entry.fields):
            return None
        (cache,) = engine.store.get_many([CacheKey(**entry.fields)], counted=False)
        if cache is None:
            return None
        ids, around = cache.own_tokens, engine.encoder.encoding
        if around.keep and cache.key.encoding == around.label and len(ids) == cache.length:
            ids = ids[len(around.before) : len(ids) - len(around.after)]
        return Document("", entry.title or None, digest, ids=tuple(ids.tolist()))

    def _stored_or_not(self, engine: Engine, parts: Sequence[Any]) -> list[Any]:
        """The same; documents that are missing are computed in the prompt if they are not to be encoded."""
        if self.encode:
            return [*parts]
        keys = {n: engine.encoder.items([p])[0].key.digest for n, p in enumerate(parts) if isinstance(p, Document)}
        there = engine.store.contains(keys.values())
        return [replace(p, store=False) if n in keys and keys[n] not in there else p for n, p in enumerate(parts)]


@dataclass
class Done:
    """An answer, its text without what stops it, why it ended, and what it took."""

    answer: Answer
    text: str
    reason: str
    receipt: dict[str, Any]

    @property
    def usage(self) -> tuple[int, int, int]:
        """Tokens of the prompt, those of it that were reused, and tokens of the answer."""
        u = self.answer.usage
        return u.reused_tokens + u.computed_tokens, u.reused_tokens, u.generated_tokens


def answer(engines: Engines, question: Question, job: Job) -> Done:
    """Answer a question; the job hears First, and the text in pieces."""
    engine, chat, documents = question.ready(engines)
    placing = Placing(engines.kept, (engine.label, question.namespace, engine.text.system))
    first = First(placing, {"queue": job.waited})
    told = Telling(job, engine.text.tokenizer, question.stops, first)
    settings = question.settings | ({"stop_strings": question.stops} if question.stops else {})
    made = engine.answer(chat, documents, streamer=told, placing=placing, allow_empty=True, **settings)
    text, stopped = cut(made.text, question.stops)
    ends = getattr(engine.model.hf.generation_config, "eos_token_id", None)
    ended = stopped or made.tokens[-1] in (ends if isinstance(ends, list) else [ends])
    return Done(made, text, "stop" if ended else "length", receipt(made, placing, job.waited))
