"""Many at once, some of whom go away: queue, deadlines, cancellation, shutdown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core_kit import engine_of
from kvilt.engine.engine import Engine
from kvilt.types import Answer
from serve_kit import LONG, begin, cut, events, in_thread, until


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
