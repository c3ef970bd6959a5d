"""The documents of one request: where they stand in its prompt, which are stored, and the plan that follows.

Where they stand comes from our own HTTP plugin (`kv_transfer_params`) or from the index. Either names places alone: keys are
made from the tokens that stand there, so nothing that a client writes can name somebody else's document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvilt.errors import KviltError, PromptError
from kvilt.integrations.vllm.deployment import Deployment, bare
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


@dataclass
class Ticket:
    """One request from its arrival to its receipt."""

    placed: Placed
    receipt: dict[str, Any] = field(default_factory=dict)
    plain: int = 0  # tokens of the prompt as the client sent it
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
            raise PromptError("kv_transfer_params.kvilt: documents must be [start, end, name, title] in order, inside the prompt.")
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

    def ticket(self, ids: list[int], hint: Any, namespace: str) -> Ticket | None:
        """The plan of a prompt; None where nothing can be reused. Raises KviltError where the reason is worth telling."""
        if hint is not None:
            parts = named(hint, len(ids), self.deployment)
        else:
            parts = within(ids, namespace, self.deployment, self.index)
        if not parts:
            return None
        head = tuple(ids[: parts[0].start])
        strategy = self.deployment.bound(head)
        prompt, hits = self._prompt(ids, parts, namespace, strategy.encoding or Encoding())
        if not any(hits):
            return None
        plan = self.deployment.plan(prompt, strategy)
        placed = place(plan, self.deployment.info.linear_cost)
        if placed.reused() < LEAST:
            return None
        return Ticket(placed, self._receipt(parts, prompt, hits, placed, repr(strategy)))

    def _prompt(
        self, ids: list[int], parts: Sequence[Part], namespace: str, encoding: Encoding
    ) -> tuple[Prompt, list[bool]]:
        """The prompt with the caches that are stored, and which documents these are.

        Tokens between documents are computed where they stand, as documents that are not stored are."""
        spans: list[tuple[int, int, Part | None]] = []
        at = parts[0].start
        for part in parts:
            spans += [(at, part.start, None)] if at < part.start else []
            spans.append((part.start, part.end, part))
            at = part.end
        head = ids[: parts[0].start]
        keys = [self._key(head, Encoding(), namespace, "")]
        keys += [self._key(ids[a:b], encoding, namespace, p.compression) for a, b, p in spans if p]
        caches = self._fetch(keys)
        stored = iter(caches[1:])
        documents = [(next(stored) if part else None) or bare(self.deployment, ids[a:b]) for a, b, part in spans]
        names = tuple(part.name if part else "" for _, _, part in spans)
        system = caches[0] or bare(self.deployment, head)
        prompt = Prompt(system, tuple(documents), torch.tensor(ids[at:], dtype=torch.long), names)
        return prompt, [cache is not None for cache in caches[1:]]

    def _fetch(self, keys: list[CacheKey]) -> list[DocumentCache | None]:
        try:
            return self.deployment.store.get_many(keys)
        except KviltError as error:
            raise PromptError(f"the store cannot be read: {error}") from error

    def _key(self, ids: list[int], encoding: Encoding, namespace: str, compression: str) -> CacheKey:
        return self.deployment.key(torch.tensor(ids, dtype=torch.long), encoding, namespace, compression)

    def _receipt(
        self, parts: Sequence[Part], prompt: Prompt, hits: list[bool], placed: Placed, strategy: str
    ) -> dict[str, Any]:
        named = {part.start: part for part in parts}
        return {
            "strategy": strategy,
            "documents": [
                {"name": part.name, "tokens": part.end - part.start, "hit": hit}
                for part, hit in zip(named.values(), hits, strict=True)
            ],
            "hits": sum(hits),
            "misses": len(hits) - sum(hits),
            "charged": round(placed.charged, 4),
        }
