"""The application: its table of routes, who may ask, what errors look like, the page, and /openapi.json made from all that."""

from __future__ import annotations

import contextlib
import mimetypes
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Any

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from kvilt import __version__
from kvilt.serve import replies, wire
from kvilt.serve.door import Door, Gone
from kvilt.serve.routes import Routes
from kvilt.serve.wire import Refused

Endpoint = Callable[[Request], Awaitable[Response]]
Table = list[tuple[str, str, Endpoint, type[msgspec.Struct] | None]]
LOCAL = frozenset(("localhost", "127.0.0.1", "[::1]"))
PAGE = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self' data:; "
PAGE += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
SAFE = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "content-security-policy": PAGE}
FREE = ("/health", "/", "/page/{name}", "/openapi.json")  # without a key
QUERY = {"/v1/documents": ("limit", "after"), "/v1/documents/{id}": ("text",)}
STATUSES = (400, 401, 403, 404, 408, 409, 413, 415, 429, 503, 504)


def guarded(door: Door, path: str, endpoint: Endpoint) -> Endpoint:
    """The answer of one route: checks who asks, counts, and turns whatever goes wrong into a body that says it."""

    async def answer(request: Request) -> Response:
        try:
            _check_host(door, request.headers.get("host", "").lower())
            if path not in FREE:
                door.namespace(request, None)
            response = await endpoint(request)
        except (Gone, ClientDisconnect):
            response = Response(status_code=499)
        except Exception as error:
            response = failed(error)
        door.metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    return answer


def _check_host(door: Door, host: str) -> None:
    """A page of another site must not reach a server without keys under a name of its own."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if not door.tenants.asked_for and name not in LOCAL:
        raise Refused(403, f"this server answers to localhost alone, not to {name!r:.80}: start it with a key.")


def failed(error: Exception) -> Response:
    """The response that says what went wrong."""
    status, headers = replies.status_of(error), replies.retry_after(error)
    if status == 500:
        replies.fault(error)
    headers |= {"connection": "close"} if status in (401, 408, 413, 415) else {}  # the body is not read to its end
    headers |= {"www-authenticate": "Bearer"} if status == 401 else {}
    return Response(replies.encode(replies.failure(error)), status, headers, "application/json")


def build(routes: Routes, closing: Callable[[], None]) -> Starlette:
    """The application; `closing` is called, in a thread, when it ends."""
    table = _table(routes)
    described = description(table)

    async def openapi(_: Request) -> Response:
        """What is served."""
        return Response(described, media_type="application/json")

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(closing)

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return failed(Refused(error.status_code, f"{error.detail}: see /openapi.json for what is served."))

    pages: Table = [
        ("GET", "/openapi.json", openapi, None),
        ("GET", "/", page, None),
        ("GET", "/page/{name}", page, None),
    ]
    listed = [Route(p, guarded(routes, p, made), methods=[method]) for method, p, made, _ in (*table, *pages)]
    handlers: dict[Any, Any] = {HTTPException: http_error}
    return Starlette(routes=listed, exception_handlers=handlers, lifespan=lifespan)


def _table(r: Routes) -> Table:
    library, one = r.library, "/v1/documents/{id}"
    return [
        ("POST", "/v1/chat/completions", r.chat, wire.Chat),
        ("POST", "/v1/completions", r.complete, wire.Completion),
        ("POST", "/v1/responses", r.respond, wire.Respond),
        ("POST", "/v1/plan", r.plan, wire.Chat),
        ("GET", "/v1/models", r.models, None),
        ("GET", "/v1/models/{model}", r.models, None),
        ("POST", "/v1/documents", r.add, wire.Added),
        ("GET", "/v1/documents", r.listed, None),
        ("GET", one, r.one, None),
        ("DELETE", one, r.on(library.delete), None),
        ("POST", f"{one}/verify", r.on(library.verify), None),
        ("POST", f"{one}/pin", r.on(library.pin), None),
        ("POST", f"{one}/unpin", r.on(library.unpin), None),
        ("GET", "/metrics", r.measured, None),
        ("GET", "/health", health, None),
    ]


def description(table: Table) -> bytes:
    """The OpenAPI description."""
    refused = {
        "description": "refused",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    anything: dict[str, Any] = {kind: {} for kind in ("application/json", "text/event-stream", "text/plain")}
    answers: dict[str, Any] = {str(s): {"description": "done", "content": anything} for s in (200, 202)}
    answers |= {str(s): refused for s in STATUSES}
    kinds = [body for *_, body in table if body is not None]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schemas["Error"] = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    paths: dict[str, dict[str, Any]] = {}
    for method, path, endpoint, body in table:
        named = [{"in": "path", "required": True, "name": name} for name in re.findall(r"{(\w+)}", path)]
        named += [{"in": "query", "name": name} for name in QUERY.get(path, ()) if method == "GET"]
        parameters = [{**parameter, "schema": {"type": "string"}} for parameter in named]
        told = {"summary": endpoint.__doc__, "parameters": parameters, "responses": answers}
        if body is not None:
            schema = {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
            told["requestBody"] = {"required": True, "content": {"application/json": schema}}
        paths.setdefault(path, {})[method.lower()] = told
    info = {"title": "Kvilt", "version": __version__, "description": "OpenAI's routes, with documents."}
    components = {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
    whole = {"openapi": "3.1.0", "info": info, "paths": paths, "components": components, "security": [{"key": []}, {}]}
    return msgspec.json.encode(whole)


async def health(_: Request) -> Response:
    """Whether the server is up."""
    return Response(b'{"status":"ok"}', media_type="application/json")


async def page(request: Request) -> Response:
    """A file of the page."""
    name = request.path_params.get("name", "index.html")
    file = files("kvilt.serve").joinpath("page", name)
    if name.startswith(".") or "/" in name or "\\" in name or not file.is_file():
        raise Refused(404, f"there is no page {name!r:.80}.")
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Response(file.read_bytes(), headers={**SAFE, "cache-control": "no-cache"}, media_type=kind)
