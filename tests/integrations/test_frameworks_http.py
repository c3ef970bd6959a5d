"""LangChain and LlamaIndex over HTTP: Kvilt's adapters, and the frameworks' own clients unmodified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.documents import Document as Passage
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.openai_like import OpenAILike

from kvilt.integrations.langchain import ChatKvilt
from kvilt.integrations.llama_index import Encode, Kvilt, Synthesizer
from serve_kit import Server, serving

TEXTS = ("Ada Lorn was born in Tavik. Ada Lorn works for Tavik Press.", "Tavik Press is based in Orsa.")
QUESTION, ANSWER = "Where was Ada Lorn born?", "Ada Lorn was born in Tavik."
DOCUMENTS = [{"text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`kvilt serve builtin`."""
    with serving("builtin", "--store", "memory", log=tmp_path_factory.mktemp("frameworks") / "log") as made:
        yield made


@pytest.fixture
def url(server: Server) -> str:
    """Its address, as clients of OpenAI want it."""
    return f"{server.url}/v1"


def test_langchain_over_http(url: str, server: Server) -> None:
    """Danger: over HTTP the adapter forgets the documents, encodes them in every request, or tells no usage."""
    chat = ChatKvilt(base_url=url, max_tokens=16)
    passages = [Passage(page_content=text) for text in TEXTS]
    chat.encode(passages)
    assert server.metric("kvilt_encoded_documents_total") == 2
    answer = chat.invoke(QUESTION, documents=passages[::-1])
    assert answer.text == ANSWER
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_token_details"]["cache_read"] > 20
    assert server.metric('kvilt_documents_total{how="miss"}') == 0
    assert "".join(piece.text for piece in chat.stream(QUESTION, documents=passages)) == ANSWER
    full = ChatKvilt(base_url=url, strategy="full", max_tokens=16).invoke(QUESTION, documents=passages)
    assert full.response_metadata["strategy"] == "full"
    assert (answer.response_metadata["usage"]["hits"], full.response_metadata["usage"]["hits"]) == (2, 0)


def test_llama_index_over_http(url: str, server: Server) -> None:
    """Danger: nodes that the pipeline encoded on the server are not those that the synthesizer asks about."""
    llm = Kvilt(base_url=url, max_tokens=16)
    nodes = Encode(llm)([TextNode(text=text, metadata={"page": n}) for n, text in enumerate(TEXTS)])
    before = server.metric('kvilt_documents_total{how="miss"}')
    synthesizer: BaseSynthesizer = Synthesizer(llm)
    response = synthesizer.synthesize(QUESTION, [NodeWithScore(node=node) for node in nodes])
    assert "Tavik" in str(response)
    assert llm.metadata.context_window == 2048
    assert server.metric('kvilt_documents_total{how="miss"}') == before


def test_langchains_own_client(url: str) -> None:
    """Danger: whoever has ChatOpenAI already must change more than the address and the documents."""
    chat = ChatOpenAI(base_url=url, api_key="none", model="builtin", max_tokens=16, extra_body={"documents": DOCUMENTS})  # type: ignore[call-arg, arg-type]
    answer = chat.invoke([SystemMessage("Answer the question from the documents."), HumanMessage(QUESTION)])
    assert answer.text == ANSWER
    assert "".join(piece.text for piece in chat.stream(QUESTION)) == ANSWER


def test_llama_indexs_own_client(url: str, tmp_path: Path) -> None:
    """Danger: OpenAILike gets bodies or streams that it cannot read."""
    extra = {"extra_body": {"documents": DOCUMENTS}}
    llm = OpenAILike(
        model="builtin", api_base=url, api_key="none", is_chat_model=True, max_tokens=16, additional_kwargs=extra
    )
    asked = [ChatMessage(role="user", content=QUESTION)]
    assert llm.chat(asked).message.content == ANSWER
    *_, last = llm.stream_chat(asked)
    assert last.message.content == ANSWER
