"""Rows from a local file (.jsonl, .json, .txt, each also .gz), a folder, or the hub through `datasets`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvilt.errors import DocumentError, MissingExtra, UserError
from kvilt.lab.evaluate.tasks.base import require, split_of
from kvilt.rows.files import json_lines, text_lines

_JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


@dataclass(frozen=True)
class Row:
    """One object of a file and where it stands, for messages."""

    where: str
    number: int
    data: dict[str, Any]

    def name(self, task: str) -> str:
        """The sample's id, or a name made of its place where the data gives none."""
        return str(self.data.get("_id") or self.data.get("id") or f"{task}-{self.number}")


def rows(path: str, aliases: Sequence[str], split: str) -> Iterator[Row]:
    """The rows of `path` that belong to `split`; a folder is searched for a file named after an alias and the split."""
    file = find(path, aliases, split, _JSON)
    others, count = set[str](), 0
    for row in _objects(file):
        name = str(row.data.get("split"))
        if split_of(name) in (None, split):
            count += 1
            yield row
        else:
            others.add(name)
    there = ", ".join(sorted(others))
    require(count > 0 or not others, f"{file} holds the split {there}, not {split}: set split=… or path=….")
    require(count > 0, f"{file} is empty: expected one JSON object for each sample.")


def hub_rows(name: str, config: str | None, split: str) -> Iterator[Row]:
    """The rows of a dataset on the Hugging Face hub."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "data") from None
    try:
        data = datasets.load_dataset(name, config, split="validation" if split == "dev" else split)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name} ({split}) from the hub: {error}. Give a copy with path=….") from error
    for number, row in enumerate(data, 1):
        yield Row(f"{name} ({split}), row {number}", number, dict(row))


def find(path: str, aliases: Sequence[str], split: str, suffixes: Sequence[str]) -> Path:
    """The file that `path` means for a split; raises UserError when there is none, or more than one."""
    place = Path(path).expanduser()
    require(place.exists(), f"{place} does not exist. Give the data with path=FILE or path=FOLDER.")
    if place.is_file():
        named_for = split_in_name(place) or split
        require(named_for == split, f"{place} is named for the split {named_for}, not {split}: set split=… or path=….")
        return place
    files = sorted(f for f in place.iterdir() if f.name.lower().endswith(tuple(suffixes)))
    named = [f for f in files if any(f.name.lower().startswith(alias) for alias in aliases)]
    exact = [f for f in named if split_in_name(f) == split]
    fitting = exact or [f for f in named if split_in_name(f) is None]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(f.name for f in (fitting or files)[:8]) or "none"
    many = "more than one file" if fitting else "no file"
    wanted = " or ".join(f"{alias}…" for alias in aliases)
    raise UserError(f"{place} has {many} for {wanted}, split {split} (candidates: {listed}): name one with path=FILE.")


def split_in_name(file: Path) -> str | None:
    """The split that a file name mentions ("hotpot_dev_distractor_v1.json": dev)."""
    return next(filter(None, map(split_of, re.split(r"[^a-z]+", file.name.lower()))), None)


def _objects(file: Path) -> Iterator[Row]:
    if ".jsonl" in file.name.lower():
        objects = json_lines(text_lines(file), str(file))
    else:
        whole = _parse("".join(text_lines(file)), str(file))
        items = whole.get("data", whole.get("Data")) if isinstance(whole, dict) else whole
        if not isinstance(items, list):
            raise DocumentError(f'{file}: expected a list of samples, or an object with a list under "data".')
        objects = ((f"{file}, item {number}", item) for number, item in enumerate(items, 1))
    for number, (where, item) in enumerate(objects, 1):
        if not isinstance(item, dict):
            raise DocumentError(f"{where}: expected an object with named fields, not {type(item).__name__}.")
        yield Row(where, number, item)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " A file with one object a line must be named .jsonl." if error.msg == "Extra data" else ""
        raise DocumentError(f"{where}: not valid JSON ({error.msg}, line {error.lineno}).{hint}") from error
