"""Up to three kinds of compression in one specification: "llmlingua2:rate=0.5+keydiff:keep=0.5+int8"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, cast

from torch import Tensor

from kvilt import registry
from kvilt.errors import SpecError
from kvilt.rows.codec import Codec, QuantisedRows
from kvilt.rows.rows import whole
from kvilt.types import Document, DocumentCache, Rows, cached

KINDS = ("text", "rows", "numbers")  # in the order in which they are applied


@dataclass(frozen=True, eq=False)
class Made:
    """A document as it was just encoded, and what a press may look at."""

    cache: DocumentCache
    around: tuple[int, int]  # kept rows before and after the document's own
    title: int  # tokens of the title
    rotate: Callable[[Tensor, Tensor], Tensor]  # keys (..., rows, head_dim) rotated to positions (rows,)
    attention: Callable[..., Tensor]  # `ModelProbe.attention`: what each row of a plan gets, (layers, rows)
    tokenize: Callable[[str], Tensor]
    context: int  # positions that the model has

    @cached
    def rows(self) -> Tensor:
        """All keys (without rotation) and values, (layers, 2, heads, rows, head_dim)."""
        return whole(cast(Rows, self.cache.rows))


class Shortener(Protocol):
    """Compression of kind "text"."""

    def shorten(self, text: str) -> str:
        """The text with fewer words."""


class Press(Protocol):
    """Compression of kind "rows"."""

    def press(self, made: Made) -> DocumentCache:
        """The cache with fewer rows; places that lost theirs are neither reused nor computed."""


@dataclass(frozen=True)
class Compression:
    """At most one of each kind; nothing by default."""

    text: Shortener | None = None
    rows: Press | None = None
    numbers: Codec | None = None

    @classmethod
    def of(cls, spec: str | Compression) -> Compression:
        """From names joined by "+", in any order. Raises SpecError."""
        if isinstance(spec, Compression):
            return spec
        found: dict[str, object] = {}
        for part in registry.split(spec, "+") if spec else ():
            made = registry.build("compress", part)
            kind = str(getattr(made, "kind", ""))
            if kind not in KINDS or kind in found:
                raise SpecError(f"compress={spec!r}: at most one compressor of each kind ({', '.join(KINDS)}).")
            found[kind] = made
        return cls(**found)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return "+".join(registry.spec_of(part) for part in (self.text, self.rows, self.numbers) if part is not None)

    def identity(self, title: int) -> str:
        """What of it shapes a cache, for the cache key: a classifier's weights and not where they lie; and the title's
        length, since presses never drop the title."""
        parts = [registry.spec_of(part) for part in (self.rows, self.numbers) if part is not None]
        name = "+".join(parts if self.text is None else [repr(self.text), *parts])
        return f"{name} title={title}" if self.rows is not None and title else name

    def shorten(self, document: Document) -> Document:
        """The document with a shorter text, its title as it is."""
        return document if self.text is None else replace(document, text=self.text.shorten(document.text))

    def apply(self, made: Made) -> DocumentCache:
        """Drop rows, then quantise what is left."""
        cache = made.cache if self.rows is None else self.rows.press(made)
        if self.numbers is None or cache.rows is None:
            return cache
        return replace(cache, rows=QuantisedRows.of(cache.rows, self.numbers))
