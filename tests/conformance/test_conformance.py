"""About forty requests that mean the same at both doors. Answers are compared with those of the engine in this process."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from conformance_kit import DOCUMENTS, NEW, OTHER_SYSTEM, QUESTION, SAID, TEXTS, Door, eventually, receipt, text
from kvilt.engine.engine import Engine

UNKNOWN = "ab" * 32
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
ORDERS = {"in order": [0, 1, 2, 3], "reversed": [3, 2, 1, 0], "some": [2, 0], "one": [1], "one twice": [1, 0, 1]}
TURNS = [*SAID, {"role": "assistant", "content": "In Tavik."}, {"role": "user", "content": "When?"}]

REFUSED: dict[str, tuple[dict[str, Any], int]] = {
    "a document without text": ({"documents": [{"title": "no text"}]}, 400),
    "an empty document": ({"documents": [""]}, 400),
    "a number as text": ({"documents": [{"text": 5}]}, 400),
    "documents that are no list": ({"documents": 7}, 400),
    "a list as document": ({"documents": [["text"]]}, 400),
    "tools beside documents": ({"documents": ["a"], "tools": [TOOL]}, 400),
    "documents without a user": ({"documents": ["a"], "messages": [{"role": "assistant", "content": "x"}]}, 400),
    "an image beside documents": ({"documents": ["a"], "messages": IMAGE}, 400),
    "half a character": ({"documents": ["a \ud800 b"]}, 400),
    "a document longer than the context": ({"documents": ["x" * 9000]}, 400),
    "messages that are no list": ({"messages": "hello"}, 400),
    "messages left out": ({"messages": None}, 400),
    "another model": ({"model": "gpt-4o"}, 404),
    "too few tokens": ({"max_tokens": -1}, 400),
    "a wrong temperature": ({"temperature": -1}, 400),
    "an id that is not stored": ({"documents": [{"id": UNKNOWN}]}, 409),
    "an id that is a path": ({"documents": [{"id": "../../etc/passwd"}]}, 409),
}


def chosen(order: list[int]) -> tuple[list[Any], list[dict[str, Any]]]:
    return [DOCUMENTS[i] for i in order], [TEXTS[i] for i in order]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_documents_in_any_order(door: Door, engine: Engine, order: list[int]) -> None:
    """Danger: the same request is answered from other rows at one of the doors, or reuses nothing there."""
    documents, texts = chosen(order)
    answer = eventually(lambda: door.chat(texts), lambda a: receipt(a).get("hits") == len(order))
    assert text(answer) == engine.answer(QUESTION, documents, max_new_tokens=NEW).text.strip()
    assert answer.usage.prompt_tokens_details.cached_tokens > 0
    assert answer.usage.prompt_tokens_details.cached_tokens <= answer.usage.prompt_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_documents_as_strings(door: Door, engine: Engine) -> None:
    """Danger: a text is another document than {"text": ...}."""
    texts = [f"{d.title}\n{d.text}" for d in DOCUMENTS[:2]]
    assert text(door.chat(texts)) == text(door.chat([{"text": t} for t in texts]))
    assert text(door.chat(texts)) == engine.answer(QUESTION, DOCUMENTS[:2], max_new_tokens=NEW).text.strip()


def test_documents_by_id(door: Door, engine: Engine) -> None:
    """Danger: an id stands for another document at one of the doors."""
    ids = door.add(TEXTS)
    wanted = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=NEW).text.strip()
    assert ids == [i.key.digest for i in engine.encoder.items(DOCUMENTS)]
    assert text(door.chat([{"id": i} for i in ids])) == wanted
    assert text(door.chat([{"id": ids[0]}, TEXTS[1], {"id": ids[2]}, TEXTS[3]])) == wanted


def test_a_system_message(door: Door, engine: Engine) -> None:
    """Danger: a system message is lost, or documents encoded behind another are taken."""
    messages = [{"role": "system", "content": OTHER_SYSTEM}, *SAID]
    answer = eventually(lambda: door.chat(TEXTS, messages), lambda a: receipt(a).get("hits") == len(TEXTS))
    assert text(answer) == engine.answer(messages, DOCUMENTS, max_new_tokens=NEW).text.strip()


def test_a_conversation(door: Door, engine: Engine) -> None:
    """Danger: the second question loses the documents, or is asked without the first."""
    answer = door.chat(TEXTS, TURNS)
    assert receipt(answer)["hits"] == len(TEXTS)
    assert text(answer) == engine.answer(TURNS, DOCUMENTS, max_new_tokens=NEW).text.strip()


def test_content_in_parts(door: Door) -> None:
    """Danger: a message as a list of texts is another prompt than the message as one text."""
    halves = [{"type": "text", "text": QUESTION[:9]}, {"type": "text", "text": QUESTION[9:]}]
    whole = door.chat(TEXTS, [{"role": "user", "content": halves}])
    assert text(whole) == text(door.chat(TEXTS))


def test_a_chat_without_documents(door: Door, engine: Engine) -> None:
    """Danger: a plain chat is told something that nobody said."""
    wanted = engine.with_system("").answer(QUESTION, [], allow_empty=True, max_new_tokens=NEW)
    assert text(door.chat()) == wanted.text.strip()


def test_streams(door: Door) -> None:
    """Danger: a stream gives another text than the answer, or usage that nobody asked for."""
    whole = door.chat(TEXTS)
    chunks = list(door.chat(TEXTS, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip() == text(whole)
    assert {c.choices[0].finish_reason for c in chunks if c.choices} == {None, whole.choices[0].finish_reason}
    assert not [c for c in chunks if c.usage]
    counted = list(door.chat(TEXTS, stream=True, stream_options={"include_usage": True}))
    assert counted[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert counted[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert counted[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_lengths_and_reasons(door: Door) -> None:
    """Danger: an answer is longer than was asked for, or does not say that it was cut."""
    for name in ("max_tokens", "max_completion_tokens"):
        options: dict[str, Any] = {"max_tokens": openai.omit, name: 3}
        answer = door.chat(TEXTS, extra={"ignore_eos": True}, **options)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_stop_strings(door: Door) -> None:
    """Danger: what stops an answer stands in it, or the answer goes on."""
    longer: dict[str, Any] = {"max_tokens": 60, "extra": {"ignore_eos": True}}
    whole = text(door.chat(TEXTS, **longer))
    at = next(i for i in range(1, len(whole)) if "!" <= whole[i] <= "~" and whole.find(whole[i]) == i)
    for stop in (whole[at], [whole[at], "never said"]):
        answer = door.chat(TEXTS, stop=stop, **longer)
        assert (text(answer), answer.choices[0].finish_reason) == (whole[:at].strip(), "stop")
        chunks = list(door.chat(TEXTS, stop=stop, stream=True, **longer))
        said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert said.strip() == whole[:at].strip()


def test_seeds(door: Door) -> None:
    """Danger: a seed is ignored, or sampling is."""
    drawn = [text(door.chat(TEXTS, temperature=2, seed=n % 3)) for n in range(6)]
    assert drawn[:3] == drawn[3:]
    assert len(set(drawn)) > 1


def test_completions(door: Door) -> None:
    """Danger: a prompt without template is written into one."""
    made = door.client.completions.create(model="tiny", prompt="Ada Lorn was", max_tokens=5, temperature=0)
    assert made.usage.prompt_tokens == len("Ada Lorn was")  # a token is a byte
    assert made.usage.completion_tokens == 5 or made.choices[0].finish_reason == "stop"
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(
        door.client.completions.create(model="tiny", prompt="Ada Lorn was", max_tokens=5, temperature=0, **options)
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices).strip() == made.choices[0].text.strip()
    assert chunks[-1].usage.prompt_tokens == made.usage.prompt_tokens


def test_responses(door: Door) -> None:
    """Danger: the newer route answers something else than the older one."""
    made = door.client.responses.create(model="tiny", input=QUESTION, max_output_tokens=NEW, temperature=0)
    assert made.output_text.strip() == text(door.chat())
    assert made.usage.output_tokens <= NEW
    events = list(
        door.client.responses.create(model="tiny", input=QUESTION, max_output_tokens=NEW, temperature=0, stream=True)
    )
    assert (
        "".join(e.delta for e in events if e.type == "response.output_text.delta").strip() == made.output_text.strip()
    )
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    with pytest.raises(openai.APIStatusError) as error:
        door.client.responses.create(model="tiny", input=QUESTION, previous_response_id="resp_0")
    assert error.value.status_code in (400, 404)


def test_models_and_health(door: Door) -> None:
    """Danger: a client that looks which model there is finds none."""
    assert [m.id for m in door.client.models.list()] == ["tiny"]
    assert door.is_up()


@pytest.mark.parametrize(("body", "status"), REFUSED.values(), ids=REFUSED)
def test_refused(door: Door, body: dict[str, Any], status: int) -> None:
    """Danger: what one door refuses, the other answers; or a refusal has no line that says why."""
    got, told = door.post(**body)
    assert got == status, told
    assert told["error"]["message"]
    assert told["error"]["code"] == status
    if status == 409:
        assert told["error"]["missing"] == [d["id"] for d in body["documents"]]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe", b'{"documents": 3}'], ids=range(6))
def test_bodies_that_are_none(door: Door, body: bytes) -> None:
    """Danger: bytes that are no request end the server, or get a 500."""
    assert door.http("POST", "/v1/documents", body)[0] == 400
    assert door.http("POST", "/v1/chat/completions", body)[0] in (400, 422)
    assert door.is_up()


def test_documents_are_kept_and_told(door: Door) -> None:
    """Danger: what was added is not listed, is another document, or survives its deletion."""
    new = [{"title": f"{door.kind} {n}", "text": f"A document of {door.kind}, number {n}."} for n in range(3)]
    ids = door.add(new)
    assert ids == door.add(new)
    status, one = door.http("GET", f"/v1/documents/{ids[0]}")
    assert (status, one["id"], one["title"]) == (200, ids[0], new[0]["title"])
    assert one["tokens"] > 0
    assert one["bytes"] > 0
    listed = door.http("GET", "/v1/documents")[1]
    assert set(ids) <= {d["id"] for d in listed["data"]}
    assert listed["total"] >= len(ids)
    assert receipt(eventually(lambda: door.chat(new), lambda a: receipt(a).get("hits") == 3))["misses"] == 0
    assert door.http("DELETE", f"/v1/documents/{ids[0]}")[1]["deleted"]
    for method in ("GET", "DELETE"):
        assert door.http(method, f"/v1/documents/{ids[0]}")[0] == 404
        assert door.http(method, f"/v1/documents/{UNKNOWN}")[0] == 404
    assert door.post(documents=[{"id": ids[0]}])[0] == 409


def test_namespaces(door: Door) -> None:
    """Danger: a document of one namespace is told, deleted or answered from in another."""
    (stored,) = door.add([TEXTS[0]])
    for method in ("GET", "DELETE"):
        assert door.http(method, f"/v1/documents/{stored}", x_kvilt_namespace="tenant")[0] == 404
    assert door.http("GET", "/v1/documents", x_kvilt_namespace="tenant")[1]["total"] == 0
    assert door.post(documents=[{"id": stored}], cache_salt="tenant")[0] == 409
    salted = door.chat([TEXTS[0]], extra={"cache_salt": f"{door.kind} salt"})
    assert not receipt(salted).get("hits")
