"""Two ways to a model for the frameworks' adapters: an engine in this process, or a server by its address."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kvilt.errors import MissingExtra, PromptError, UserError
from kvilt.types import Answer, Document

if TYPE_CHECKING:
    from kvilt.engine.engine import Engine

Chat = Sequence[tuple[str, str]]  # (role, text), the question last
HELD = 4096  # tokens of a context, where a server does not say


@dataclass(frozen=True)
class Reply:
    """An answer's end: its whole text, how many tokens went in (of them from caches) and came out, and Kvilt's own usage."""

    text: str
    prompt: int
    reused: int
    generated: int
    usage: dict[str, Any] = field(default_factory=dict)


class Door(Protocol):
    """What an adapter asks for."""

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have."""

    def encode(self, documents: Sequence[Document]) -> None:
        """Encode what is not stored yet, ahead of any question."""

    def stream(self, chat: Chat, documents: Sequence[Document], **settings: Any) -> Iterator[str | Reply]:
        """Pieces of the answer, and the Reply last; settings are `max_tokens`, `temperature`, `top_p`, `seed`, `stop`."""


@dataclass(frozen=True)
class InProcess:
    """An engine in this process."""

    engine: Engine

    @property
    def context(self) -> int:
        """Of the model."""
        return self.engine.model.context_length

    def encode(self, documents: Sequence[Document]) -> None:
        """Into the engine's store."""
        self.engine.encode(documents)

    def stream(self, chat: Chat, documents: Sequence[Document], **settings: Any) -> Iterator[str | Reply]:
        """From the engine; one that is not read to its end stops."""
        if not chat or chat[-1][0] != "user":
            raise PromptError("a chat ends with what the user says.")
        told = any(role == "system" for role, _ in chat)
        system = None if told or documents else ""  # a plain chat says nothing that nobody said
        messages = [{"role": role, "content": text} for role, text in chat]
        given = self.engine.stream(messages, documents, system=system, allow_empty=True, **_sampling(settings))
        for piece in given:
            yield _reply(piece) if isinstance(piece, Answer) else piece


@dataclass(frozen=True)
class OverHTTP:
    """A server: `kvilt serve`, or vLLM with Kvilt's plugin."""

    base_url: str
    model: str = ""
    api_key: str = ""
    strategy: str = ""  # another one than the server's own

    @property
    def context(self) -> int:
        """Of the server's model, as far as it tells."""
        told = _served(self.base_url, self.api_key)
        return (told.get("kvilt") or {}).get("context_length") or told.get("max_model_len") or HELD

    def encode(self, documents: Sequence[Document]) -> None:
        """Into the server's store."""
        body = {"documents": list(map(_written, documents)), "wait": True, **self._ours()}
        _client(self.base_url, self.api_key).post("/documents", body=body, cast_to=object)

    def stream(self, chat: Chat, documents: Sequence[Document], **settings: Any) -> Iterator[str | Reply]:
        """From the server; one that is not read to its end is hung up on."""
        text, usage, receipt = "", None, dict[str, Any]()
        given = _client(self.base_url, self.api_key).chat.completions.create(
            model=self.model or _served(self.base_url, self.api_key)["id"],
            messages=[{"role": role, "content": said} for role, said in chat],
            stream=True,
            stream_options={"include_usage": True},
            extra_body=({"documents": list(map(_written, documents))} if documents else {}) | self._ours(),
            **settings,
        )
        with given:
            for chunk in given:
                usage, receipt = chunk.usage or usage, (chunk.model_extra or {}).get("kvilt") or receipt
                for piece in (choice.delta.content for choice in chunk.choices if choice.delta.content):
                    text += piece
                    yield piece
        told = usage.model_dump() if usage else {}
        reused = (told.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        tokens = told.get("prompt_tokens", 0), reused, told.get("completion_tokens", 0)
        yield Reply(text, *tokens, {"strategy": receipt.get("strategy", self.strategy), "usage": receipt or told})

    def _ours(self) -> dict[str, Any]:
        return {"kvilt": {"strategy": self.strategy}} if self.strategy else {}


@functools.cache
def _client(base_url: str, api_key: str) -> Any:
    """One client for a server: it keeps connections, and may be used by many threads."""
    try:
        from openai import OpenAI
    except ImportError as error:
        raise MissingExtra("openai", "langchain") from error
    return OpenAI(base_url=base_url, api_key=api_key or "none")


@functools.cache
def _served(base_url: str, api_key: str) -> dict[str, Any]:
    """The server's model, as it describes it."""
    return dict(next(iter(_client(base_url, api_key).models.list())).model_dump())


def door(engine: Engine | None, base_url: str | None, model: str, api_key: str, given: Mapping[str, Any]) -> Door:
    """The way that is given: an engine, a server's address, or a model to be loaded; `given` is a strategy and a store.

    Raises UserError for what contradicts itself: an engine has a strategy and a store, and a server a store."""
    if engine is not None and (base_url or given):
        raise UserError(f"give an engine alone: it has {'no base_url' if base_url else 'a strategy and a store'}.")
    if base_url:
        if "store" in given:
            raise UserError("the server has a store of its own: give no store with a base_url.")
        return OverHTTP(base_url, model, api_key, given.get("strategy", ""))
    if engine is None and not model:
        raise UserError("give a model, an engine or the base_url of a server.")
    if engine is None:
        from kvilt.engine.engine import Engine

        engine = Engine.load(model, **given)
    return InProcess(engine)


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under the names of `Engine.answer`; greedy where neither temperature nor top_p is given."""
    names = {"max_tokens": "max_new_tokens", "stop": "stop_strings"}
    return {names.get(name, name): value for name, value in settings.items() if value is not None}


def _reply(answer: Answer) -> Reply:
    u = answer.usage
    prompt = u.reused_tokens + u.computed_tokens
    return Reply(answer.text, prompt, u.reused_tokens, u.generated_tokens, answer.as_dict())


def _written(document: Document) -> dict[str, str]:
    fields = {"text": document.text, "title": document.title, "id": document.id}
    return {name: value for name, value in fields.items() if value}
