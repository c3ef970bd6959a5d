"""The documents that a question is answered from, picked out of many: BM25 by bm25s (extra `retrieve`).

Caches are kept without texts, so what is searched are the documents themselves: files, or the JSON lines that
`kvilt encode --save` wrote. The index of one such file is kept beside it in FILE.bm25 and made again when the file changes."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kvilt import registry
from kvilt.errors import MissingExtra, PromptError, SpecError
from kvilt.types import Document, digest_of

Find = Callable[[str], list[Document]]  # the best documents for a question, the best first

# A word is a run of letters and digits; where a script has no spaces, a character.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"
_WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+"


@dataclass(frozen=True)
class BM25:
    """Documents that share words with the question, rare words first (Okapi BM25).

    `top` documents at most; `k1` and `b` are the formula's; words of no account are left out in the language `stopwords`
    (en, de, fr, es, ...; none)."""

    top: int = 8
    k1: float = 1.5
    b: float = 0.75
    stopwords: str = "en"

    def __post_init__(self) -> None:
        if self.top < 1:
            raise SpecError("bm25: top must be 1 or more.")

    def over(self, documents: Sequence[Document], beside: Path | None = None) -> Find:
        """What finds documents for a question; `beside` a file of documents, its index is kept there if that can be written.

        The finder raises PromptError where no document shares a word with the question. Raises MissingExtra."""
        index = self._index([d.content for d in documents], beside)

        def find(question: str) -> list[Document]:
            (words,) = self._words([question])
            scores = index.get_scores_from_ids(index.get_tokens_ids(words))
            best = (-scores).argsort(kind="stable")[: self.top]
            found = [documents[n] for n in best if scores[n] > 0]
            if not found:
                raise PromptError("no document shares a word with the question: ask in the documents' own words.")
            return found

        return find

    def _words(self, texts: list[str]) -> list[list[str]]:
        stopwords: Any = [] if self.stopwords == "none" else self.stopwords
        try:
            split: list[list[str]] = _bm25s().tokenize(
                texts, token_pattern=_WORD, stopwords=stopwords, return_ids=False, show_progress=False
            )
        except ValueError as error:
            raise SpecError(f"bm25: {error}") from error
        return split

    def _index(self, texts: list[str], beside: Path | None) -> Any:
        bm25s = _bm25s()
        name = digest_of(bm25s.__version__, f"{self.k1} {self.b} {self.stopwords}", *texts)[:32]
        kept = beside and Path(f"{beside}.bm25") / name
        if kept and kept.is_dir():
            return bm25s.BM25.load(kept, mmap=True, show_progress=False)
        index = bm25s.BM25(k1=self.k1, b=self.b)
        index.index(self._words(texts), show_progress=False)
        if kept:
            with contextlib.suppress(OSError):  # then it is made again each time
                _keep(index, kept)
        return index


def finder(spec: str, documents: list[Document], paths: Sequence[str] = ()) -> Find:
    """What a specification finds among documents, all of them where it is empty.

    Where they were read from one .jsonl file alone, the index is kept beside it. Raises SpecError, MissingExtra."""
    if not spec:
        return lambda question: documents
    beside = Path(paths[0]) if len(paths) == 1 and paths[0].endswith(".jsonl") else None
    return cast("Find", registry.build("retrieve", spec).over(documents, beside))


def _keep(index: Any, place: Path) -> None:
    """Save an index under its name, whole or not at all, and drop those of older texts."""
    place.parent.mkdir(exist_ok=True)
    others = [other for other in place.parent.iterdir() if other.name[0] != "."]  # what others are writing just now
    with tempfile.TemporaryDirectory(prefix=".", dir=place.parent, ignore_cleanup_errors=True) as made:
        index.save(f"{made}/index", show_progress=False)
        os.rename(f"{made}/index", place)
    for other in others:
        shutil.rmtree(other, ignore_errors=True)


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtra("bm25s", "retrieve") from error
    return bm25s
