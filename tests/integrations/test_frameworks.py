"""The adapters of LangChain and LlamaIndex, with the real packages and a real engine."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path

import pytest
from langchain_core.documents import Document as Passage
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.base.response.schema import StreamingResponse
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import Document as IndexDocument
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from kvilt.engine.engine import Engine
from kvilt.errors import PromptError, UserError
from kvilt.integrations.langchain import ChatKvilt
from kvilt.integrations.llama_index import Encode, Kvilt, Synthesizer
from kvilt.types import Document

ROOT = Path(__file__).parents[2]
TEXTS = [f"The {word} keeps the key number {n}." for n, word in enumerate(("harbour", "cellar", "orchard"))]
QUESTION = "which key does the cellar keep?"


@pytest.fixture
def engine(model_dir: Path) -> Engine:
    """The tiny model over a fresh store."""
    return Engine.load(str(model_dir), "block", "memory")


def passages() -> list[Passage]:
    return [
        Passage(page_content=text, metadata={"title": "Keys", "source": f"{n}.txt"}) for n, text in enumerate(TEXTS)
    ]


def documents() -> list[Document]:
    return [Document(text, "Keys", f"{n}.txt") for n, text in enumerate(TEXTS)]


def test_langchain_answers_as_the_engine_does(engine: Engine) -> None:
    """Danger: the adapter asks another question than the caller, loses titles, or encodes what is stored already."""
    chat = ChatKvilt(engine=engine, max_tokens=6)
    chat.encode(passages())
    answer = chat.invoke(QUESTION, documents=passages()[::-1])
    wanted = engine.answer(QUESTION, documents()[::-1], max_new_tokens=6)
    assert answer.text == wanted.text
    assert answer.response_metadata["usage"]["misses"] == 0
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_token_details"]["cache_read"] == wanted.usage.reused_tokens
    assert answer.usage_metadata["output_tokens"] == wanted.usage.generated_tokens


def test_langchain_streams_binds_and_chains(engine: Engine) -> None:
    """Danger: the pieces are not the answer, or documents are lost on the way through a chain."""
    chat = ChatKvilt(engine=engine, max_tokens=6)
    whole = chat.invoke(QUESTION, documents=passages())
    pieces = list(chat.stream(QUESTION, documents=passages()))
    assert "".join(p.text for p in pieces) == whole.text
    assert [p.usage_metadata for p in pieces if p.usage_metadata][-1]["output_tokens"] == 6  # type: ignore[index]
    assert chat.bind(documents=passages()).invoke(QUESTION).text == whole.text
    chain = chat.over(RunnableLambda(lambda question: passages() if question == QUESTION else []))
    assert chain.invoke(QUESTION).text == whole.text
    assert asyncio.run(chain.ainvoke(QUESTION)).text == whole.text


def test_langchain_histories_and_what_it_cannot_do(engine: Engine) -> None:
    """Danger: earlier turns or the system text are dropped in silence, and so are tools and unknown options."""
    chat = ChatKvilt(engine=engine, max_tokens=3)
    turns = [SystemMessage("Be brief."), HumanMessage("which?"), AIMessage("none"), HumanMessage(QUESTION)]
    long = chat.invoke(turns, documents=passages()).usage_metadata
    short = chat.invoke([turns[0], turns[-1]], documents=passages()).usage_metadata
    assert long is not None
    assert short is not None
    assert long["input_tokens"] > short["input_tokens"] + len("which?none")
    for wrong, message in (
        ([*turns, AIMessage("x")], "ends with what the user says"),
        ([ToolMessage("x", tool_call_id="1"), *turns], "messages of the type 'tool'"),
    ):
        with pytest.raises(PromptError, match=message):
            chat.invoke(wrong, documents=passages())
    with pytest.raises(PromptError, match="knows no tools"):
        chat.invoke(QUESTION, documents=passages(), tools=[1])
    for given, message in (
        ({}, "give a model, an engine or the base_url"),
        ({"engine": engine, "strategy": "full"}, "it has a strategy and a store"),
        ({"base_url": "http://127.0.0.1:1/v1", "store": "memory"}, "a store of its own"),
    ):
        with pytest.raises(UserError, match=message):
            ChatKvilt(**given)


def test_llama_index_answers_as_the_engine_does(engine: Engine) -> None:
    """Danger: LlamaIndex is told another answer than everybody else."""
    llm = Kvilt(engine=engine, max_tokens=6)
    wanted = engine.answer(QUESTION, documents(), max_new_tokens=6)
    assert llm.complete(QUESTION, documents=documents()).text == wanted.text
    *_, last = llm.stream_complete(QUESTION, documents=documents())
    assert last.text == wanted.text
    assert last.raw["usage"]["misses"] == 0
    asked = [ChatMessage(role="user", content=QUESTION)]
    assert llm.chat(asked, documents=documents()).message.content == wanted.text
    assert "".join(c.delta or "" for c in llm.stream_chat(asked, documents=documents())) == wanted.text
    assert llm.metadata.context_window == engine.model.context_length
    with pytest.raises(PromptError, match="knows no tools"):
        llm.complete(QUESTION, tools=[])


class Fixed(BaseRetriever):
    """Finds the same nodes for every question."""

    def __init__(self, nodes: list[TextNode]) -> None:
        super().__init__()
        self.nodes = nodes

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=node, score=1.0) for node in self.nodes]


def test_llama_index_finds_what_its_pipeline_encoded(engine: Engine) -> None:
    """Danger: nodes are encoded in one form and asked in another, so nothing is ever reused."""
    llm = Kvilt(engine=engine, max_tokens=4)
    given = [IndexDocument(text=text, metadata={"source": f"{n}.txt"}) for n, text in enumerate(TEXTS)]
    nodes = IngestionPipeline(transformations=[SentenceSplitter(), Encode(llm)]).run(documents=given)
    before = engine.store.stats().entries
    assert before == len(TEXTS) + 1  # and the system text
    found = Fixed(nodes[::-1])  # type: ignore[arg-type]
    response = RetrieverQueryEngine(found, Synthesizer(llm)).query(QUESTION)
    assert engine.store.stats().entries == before
    assert len(response.source_nodes) == len(TEXTS)
    streamed = RetrieverQueryEngine(found, Synthesizer(llm, streaming=True)).query(QUESTION)
    assert isinstance(streamed, StreamingResponse)
    assert "".join(streamed.response_gen) == str(response)


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Danger: the first program that a user of LangChain copies does not work, or encodes everything twice."""
    program = runpy.run_path(str(ROOT / "examples" / "rag_bm25.py"), run_name="example")
    program["main"](
        "builtin", ["Where is the Eiffel Tower?", "Who lives in the sea?"], f"disk:path={tmp_path / 'store'}"
    )
    assert capsys.readouterr().out.count("4 of 4 passages reused") == 2
