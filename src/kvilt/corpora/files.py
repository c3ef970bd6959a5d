"""Reading documents: .txt, .md and .jsonl files, folders of them, and standard input.

.txt     the whole file; no title
.md      the whole file; a heading in its first line becomes the title
.jsonl   one document a line: {"text": ..., "title": ..., "id": ...}, of which only the text is required
folder   every such file in it and below, sorted by name; hidden files are passed over, others reported and skipped
-        standard input: JSON lines if its first line is an object with a text, otherwise one text

A document's id is its path as given (folders: joined with the path below), for JSON lines without an id path:line.
Bytes of a path that are not UTF-8 are written out in the id: caf\\xe9.txt.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from kvilt.engine.documents import document, document_of
from kvilt.errors import DocumentError
from kvilt.rows.files import json_object, name_of
from kvilt.types import Document

Readers = Mapping[str, Callable[[str], Document]]  # of files of other kinds: a suffix, and what makes a path a document
STDIN = "-"
SUFFIXES = (".txt", ".md", ".jsonl")
CONVERT = "convert it to text first (PDF, DOCX and HTML are read with: pip install 'kvilt[files]')"
UTF16 = (b"\xff\xfe", b"\xfe\xff")

Found = Iterator[Document | DocumentError]  # what could be read, and why the rest could not


def read_documents(
    paths: Sequence[str],
    on_skip: Callable[[str], None] = lambda path: None,
    on_bad: Callable[[DocumentError], None] | None = None,
    others: Readers = MappingProxyType({}),
) -> list[Document]:
    """Every document that the paths name, in their order; `on_skip` hears of files in folders that are no documents.

    `others` reads files of further kinds (`kvilt.corpora.readers` has PDF, DOCX, HTML and code).
    Raises DocumentError for what cannot be read, naming the file and the line or byte; with `on_bad`, that hears of it
    instead and the other documents are read."""
    documents = sound((item for path in paths for item in _read(path, on_skip, others)), on_bad)
    if paths and not documents and on_bad is None:
        raise DocumentError(f"no documents in {', '.join(paths)}: Kvilt reads {', '.join((*SUFFIXES, *others))} files.")
    return documents


def sound(found: Found, on_bad: Callable[[DocumentError], None] | None) -> list[Document]:
    """The documents that could be read; `on_bad` hears of the others, or the first of them is raised."""
    documents = []
    for item in found:
        if isinstance(item, Document):
            documents.append(item)
        elif on_bad is None:
            raise item
        else:
            on_bad(item)
    return documents


def _read(path: str, on_skip: Callable[[str], None], others: Readers) -> Found:
    if path == STDIN:
        yield from _stdin(sys.stdin.buffer.read())
    elif os.path.isdir(path):
        for file in files_in(path, (*SUFFIXES, *others), on_skip):
            yield from _file(file, others)
    elif not os.path.exists(path):
        raise DocumentError(f"no such file or folder: {path}.")
    elif not path.lower().endswith((*SUFFIXES, *others)):
        raise DocumentError(f"{path} is none of {', '.join(SUFFIXES)}: {CONVERT}.")
    else:
        yield from _file(path, others)


def files_in(folder: str, suffixes: tuple[str, ...], on_skip: Callable[[str], None]) -> Iterator[str]:
    """Documents in a folder and below, sorted; hidden files and folders are passed over."""

    def refuse(error: OSError) -> None:
        raise DocumentError(f"cannot read the folder {error.filename}: {error.strerror}.") from error

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            path = os.path.join(root, name)
            if name.lower().endswith(suffixes):
                yield path
            else:
                on_skip(path)


def _file(path: str, others: Readers) -> Found:
    kind = path.lower().rpartition(".")[2]
    try:
        if not os.path.isfile(path):  # a pipe would be waited for without end
            raise DocumentError(f"{path} is no regular file.")
        if read := others.get(f".{kind}"):
            return iter([read(path)])
        text, name = decode(Path(path).read_bytes(), path), name_of(path)
        title, text = heading(text) if kind == "md" else (None, text)
        return _lines(text, name) if kind == "jsonl" else iter([document(text, title, name, path)])
    except OSError as error:
        return iter([DocumentError(f"cannot read {path}: {error.strerror}.")])
    except DocumentError as error:
        return iter([error])


def _stdin(data: bytes) -> Found:
    text = decode(data, "standard input")
    first = next((line for line in text.split("\n") if line.strip()), "")
    try:
        is_lines = "text" in dict(json.loads(first))
    except (ValueError, TypeError, RecursionError):
        is_lines = False
    yield from _lines(text, "stdin") if is_lines else [document(text, None, "stdin", "standard input")]


def decode(data: bytes, where: str) -> str:
    """A file's text. Raises DocumentError where it is binary or no UTF-8."""
    if data.startswith(UTF16):
        raise DocumentError(f"{where} is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8.")
    if (at := data.find(b"\0")) >= 0:
        raise DocumentError(f"{where} is a binary file (a zero byte at offset {at}): give its text instead.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        what = f"byte 0x{data[offset]:02x} at offset {offset}"
        raise DocumentError(f"{where} is not UTF-8 ({what}). Convert it: iconv -f ENCODING -t UTF-8.") from error


def heading(text: str) -> tuple[str | None, str]:
    """Title and text of a Markdown file: a heading in the first line that is not blank, if there is text after it."""
    first, _, rest = text.lstrip().partition("\n")
    marks, space, title = first.partition(" ")
    is_heading = 1 <= len(marks) <= 6 and set(marks) == {"#"} and bool(space)
    title = title.strip().rstrip("#").strip()
    return (title, rest.lstrip("\r\n")) if is_heading and title and rest.strip() else (None, text)


def _lines(text: str, name: str) -> Found:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{name}:{number}"
        try:
            if line.strip():
                yield document_of(json_object(line, where), where, where)
        except DocumentError as error:
            yield error
