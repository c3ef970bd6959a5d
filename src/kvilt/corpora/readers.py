"""Documents as people have them: PDF, DOCX and HTML files by MarkItDown (extra `files`), and source code as it is.

PDF, DOCX and HTML become Markdown; the title is the file's own, else a heading in the first line. A source file's title
is its name. Everything else is read as `kvilt.corpora.files` says."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvilt.corpora.files import Readers, decode, heading, read_documents
from kvilt.engine.documents import document
from kvilt.errors import DocumentError, MissingExtra
from kvilt.rows.files import name_of
from kvilt.types import Document

RICH = (".pdf", ".docx", ".html", ".htm")
KINDS = "py pyi js mjs ts tsx jsx java kt scala c h cc cpp hpp cs go rs rb php swift lua pl r jl sh sql toml yaml yml rst tex"
CODE = tuple(f".{kind}" for kind in KINDS.split())
MARKDOWN = (".md", *RICH)  # whose texts have headings


def read(
    paths: Sequence[str],
    on_skip: Callable[[str], None] = lambda path: None,
    on_bad: Callable[[DocumentError], None] | None = None,
) -> list[Document]:
    """Every document of files and folders, in their order, as `read_documents` reads and refuses them.

    Without the extra `files`, PDF, DOCX and HTML files of folders are skipped. Raises DocumentError."""
    return read_documents(paths, on_skip, on_bad, readers())


def readers() -> Readers:
    """What reads files of further kinds, as far as it is installed."""
    is_there = importlib.util.find_spec("markitdown") is not None
    return {**dict.fromkeys(CODE, _code), **(dict.fromkeys(RICH, _rich) if is_there else {})}


def why(skipped: str) -> str:
    """Why a file of a folder is no document."""
    rich = skipped.lower().endswith(RICH)
    return f"{MissingExtra('markitdown', 'files')}" if rich else "Kvilt reads no files of that kind"


def _code(path: str) -> Document:
    return document(decode(Path(path).read_bytes(), path), Path(name_of(path)).name, name_of(path), path)


def _rich(path: str) -> Document:
    with open(path, "rb") as file:  # what the disk refuses is the disk's error, not the converter's
        file.read(1)
    try:
        made = _converter().convert_local(path)
    except Exception as error:  # of many libraries, for broken files
        if "MissingDependency" in str(error):  # MarkItDown itself is there, what reads this format is not
            raise DocumentError(f"{path}: {MissingExtra('what reads it', 'files')}") from error
        told = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise DocumentError(f"{path} cannot be converted to text: {told}") from error
    own, whole = " ".join((made.title or "").split()), made.markdown.strip()
    first, rest = heading(whole)
    title, text = (first, rest) if not own or own == first else (own, whole)
    if not text.strip():
        raise DocumentError(f"{path} holds no text. If it is a scan, run it through OCR first.")
    return document(text, title, name_of(path), path)


@functools.cache
def _converter() -> Any:
    """MarkItDown with what reads these formats only: its other converters would take a broken PDF for a text."""
    try:
        from markitdown import MarkItDown, converters
    except ImportError as error:
        raise MissingExtra("markitdown", "files") from error
    made = MarkItDown(enable_builtins=False, enable_plugins=False)
    for kind in (converters.PdfConverter, converters.DocxConverter, converters.HtmlConverter):
        made.register_converter(kind())
    return made
