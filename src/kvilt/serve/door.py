"""What every route needs: who asks, the body of a request as far as it is welcome, and what the worker says of its job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from starlette.requests import Request
from starlette.responses import Response

from kvilt.serve import replies
from kvilt.serve.aio import Events
from kvilt.serve.asking import Engines
from kvilt.serve.library import Library
from kvilt.serve.metrics import Metrics
from kvilt.serve.settings import Settings
from kvilt.serve.tenants import Tenants
from kvilt.serve.wire import Refused
from kvilt.serve.worker import Job, Late, Worker
from kvilt.stores.sizes import parse_size

T = TypeVar("T")
NAMESPACE = "x-kvilt-namespace"
BODY_SECONDS = 30.0


class Gone(Exception):
    """The client went away."""


async def while_there(request: Request, events: Events) -> Any:
    """The next thing that comes of a job, which is withdrawn where its client goes away or its time is over before."""
    ends = None if events.job.ends is None else max(0.0, events.job.ends - time.monotonic()) + 1.0
    try:
        return await unless_gone(request, events.next(), ends)
    except BaseException:
        events.withdraw()
        raise


async def unless_gone(request: Request, wanted: Awaitable[T], seconds: float | None = None) -> T:
    """What is waited for. Raises Gone where the client goes away before, Late when the time is over."""
    both = asyncio.ensure_future(wanted), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if both[0].done():
            return both[0].result()
        raise Gone if both[1].done() else Late
    finally:
        for task in both:
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Door:
    """What stands between HTTP and the worker."""

    def __init__(self, engines: Engines, worker: Worker, tenants: Tenants, settings: Settings) -> None:
        self.engines, self.worker, self.tenants, self.settings = engines, worker, tenants, settings
        self.longest = parse_size(settings.body, "--max-body") or 0
        self.metrics = Metrics(worker, engines.base.store)
        self.library = Library(engines, worker, self.metrics.encoded.inc, self.metrics.shared.inc)
        self.metrics.gauge("kvilt_encode_queue", "Documents that wait to be encoded.", lambda: self.library.waiting)

    async def work(self, request: Request, work: Callable[[Job], T]) -> T:
        """Have the worker do something; its result."""
        return cast(T, await while_there(request, Events(self.worker, work, self.settings.deadline)))

    def namespace(self, request: Request, salt: str | None) -> str:
        """The namespace of who asks. Raises Refused (401)."""
        salt = salt or request.headers.get(NAMESPACE) or None
        found = self.tenants.namespace_of(request.headers.get("authorization"), salt)
        if found is None:
            raise Refused(401, "this server wants a key: authorization: Bearer KEY.")
        return found

    async def body(self, request: Request) -> bytes:
        """The body, as long as it is JSON and not too long. Raises Refused."""
        self.namespace(request, None)  # nobody without a key is read from
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "send JSON: content-type: application/json.")
        declared, read, size = request.headers.get("content-length", "0"), bytearray(), 0
        too_long = Refused(413, f"the body is longer than {self.longest:,} bytes.")
        if len(declared) > 12 or (declared.isdecimal() and int(declared) > 8 * self.longest):
            raise too_long
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    read += chunk if size <= self.longest else b""  # what is a little too long is read, but not kept
                    if size > 8 * self.longest:
                        raise too_long
        except TimeoutError as error:
            raise Refused(408, f"the body did not come within {BODY_SECONDS:.0f} seconds.") from error
        if size > self.longest:
            raise too_long
        return bytes(read)


def json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A body as JSON."""
    return Response(replies.encode(body), status, headers, "application/json")
