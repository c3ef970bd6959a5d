"""A real server, asked as its users ask it: by the openai client as it comes."""

from __future__ import annotations

import openai
import pytest

from kvilt.engine.engine import Engine
from serve_kit import Server, events, said

DOCUMENTS = [
    {"title": "Ada", "text": "Ada Lorn was born in Tavik."},
    "Orsa is a town by the Sel.",
    "Brint makes clocks.",
]
QUESTION = "Where was Ada Lorn born?"
NEW = 12


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    """The client as it comes."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_answers_are_those_of_the_engine(client: openai.OpenAI, engine: Engine) -> None:
    """Danger: over HTTP another prompt is answered than in process, or what was reused is not told."""
    for documents in (DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS[:1]):
        wanted = engine.answer(QUESTION, documents, max_new_tokens=NEW)
        told = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=NEW,
            extra_body={"documents": documents},
        )
        assert told.choices[0].message.content == wanted.text
        assert told.usage is not None
        assert told.usage.prompt_tokens_details is not None
        cached, block = told.usage.prompt_tokens_details.cached_tokens, told.kvilt  # type: ignore[attr-defined]
        assert cached == block["reused_tokens"] > 0
        assert told.usage.prompt_tokens == block["reused_tokens"] + block["computed_tokens"]
        assert block["hits"] + block["misses"] == len(documents)
        assert [d["title"] for d in block["documents"]] == ["" if isinstance(d, str) else d["title"] for d in documents]


def test_a_stream_says_the_same(server: Server) -> None:
    """Danger: a stream gives another text than the answer, loses its last piece, or no account of what was reused."""
    whole = server.chat(QUESTION, DOCUMENTS).json
    reply = server.chat(QUESTION, DOCUMENTS, stream=True, stream_options={"include_usage": True})
    chunks = events(reply.body)
    assert said(chunks) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-2]["kvilt"]["hits"] == len(DOCUMENTS)
    assert reply.body.endswith(b"data: [DONE]\n\n")
    assert "prefill;dur=" in reply.headers["server-timing"]
    assert int(reply.headers["x-kvilt-reused"]) == chunks[-2]["kvilt"]["reused_tokens"]
