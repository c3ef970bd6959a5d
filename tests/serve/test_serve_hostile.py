"""Whatever comes over the wire: a clear answer, no fault, no traceback, and nothing of another tenant."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core_kit import engine_of
from serve_kit import Server, in_thread, serving

CHAT = "/v1/chat/completions"
SAID = [{"role": "user", "content": "?"}]
OTHER = "ab" * 32


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": SAID, "max_tokens": 1, **more}


BAD: list[tuple[str, Any, int, str]] = [  # path, body, status, what the message names
    (CHAT, b"", 400, "JSON"),
    (CHAT, b"{", 400, "JSON"),
    (CHAT, b"\xff\xfe{}", 400, "JSON"),
    (CHAT, b"[]", 400, "object"),
    (CHAT, b"null", 400, "object"),
    (CHAT, b"NaN", 400, "JSON"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "JSON"),
    (CHAT, b"[" * 100_000, 400, "deep"),
    (CHAT, b'{"a":' * 100_000, 400, "deep"),
    (CHAT, b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "deep"),
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "hello"}, 400, "messages"),
    (CHAT, {"messages": [5]}, 400, "messages[0]"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0]"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "role"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "king"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "image_url",
    ),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": ["text"], "text": 5}]}]}, 400, "content[0]"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, 400, "user"),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}, 400, "empty"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, 400, "tool"),
    (CHAT, chat(documents=7), 400, "documents"),
    (CHAT, chat(documents=["a", 5]), 400, "documents[1]"),
    (CHAT, chat(documents=[["text"]]), 400, "documents[0]"),
    (CHAT, chat(documents=[{"title": "no text"}]), 400, "no text"),
    (CHAT, chat(documents=[{"text": 5}]), 400, "text"),
    (CHAT, chat(documents=[{"text": "a", "title": 5}]), 400, "title"),
    (CHAT, chat(documents=[{"text": "a", "store": "yes"}]), 400, "store"),
    (CHAT, chat(documents=[{"source": {"data": {}}}]), 400, "text"),
    (CHAT, chat(documents=[""]), 400, "empty"),
    (CHAT, chat(documents=["x" * 9000]), 400, "context"),
    (CHAT, chat(documents=[{"text": "x", "title": "t" * 5000}]), 400, "4,096"),
    (CHAT, chat(documents=[{"id": OTHER}, {"id": "../../etc/passwd"}, {"id": 5}, {"id": ["a"]}]), 409, "not stored"),
    (CHAT, chat(documents=["x"] * 5000), 400, "documents"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    (CHAT, chat(max_tokens=1.5), 400, "max_tokens"),
    (CHAT, chat(max_tokens="1"), 400, "max_tokens"),
    (CHAT, chat(max_tokens=10**30), 400, "max_tokens"),
    (CHAT, chat(temperature=-1), 400, "temperature"),
    (CHAT, chat(temperature="hot"), 400, "temperature"),
    (CHAT, chat(top_p=2), 400, "top_p"),
    (CHAT, chat(seed=-5), 400, "seed"),
    (CHAT, chat(seed=10**40), 400, "seed"),
    (CHAT, chat(stop=[""]), 400, "stop"),
    (CHAT, chat(stop=["a"] * 100), 400, "stop"),
    (CHAT, chat(n=2), 400, "n=2"),
    (CHAT, chat(logprobs=True), 400, "logprobs"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools"),
    (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format"),
    (CHAT, chat(temprature=1), 400, "temperature"),
    (CHAT, chat(model="gpt-4o"), 404, "gpt-4o"),
    (CHAT, chat(kvilt={"strategy": "magic"}), 400, "magic"),
    (CHAT, chat(kvilt={"strategy": "kv_packet:wrapper=/etc/passwd"}), 400, "not served"),
    (CHAT, chat(kvilt={"unknown": 1}), 400, "unknown"),
    (CHAT, chat(kvilt={"deadline": -1}), 400, "deadline"),
    (CHAT, chat(kvilt=5), 400, "kvilt"),
    (CHAT, chat(cache_salt="\u0000"), 400, "namespace"),
    (CHAT, chat(cache_salt="x" * 500), 400, "cache_salt"),
    (CHAT, chat(stream="yes"), 400, "stream"),
    ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [1, 2]}, 400, "prompt"),
    ("/v1/completions", {"prompt": ""}, 400, "empty"),
    ("/v1/completions", {"prompt": "x", "echo": True}, 400, "echo"),
    ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, 400, "previous_response_id"),
    ("/v1/responses", {"input": "x", "background": True}, 400, "background"),
    ("/v1/responses", {"input": "x", "tools": [{"type": "web_search"}]}, 400, "tools"),
    ("/v1/responses", {"input": [{"type": "function_call_output", "output": "x", "role": "user"}]}, 400, "tool"),
    ("/v1/plan", {"messages": SAID, "documents": [{"id": OTHER}]}, 409, "not stored"),
    ("/v1/documents", {}, 400, "documents"),
    ("/v1/documents", {"documents": []}, 400, "documents"),
    ("/v1/documents", {"documents": ["a"], "system": 4}, 400, "system"),
    ("/v1/documents", {"documents": ["a"], "more": 4}, 400, "more"),
]


@pytest.mark.parametrize(("path", "body", "status", "named"), BAD, ids=range(len(BAD)))
def test_malformed_requests_get_a_line(server: Server, path: str, body: Any, status: int, named: str) -> None:
    """Danger: a malformed request ends in a 500, a traceback or a hang, or is served as something else."""
    reply = server.ask("POST", path, body)
    assert reply.status == status, reply.body[:400]
    error = reply.json["error"]
    assert named in error["message"]
    assert error["code"] == status
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1000


def test_nothing_of_that_was_a_fault(server: Server) -> None:
    """Danger: what was refused has left the server ill. After the tests above."""
    assert server.chat("Who?", ["A text."]).status == 200
    assert "fault" not in server.log.read_text()
    assert "Traceback" not in server.log.read_text()


ONE = f"/v1/documents/{OTHER}"
PATHS = [
    ("GET", "/nowhere", 404),
    ("PUT", "/v1/models", 405),
    ("GET", "/page/../worker.py", 404),
    ("GET", "/page/%2e%2e%2fworker.py", 404),
    ("GET", "/page/.hidden", 404),
    ("GET", "/page/nothing.js", 404),
    ("GET", "/v1/models/other", 404),
    ("GET", ONE, 404),
    ("DELETE", ONE, 404),
    ("POST", f"{ONE}/verify", 404),
    ("POST", f"{ONE}/pin", 404),
    ("GET", "/v1/documents/%00", 404),
    ("GET", "/v1/documents?limit=0", 400),
    ("GET", "/v1/documents?limit=1e9", 400),
    ("GET", "/v1/documents?after='%20OR%201=1%20--", 200),
    ("GET", "/v1/documents/" + "a" * 10_000, 404),
]


@pytest.mark.parametrize(("method", "path", "status"), PATHS, ids=range(len(PATHS)))
def test_paths_lead_nowhere_else(server: Server, method: str, path: str, status: int) -> None:
    """Danger: a path leads out of the page's folder, or an id into a query."""
    reply = server.ask(method, path)
    assert reply.status == status
    assert status == 200 or reply.json["error"]["message"]


def test_only_json_for_this_host(server: Server) -> None:
    """Danger: a web page that the user visits asks this server, or reads what it holds, under a name of its own."""
    body = json.dumps(chat()).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert server.ask("POST", CHAT, body, content_type=kind).status == 415
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1].evil:1"):
        assert server.ask("GET", "/v1/documents", host=host).status == 403
    assert server.ask("GET", "/v1/documents", host="localhost:1234").status == 200
    reply = server.ask("OPTIONS", CHAT, origin="https://evil.example", access_control_request_method="POST")
    assert not [name for name in reply.headers if name.startswith("access-control")]


def raw(server: Server, data: bytes, seconds: float = 10.0) -> bytes:
    """What comes back for some bytes."""
    with socket.create_connection(server.address, timeout=seconds) as connection:
        got = b""
        with contextlib.suppress(ConnectionError):  # whatever was not read when the server had enough
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                got += part
        return got


def test_long_bodies_are_not_read(server: Server) -> None:
    """Danger: a body of gigabytes is collected in memory before anybody says no."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    assert server.ask("POST", CHAT, b'{"a": "' + b"x" * 10_000_000 + b'"}').status == 413
    assert b" 413 " in raw(server, head + b"content-length: 99999999999999999999\r\n\r\n")
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    sent = 0
    with socket.create_connection(server.address, timeout=20) as connection, contextlib.suppress(OSError):
        connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        while sent < 1000:
            connection.sendall(chunk)
            sent += 1
    assert sent < 100  # cut off
    for odd in (
        b"content-length: -5\r\n\r\n",
        b"content-length: x\r\n\r\n",
        b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
    ):
        assert b" 400 " in raw(server, head + odd)


def test_connections_that_are_cut_or_lie(server: Server) -> None:
    """Danger: half a request keeps a worker waiting, or one header ends another's answer."""
    for data in (
        b"",
        b"GET",
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 20_000,
    ):
        raw(server, data)
    half = json.dumps(chat()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(half) + 9}\r\n\r\n"
    raw(server, head.encode() + half)
    injected = server.chat("Who?", [{"text": "a", "title": "x\r\nset-cookie: a=b"}], model="tiny")
    assert "set-cookie" not in injected.headers
    assert server.chat("Who?").status == 200


def test_slow_senders_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a few thousand connections that send a byte a minute, and nobody else gets in."""
    monkeypatch.setattr("kvilt.serve.launch.HEADER_SECONDS", 0.3)
    monkeypatch.setattr("kvilt.serve.door.BODY_SECONDS", 0.4)
    with in_thread(engine_of("block"), tmp_path) as server:
        for sent in (b"", b"GET /health HT"):
            with socket.create_connection(server.address, timeout=5) as slow:
                slow.sendall(sent)
                began = time.monotonic()
                while slow.recv(100):
                    pass
                assert time.monotonic() - began < 3
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{"
        with socket.create_connection(server.address, timeout=5) as slow:
            slow.sendall(head.encode())
            assert b" 408 " in slow.recv(1000)
        connection = http.client.HTTPConnection(*server.address, timeout=5)
        for _ in range(3):  # who asks now and then is not slow
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            time.sleep(0.2)
        connection.close()


KEYS = ["first-key-of-sixteen", "second-key-of-sixteen"]


@pytest.fixture(scope="module")
def tenants(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two tenants, on every address."""
    place = tmp_path_factory.mktemp("tenants")
    (place / "keys").write_text("# two of them\n" + "\n".join(KEYS) + "\n")
    options = ["--store", "memory", "--dtype", "float32", "--keys", str(place / "keys"), "--host", "0.0.0.0"]
    with serving(checkpoint, *options, log=place / "log") as made:
        made.url = made.url.replace("0.0.0.0", "127.0.0.1")
        yield made


def key(n: int) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[n]}"}


def test_without_a_key_nobody_gets_in(tenants: Server) -> None:
    """Danger: a server on the network answers everybody, or tells a wrong key from a missing one."""
    wrong = [
        "",
        "Bearer",
        "Bearer ",
        "Bearer x",
        f"Basic {KEYS[0]}",
        KEYS[0],
        f"Bearer {KEYS[0]}x",
        f"Bearer {KEYS[0][:-1]}",
        "Bearer \xe9",
    ]
    for path, method in (("/v1/models", "GET"), ("/v1/documents", "GET"), ("/metrics", "GET"), (CHAT, "POST")):
        body = chat() if method == "POST" else None
        assert tenants.ask(method, path, body).status == 401
        for value in wrong:
            reply = tenants.ask(method, path, body, authorization=value)
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert tenants.ask("GET", "/health", host="any.example").status == 200
    assert tenants.ask("GET", "/v1/models", **key(0), host="any.example").status == 200


def test_tenants_see_nothing_of_each_other(tenants: Server) -> None:
    """Danger: a document of one tenant is found, listed, read, pinned, deleted or answered from by another."""
    text = "A secret of the first."
    (told,) = tenants.ask("POST", "/v1/documents", {"documents": [text], "wait": True}, **key(0)).json["data"]
    assert told["stored"]
    at = f"/v1/documents/{told['id']}"
    assert tenants.ask("GET", at, **key(0)).status == 200
    forged = [{}, {"x_kvilt_namespace": "shared"}]
    first = tenants.chat("What?", [text], headers=key(0)).json["kvilt"]
    assert first["hits"] == 1
    for more in forged:
        for method, path in (
            ("GET", at),
            ("DELETE", at),
            ("GET", f"{at}?text=yes"),
            *(("POST", f"{at}/{w}") for w in ("verify", "pin")),
        ):
            assert tenants.ask(method, path, **key(1), **more).status == 404
        listed = tenants.ask("GET", "/v1/documents", **key(1), **more).json
        assert told["id"] not in {d["id"] for d in listed["data"]}
        assert tenants.chat("What?", [{"id": told["id"]}], headers={**key(1), **more}).status == 409
    other = tenants.chat("What?", [text], headers=key(1)).json["kvilt"]
    assert (other["hits"], other["misses"], other["kept_tokens"]) == (0, 1, 0)
    salted = tenants.chat("What?", [text], headers=key(0), cache_salt="mine").json["kvilt"]
    assert (salted["misses"], salted["kept_tokens"]) == (1, 0)
    ids = [d["documents"][0]["id"] for d in (first, other, salted)]
    assert len(set(ids)) == 3
    assert tenants.ask("DELETE", at, **key(0)).json["deleted"]
    assert tenants.ask("DELETE", at, **key(0)).status == 404


def test_texts_and_keys_are_in_no_log(server: Server, tenants: Server) -> None:
    """Danger: what users write, or their keys, stands in a log."""
    marked = "Xylophagous-beetle"
    assert server.chat(f"{marked}?", [f"{marked} text.", {"text": "t", "title": "A title"}]).status == 200
    server.chat(f"{marked}?", [{"text": f"{marked} \ue000", "title": 5}])
    audit = server.log.with_name("audit").read_text()
    lines = [json.loads(line) for line in audit.splitlines()]
    assert lines[-1]["misses"] + lines[-1]["hits"] == 2
    assert {"time", "route", "tenant", "strategy", "reused_tokens", "charged", "ttft", "documents"} <= lines[-1].keys()
    written = audit + server.log.read_text() + tenants.log.read_text()
    assert not [text for text in (marked, "A title", *KEYS) if text in written]
