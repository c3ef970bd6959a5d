"""vLLM's HTTP plugin: `documents` in chat completions, and /v1/documents. `VLLM_PLUGINS=kvilt` switches it on.

A chat's documents are laid out here and handed to vLLM as token ids, with the places where they stand; everything else
(sampling, streaming, usage, parsers) is vLLM's own. Nobody else may name such places."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion import api_router as chat_routes
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as completion_routes
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from kvilt.errors import StoreError, UserError
from kvilt.integrations.vllm.deployment import Deployment, Settings
from kvilt.integrations.vllm.documents import PARAMETER
from kvilt.integrations.vllm.encoding import Background, QueueFull
from kvilt.integrations.vllm.prompts import Prompts, Unknown, Wanted, is_digest

LISTED = 1000  # documents in one answer of GET /v1/documents
NAMESPACE = "x-kvilt-namespace"  # header of /v1/documents; chats name theirs by `cache_salt`
ENCODE = "x-kvilt-encode"  # header of chats: "no" leaves missing documents alone
KINDS = {409: "missing_documents", 429: "rate_limit_error", 503: "store_unavailable"}

router = APIRouter()


class DocumentChat(ChatCompletionRequest):
    """A chat whose documents may be texts, {"text", "title", "id"}, or {"id"} of a stored one."""

    documents: list[str | dict[str, Any]] | None = None


class Documents:
    """What the routes need, on `app.state.kvilt`."""

    def __init__(self, prompts: Prompts, background: Background | None) -> None:
        self.prompts, self.background = prompts, background
        self.deployment, self.store = prompts.deployment, prompts.deployment.store

    def namespace(self, request: Request) -> str:
        """Whose documents a request is about."""
        return request.headers.get(NAMESPACE) or self.deployment.settings.namespace

    def missing(self, wanted: list[Wanted]) -> list[Wanted]:
        """Those that are not stored."""
        there = self.store.contains(w.key.digest for w in wanted)
        return [w for w in wanted if w.key.digest not in there]


@router.post("/v1/chat/completions")
async def create_chat(request: DocumentChat, raw_request: Request) -> Any:
    """vLLM's own route, with documents."""
    _check(request)
    if request.documents is not None:
        await _lay(raw_request.app.state.kvilt, request, raw_request.headers.get(ENCODE) != "no")
    return await chat_routes.create_chat_completion(request, raw_request)


async def _lay(kvilt: Documents, request: DocumentChat, encode: bool) -> None:
    """Replace a chat's documents by token ids and the places where they stand; missing ones are encoded meanwhile."""
    if request.tools:
        raise UserError("documents and tools in one request are not served: call the tools without documents.")
    namespace = request.cache_salt or kvilt.deployment.settings.namespace
    messages = [m if isinstance(m, Mapping) else m.model_dump() for m in request.messages]
    asked = await asyncio.to_thread(kvilt.prompts.asked, messages, request.documents or [], namespace)
    parameters = {"prompt_token_ids": asked.ids, PARAMETER: {"documents": asked.places}}
    request.kv_transfer_params = {**(request.kv_transfer_params or {}), **parameters}
    request.documents = None
    if kvilt.background is not None and encode:
        kvilt.background.add(await asyncio.to_thread(kvilt.missing, asked.wanted), asked.system, some=True)


@router.post("/v1/completions")
async def create_completion(request: CompletionRequest, raw_request: Request) -> Any:
    """vLLM's own route."""
    _check(request)
    return await completion_routes.create_completion(request, raw_request)


@router.post("/v1/documents")
async def add_documents(raw_request: Request) -> Response:
    """Encode documents in the background: {"documents": [...], "system": "..."}; their ids and whether they are stored."""
    kvilt: Documents = raw_request.app.state.kvilt
    values, system, namespace = await _body(kvilt, raw_request)
    wanted = await asyncio.to_thread(kvilt.prompts.alone, values, system, namespace)
    missing = await asyncio.to_thread(kvilt.missing, wanted)
    if kvilt.background is not None:
        kvilt.background.add(missing, system)
    elif missing:
        raise UserError("this server encodes nothing: run kvilt encode, or start it with --encode.")
    todo = {w.key.digest for w in missing}
    listed = [{**_document(w), "stored": w.key.digest not in todo} for w in wanted]
    return JSONResponse({"object": "list", "data": listed}, 202 if todo else 200)


@router.post("/v1/documents/check")
async def check_documents(raw_request: Request) -> Response:
    """Whether documents are stored, and what is stored of the same text: for `kvilt doctor --vllm`."""
    kvilt: Documents = raw_request.app.state.kvilt
    wanted = await asyncio.to_thread(kvilt.prompts.alone, *await _body(kvilt, raw_request))
    missing = {w.key.digest for w in await asyncio.to_thread(kvilt.missing, wanted)}
    entries = await asyncio.to_thread(kvilt.store.entries) if missing else []
    listed = []
    for w in wanted:
        near = [e.fields for e in entries if e.fields.get("tokens") == w.key.tokens] if w.key.digest in missing else []
        listed.append({**_document(w), "stored": w.key.digest not in missing, "fields": asdict(w.key), "near": near})
    return JSONResponse({"strategy": kvilt.deployment.settings.strategy, "data": listed})


@router.get("/v1/documents")
async def list_documents(raw_request: Request) -> Response:
    """Stored documents of a namespace that this server can reuse."""
    kvilt: Documents = raw_request.app.state.kvilt
    entries = await asyncio.to_thread(kvilt.store.entries, kvilt.namespace(raw_request))
    own = [e for e in entries if kvilt.deployment.knows(e.fields)]
    data = [{"id": e.key, "title": e.title, "tokens": e.tokens, "bytes": e.bytes} for e in own[:LISTED]]
    return JSONResponse({"object": "list", "data": data, "total": len(own)})


@router.get("/v1/documents/{digest}")
async def get_document(digest: str, raw_request: Request) -> Response:
    """One stored document."""
    kvilt: Documents = raw_request.app.state.kvilt
    entry = await asyncio.to_thread(kvilt.store.entry, digest) if is_digest(digest) else None
    if entry is None or entry.namespace != kvilt.namespace(raw_request):
        return _json(404, f"no document {digest!r:.80} is stored.")
    return JSONResponse({"id": entry.key, "title": entry.title, "tokens": entry.tokens, "bytes": entry.bytes})


@router.delete("/v1/documents/{digest}")
async def delete_document(digest: str, raw_request: Request) -> Response:
    """Delete a stored document."""
    kvilt: Documents = raw_request.app.state.kvilt
    there = is_digest(digest) and await asyncio.to_thread(kvilt.store.delete, digest, kvilt.namespace(raw_request))
    return (
        JSONResponse({"id": digest, "deleted": True}) if there else _json(404, f"no document {digest!r:.80} is stored.")
    )


class Plugin:
    """The entry point `kvilt` of the group `vllm.endpoint_plugins`."""

    name = "kvilt"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, those that vLLM has too instead of its own; and what our errors look like."""
        app.include_router(router)
        for kind in (UserError, StoreError, Unknown, QueueFull):
            app.add_exception_handler(kind, _failed)

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        """Make what the routes need, from the connector's configuration."""
        transfer = engine_client.vllm_config.kv_transfer_config if engine_client is not None else None
        if engine_client is None or transfer is None:
            raise UserError("Kvilt's routes need its connector: start the server with `kvilt vllm`.")
        settings, model = Settings.of(transfer.kv_connector_extra_config), engine_client.vllm_config.model_config
        state.kvilt = await asyncio.to_thread(_documents, settings, model.model, model.tokenizer or model.model)


def _documents(settings: Settings, source: str, tokenizer: str) -> Documents:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(tokenizer)
    prompts = Prompts(Deployment(source, made, settings), made)
    return Documents(prompts, Background(source, settings) if settings.encode else None)


async def _body(kvilt: Documents, request: Request) -> tuple[list[Any], str | None, str]:
    """Documents, system text and namespace of a request. Raises UserError."""
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON: {error}") from error
    values, system = (body.get("documents"), body.get("system")) if isinstance(body, dict) else (None, None)
    if not isinstance(values, list) or not isinstance(system, str | None):
        raise UserError('write {"documents": [{"text": "..."}], "system": "..."}; the system text may be left out.')
    return values, system, kvilt.namespace(request)


def _check(request: Any) -> None:
    """Places come from this plugin alone. Raises UserError."""
    if PARAMETER in (request.kv_transfer_params or {}):
        raise UserError(f"kv_transfer_params.{PARAMETER} is set by the server: give `documents` instead.")


def _document(wanted: Wanted) -> dict[str, Any]:
    return {"id": wanted.key.digest, "title": wanted.document.title or "", "tokens": len(wanted.ids)}


def _failed(request: Request, error: Exception) -> Response:
    """What goes wrong on purpose, as OpenAI's clients expect it."""
    if isinstance(error, Unknown):
        message = f"{len(error.ids)} documents are not stored: send their texts, or add them by POST /v1/documents."
        return _json(409, message, missing=list(error.ids))
    return _json(429 if isinstance(error, QueueFull) else 400 if isinstance(error, UserError) else 503, str(error))


def _json(status: int, message: str, **more: Any) -> Response:
    error = {"message": message, "type": KINDS.get(status, "invalid_request_error"), "code": status, **more}
    return JSONResponse({"error": error}, status, {"retry-after": "5"} if status in (429, 503) else None)
