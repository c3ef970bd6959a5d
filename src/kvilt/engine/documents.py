"""Documents from values: a text, or {"text", "title", "id"}, checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping

from kvilt.errors import DocumentError
from kvilt.types import Document

LONGEST_NAME = 4096  # characters of a title or an id


def document_of(value: object, where: str, name: str | None = None) -> Document:
    """The document of a text, or of {"text", "title", "id"}, called `name` if it has no id.

    Raises DocumentError for anything else, saying where it stands."""
    fields = {"text": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping):
        given = type(value).__name__
        raise DocumentError(f'{where} is {given}, not a document: give a text, or {{"text": "...", "title": "..."}}.')
    title, called = fields.get("title"), fields.get("id")
    if not isinstance(fields.get("text"), str):
        raise DocumentError(f'{where} has no text: write {{"text": "..."}}.')
    if not isinstance(title, str | None):
        raise DocumentError(f"{where}: the title must be a text, not {title!r}.")
    if not isinstance(called, str | int | None) or isinstance(called, bool):
        raise DocumentError(f"{where}: the id must be a text or a number, not {called!r}.")
    return document(fields["text"], title or None, name if called in (None, "") else str(called), where)


def document(text: str, title: str | None, name: str | None, where: str) -> Document:
    """The document of a checked text. Raises DocumentError where it cannot be one."""
    if not text.strip():
        raise DocumentError(f"{where} is empty. Leave it out, or give it a text.")
    if max(len(title or ""), len(name or "")) > LONGEST_NAME:
        raise DocumentError(f"{where}: a title and an id may have {LONGEST_NAME:,} characters at most.")
    try:
        f"{title}{name}{text}".encode()
    except UnicodeEncodeError as error:
        raise DocumentError(f"{where} holds half a character (a lone surrogate): write it as UTF-8.") from error
    return Document(text.replace("\r\n", "\n"), title, name)  # the same document has the same cache on every system
