"""The routes, in front of the worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from kvilt.serve import asking, replies, wire
from kvilt.serve.aio import Events
from kvilt.serve.asking import Done, Question
from kvilt.serve.door import Door, json, unless_gone, while_there
from kvilt.serve.kept import Placing
from kvilt.serve.library import LISTED
from kvilt.serve.metrics import Audit
from kvilt.serve.receipts import First, described
from kvilt.serve.replies import Completed, Reply, Responded
from kvilt.serve.wire import Refused
from kvilt.serve.worker import Job
from kvilt.types import Clock

SYSTEM = ("system", "developer")
ENCODE = "x-kvilt-encode"
NO_STORE = {"cache-control": "no-store", "x-accel-buffering": "no"}


class Routes(Door):
    """What the routes do."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.audit, self.began, self.name = Audit(self.settings.audit), int(time.time()), self.settings.name or "kvilt"

    async def chat(self, request: Request) -> Response:
        """Answer a chat with documents."""
        body = wire.decode(await self.body(request), wire.Chat)
        return await self._answer(request, body, [_message(m, n) for n, m in enumerate(body.messages)], Reply)

    async def complete(self, request: Request) -> Response:
        """Answer a prompt without template."""
        body = wire.decode(await self.body(request), wire.Completion)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if len(prompts) != 1 or not isinstance(prompts[0], str):
            raise wire.Invalid("prompt: give one text.", "prompt")
        return await self._answer(request, body, prompts[0], Completed)

    async def respond(self, request: Request) -> Response:
        """Answer as /v1/responses does."""
        body = wire.decode(await self.body(request), wire.Respond)
        given = [wire.Message("user", body.input)] if isinstance(body.input, str) else body.input
        messages = [_message(m, n) for n, m in enumerate(given)]
        told = [{"role": "system", "content": body.instructions}] if body.instructions else []
        return await self._answer(request, body, [*told, *messages], Responded)

    async def plan(self, request: Request) -> Response:
        """The plan of a chat, without answering; documents that are not stored stand in it as computed."""
        body = wire.decode(await self.body(request), wire.Chat)
        question = self._question(request, body, [_message(m, n) for n, m in enumerate(body.messages)])
        question.encode = False

        def work(job: Job) -> Any:
            engine, chat, documents = question.ready(self.engines)
            placing = Placing(self.engines.kept, None)
            plan, fetched, _ = engine.ready(chat, documents, True, 1, Clock(), ())
            placing.plan, placing.fetched = plan, fetched
            told = described(placing)
            reused, charged = plan.reused_count, plan.charged(engine.info.linear_cost)
            tokens = {"reused_tokens": reused, "computed_tokens": len(plan.computed_rows), "charged": round(charged, 4)}
            return {"strategy": engine.label, **tokens, "prompt_tokens": len(plan.positions), "note": plan.note, **told}

        return json(await self.work(request, work))

    def _question(self, request: Request, body: wire.Asked, messages: Any) -> Question:
        self._named(body.model)
        ours = body.kvilt or wire.Ours()
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "seed")
        settings = {name: value for name in names if (value := getattr(body, name)) is not None}
        if body.top_k is not None and body.top_k > 0:
            settings["top_k"] = body.top_k
        if body.temperature == 0 or body.top_p == 0:  # greedy
            settings = {name: v for name, v in settings.items() if name in ("seed", "repetition_penalty")}
        settings |= {"eos_token_id": []} if body.ignore_eos else {}
        settings["max_new_tokens"] = body.limit or self.settings.tokens
        namespace = self.namespace(request, body.cache_salt)
        encode, strategy = ours.encode and request.headers.get(ENCODE) != "no", self.engines.check(ours.strategy)
        return Question(messages, body.documents, namespace, strategy, settings, wire.stops(body.stop), encode)

    async def _answer(self, request: Request, body: wire.Asked, messages: Any, kind: type[Reply]) -> Response:
        question = self._question(request, body, messages)
        reply = kind(self.name, bool(body.stream_options and body.stream_options.include_usage))
        deadline = (body.kvilt or wire.Ours()).deadline or self.settings.deadline
        events = Events(self.worker, lambda job: asking.answer(self.engines, question, job), deadline)
        first = await while_there(request, events)
        assert isinstance(first, First)
        if body.stream:
            stream = self._stream(request, question, events, reply)
            return StreamingResponse(stream, media_type="text/event-stream", headers=replies.timing(first) | NO_STORE)
        while not isinstance(done := await while_there(request, events), Done):
            pass
        self._note(request, question, done)
        return json(reply.body(done), headers=replies.timing(first, done.receipt))

    async def _stream(self, request: Request, question: Question, events: Events, reply: Reply) -> AsyncIterator[bytes]:
        try:
            yield reply.begin()
            while True:
                item = await events.next()
                texts, rest = ([item] if isinstance(item, str) else []), events.waiting()
                texts += [other for other in rest if isinstance(other, str)]
                if texts:
                    yield reply.piece("".join(texts))
                for other in (item, *rest):
                    if isinstance(other, Exception):
                        raise other
                    if isinstance(other, Done):
                        self._note(request, question, other)
                        for part in reply.finish(other):
                            yield part
                        return
        except Exception as error:
            if replies.status_of(error) == 500:
                replies.fault(error)
            for part in reply.broken(error):
                yield part
        finally:
            events.withdraw()

    def _note(self, request: Request, question: Question, done: Done) -> None:
        route, tokens = request.url.path, done.answer.usage.generated_tokens
        self.metrics.answered(done.receipt, tokens)
        self.audit.note(route, question.namespace, done.receipt, generated_tokens=tokens, finish=done.reason)

    def _named(self, model: str | None) -> None:
        if model not in (None, "", self.name):
            raise Refused(404, f"the model {model!r:.80} does not exist: this server has {self.name!r}.")

    async def add(self, request: Request) -> Response:
        """Encode documents in the background, or with "wait" before the answer."""
        body = wire.decode(await self.body(request), wire.Added)
        strategy = self.engines.check((body.kvilt or wire.Ours()).strategy)
        asked = [{"role": "user", "content": "?"}]
        question = Question(asked, body.documents, self.namespace(request, None), strategy)
        if not body.documents:
            raise wire.Invalid("documents: give at least one.", "documents")
        data, waits = await self.work(request, lambda job: self.library.add(question, body.system))
        if body.wait:
            every = asyncio.gather(*(asyncio.wrap_future(p.ends) for p in waits))
            await unless_gone(request, asyncio.shield(every))  # who goes away stops nobody else
            data = [await asyncio.to_thread(self.library.told, question.namespace, d["id"]) for d in data]
        todo = any(not d["stored"] for d in data)
        return json({"object": "list", "data": data}, 202 if todo else 200)

    async def listed(self, request: Request) -> Response:
        """Stored documents, oldest first."""
        limit = request.query_params.get("limit", str(LISTED))
        if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:6]) <= LISTED):
            raise wire.Invalid(f"limit must be a number from 1 to {LISTED}.", "limit")
        after, namespace = request.query_params.get("after"), self.namespace(request, None)
        return json(await asyncio.to_thread(self.library.listed, namespace, int(limit), after))

    async def one(self, request: Request) -> Response:
        """One document, its text too if ?text=yes."""
        wanted = request.query_params.get("text") == "yes"
        return await self.on(self.library.read if wanted else self.library.told)(request)

    def on(self, what: Callable[[str, str], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        """The route that does something with one document."""

        async def endpoint(request: Request) -> Response:
            return json(await asyncio.to_thread(what, self.namespace(request, None), request.path_params["id"]))

        endpoint.__doc__ = what.__doc__
        return endpoint

    async def models(self, request: Request) -> Response:
        """The one model of this server."""
        base, names = self.engines.base, dict.fromkeys(map(str, self.engines.strategies.values()))
        told = {"strategy": base.label, "strategies": [*names], "compress": str(base.compression)}
        dtype = str(base.model.hf.dtype).removeprefix("torch.")
        ours = {**told, "system": base.text.system, "context_length": base.model.context_length, "dtype": dtype}
        model = {"id": self.name, "object": "model", "created": self.began, "owned_by": "kvilt", "kvilt": ours}
        if "model" in request.path_params:
            self._named(request.path_params["model"])
            return json(model)
        return json({"object": "list", "data": [model]})

    async def measured(self, request: Request) -> Response:
        """Counters for Prometheus."""
        return Response(await asyncio.to_thread(self.metrics.text), media_type="text/plain; version=0.0.4")


def _message(m: wire.Message, n: int) -> dict[str, Any]:
    """A message as the engine takes it. Raises Invalid."""
    role = "system" if m.role in SYSTEM else m.role
    if role not in ("system", "user", "assistant", "tool"):
        raise wire.Invalid(f"messages[{n}].role: {m.role!r:.40} is none of system, developer, user, assistant, tool.")
    if m.tool_calls or m.type != "message":
        raise wire.Invalid(f"messages[{n}] is or holds a call of a tool: those are not served.", "messages")
    if m.content is None and role != "assistant":
        raise wire.Invalid(f"messages[{n}].content is missing.", "messages")
    return {"role": role, "content": m.content}
