"""A real server, started by `kvilt vllm`, asked by the openai client as its users ask it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from vllm_kit import DOCUMENTS, NEW, QUESTION, Reference, document

from kvilt.check.server import examine_server
from kvilt.engine.engine import Engine
from kvilt.types import Document

STRATEGY = "epic:tokens=17,sink=system"
TEXTS = [{"title": d.title, "text": d.text} for d in DOCUMENTS]
SECONDS = 240


@pytest.fixture(scope="module")
def url(place: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that encodes what is missing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "kvilt", "vllm", reference.model, "--store", reference.store, "--encode"]
    line += ["--strategy", STRATEGY, "--system", reference.system, "--dtype", "float32", "--enforce-eager"]
    line += ["--max-model-len", "2048", "--port", str(port), "--served-model-name", "tiny", "--block-size", "32"]
    log = (tmp_path_factory.mktemp("log") / "server").open("w+")
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    process = subprocess.Popen(line, stdout=log, stderr=log, env={**inherited, **environment}, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(SECONDS):
            time.sleep(1)
            if process.poll() is not None or _is_up(address):
                break
        log.seek(0)
        assert _is_up(address), log.read()[-6000:]
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def _is_up(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def engine(reference: Reference) -> Engine:
    """Kvilt's own engine, with everything encoded."""
    made = reference.engine(STRATEGY)
    made.encode(DOCUMENTS)
    return made


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    """The client as it comes."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS)


def chat(client: openai.OpenAI, documents: Any, question: str = QUESTION, **more: Any) -> Any:
    """A greedy chat with documents."""
    messages = more.pop("messages", [{"role": "user", "content": question}])
    extra = {"documents": documents, "ignore_eos": False, "skip_special_tokens": True, **more.pop("extra", {})}
    return client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=NEW, temperature=0, extra_body=extra, **more
    )


def told(answer: Any) -> dict[str, Any]:
    """The receipt."""
    return dict((answer.kv_transfer_params or {}).get("kvilt") or {})


def eventually(ask: Callable[[], Any], is_good: Callable[[Any], bool]) -> Any:
    """What is asked for, as soon as it is as it should be."""
    end = time.monotonic() + SECONDS
    while not is_good(answer := ask()):
        assert time.monotonic() < end, answer
        time.sleep(0.5)
    return answer


def test_a_chat_with_documents(client: openai.OpenAI, engine: Engine) -> None:
    """Danger: the wire format that users know is served with other words, other places, or without reuse."""
    wanted = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=NEW)
    answer = chat(client, TEXTS)
    assert answer.choices[0].message.content.strip() == wanted.text.strip()
    assert told(answer)["hits"] == len(DOCUMENTS)
    assert answer.usage.prompt_tokens_details.cached_tokens == told(answer)["reused_tokens"] > 0
    shuffled = chat(client, TEXTS[::-1])
    assert told(shuffled)["hits"] == len(DOCUMENTS)
    assert (
        shuffled.choices[0].message.content.strip()
        == engine.answer(QUESTION, DOCUMENTS[::-1], max_new_tokens=NEW).text.strip()
    )


def test_streaming_with_usage(client: openai.OpenAI, engine: Engine) -> None:
    """Danger: a stream gives another text than the answer, or no account of what was reused."""
    chunks = list(chat(client, TEXTS[:2], stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text.strip() == engine.answer(QUESTION, DOCUMENTS[:2], max_new_tokens=NEW).text.strip()
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_a_client_that_knows_nothing_of_us(client: openai.OpenAI, engine: Engine, reference: Reference) -> None:
    """Danger: only those who change their code get reuse."""
    content = "".join(d.content for d in DOCUMENTS) + QUESTION
    messages = [{"role": "system", "content": reference.system}, {"role": "user", "content": content}]

    def ask() -> Any:
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=NEW, temperature=0)

    answer = eventually(ask, lambda a: told(a).get("hits") == len(DOCUMENTS))  # the store is looked through every 5 s
    assert (
        answer.choices[0].message.content.strip() == engine.answer(QUESTION, DOCUMENTS, max_new_tokens=NEW).text.strip()
    )


def test_missing_documents_are_encoded_meanwhile(client: openai.OpenAI, engine: Engine) -> None:
    """Danger: a new document is computed in every prompt for ever, or its first reader waits for it."""
    new = [document(500 + i, 120) for i in range(3)]
    texts: list[Any] = [{"title": d.title, "text": d.text} for d in new]
    assert not told(chat(client, texts)).get("hits")
    eventually(lambda: chat(client, texts, "And now?"), lambda a: told(a).get("hits") == 3)
    wanted = engine.answer(QUESTION, new, max_new_tokens=NEW)
    assert wanted.usage.hits == 3
    assert chat(client, texts).choices[0].message.content.strip() == wanted.text.strip()


def test_documents_by_id(url: str, client: openai.OpenAI, engine: Engine) -> None:
    """Danger: a wrong id answers from nothing; a right one from something else."""
    added = httpx.post(f"{url}/v1/documents", json={"documents": [*TEXTS, "A text alone."]}, timeout=SECONDS).json()[
        "data"
    ]
    ids = [d["id"] for d in added[: len(TEXTS)]]
    assert [d["stored"] for d in added[: len(TEXTS)]] == [True] * len(TEXTS)
    answer = chat(client, [{"id": i} for i in ids])
    assert (
        answer.choices[0].message.content.strip() == engine.answer(QUESTION, DOCUMENTS, max_new_tokens=NEW).text.strip()
    )
    unknown = "ab" * 32
    with pytest.raises(openai.ConflictError) as error:
        chat(client, [{"id": ids[0]}, {"id": unknown}, {"id": "../../etc/passwd"}])
    assert error.value.body["missing"] == [unknown, "../../etc/passwd"]
    assert httpx.get(f"{url}/v1/documents/{ids[0]}").json()["title"] == DOCUMENTS[0].title
    assert ids[0] in {d["id"] for d in httpx.get(f"{url}/v1/documents").json()["data"]}
    foreign = {"x-kvilt-namespace": "tenant"}
    assert httpx.get(f"{url}/v1/documents/{ids[0]}", headers=foreign).status_code == 404
    assert httpx.delete(f"{url}/v1/documents/{ids[0]}", headers=foreign).status_code == 404
    with pytest.raises(openai.ConflictError):
        chat(client, [{"id": ids[0]}], extra={"cache_salt": "tenant"})


def test_deleted_documents_are_gone(url: str, client: openai.OpenAI, engine: Engine) -> None:
    """Danger: what was deleted is still served."""
    doomed = document(600, 100)
    engine.encode([doomed])
    texts = [{"title": doomed.title, "text": doomed.text}]
    digest = engine.encoder.items([doomed])[0].key.digest
    assert told(chat(client, texts))["hits"] == 1
    assert httpx.delete(f"{url}/v1/documents/{digest}").json()["deleted"]
    assert httpx.delete(f"{url}/v1/documents/{digest}").status_code == 404
    with pytest.raises(openai.ConflictError):
        chat(client, [{"id": digest}])


def test_a_conversation(client: openai.OpenAI) -> None:
    """Danger: the second question loses the documents of the first."""
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "In Tavik."}]
    messages.append({"role": "user", "content": "When?"})
    answer = chat(client, TEXTS, messages=messages)
    assert told(answer)["hits"] == len(DOCUMENTS)
    parts = [{"type": "text", "text": QUESTION}]
    assert told(chat(client, TEXTS, messages=[{"role": "user", "content": parts}]))["hits"] == len(DOCUMENTS)


BAD: list[tuple[dict[str, Any], int]] = [
    ({"kv_transfer_params": {"kvilt": {"documents": [[0, 5, "x", 0]]}}}, 400),
    ({"documents": [{"title": "no text"}]}, 400),
    ({"documents": [""]}, 400),
    ({"documents": [{"text": 5}]}, 400),
    ({"documents": 7}, 400),
    ({"documents": [["text"]]}, 400),
    ({"documents": ["a"], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, 400),
    ({"documents": ["a"], "messages": [{"role": "assistant", "content": "x"}]}, 400),
    (
        {
            "documents": ["a"],
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        },
        400,
    ),
    ({"documents": ["a \ud800 b"]}, 400),
    ({"documents": ["x" * 9000]}, 400),
]


def test_bad_input_gets_a_clear_answer(url: str, client: openai.OpenAI) -> None:
    """Danger: a malformed or hostile request ends the engine, or gets a 500."""
    for body, status in BAD:
        whole = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "max_tokens": 1, **body}
        answer = httpx.post(f"{url}/v1/chat/completions", content=_json(whole), headers=JSON, timeout=SECONDS)
        assert answer.status_code == status, (body, answer.text[:300])
        assert answer.json()["error"]["message"]
    forged = {"model": "tiny", "prompt": "x", "kv_transfer_params": {"kvilt": {}}}
    assert httpx.post(f"{url}/v1/completions", json=forged).status_code == 400
    for content in (
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"documents": 3}',
        b'{"documents": [], "system": 4}',
        b"\xff\xfe",
    ):
        answer = httpx.post(f"{url}/v1/documents", content=content, headers=JSON, timeout=SECONDS)
        assert answer.status_code == 400, content[:20]
    assert chat(client, TEXTS[:1]).choices[0].message.content is not None


JSON = {"content-type": "application/json"}


def _json(body: Any) -> bytes:
    import json

    return json.dumps(body).encode()


def test_the_doctor_says_why(url: str, reference: Reference, engine: Engine) -> None:
    """Danger: nothing is reused, and nobody can say why."""
    healthy = examine_server(url, DOCUMENTS, None, None)
    assert healthy.healthy, healthy
    other = examine_server(url, [DOCUMENTS[0]], "Another system text.", None)
    assert not other.healthy
    assert "encoded" in other.verdicts[0].reason
    unknown = examine_server(url, [Document("Never seen before, anywhere at all.")], None, None)
    assert "nothing is stored" in unknown.verdicts[0].reason
    assert "no vLLM server" in examine_server("http://127.0.0.1:9", [], None, None).findings[0].what
    assert examine_server(url, [], None, "nobody").findings[0].status == "problem"


def test_many_at_once(client: openai.OpenAI, engine: Engine) -> None:
    """Danger: requests of several clients mix their documents."""
    orders = [[i % 4, (i + 1) % 4, (i + 2 + i // 4) % 4] for i in range(12)]
    wanted = {
        str(o): engine.answer(QUESTION, [DOCUMENTS[i] for i in o], max_new_tokens=NEW).text.strip() for o in orders
    }
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = chat(client, [TEXTS[i] for i in orders[number]]).choices[0].message.content.strip()

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: wanted[str(o)] for n, o in enumerate(orders)}


def test_a_killed_engine_harms_no_document(
    url: str, client: openai.OpenAI, reference: Reference, engine: Engine
) -> None:
    """Danger: an engine that dies while it loads leaves locks or half a file behind. Last: it ends the server."""
    port = int(url.rpartition(":")[2])
    (server,) = (c.pid for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == "LISTEN")
    children = psutil.Process(server).children(recursive=True)
    cores = [p for p in children if "EngineCore" in p.name() + " ".join(p.cmdline())]
    threading.Timer(0.05, lambda: [p.kill() for p in cores or children]).start()
    with pytest.raises(openai.APIError):
        [chat(client, TEXTS, f"Question {n}?") for n in range(200)]
    assert engine.store.verify() == []
    again = reference.engine(STRATEGY).answer(QUESTION, DOCUMENTS, max_new_tokens=NEW)
    assert again.usage.hits == len(DOCUMENTS)
