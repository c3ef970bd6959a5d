"""Long documents in chunks: cut at headings, paragraphs and sentence ends, by the model's own tokens.

A chunk's id is its document's id and a digest of its own text, "handbook.pdf#3fa2c01b": it stays the same while the passage
stays the same, whatever is changed before it. Its title is the document's title and the headings that it stands under."""

from __future__ import annotations

import bisect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvilt import registry
from kvilt.corpora.readers import MARKDOWN
from kvilt.engine.text import TextFormat
from kvilt.errors import MissingExtra, SpecError, UserError
from kvilt.rows.files import replacing
from kvilt.types import Document, digest_of

LONGEST_TITLE = 200  # characters; what is longer loses headings, outermost first
_HEADING = re.compile(r"^(?:(#{1,6})[ \t]+(.*\S)[ \t]*|(?:```|~~~).*)$", re.MULTILINE)


@dataclass(frozen=True)
class Chunks:
    """How documents are cut: into at most so many `tokens`, title included, each repeating up to `overlap` of the one before."""

    tokens: int = 512
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 16 or not 0 <= self.overlap <= self.tokens // 2:
            raise SpecError("--chunk: tokens must be 16 or more, and overlap between 0 and half of tokens.")

    @classmethod
    def of(cls, spec: str) -> Chunks:
        """What "tokens=512,overlap=0" says. Raises SpecError."""
        given: dict[str, Any] = registry.values(cls, registry.parse(f"chunk:{spec}")[1], "--chunk")
        return cls(**given)

    def cut(self, documents: list[Document], text: TextFormat) -> list[Document]:
        """The documents, those that are longer than a chunk in chunks. Raises MissingExtra, DocumentError."""
        return [chunk for document in documents for chunk in self._cut(document, text)]

    def _cut(self, document: Document, text: TextFormat) -> Iterator[Document]:
        if len(text.document_ids(document)) <= self.tokens:
            yield document
            return
        is_markdown = (document.id or "").lower().endswith(MARKDOWN)
        titles = [(0, document.title or ""), *(_titles(document) if is_markdown else ())]
        longest = max({len(text.plain_ids(f"{title}\n")) if title else 0 for _, title in titles})
        room = max(self.tokens - longest - 1, self.tokens // 4)  # a token for the line's end
        split = _splitter(is_markdown, room, min(self.overlap, room // 2), text)
        seen = Counter[str]()
        for at, piece in split.chunk_indices(document.text):
            digest = digest_of(piece)[:8]
            seen[digest] += 1
            name = f"{document.id or 'document'}#{digest}" + (f"-{seen[digest]}" if seen[digest] > 1 else "")
            title = titles[bisect.bisect([begin for begin, _ in titles], at) - 1][1]
            yield replace(document, text=piece, title=title or None, id=name)


def cutter(spec: str) -> Callable[[list[Document], TextFormat], list[Document]]:
    """What cuts documents as a specification says; an empty one leaves them whole. Raises SpecError."""
    return Chunks.of(spec).cut if spec else lambda documents, _: documents


def _titles(document: Document) -> Iterator[tuple[int, str]]:
    """Where each heading of a Markdown text stands, and the title of what follows it."""
    above, fenced = dict[int, str](), False
    for line in _HEADING.finditer(document.text):
        fenced ^= line[1] is None
        if line[1] and not fenced:
            level = len(line[1])
            above = {n: told for n, told in above.items() if n < level} | {level: line[2].rstrip("# \t")}
            trail = [document.title or "", *above.values()]
            while len(" > ".join(trail)) > LONGEST_TITLE and len(trail) > 1:
                del trail[1:2]
            yield line.start(), " > ".join(filter(None, trail))


def _splitter(is_markdown: bool, tokens: int, overlap: int, text: TextFormat) -> Any:
    try:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter
    except ImportError as error:
        raise MissingExtra("semantic-text-splitter", "retrieve") from error
    kind = MarkdownSplitter if is_markdown else TextSplitter
    return kind.from_callback(lambda piece: len(text.plain_ids(piece)), tokens, overlap)


def save(documents: Sequence[Document], path: Path) -> None:
    """Write documents as JSON lines, to be read again wherever documents are. Raises UserError."""
    lines = (json.dumps({"id": d.id, "title": d.title, "text": d.text}, ensure_ascii=False) for d in documents)
    try:
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error
