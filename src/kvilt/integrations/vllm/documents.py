"""The documents of one request: where they stand in its prompt, which are stored, and the plan that follows.

Where they stand comes from our own HTTP plugin (`kv_transfer_params`) or from the index. Either names places alone: keys are
made from the tokens that stand there, so nothing that a client writes can name somebody else's document."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from kvilt.errors import KviltError, PromptError
from kvilt.integrations.vllm.deployment import Deployment
from kvilt.integrations.vllm.index import Index
from kvilt.integrations.vllm.plans import Piece, Placed, place
from kvilt.types import CacheKey, DocumentCache, Encoding, Prompt

PARAMETER = "kvilt"  # in kv_transfer_params: what our plugin says of a request, and the receipt of its answer
SYSTEM = "system"  # the title under which the engine stores the part before the documents
LEAST = 16  # rows below which reusing is not worth a salt


@dataclass(frozen=True)
class Part:
    """A document in a prompt: tokens [start, end), and the title line's tokens where a press must know."""

    start: int
    end: int
    name: str = ""
    compression: str = ""


@dataclass(frozen=True)
class Arrived:
    """A request as its client sent it."""

    ids: Sequence[int]
    salt: str | None = None
    hint: Any = None


@dataclass
class Ticket:
    """One request from its arrival to its receipt."""

    arrived: Arrived
    placed: Placed
    receipt: dict[str, Any] = field(default_factory=dict)
    local: int = 0  # slots that vLLM's own prefix cache held at admission
    end: int = 0  # slots that are there, loaded, or computed in holes, when the tail begins
    asked: int = 0  # how often the scheduler was told to wait

    @property
    def pieces(self) -> list[Piece]:
        """What is loaded."""
        return self.placed.between(self.local, self.end)

    @property
    def holes(self) -> list[tuple[int, int]]:
        """The runs that are computed before the tail."""
        return self.placed.holes_in(self.local, self.end)

    @property
    def loaded(self) -> int:
        """Rows that are loaded."""
        return sum(piece.count for piece in self.pieces)


def named(hint: Any, tokens: int, deployment: Deployment) -> list[Part]:
    """The parts that our plugin names: {"documents": [[start, end, name, title tokens], ...]}. Raises PromptError."""
    documents = hint.get("documents") if isinstance(hint, Mapping) else None
    if not isinstance(documents, Sequence) or isinstance(documents, str | bytes):
        raise PromptError("kv_transfer_params.kvilt must hold a list of documents.")
    parts, end = [], 0
    for entry in documents:
        kinds = [type(value) for value in entry] if isinstance(entry, list | tuple) else []
        if kinds != [int, int, str, int] or not end <= entry[0] < entry[1] <= tokens:
            raise PromptError(
                "kv_transfer_params.kvilt: documents are [start, end, name, title], in order, in the prompt."
            )
        parts.append(Part(entry[0], entry[1], entry[2], deployment.compression.identity(entry[3])))
        end = entry[1]
    return parts


def within(ids: list[int], namespace: str, deployment: Deployment, index: Index) -> list[Part]:
    """The parts that the index knows; a stored system part at the beginning is none of them."""
    parts, own = [], str(deployment.compression)
    for match in index.matches(ids, namespace):
        fits = [c for c in match.compressions if c == own or c.startswith(f"{own} title=")]
        if fits and not (match.start == 0 and match.title == SYSTEM):
            parts.append(Part(match.start, match.end, match.title, fits[0]))
    return parts


class Documents:
    """Finds documents, fetches their caches and makes plans."""

    def __init__(self, deployment: Deployment, index: Index) -> None:
        self.deployment, self.index = deployment, index

    def ticket(self, arrived: Arrived, refused: Container[str] = ()) -> Ticket | None:
        """The plan of a prompt, without the documents `refused` (digests); None where nothing can be reused.

        Raises KviltError where the reason is worth telling."""
        ids, namespace = list(arrived.ids), arrived.salt or self.deployment.settings.namespace
        if arrived.hint is not None:
            parts = named(arrived.hint, len(ids), self.deployment)
        else:
            parts = within(ids, namespace, self.deployment, self.index)
        if not parts:
            return None
        strategy = self.deployment.bound(tuple(ids[: parts[0].start]))
        prompt, hits = self._prompt(ids, parts, namespace, strategy.encoding or Encoding(), refused)
        if not any(hits):
            return None
        plan = self.deployment.plan(prompt, strategy)
        placed = place(plan, self.deployment.info.linear_cost)
        if placed.reused() < LEAST:
            return None
        receipt = {
            "strategy": str(strategy),
            "documents": [
                {"name": p.name, "tokens": p.end - p.start, "hit": h} for p, h in zip(parts, hits, strict=True)
            ],
            "hits": sum(hits),
            "misses": len(hits) - sum(hits),
            "charged": round(placed.charged, 4),
        }
        return Ticket(arrived, placed, receipt)

    def _prompt(
        self, ids: list[int], parts: Sequence[Part], namespace: str, encoding: Encoding, refused: Container[str]
    ) -> tuple[Prompt, list[bool]]:
        """The prompt with the caches that are stored, and which documents these are.

        Tokens between documents are computed where they stand, as documents that are not stored are."""
        known = {part.start: part for part in parts}
        edges = sorted({*known, *(part.end for part in parts)})  # tokens between two documents are a part of their own
        spans = [(0, edges[0]), *pairwise(edges)]
        keys = [self._key(ids[: edges[0]], Encoding(), namespace, "")]
        for a, b in spans[1:]:
            part = known.get(a)
            keys.append(self._key(ids[a:b], encoding, namespace, part.compression if part else ""))
        caches = self._fetch(keys, refused)
        made = [cache or bare(ids[a:b], key) for cache, key, (a, b) in zip(caches, keys, spans, strict=True)]
        names = tuple(known[a].name if a in known else "" for a, _ in spans[1:])
        prompt = Prompt(made[0], tuple(made[1:]), torch.tensor(ids[edges[-1] :], dtype=torch.long), names)
        return prompt, [cache is not None for cache, (a, _) in zip(caches[1:], spans[1:], strict=True) if a in known]

    def _fetch(self, keys: list[CacheKey], refused: Container[str]) -> list[DocumentCache | None]:
        try:
            caches = self.deployment.store.get_many(keys)
        except KviltError as error:
            raise PromptError(f"the store cannot be read: {error}") from error
        return [None if key.digest in refused else cache for key, cache in zip(keys, caches, strict=True)]

    def _key(self, ids: list[int], encoding: Encoding, namespace: str, compression: str) -> CacheKey:
        return self.deployment.key(torch.tensor(ids, dtype=torch.long), encoding, namespace, compression)


def bare(ids: Sequence[int], key: CacheKey) -> DocumentCache:
    """Tokens without rows: they are computed where they stand."""
    tokens = torch.tensor(ids, dtype=torch.long)
    return DocumentCache(tokens, torch.arange(len(tokens)), len(tokens), key)
