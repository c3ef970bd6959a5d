"""LangChain: a chat model that takes documents, in this process or over HTTP.

chat = ChatKvilt(model="smollm2", strategy="block:sink=system")    # or base_url="http://127.0.0.1:8000/v1"
chat.encode(documents)                                             # of a loader or a retriever, once
chat.invoke("Who wrote it?", documents=retriever.invoke("Who wrote it?"))
chat.over(retriever).invoke("Who wrote it?")                       # the same as a Runnable
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvilt import registry
from kvilt.errors import MissingExtra, PromptError
from kvilt.integrations.doors import Door, Reply, door
from kvilt.types import Document

try:
    from langchain_core.documents import Document as Passage
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.runnables import Runnable, RunnableLambda
    from pydantic import Field, PrivateAttr
except ImportError as error:
    raise MissingExtra("langchain-core", "langchain") from error

ROLES = {"human": "user", "ai": "assistant", "system": "system"}


class ChatKvilt(BaseChatModel):
    """A chat model with documents: give them to `invoke`, `stream` or `bind` as `documents=`.

    One of `model` (loaded here, with a strategy and a store), `engine` (a `kvilt.Engine`) or `base_url` (a server)."""

    model: str = ""
    engine: Any = Field(default=None, exclude=True)
    base_url: str | None = None
    api_key: str = Field(default="", repr=False, exclude=True)
    strategy: str = registry.DEFAULT
    store: str = "disk"
    max_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    _door: Door = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Open the way to the model."""
        super().model_post_init(context)
        given = {name: getattr(self, name) for name in ("strategy", "store") if name in self.model_fields_set}
        self._door = door(self.engine, self.base_url, self.model, self.api_key, given)

    def encode(self, documents: Sequence[Passage | Document | str]) -> None:
        """Encode documents that are not stored yet, ahead of any question."""
        self._door.encode(list(map(document_of, documents)))

    def over(self, retriever: Runnable[str, list[Passage]]) -> Runnable[str, AIMessage]:
        """Answers questions from what a retriever finds for them."""

        def answer(question: str) -> AIMessage:
            return self.invoke(question, documents=retriever.invoke(question))

        return RunnableLambda(answer, name="answer from documents")

    @property
    def _llm_type(self) -> str:
        return "kvilt"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model or self.base_url, "strategy": self.strategy}

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        *_, reply = self._pieces(messages, stop, kwargs)
        message = AIMessage(reply.text, usage_metadata=_usage(reply), response_metadata=reply.usage)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        for piece in self._pieces(messages, stop, kwargs):
            if isinstance(piece, str):
                chunk = ChatGenerationChunk(message=AIMessageChunk(piece))
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            else:
                last = AIMessageChunk("", usage_metadata=_usage(piece), response_metadata=piece.usage)
                yield ChatGenerationChunk(message=last)

    def _pieces(self, messages: list[BaseMessage], stop: list[str] | None, more: dict[str, Any]) -> Iterator[Any]:
        documents = list(map(document_of, more.pop("documents", ())))
        settings = {
            name: more.pop(name, getattr(self, name)) for name in ("max_tokens", "temperature", "top_p", "seed")
        }
        if more := {name: value for name, value in more.items() if value is not None}:
            raise PromptError(f"ChatKvilt knows no {', '.join(more)}.")
        return self._door.stream(list(map(_said, messages)), documents, **settings, stop=stop)


def document_of(passage: Passage | Document | str) -> Document:
    """A document of LangChain's as Kvilt's: the title is its metadata's, the id its own or its source."""
    if not isinstance(passage, Passage):
        return passage if isinstance(passage, Document) else Document(passage)
    title, name = passage.metadata.get("title"), passage.id or passage.metadata.get("source")
    return Document(passage.page_content, str(title) if title else None, str(name) if name else None)


def _said(message: BaseMessage) -> tuple[str, str]:
    if message.type not in ROLES:
        raise PromptError(f"ChatKvilt answers chats of people, not messages of the type {message.type!r}.")
    return ROLES[message.type], str(message.text)


def _usage(reply: Reply) -> Any:
    return {
        "input_tokens": reply.prompt,
        "output_tokens": reply.generated,
        "total_tokens": reply.prompt + reply.generated,
        "input_token_details": {"cache_read": reply.reused},
    }
