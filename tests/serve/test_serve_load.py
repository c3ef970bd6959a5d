"""Many at once, some of whom go away: queue, deadlines, cancellation, shutdown."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from core_kit import engine_of
from kvilt.engine.engine import Engine
from kvilt.types import Answer
from serve_kit import Server, events, in_thread, said, serving

LONG = {"max_tokens": 3000, "ignore_eos": True}


class Watched:
    """An engine that counts tokens and layers, and can be slowed down."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tokens, self.layers, self.pause = engine, 0, 0, 0.0
        after = engine.model.after

        def counted(*given: Any) -> Any:
            self.tokens += 1
            time.sleep(self.pause)
            return after(*given)

        engine.model.after = counted  # type: ignore[method-assign]
        self.hooks = [layer.register_forward_pre_hook(self._slow) for layer in engine.model.hf.model.layers]

    def _slow(self, *_: Any) -> None:
        self.layers += 1
        time.sleep(self.pause)

    def close(self) -> None:
        """Leave the model as it was."""
        del self.engine.model.after
        for hook in self.hooks:
            hook.remove()


@pytest.fixture
def watched() -> Iterator[Watched]:
    """A watched engine."""
    made = Watched(engine_of("block"))
    yield made
    made.close()


def begin(server: Server, **body: Any) -> http.client.HTTPConnection:
    """A request whose answer nobody has read yet."""
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    whole = {"messages": [{"role": "user", "content": "Who?"}], **LONG, **body}
    connection.request("POST", "/v1/chat/completions", json.dumps(whole), {"content-type": "application/json"})
    return connection


def cut(connection: http.client.HTTPConnection) -> None:
    """Go away without a word."""
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def until(true: Any, seconds: float = 20.0) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_answer(watched: Watched, tmp_path: Path, stream: bool) -> None:
    """Danger: the model writes thousands of tokens for nobody, and everybody else waits."""
    watched.pause = 0.005
    with in_thread(watched.engine, tmp_path) as server:
        connection = begin(server, stream=stream)
        until(lambda: watched.tokens > 5)
        cut(connection)
        time.sleep(0.2)  # until the loop hears of it
        seen = watched.tokens
        time.sleep(0.2)
        assert watched.tokens <= seen + 1
        assert server.chat("Who?").status == 200


def test_a_client_that_goes_away_during_prefill_stops_it(watched: Watched, tmp_path: Path) -> None:
    """Danger: a long prompt is computed to its end for nobody."""
    watched.pause = 0.5
    with in_thread(watched.engine, tmp_path) as server:
        connection = begin(server)
        until(lambda: watched.layers == 1)
        cut(connection)
        time.sleep(2.0)
        assert watched.layers <= 3
        assert watched.tokens == 0
        watched.pause = 0.0
        assert server.chat("Who?").status == 200


def test_the_queue_is_bounded_and_says_when_to_come_back(watched: Watched, tmp_path: Path) -> None:
    """Danger: a thousand requests wait in memory, each for minutes; or those that waited and left are still answered."""
    watched.pause = 0.005
    with in_thread(watched.engine, tmp_path, queue=2) as server:
        first = begin(server, stream=True)
        until(lambda: watched.tokens > 2)
        others = [begin(server) for _ in range(2)]
        until(lambda: server.metric("kvilt_queue_requests") == 2)
        refused = server.chat("Who?")
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json["error"]["type"] == "rate_limit_error"
        for connection in others:
            cut(connection)
        until(lambda: server.metric("kvilt_queue_requests") == 0)
        cut(first)
        assert server.chat("Who?").status == 200


def test_deadlines_hold_while_waiting_and_while_running(watched: Watched, tmp_path: Path) -> None:
    """Danger: a request that nobody waits for any more takes its turn; or a stream ends without saying why."""
    watched.pause = 0.01
    with in_thread(watched.engine, tmp_path) as server:
        began = time.monotonic()
        late = server.chat("Who?", **LONG, kvilt={"deadline": 0.5})
        assert late.status == 504
        assert 0.4 < time.monotonic() - began < 5
        reply = server.chat("Who?", **LONG, stream=True, kvilt={"deadline": 0.5})
        assert reply.status == 200
        assert events(reply.body)[-1]["error"]["code"] == 504
        assert reply.body.endswith(b"[DONE]\n\n")
        first = begin(server, stream=True)
        until(lambda: server.metric("kvilt_running_requests") == 1)
        waited = server.chat("Who?", kvilt={"deadline": 0.2})
        assert waited.status == 504
        cut(first)


def test_a_hundred_streams_at_once(checkpoint: str, log: Path) -> None:
    """Danger: under load a stream is dropped, mixed with another's, or cut short."""
    options = ["--strategy", "block", "--store", "memory", "--dtype", "float32"]
    with serving(checkpoint, *options, log=log) as server:
        documents = [f"Document {n} speaks of Ada and of number {n * n}." for n in range(10)]
        server.ask("POST", "/v1/documents", {"documents": documents, "wait": True})
        alone = {n: server.chat("Who?", [documents[n], documents[n - 1]]).json for n in range(10)}
        got: dict[int, Any] = {}

        def ask(number: int) -> None:
            n = number % 10
            got[number] = server.chat("Who?", [documents[n], documents[n - 1]], stream=True).body

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, body in got.items():
            assert said(events(body)) == alone[number % 10]["choices"][0]["message"]["content"]
            assert events(body)[-1]["kvilt"]["misses"] == 0
        assert len(got) == 100
        assert server.metric('kvilt_requests_total{route="/v1/chat/completions",status="200"}') == 110


def test_a_thousand_requests_leave_nothing_behind(checkpoint: str, log: Path) -> None:
    """Danger: a server that runs for a week has no memory, no handles or no threads left."""
    options = ["--strategy", "block", "--store", "memory:budget=20MB", "--dtype", "float32", "--keep", "20MB"]
    with serving(checkpoint, *options, log=log) as server:
        process = psutil.Process(server.process.pid)
        connection = http.client.HTTPConnection(*server.address, timeout=60)
        seen = []
        for number in range(1000):
            documents = [f"Document {number % 40} of many, about clocks.", f"Another, {number % 7}."]
            body = {
                "messages": [{"role": "user", "content": f"Which, {number}?"}],
                "documents": documents,
                "max_tokens": 2,
            }
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()
            if number in (300, 999):
                seen.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
        connection.close()
        (rss, handles, threads), (rss_end, handles_end, threads_end) = seen
        assert rss_end - rss < 12e6
        assert handles_end <= handles + 2
        assert threads_end <= threads + 1


def test_sigterm_finishes_what_runs(checkpoint: str, tmp_path: Path, engine: Engine) -> None:
    """Danger: a restart cuts answers in two, or loses documents that were told to be stored."""
    store = f"disk:path={tmp_path / 'store'}"
    options = ["--strategy", "block", "--store", store, "--dtype", "float32", "--grace", "20"]
    with serving(checkpoint, *options, log=tmp_path / "log") as server:
        documents = [f"Document {n}." + " It goes on and on." * 20 for n in range(12)]
        ids = [d["id"] for d in server.ask("POST", "/v1/documents", {"documents": documents}).json["data"]]
        answers: list[Any] = []
        body = {"max_tokens": 300, "stream": True, "ignore_eos": True}
        thread = threading.Thread(target=lambda: answers.append(server.chat("Who?", documents[:2], **body).body))
        thread.start()
        until(lambda: server.metric("kvilt_running_requests") == 1)
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        assert server.process.wait(30) == 0
        assert events(answers[0])[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        assert answers[0].endswith(b"[DONE]\n\n")
        assert "stopped." in server.log.read_text()
        assert "Traceback" not in server.log.read_text()
    with serving(checkpoint, *options, log=tmp_path / "log2") as server:
        assert all(server.ask("GET", f"/v1/documents/{i}").json["stored"] for i in ids)
        again = server.chat("Who?", [{"id": i} for i in ids[:5]])
        assert again.json["kvilt"]["hits"] == 5


def test_sigterm_gives_up_after_its_grace(checkpoint: str, tmp_path: Path) -> None:
    """Danger: a server that was told to end runs on for hours."""
    options = ["--strategy", "block", "--store", "memory", "--dtype", "float32", "--grace", "1"]
    with serving(checkpoint, *options, log=tmp_path / "log") as server:
        connection = begin(server, stream=True, max_tokens=3900)
        until(lambda: server.metric("kvilt_running_requests") == 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        connection.close()


def test_answers_go_before_background_work(watched: Watched, tmp_path: Path) -> None:
    """Danger: whoever uploads a library keeps everybody else waiting for hours."""
    watched.pause = 0.01
    with in_thread(watched.engine, tmp_path) as server:
        documents = [f"Number {n}: a text of its own." for n in range(60)]
        told = server.ask("POST", "/v1/documents", {"documents": documents})
        assert told.status == 202
        answer: Answer | Any = server.chat("Who?", max_tokens=2)
        assert answer.status == 200
        assert server.metric("kvilt_encode_queue") > 10
        again = server.ask("POST", "/v1/documents", {"documents": documents[-2:]})
        assert again.json["data"][0]["id"] == told.json["data"][-2]["id"]
        assert server.metric("kvilt_single_flight_waits_total") == 2
        watched.pause = 0.0
        done = server.ask("POST", "/v1/documents", {"documents": documents, "wait": True})
        assert done.status == 200
        assert {d["status"] for d in done.json["data"]} == {"stored"}
        assert server.metric("kvilt_encoded_documents_total") == 60
