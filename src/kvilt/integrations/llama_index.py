"""LlamaIndex: a language model, a synthesizer that answers from nodes' caches, and a transformation that makes them.

llm = Kvilt(model="smollm2")                                       # or base_url="http://127.0.0.1:8000/v1"
nodes = IngestionPipeline(transformations=[SentenceSplitter(), Encode(llm)]).run(documents=documents)
RetrieverQueryEngine(retriever, Synthesizer(llm)).query("Who wrote it?")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvilt import registry
from kvilt.errors import MissingExtra, PromptError
from kvilt.integrations.doors import Door, Reply, door
from kvilt.types import Document

try:
    from llama_index.core.base.llms.types import (
        ChatMessage,
        ChatResponse,
        ChatResponseGen,
        CompletionResponse,
        CompletionResponseGen,
        LLMMetadata,
    )
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
    from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
    from llama_index.core.llms.custom import CustomLLM
    from llama_index.core.response_synthesizers import BaseSynthesizer
    from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
except ImportError as error:
    raise MissingExtra("llama-index-core", "llama-index") from error


class Kvilt(CustomLLM):
    """A language model with documents: give them to `complete` and `chat` as `documents=`.

    One of `model` (loaded here, with a strategy and a store), `engine` (a `kvilt.Engine`) or `base_url` (a server)."""

    model: str = ""
    engine: Any = Field(default=None, exclude=True)
    base_url: str | None = None
    api_key: str = Field(default="", repr=False, exclude=True)
    strategy: str = registry.DEFAULT
    store: str = "disk"
    max_tokens: int = 128
    temperature: float | None = None
    _door: Door = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Open the way to the model."""
        super().model_post_init(context)
        given = {name: getattr(self, name) for name in ("strategy", "store") if name in self.model_fields_set}
        self._door = door(self.engine, self.base_url, self.model, self.api_key, given)

    @classmethod
    def class_name(cls) -> str:
        return "Kvilt"

    @property
    def metadata(self) -> LLMMetadata:
        named = self.model or self.base_url or "kvilt"
        return LLMMetadata(
            context_window=self._door.context, num_output=self.max_tokens, is_chat_model=True, model_name=named
        )

    def encode(self, documents: Sequence[BaseNode | Document | str]) -> None:
        """Encode documents that are not stored yet, ahead of any question."""
        self._door.encode(list(map(document_of, documents)))

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        *_, last = self._answer([("user", prompt)], kwargs)
        return last

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return self._answer([("user", prompt)], kwargs)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        *_, last = self._chat(messages, kwargs)
        return last

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return self._chat(messages, kwargs)

    def _chat(self, messages: Sequence[ChatMessage], more: dict[str, Any]) -> ChatResponseGen:
        for made in self._answer([(m.role.value, m.content or "") for m in messages], more):
            message = ChatMessage(role="assistant", content=made.text)
            yield ChatResponse(message=message, delta=made.delta, raw=made.raw)

    def _answer(self, chat: list[tuple[str, str]], more: dict[str, Any]) -> CompletionResponseGen:
        """The text so far with every piece; the last has the usage in `raw`."""
        documents = list(map(document_of, more.pop("documents", ())))
        settings = {name: more.pop(name, getattr(self, name)) for name in ("max_tokens", "temperature")}
        settings |= {name: more.pop(name) for name in ("top_p", "seed", "stop") if name in more}
        if more:
            raise PromptError(f"Kvilt's model knows no {', '.join(more)}.")
        text = ""
        for piece in self._door.stream(chat, documents, **settings):
            if isinstance(piece, Reply):
                yield CompletionResponse(text=piece.text, delta="", raw=piece.usage)
            else:
                text += piece
                yield CompletionResponse(text=text, delta=piece)


class Synthesizer(BaseSynthesizer):
    """Answers a question from nodes as documents: each is reused from its cache, in whatever order they were found."""

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        pass

    def get_response(self, query_str: str, text_chunks: Sequence[str], **kwargs: Any) -> Any:
        if self._streaming:
            given = self._llm.stream_complete(query_str, documents=text_chunks, **kwargs)
            return (piece.delta or "" for piece in given)
        return self._llm.complete(query_str, documents=text_chunks, **kwargs).text

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **kwargs: Any) -> Any:
        return self.get_response(query_str, text_chunks, **kwargs)


class Encode(TransformComponent):
    """The last step of an ingestion: encodes every node, so that questions find its cache."""

    llm: Kvilt

    def __init__(self, llm: Kvilt) -> None:
        super().__init__(llm=llm)

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        self.llm.encode(nodes)
        return nodes


def document_of(node: BaseNode | Document | str) -> Document:
    """A node as a Kvilt document: what a synthesizer shows of it, metadata included."""
    if isinstance(node, BaseNode):
        return Document(node.get_content(metadata_mode=MetadataMode.LLM), None, node.node_id)
    return node if isinstance(node, Document) else Document(node)
