"""Chat messages with documents as one prompt of token ids, and where each document stands in it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvilt.engine.text import TextFormat
from kvilt.errors import PromptError
from kvilt.integrations.vllm.deployment import Deployment
from kvilt.types import CacheKey, Document, Encoding

REMEMBERED = 1 << 13  # documents whose ids are kept


@dataclass(frozen=True)
class Unknown(Exception):
    """Documents named by ids that are not stored (in this namespace, for this server)."""

    ids: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Wanted:
    """A document of a prompt: its ids (tokens,), its key, and itself where it came with its text."""

    ids: Tensor
    key: CacheKey
    document: Document
    title: int = 0  # tokens of the title line, where a press must know


@dataclass
class Asked:
    """A prompt, ready for vLLM."""

    ids: list[int] = field(default_factory=list)
    places: list[list[Any]] = field(default_factory=list)  # [start, end, name, title tokens] of each document
    wanted: list[Wanted] = field(default_factory=list)
    system: str | None = None  # as documents have to be encoded behind it


class Prompts:
    """Makes prompts for one server. Thread-safe."""

    def __init__(self, deployment: Deployment, tokenizer: Any) -> None:
        self.deployment = deployment
        self.text = TextFormat.of(tokenizer, deployment.settings.system or None)
        self._ids = functools.lru_cache(REMEMBERED)(self.text.document_ids)

    def asked(self, messages: Iterable[Mapping[str, Any]], documents: Sequence[object], namespace: str) -> Asked:
        """The prompt of a chat, its documents in front of the first thing the user says.

        Raises PromptError, DocumentError, and Unknown for ids that are not stored."""
        turns = [(str(m.get("role")), [_said(m)]) for m in messages]
        asked = Asked(system=next(("".join(texts) for role, texts in turns if role == "system"), None))
        if asked.system is None:
            turns.insert(0, ("system", [self.text.system]))
        listed = self.documents(documents, namespace)
        first = next((n for n, (role, _) in enumerate(turns) if role == "user"), None)
        if first is None:
            raise PromptError("documents need a message of the user, in front of which they stand.")
        chat: list[tuple[str, list[str | Document]]] = [(role, [*texts]) for role, texts in turns]
        chat[first] = ("user", [*(d for d, _ in listed), *chat[first][1]])
        known, head = dict(zip(map(id, (d for d, _ in listed)), (i for _, i in listed), strict=True)), None
        for part in self.text.render(chat):
            if isinstance(part, Document):
                head = tuple(asked.ids) if head is None else head
                self._add(asked, self.want(part, known[id(part)], head, namespace))
            else:
                asked.ids += part.tolist()
        return asked

    def _add(self, asked: Asked, wanted: Wanted) -> None:
        end = len(asked.ids) + len(wanted.ids)
        name = wanted.document.title or wanted.document.id or ""
        asked.places.append([len(asked.ids), end, name, wanted.title])
        asked.ids += wanted.ids.tolist()
        asked.wanted.append(wanted)

    def documents(self, values: Sequence[object], namespace: str) -> list[tuple[Document, Tensor | None]]:
        """Documents as the prompt writes them; those named by an id alone with their stored ids (tokens,)."""
        named = {n: str(v["id"]) for n, v in enumerate(values) if isinstance(v, Mapping) and set(v) == {"id"}}
        stored = self.stored([*named.values()], namespace)
        if missing := tuple(digest for digest in named.values() if digest not in stored):
            raise Unknown(missing)
        texts = iter(self.text.documents([v for n, v in enumerate(values) if n not in named]))
        made = [Document(named[n], id=named[n]) if n in named else next(texts) for n in range(len(values))]
        return [(d, stored[named[n]] if n in named else None) for n, d in enumerate(made)]

    def stored(self, digests: Sequence[str], namespace: str) -> dict[str, Tensor]:
        """The ids in a prompt, (tokens,), of stored documents that this server can reuse in a namespace."""
        store, deployment = self.deployment.store, self.deployment
        entries = [entry for digest in digests if is_digest(digest) and (entry := store.entry(digest))]
        own = [e for e in entries if e.namespace == namespace and deployment.knows(e.fields)]
        caches = store.get_many([CacheKey(**e.fields) for e in own], counted=False)
        return {c.key.digest: deployment.tokens_of(c) for c in caches if c is not None}

    def want(self, document: Document, ids: Tensor | None, head: tuple[int, ...], namespace: str) -> Wanted:
        """A document with the key that it has behind these tokens. Raises DocumentError."""
        compression, title = self.deployment.compression, 0
        if ids is None:
            document = compression.shorten(document)
            ids = self._ids(document)
            title = self.text.title_length(document) if compression.rows else 0
        encoding = self.deployment.bound(head).encoding or Encoding()
        key = self.deployment.key(ids, encoding, namespace, compression.identity(title))
        return Wanted(ids, key, document, title)

    def alone(self, values: Sequence[object], system: str | None, namespace: str) -> list[Wanted]:
        """Documents to be encoded behind a system text. Raises DocumentError."""
        text = self.text if system is None else self.text.told(system)
        head = tuple(text.system_ids().tolist())
        return [self.want(document, None, head, namespace) for document in self.text.documents(values)]


def is_digest(value: str) -> bool:
    """Whether it can be the key of a stored document."""
    return len(value) == 64 and not set(value) - set("0123456789abcdef")


def _said(message: Mapping[str, Any]) -> str:
    """What a message says. Raises PromptError for anything but text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    texts = (
        [p.get("text") if isinstance(p, Mapping) else None for p in content]
        if isinstance(content, Iterable)
        else [None]
    )
    if not all(isinstance(text, str) for text in texts):
        raise PromptError("with documents, messages must be text.")
    return "".join(map(str, texts))
