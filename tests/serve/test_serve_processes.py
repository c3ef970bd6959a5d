"""Servers as processes: a hundred streams, a thousand requests, and the end."""

from __future__ import annotations

import http.client
import json
import signal
import threading
from pathlib import Path
from typing import Any

import psutil

from serve_kit import begin, events, said, serving, until


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
                "max_tokens": 1,
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


def test_sigterm_finishes_what_runs(checkpoint: str, tmp_path: Path) -> None:
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
