"""A corpus as parts: each worker reads its own, so the texts never pass through the process that gives the work out.

Files as `kvilt.corpora.readers` reads them, folders of them, and Parquet files, one row a document: columns `text`, and if they
are there `title` and `id`, or others that are named. JSON lines and Parquet files may lie behind URLs (s3://, gs://, file://),
which pyarrow opens with the credentials of the usual places. Paths may hold *. What cannot be read costs that row only."""

from __future__ import annotations

import fnmatch
import glob
import importlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvilt.corpora import readers
from kvilt.corpora.files import SUFFIXES, files_in, sound
from kvilt.engine.documents import document_of
from kvilt.errors import DocumentError, MissingExtra, UserError
from kvilt.rows.files import json_object, name_of
from kvilt.types import Document

DOCUMENTS = 256  # that are looked up, sorted by length and encoded together
LINES = 1 << 20  # bytes of JSON lines in a part
LARGE = (".parquet", ".jsonl")  # files that are read in parts, and from URLs
FIELDS = ("text", "title", "id")

Found = Iterator[Document | DocumentError]
Skip = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """A piece of a corpus: some text files, some lines, a row group, or documents themselves. It can be written as JSON."""

    paths: Sequence[str] = ()
    start: int = 0  # first byte of the lines, or number of the row group
    stop: int = 0  # byte after the lines, or rows of the group
    first: int = 1  # number of the first line or row
    documents: Sequence[Mapping[str, Any]] = ()
    columns: Mapping[str, str] = field(default_factory=dict)  # by field


def is_needed(paths: Sequence[str]) -> bool:
    """Whether paths name what only this module reads: URLs, Parquet files, and names with *."""
    return any("://" in p or p.lower().endswith(LARGE[0]) or ("*" in p and not os.path.exists(p)) for p in paths)


def read_all(
    paths: Sequence[str], on_skip: Skip, on_bad: Callable[[DocumentError], None] | None = None, columns: str = ""
) -> list[Document]:
    """Every document of paths of all kinds; as `readers.read` does it where that will do. Raises DocumentError."""
    if not is_needed(paths):
        return readers.read(paths, on_skip, on_bad)
    parts = split(paths, columns, on_skip)
    return sound((one for part in parts for one in (read(part) if isinstance(part, Part) else [part])), on_bad)


def split(
    source: Iterable[str | Document], columns: str = "", on_skip: Skip = lambda path: None
) -> Iterator[Part | DocumentError]:
    """The parts of paths or of documents, in their order, always the same ones; and what cannot be read at all.

    `columns` are Parquet columns: "text=body,title=name". Raises UserError, DocumentError where a path leads nowhere."""
    named = dict(pair.partition("=")[::2] for pair in columns.split(",") if pair)
    if not set(FIELDS) >= named.keys() or "" in named.values():
        raise UserError(f"columns {columns!r}: write text=NAME,title=NAME,id=NAME, or some of them.")
    for is_path, group in itertools.groupby(source, key=lambda item: isinstance(item, str)):
        if is_path:
            files = (file for path in group for file in _files(str(path), on_skip))
            yield from _parts(files, {**dict(zip(FIELDS, FIELDS, strict=True)), **named})
        else:
            for some in batched((d for d in group if isinstance(d, Document)), DOCUMENTS):
                yield Part(documents=[{name: getattr(d, name) for name in FIELDS} for d in some])


def read(part: Part) -> Found:
    """The documents of a part, and why others cannot be read."""
    yield from (_whole(fields, "a document", None) for fields in part.documents)
    if not part.stop:
        bad: list[DocumentError] = []
        yield from readers.read(part.paths, on_bad=bad.append)
        yield from bad
        return
    (path,) = part.paths
    try:
        yield from (_rows if path.lower().endswith(LARGE[0]) else _lines)(part, path)
    except OSError as error:
        yield DocumentError(f"cannot read {path}: {error.strerror or error}.")


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size`; the last one may be shorter."""
    source = iter(items)
    while some := list(itertools.islice(source, size)):
        yield some


def _parts(files: Iterable[str], columns: Mapping[str, str]) -> Iterator[Part | DocumentError]:
    for kind, group in itertools.groupby(files, key=lambda path: path[-8:].lower().endswith(LARGE)):
        if not kind:
            yield from (Part(some) for some in batched(group, DOCUMENTS))
            continue
        for path in group:
            try:
                yield from _row_groups(path, columns) if path.lower().endswith(LARGE[0]) else _line_groups(path)
            except (OSError, ValueError) as error:  # pyarrow's are either
                yield DocumentError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.")


def _row_groups(path: str, columns: Mapping[str, str]) -> Iterator[Part]:
    first = 1
    with _opened(path) as file:
        described = _arrow("parquet").ParquetFile(file)
        names = described.schema_arrow.names
        known = {field: column for field, column in columns.items() if column in names}
        if "text" not in known:
            raise ValueError(f"it has no column {columns['text']!r}, only {', '.join(map(str, names))}")
        for group in range(described.metadata.num_row_groups):
            rows = described.metadata.row_group(group).num_rows
            yield Part([path], group, rows, first, columns=known)
            first += rows


def _line_groups(path: str) -> Iterator[Part]:
    """Lines in parts of about LINES bytes: the file is read once, to find the ends of lines and count them."""
    offset, start, first = 0, 0, 1
    with _opened(path) as file:
        while data := file.read(LINES):
            if cut := data.rfind(b"\n") + 1:
                yield Part([path], start, offset + cut, first)
                start, first = offset + cut, first + data.count(b"\n")
            offset += len(data)
    if offset > start:
        yield Part([path], start, offset, first)


def _rows(part: Part, path: str) -> Found:
    number, name = part.first, _name(path)
    try:
        with _opened(path) as file:
            opened, names = _arrow("parquet").ParquetFile(file), list(part.columns.values())
            for batch in opened.iter_batches(DOCUMENTS, row_groups=[part.start], columns=names):
                for row in range(batch.num_rows):
                    yield _row(batch, row, part.columns, f"{name}:{number}")
                    number += 1
    except (OSError, ValueError) as error:  # a damaged page: nothing behind it in its row group can be found
        yield DocumentError(f"rows {number:,} to {part.first + part.stop - 1:,} of {path} cannot be read: {error}.")


def _row(batch: Any, row: int, columns: Mapping[str, str], where: str) -> Document | DocumentError:
    try:
        return _whole({name: batch.column(column)[row].as_py() for name, column in columns.items()}, where, where)
    except UnicodeDecodeError as error:
        return DocumentError(f"{where} is not UTF-8: {error}.")


def _lines(part: Part, path: str) -> Found:
    with _opened(path) as file:
        file.seek(part.start)
        data = file.read(part.stop - part.start)
    for number, line in enumerate(data.split(b"\n"), part.first):
        where = f"{_name(path)}:{number}"
        try:
            if line.strip():
                yield _whole(json_object(line.decode("utf-8-sig" if number == 1 else "utf-8"), where), where, where)
        except UnicodeDecodeError as error:
            yield DocumentError(f"{where} is not UTF-8: {error}.")
        except DocumentError as error:
            yield error


def _whole(fields: object, where: str, name: str | None) -> Document | DocumentError:
    try:
        return document_of(fields, where, name)
    except DocumentError as error:
        return error


def _files(path: str, on_skip: Skip) -> Iterator[str]:
    """The files that a path names: itself, those of a folder, or those that match its *."""
    endings = (*SUFFIXES, *LARGE, *readers.readers())
    if "://" in path:
        endings, found = LARGE, _remote(path)
    elif os.path.isdir(path):
        found = list(files_in(path, endings, on_skip))
    else:
        found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not any(file.lower().endswith(endings) for file in found):
        what = f"{found[0]} is none of {', '.join(endings)}" if found else f"no such file or folder: {path}"
        raise DocumentError(f"{what}.")
    yield from (file for file in found if file.lower().endswith(endings))


def _remote(url: str) -> list[str]:
    """The files that a URL names. Raises DocumentError."""
    fixed = url.partition("*")[0].rpartition("/")[0] if "*" in url else url
    fs = _arrow("fs")
    try:
        system, root = fs.FileSystem.from_uri(fixed)
        if system.get_file_info(root).type == fs.FileType.File:
            return [url]
        listed = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    except (OSError, ValueError) as error:
        raise DocumentError(f"cannot list {url}: {error}.") from error
    start = fixed[: len(fixed.rstrip("/")) - len(root.rstrip("/"))]  # what stands before the path
    names = sorted(f"{start}{info.path}" for info in listed if info.type == fs.FileType.File)
    return [name for name in names if fixed == url or fnmatch.fnmatch(name, url)]


def _opened(path: str) -> Any:
    """A file, open for reading bytes."""
    if "://" not in path:
        return open(path, "rb")
    system, inner = _arrow("fs").FileSystem.from_uri(path)
    return system.open_input_file(inner)


def _name(path: str) -> str:
    return path if "://" in path else name_of(path)


def _arrow(module: str) -> Any:
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError as error:
        raise MissingExtra("pyarrow", "parquet") from error
