"""A question or a chat, and its documents, as the parts of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvilt.engine.encoder import Item
from kvilt.engine.text import TextFormat, Turn
from kvilt.errors import PromptError
from kvilt.types import Document, DocumentCache


@dataclass(frozen=True, eq=False)
class Fetched:
    """The caches of a prompt, and how they came."""

    system: DocumentCache
    documents: list[DocumentCache]
    # what they are the caches of; those without id and text are what a chat says between documents
    items: Sequence[Item]
    hits: int
    missing: tuple[str, ...] = ()  # digests of the documents that were not stored, once for each time they stand there
    encoded: tuple[int, ...] = ()  # tokens of everything that had to be encoded


def opened(question: Any, system: str | None = None) -> tuple[str | None, str | list[Turn]]:
    """The system text of a question or chat (None: the engine's own), and the rest: a text if the user alone speaks, once.

    A chat is a list of {"role", "content"}; a content is a text, or a list of texts, {"type": "text", "text"} and documents.
    Raises PromptError for anything else."""
    if isinstance(question, str):
        return system, question
    if not isinstance(question, list | tuple) or not question:
        raise PromptError(f"the question must be a text or a list of messages, not {question!r:.40}.")
    turns = [_turn(message, f"message {n}") for n, message in enumerate(question, 1)]
    if turns[0][0] == "system" and all(isinstance(part, str) for part in turns[0][1]):
        said = "".join(map(str, turns.pop(0)[1]))
        system = said if system is None else system
    if [role for role, _ in turns] == ["user"] and all(isinstance(part, str) for part in turns[0][1]):
        return system, "".join(map(str, turns[0][1]))
    return system, turns


def _turn(message: Any, where: str) -> Turn:
    if isinstance(message, tuple):
        return message[0], list(message[1])
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    parts = [content] if isinstance(content, str) else content if isinstance(content, Sequence) else [None]
    said = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part for part in parts]
    if not isinstance(role, str) or not all(isinstance(part, str | Document) for part in said):
        raise PromptError(
            f'{where} must be {{"role": "user", "content": ...}}, with texts and documents as its content.'
        )
    return role, said


def parts_of(
    text: TextFormat, system: Tensor, chat: list[Turn], documents: list[Document]
) -> tuple[bool, list[Document], Tensor]:
    """Whether a chat's prompt begins with the ids `system` (tokens,), the parts behind them, and the ids of all that comes last.

    The documents stand in front of the first thing the user says. Raises PromptError."""
    turns: list[Turn] = [("system", [text.system]), *chat] if text.system else [*chat]
    first = next((n for n, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise PromptError("the user says nothing in this chat.")
    turns[first] = ("user", [*documents, *turns[first][1]])
    parts = text.render(turns)
    front, count = parts[0] if isinstance(parts[0], Tensor) else system[:0], len(system)
    begins = torch.equal(front[:count], system)
    parts = [front[count:], *parts[1:]] if begins and count else parts
    if not isinstance(parts[-1], Tensor) or not len(parts[-1]):
        raise PromptError("the chat ends with a document: ask something behind it.")
    between = [Document("", store=False, ids=tuple(p.tolist())) if isinstance(p, Tensor) else p for p in parts[:-1]]
    return begins, [part for part in between if part.text or part.ids], parts[-1]
