"""What is answered: bodies and streams of the three routes, and errors as OpenAI's clients expect them."""

from __future__ import annotations

import logging
import secrets
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from kvilt.engine.streaming import Cancelled
from kvilt.errors import PromptError, StoreError, UserError
from kvilt.serve.asking import Done, Unknown
from kvilt.serve.receipts import First
from kvilt.serve.wire import Refused
from kvilt.serve.worker import Late, QueueFull, Stopping

KINDS = {401: "authentication_error", 404: "not_found_error", 409: "missing_documents", 429: "rate_limit_error"}
KINDS |= {500: "server_error", 503: "store_unavailable", 504: "timeout_error"}
log = logging.getLogger("kvilt")
encode = msgspec.json.encode


def status_of(error: BaseException) -> int:
    """The HTTP status of what went wrong."""
    if isinstance(error, Refused):
        return error.status
    kinds = ((Unknown, 409), (QueueFull, 429), (Late, 504), ((Stopping, StoreError, Cancelled), 503), (UserError, 400))
    return next((status for kind, status in kinds if isinstance(error, kind)), 500)


def failure(error: BaseException) -> dict[str, Any]:
    """The body that says what went wrong; of a fault of our own nothing but that it is one."""
    status, message = status_of(error), str(error) or str(Stopping())  # a job that was cut off says nothing
    if status == 500:
        message = "a fault of the server's own; its log says more."
    made = {"message": message, "type": KINDS.get(status, "invalid_request_error"), "code": status}
    made["param"] = getattr(error, "param", "messages" if isinstance(error, PromptError) else None)
    return {"error": made | ({"missing": error.ids} if isinstance(error, Unknown) else {})}


def fault(error: BaseException) -> None:
    """Log a fault of our own: what it is and where it happened. What it says may hold a user's text, and is left out."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    log.error("a fault of the server's own: %s in %s", type(error).__name__, where)


def retry_after(error: BaseException) -> dict[str, str]:
    """The header that says when to try again."""
    if isinstance(error, QueueFull):
        return {"retry-after": str(max(1, round(error.seconds)))}
    return {"retry-after": "5"} if status_of(error) == 503 else {}


def timing(first: First, receipt: dict[str, Any] | None = None) -> dict[str, str]:
    """Headers: where the time went until the first token (all of it, where the answer is whole), and what was reused."""
    steps = first.times if receipt is None else receipt["steps"] | {"ttft": receipt["ttft"]}
    told = ", ".join(f"{step};dur={1000 * seconds:.3f}" for step, seconds in steps.items())
    plan, kept = first.placing.plan, first.placing.rows
    reused = max(kept, plan.reused_count)
    counts = {"x-kvilt-reused": str(reused), "x-kvilt-computed": str(len(plan.positions) - reused)}
    return {"server-timing": told, **counts}


def event(body: dict[str, Any], name: str = "") -> bytes:
    """One server-sent event."""
    return (f"event: {name}\ndata: ".encode() if name else b"data: ") + encode(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _tokens(done: Done) -> dict[str, Any]:
    prompt, reused, written = done.usage
    counts = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    return {**counts, "prompt_tokens_details": {"cached_tokens": reused}}


@dataclass
class Reply:
    """How a chat is answered."""

    model: str
    with_usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    prefix, kind, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.prefix + self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, text: str | None, reason: str | None, whole: bool) -> dict[str, Any]:
        said = {"role": "assistant", "content": text} if whole else {} if text is None else {"content": text}
        told = {"message": said} if whole else {"delta": said}
        return {"index": 0, **told, "logprobs": None, "finish_reason": reason}

    def body(self, done: Done) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._choice(done.text, done.reason, True)]
        return {**self._head(self.kind), "choices": choices, "usage": _tokens(done), "kvilt": done.receipt}

    def begin(self) -> bytes:
        """What a stream begins with."""
        first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return event({**self._head(self.part), "choices": [first]})

    def piece(self, text: str) -> bytes:
        """A piece of the text."""
        return event({**self._head(self.part), "choices": [self._choice(text, None, False)]})

    def finish(self, done: Done) -> Iterator[bytes]:
        """What a stream ends with."""
        head = self._head(self.part)
        yield event({**head, "choices": [self._choice(None, done.reason, False)], "kvilt": done.receipt})
        if self.with_usage:
            yield event({**head, "choices": [], "usage": _tokens(done)})
        yield DONE

    def broken(self, error: BaseException) -> Iterator[bytes]:
        """What a stream ends with where something goes wrong in it."""
        yield event(failure(error))
        yield DONE


class Completed(Reply):
    """How a prompt without template is answered."""

    prefix, kind, part = "cmpl-", "text_completion", "text_completion"

    def _choice(self, text: str | None, reason: str | None, whole: bool) -> dict[str, Any]:
        return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": reason}

    def begin(self) -> bytes:
        """Nothing: the first piece says it all."""
        return b""


class Responded(Reply):
    """How /v1/responses answers, and its typed events."""

    prefix = "resp_"
    number = -1

    @property
    def at(self) -> dict[str, Any]:
        """Where the text stands."""
        return {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}

    def _response(self, status: str, done: Done | None = None) -> dict[str, Any]:
        head = {"id": self.prefix + self.id, "object": "response", "created_at": self.created, "status": status}
        made: dict[str, Any] = {
            **head,
            "model": self.model,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
        }
        made |= dict.fromkeys(("error", "incomplete_details", "instructions", "temperature", "top_p", "usage"))
        made |= {"metadata": {}, "output": [] if done is None else [self._item("completed", done.text)]}
        if status == "incomplete":
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        if done is not None:
            prompt, reused, written = done.usage
            details = {
                "input_tokens_details": {"cached_tokens": reused},
                "output_tokens_details": {"reasoning_tokens": 0},
            }
            total = {"input_tokens": prompt, "output_tokens": written, "total_tokens": prompt + written}
            made |= {"usage": {**total, **details}, "kvilt": done.receipt}
        return made

    def _item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [self._part(text)]
        return {"id": f"msg_{self.id}", "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": []}

    def _event(self, kind: str, **more: Any) -> bytes:
        self.number += 1
        return event({"type": kind, "sequence_number": self.number, **more}, kind)

    def body(self, done: Done) -> dict[str, Any]:
        """The whole answer."""
        return self._response("completed" if done.reason == "stop" else "incomplete", done)

    def begin(self) -> bytes:
        """What a stream begins with."""
        begun = self._event("response.created", response=self._response("in_progress"))
        begun += self._event("response.in_progress", response=self._response("in_progress"))
        begun += self._event("response.output_item.added", output_index=0, item=self._item("in_progress", None))
        return begun + self._event("response.content_part.added", **self.at, part=self._part(""))

    def piece(self, text: str) -> bytes:
        """A piece of the text."""
        return self._event("response.output_text.delta", **self.at, delta=text, logprobs=[])

    def finish(self, done: Done) -> Iterator[bytes]:
        """What a stream ends with."""
        yield self._event("response.output_text.done", **self.at, text=done.text, logprobs=[])
        yield self._event("response.content_part.done", **self.at, part=self._part(done.text))
        yield self._event("response.output_item.done", output_index=0, item=self._item("completed", done.text))
        whole = self.body(done)
        yield self._event(f"response.{whole['status']}", response=whole)

    def broken(self, error: BaseException) -> Iterator[bytes]:
        """What a stream ends with where something goes wrong in it."""
        told = failure(error)["error"]
        yield self._event("error", code=str(told["code"]), message=told["message"], param=told["param"])
