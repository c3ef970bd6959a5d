"""What the wire says: prompts without template, responses, plans, options, headers, and how fast."""

from __future__ import annotations

import http.client
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from core_kit import engine_of
from kvilt.engine.engine import Engine
from kvilt.errors import UserError
from kvilt.serve.launch import run
from kvilt.serve.settings import Settings
from serve_kit import Server, events, in_thread, said

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["Ada Lorn was born in Tavik.", {"title": "Orsa", "text": "Orsa is a town by the Sel."}]


def test_plans_are_those_that_are_run(server: Server) -> None:
    """Danger: the plan bar shows something else than what the answer did, or looking encodes and stores."""
    new = [*DOCUMENTS, f"A new one, {time.time()}."]
    server.chat("Who?", DOCUMENTS)
    plan = server.ask("POST", "/v1/plan", {"messages": [{"role": "user", "content": "Who?"}], "documents": new}).json
    assert [d["hit"] for d in plan["documents"]] == [True, True, False]
    assert server.ask("GET", f"/v1/documents/{plan['documents'][2]['id']}").status == 404
    told = server.chat("Who?", new).json["kvilt"]
    assert [d["hit"] for d in told["documents"]] == [True, True, False]
    again = server.ask("POST", "/v1/plan", {"messages": [{"role": "user", "content": "Who?"}], "documents": new}).json
    assert again["segments"] == [{**s, "kept": 0} for s in server.chat("Who?", new).json["kvilt"]["segments"]]
    assert [s["kind"] for s in again["segments"]] == ["system", "document", "document", "document", "question"]
    assert sum(s["reused"] for s in again["segments"]) == again["reused_tokens"]
    assert sum(s["computed"] for s in again["segments"]) == again["computed_tokens"]
    assert sum(s["tokens"] for s in again["segments"]) == again["prompt_tokens"]


def test_a_strategy_for_one_request(server: Server, engine: Engine) -> None:
    """Danger: two columns beside each other are answered by the same strategy, or one changes the next request."""
    for strategy in ("full", "naive", None, "full"):
        block = {"kvilt": {"strategy": strategy}} if strategy else {}
        told = server.chat("Who?", DOCUMENTS, **block).json
        other = engine.with_strategy(strategy) if strategy else engine
        assert told["kvilt"]["strategy"] == other.label
        wanted = other.answer("Who?", DOCUMENTS, max_new_tokens=12)
        assert told["choices"][0]["message"]["content"] == wanted.text
    assert server.ask("GET", "/v1/models").json["data"][0]["kvilt"]["strategies"] == [engine.label, "naive", "full"]


def test_documents_among_the_texts_of_a_message(server: Server, engine: Engine) -> None:
    """Danger: a document that stands in a later message is put in front of the first."""
    anthropic = {"type": "document", "source": {"type": "text", "data": DOCUMENTS[0]}}
    content = [{"type": "text", "text": "Look: "}, anthropic, {"type": "text", "text": " Who?"}]
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": content},
    ]
    told = server.chat("", messages=messages).json
    from kvilt.types import Document

    turns = [*messages[:2], {"role": "user", "content": ["Look: ", Document(str(DOCUMENTS[0])), " Who?"]}]
    wanted = engine.answer(turns, max_new_tokens=12)
    assert told["choices"][0]["message"]["content"] == wanted.text
    kinds = [s["kind"] for s in told["kvilt"]["segments"]]
    assert kinds == ["system", "text", "document", "question"]


def test_stop_strings_are_held_back_in_a_stream(server: Server) -> None:
    """Danger: the first half of a stop string is streamed before the second half comes."""
    options: dict[str, Any] = {"ignore_eos": True, "max_tokens": 60}
    whole = server.chat("Who?", DOCUMENTS, **options).json["choices"][0]["message"]["content"]
    stop = whole[7:10]
    for stream in (False, True):
        reply = server.chat("Who?", DOCUMENTS, stop=[stop, "\u0000never"], stream=stream, **options)
        text = said(events(reply.body)) if stream else reply.json["choices"][0]["message"]["content"]
        assert text == whole[: whole.index(stop)]


def test_missing_documents_may_be_left_alone(server: Server) -> None:
    """Danger: a look at the server (kvilt doctor, a plan) fills its store."""
    new = f"Nobody has seen this, {time.time()}."
    for more in ({"headers": {"x_kvilt_encode": "no"}}, {"kvilt": {"encode": False}}, {}, {}):
        block = server.chat("Who?", [new], **more).json["kvilt"]
        expected = (0, 1) if more == {} else (0, 0)
        assert (block["hits"], block["misses"]) == expected or block["hits"] == 1
    assert block["hits"] == 1


def test_headers_say_where_the_time_went(server: Server) -> None:
    """Danger: a streaming client learns nothing of what was reused before the stream ends."""
    whole = server.chat("Who?", DOCUMENTS)
    steps = dict(part.strip().split(";dur=") for part in whole.headers["server-timing"].split(","))
    assert set(steps) == {"queue", "tokenise", "fetch", "plan", "run", "decode", "ttft"}
    block = whole.json["kvilt"]
    assert float(steps["ttft"]) == pytest.approx(1000 * block["ttft"], abs=0.01)
    assert block["ttft"] <= sum(block["steps"].values()) + 0.001
    assert int(whole.headers["x-kvilt-reused"]) == block["reused_tokens"]
    assert int(whole.headers["x-kvilt-computed"]) == block["computed_tokens"]


def test_pins_and_damage(server: Server) -> None:
    """Danger: a damaged document is called sound, is served, or costs the answer."""
    (told,) = server.ask("POST", "/v1/documents", {"documents": ["To be damaged."], "wait": True}).json["data"]
    at = f"/v1/documents/{told['id']}"
    assert server.ask("POST", f"{at}/pin").json == {"id": told["id"], "pinned": True}
    assert server.ask("GET", at).json["pinned"]
    assert not server.ask("POST", f"{at}/unpin").json["pinned"]
    assert server.ask("POST", f"{at}/verify").json["ok"]
    assert server.ask("GET", f"{at}?text=yes").json["text"] == "To be damaged.\n"
    (file,) = (server.log.parent / "store").rglob(f"*{told['id']}*.safetensors")
    data = bytearray(file.read_bytes())
    data[-40] ^= 255
    file.chmod(0o644)
    file.write_bytes(data)
    verdict = server.ask("POST", f"{at}/verify").json
    assert not verdict["ok"]
    assert verdict["reason"]
    assert server.ask("GET", at).status == 404
    assert server.chat("Who?", ["To be damaged."]).json["kvilt"]["misses"] == 1
    assert server.ask("GET", at).json["stored"]


def test_small_packets_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Danger: headers and body of every answer wait 40 ms for each other (Nagle and delayed acknowledgements)."""
    with in_thread(engine_of("block"), tmp_path) as server:
        connection, seconds = http.client.HTTPConnection(*server.address, timeout=30), []
        for _ in range(20):
            began = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            seconds.append(time.perf_counter() - began)
        connection.close()
        assert min(seconds) < 0.02


def test_metrics_have_denominators(server: Server) -> None:
    """Danger: a dashboard shows hits, and nobody can say of how many."""
    before = {
        name: server.metric(name)
        for name in ("kvilt_documents_total", "kvilt_prompt_tokens_total", "kvilt_ttft_seconds_count")
    }
    block = server.chat("Who?", DOCUMENTS).json["kvilt"]
    assert server.metric("kvilt_documents_total") - before["kvilt_documents_total"] == 2
    tokens = server.metric("kvilt_prompt_tokens_total") - before["kvilt_prompt_tokens_total"]
    assert tokens == block["reused_tokens"] + block["computed_tokens"]
    assert server.metric("kvilt_ttft_seconds_count") == before["kvilt_ttft_seconds_count"] + 1
    assert 0 < server.metric("kvilt_store_bytes") <= server.metric("kvilt_store_budget_bytes")
    text = server.ask("GET", "/metrics").body.decode()
    for panel in json.loads((ROOT / "docs" / "grafana.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            for name in re.findall(r"kvilt_\w+", target["expr"]):
                assert re.search(rf"^{name}(\{{| )", text, re.MULTILINE), name


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"host": "0.0.0.0"}, "no key"),
        ({"host": "::"}, "no key"),
        ({"host": "example.org"}, "no key"),
        ({"port": 1, "host": "127.0.0.1", "keys": Path("/nowhere")}, "cannot read the keys"),
        ({"body": "much"}, "--max-body"),
        ({"audit": Path("/nowhere/log")}, "audit"),
    ],
)
def test_a_server_that_may_not_start_says_why(
    settings: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: a server listens to the whole network because nobody thought of a key."""
    monkeypatch.delenv("KVILT_API_KEY", raising=False)
    with pytest.raises(UserError, match=named):
        run("tiny", lambda: engine_of("block"), Settings(**{"port": 0, **settings}), print)


def test_the_page_of_the_documentation_runs(server: Server) -> None:
    """Danger: the first program that a reader types does not work."""
    page = (ROOT / "docs" / "serve.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    shown: list[Any] = []
    code = code.replace("http://127.0.0.1:8000", server.url).replace('"builtin"', '"tiny"')
    exec(compile(code, "serve.md", "exec"), {"print": lambda *given: shown.append(given)})
    assert shown[0][1] > 0
