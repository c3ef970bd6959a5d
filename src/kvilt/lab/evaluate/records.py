"""Record files: JSONL, a header with the settings first, then one record a sample, flushed as it is made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kvilt.errors import UserError
from kvilt.rows.files import json_object, text_lines
from kvilt.types import digest_of

FORMAT = 1
_FREE = ("path", "kvilt")  # may differ between a run and its continuation: every prompt's digest is compared anyway


class RecordFile:
    """Appends records; opened again with the same settings it goes on where it stopped."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = {"format": FORMAT, **header}
        self.done: dict[str, dict[str, Any]] = {}
        if path.exists():
            _drop_torn_line(path)
        fresh = not path.exists() or not path.stat().st_size
        if not fresh:
            header_there, records = read(path)
            self._compare(header_there)
            self.done = {record["id"]: record for record in records}
        self._stream = path.open("a", encoding="utf-8")
        if fresh:
            self._write(self.header)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; it is on its way to the disk when this returns."""
        self._write(record)
        self.done[record["id"]] = record

    def finished(self, name: str, prompt: str) -> bool:
        """Whether the sample is recorded; raises UserError when it was another prompt then."""
        record = self.done.get(name)
        if record is not None and record["prompt"] != prompt:
            raise UserError(f"{self.path}: sample {name} was another prompt when it was run. {_REMEDY}")
        return record is not None

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _compare(self, there: dict[str, Any]) -> None:
        mine = json.loads(json.dumps(self.header))
        keys = [key for key in sorted({*there, *mine} - set(_FREE)) if there.get(key) != mine.get(key)]
        changed = [f"{key} was {there.get(key)!r}, is {mine.get(key)!r}" for key in keys]
        if changed:
            raise UserError(f"{self.path} was made with other settings: {'; '.join(changed)}. {_REMEDY}")

    def _write(self, data: dict[str, Any]) -> None:
        self._stream.write(json.dumps(data, ensure_ascii=False) + "\n")  # one write, so an interrupt cannot split it
        self._stream.flush()


_REMEDY = "Use another output folder, or delete the file to start again."


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the records of a file; a torn last line is left out."""
    lines = enumerate(text_lines(path), 1)
    rows = [json_object(line, f"{path}:{number}") for number, line in lines if line.endswith("\n")]
    if not rows or rows[0].get("format") != FORMAT:
        raise UserError(f"{path} is no record file of this version: its first line must be a header, format {FORMAT}.")
    return rows[0], rows[1:]


def slug(text: str, longest: int = 80) -> str:
    """A text as a part of a file name; what is cut off a long one is kept as a digest."""
    name = re.sub(r"[^\w.-]+", "_", text).strip("_")
    return name if len(name) <= longest else f"{name[: longest - 9]}-{digest_of(text)[:8]}"


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a killed process left unfinished."""
    with path.open("rb+") as stream:
        data = stream.read()
        stream.truncate(data.rfind(b"\n") + 1)
