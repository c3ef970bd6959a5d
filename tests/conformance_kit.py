"""One contract, two doors: what the tests of both share. Needs pytest and openai alone, besides what Kvilt needs."""

from __future__ import annotations

import importlib.util
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STRATEGY = "epic:tokens=17,sink=system"
OTHER_SYSTEM = "Answer in one word."
NEW = 12


def _load_kit() -> Any:
    spec = importlib.util.spec_from_file_location("vllm_kit", Path(__file__).parent / "vllm" / "vllm_kit.py")
    assert spec is not None
    assert spec.loader is not None
    import sys

    made = sys.modules.setdefault("vllm_kit", importlib.util.module_from_spec(spec))
    if not hasattr(made, "DOCUMENTS"):
        spec.loader.exec_module(made)
    return made


vllm_kit = _load_kit()  # its model, documents and question: what vLLM can serve, everybody can
DOCUMENTS, QUESTION = vllm_kit.DOCUMENTS, vllm_kit.QUESTION
TEXTS = [{"title": d.title, "text": d.text} for d in DOCUMENTS]
SAID = [{"role": "user", "content": QUESTION}]


@dataclass
class Door:
    """A server, and the client as it comes."""

    kind: str
    url: str
    client: Any

    def http(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a plain request."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        request = urllib.request.Request(self.url + path, data, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=240) as answer:
                return answer.status, _json(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _json(error.read())

    def is_up(self) -> bool:
        """Whether it says so."""
        try:
            return self.http("GET", "/health")[0] == 200
        except OSError:
            return False

    def chat(self, documents: Any = None, messages: Any = SAID, **more: Any) -> Any:
        """A greedy chat."""
        extra = {**({"documents": documents} if documents is not None else {}), **more.pop("extra", {})}
        options = {"max_tokens": NEW, "temperature": 0, **more}
        return self.client.chat.completions.create(model="tiny", messages=messages, extra_body=extra, **options)

    def post(self, **body: Any) -> tuple[int, Any]:
        """A chat as plain JSON."""
        return self.http("POST", "/v1/chat/completions", {"model": "tiny", "messages": SAID, "max_tokens": 1, **body})

    def add(self, documents: Any, **headers: str) -> list[str]:
        """Add documents and wait until they are stored; their ids."""
        while True:
            status, told = self.http("POST", "/v1/documents", {"documents": documents}, **headers)
            assert status in (200, 202), told
            if all(d["stored"] for d in told["data"]):
                return [d["id"] for d in told["data"]]
            time.sleep(0.1)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data


def text(answer: Any) -> str:
    """What was answered."""
    return str(answer.choices[0].message.content).strip()


def receipt(answer: Any) -> dict[str, Any]:
    """What was reused: `kvilt` serve tells it in a block of that name, vLLM in its transfer parameters."""
    block = getattr(answer, "kvilt", None)
    return dict(block or (getattr(answer, "kv_transfer_params", None) or {}).get("kvilt") or {})


def eventually(ask: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
    """What is asked for, as soon as it is as it should be: vLLM looks through the store every few seconds."""
    end = time.monotonic() + 60
    while not good(answer := ask()):
        assert time.monotonic() < end, answer
        time.sleep(0.3)
    return answer
