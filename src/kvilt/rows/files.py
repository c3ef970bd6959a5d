"""Files: lines of JSON read one by one, and files that are there completely or not at all."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvilt.errors import DocumentError


def name_of(path: str) -> str:
    """A path as an id: with forward slashes, and without bytes that are not UTF-8."""
    return os.fsencode(Path(path).as_posix()).decode("utf-8", "backslashreplace")


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, gzipped or not, blank ones too. Raises DocumentError, naming the line before."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 - told when the next line cannot be read
                yield line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DocumentError(f"{path} cannot be read after line {number}: {error}.") from error


def json_lines(lines: Iterable[str], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("name:number", object) of every line that is not blank. Raises DocumentError, naming the line."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{name}:{number}", json_object(line, f"{name}:{number}")


def json_object(text: str, where: str) -> dict[str, Any]:
    """One JSON object. Raises DocumentError, naming where it stands."""
    try:
        made = json.loads(text)
    except ValueError as error:
        raise DocumentError(f"{where} is not JSON: {error}. Every line must be one JSON object.") from error
    except RecursionError as error:
        raise DocumentError(f"{where} is nested too deeply.") from error
    if not isinstance(made, dict):
        raise DocumentError(f"{where} is {type(made).__name__}, not a JSON object.")
    return made


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the block writes there becomes `path` if the block ends well."""
    temporary = path.with_name(f".{path.stem[:32]}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
