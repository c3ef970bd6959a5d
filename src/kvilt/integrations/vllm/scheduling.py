"""The connector's end in the scheduler: tickets of requests, what is granted to them, and their receipts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any, Literal

from kvilt.errors import KviltError, SpecError
from kvilt.integrations.vllm.deployment import Deployment, Settings
from kvilt.integrations.vllm.documents import PARAMETER, Arrived, Documents, Ticket
from kvilt.integrations.vllm.index import Index, Watcher
from kvilt.integrations.vllm.loading import Load
from kvilt.types import digest_of

COOLING = 30.0  # seconds for which a document is left alone that could not be loaded
Grant = Literal["now", "parts"]

logger = logging.getLogger("kvilt")


class Scheduling:
    """Every request that reuses documents, from its arrival to its receipt."""

    def __init__(self, deployment: Deployment, longest: int) -> None:
        self.deployment, self.longest = deployment, longest
        self.index = Index()
        self.documents = Documents(deployment, self.index)
        self.watcher = Watcher(deployment, self.index) if deployment.settings.refresh > 0 else None
        if self.watcher is not None:
            self.watcher.start()
        self.tickets: dict[str, Ticket] = {}
        self.notes: dict[str, str] = {}  # why a request with documents reuses nothing
        self.grants: dict[str, Grant] | None = None  # of requests with holes, in this step; None: nobody computes holes
        self._failing: dict[str, float] = {}  # documents that could not be loaded, and until when they are left alone
        self.admitted: list[str] = []  # requests that have got their blocks since the last step and wait for rows
        self.started: list[str] = []  # those whose rows are loaded before this step

    @classmethod
    def of(cls, settings: Settings, vllm_config: Any) -> Scheduling:
        """The end for a server's configuration."""
        from transformers import AutoTokenizer

        model = vllm_config.model_config
        deployment = Deployment(model.model, AutoTokenizer.from_pretrained(model.tokenizer or model.model), settings)
        if deployment.needs_embeddings and not model.enable_prompt_embeds:
            raise SpecError(f"strategy {settings.strategy!r} computes vectors: start vLLM with --enable-prompt-embeds.")
        return cls(deployment, model.max_model_len)

    def receive(self, request: Any) -> None:
        """Find a request's documents; lay its prompt into slots and salt it, so that no other request meets its blocks.

        Whatever goes wrong costs the reuse, never the request."""
        why = _unsuitable(request)
        if why:
            self.notes[request.request_id] = why
        else:
            hint = (request.kv_transfer_params or {}).get(PARAMETER)
            self._lay(request, Arrived(request.prompt_token_ids, request.cache_salt, hint))

    def receive_again(self, request: Any) -> None:
        """The same for a request that failed: without the documents that could not be loaded."""
        arrived = self.tickets.pop(request.request_id).arrived
        _write(request, list(arrived.ids), arrived.salt)
        self._lay(request, arrived)

    def _lay(self, request: Any, arrived: Arrived) -> None:
        try:
            now = time.monotonic()
            self._failing = {digest: until for digest, until in self._failing.items() if until > now}
            ticket, why = self.documents.ticket(arrived, self._failing), ""
            if ticket is not None and len(ticket.placed.tokens) >= self.longest:
                ticket, why = None, "with what stands around its documents it is longer than the model's context"
        except KviltError as error:
            ticket, why = None, str(error)
        except Exception:
            logger.exception("request %s is computed as it stands", request.request_id)
            ticket, why = None, "an error in Kvilt, see the server's log"
        if ticket is not None:
            self.tickets[request.request_id] = ticket
            salt = digest_of("kvilt", arrived.salt or "", ticket.placed.fingerprint)
            _write(request, list(ticket.placed.tokens), salt)
        elif why:
            self.notes[request.request_id] = why

    def refuse(self, digests: Iterable[str]) -> None:
        """Leave documents alone for a while that could not be loaded."""
        self._failing.update(dict.fromkeys(digests, time.monotonic() + COOLING))

    def matched(self, request: Any, local: int) -> tuple[int | None, bool]:
        """How many slots after the first `local` ones will be there before the tail, and whether that takes several steps.

        None where holes have to wait for a step with room."""
        ticket = self.tickets.get(request.request_id)
        if ticket is None:
            return 0, False
        placed = ticket.placed
        ticket.local, ticket.end = local, placed.tail
        holes = placed.holes_in(local, placed.tail)
        if placed.reused(local) == 0:
            ticket.end = local
        elif holes and self.grants is None:
            ticket.end = max(local, holes[0][0])  # without our scheduler: up to the first hole
        elif holes:
            grant = self.grants and self.grants.get(request.request_id)
            if grant is None:
                ticket.asked += 1
                return None, False
            return ticket.end - local, grant == "parts"
        return max(0, ticket.end - local), False

    def load(self, request_id: str, blocks: list[int]) -> Load:
        """What the workers load for a request that was admitted in this step."""
        return Load(request_id, tuple(self.tickets[request_id].pieces), tuple(blocks))

    def note(self, loaded: dict[str, tuple[int, float]]) -> None:
        """Add what the workers report to the receipts."""
        for request_id, (size, seconds) in loaded.items():
            ticket = self.tickets.get(request_id)
            if ticket is not None:
                ticket.receipt.update(bytes=size, seconds=round(seconds, 6))

    def receipt(self, request: Any) -> dict[str, Any] | None:
        """What was reused for a request that has finished; None for one without documents."""
        ticket = self.tickets.pop(request.request_id, None)
        why = self.notes.pop(request.request_id, "")
        if ticket is None:
            return {"reused_tokens": 0, "why": why} if why else None
        if self.grants is None and ticket.placed.holes:
            ticket.receipt["why"] = "vLLM runs without --scheduler-cls ...KviltScheduler: reuse ends at the first hole"
        return {
            **ticket.receipt,
            "reused_tokens": ticket.loaded + ticket.local,
            "computed_tokens": len(ticket.placed.tokens) - ticket.local - ticket.loaded,
            "cached_tokens": ticket.local,
            "holes": len(ticket.holes),
        }

    def look(self) -> None:
        """Look through the store now."""
        if self.watcher is not None:
            self.watcher.look()

    def close(self) -> None:
        """Stop looking, release the store."""
        if self.watcher is not None:
            self.watcher.stop()
        self.deployment.store.close()


def _unsuitable(request: Any) -> str:
    """Why a request cannot reuse documents, whatever it holds; empty if it can."""
    reasons = {
        "it has no prompt of tokens": request.prompt_token_ids is None or request.pooling_params is not None,
        "its prompt holds embeddings or media": request.prompt_embeds is not None or bool(request.mm_features),
        "it asks for prompt_logprobs, which need every token computed": request.skip_reading_prefix_cache,
        "it names an adapter, for which no documents are stored": request.lora_request is not None,
        "its prompt grows while it runs": request.resumable,
    }
    return next((why for why, applies in reasons.items() if applies), "")


def _write(request: Any, tokens: list[int], salt: str | None) -> None:
    """Give a request that has produced nothing yet another prompt and salt."""
    request.prompt_token_ids = tokens
    request._all_token_ids[:] = tokens
    request.num_prompt_tokens = len(tokens)
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()
