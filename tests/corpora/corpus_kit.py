"""Corpora for the tests: Parquet files with many row groups, and what a store holds after encoding them."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cli_kit import WORDS, stored

MOMENT = "1700000000"  # SOURCE_DATE_EPOCH: files that are made alike are alike, byte for byte


def texts(count: int, words: int = 8, seed: int = 0) -> list[str]:
    """Different texts of different lengths."""
    chance = random.Random(seed)
    return [f"Document {i}: {' '.join(chance.choices(WORDS, k=words + i % 7))}." for i in range(count)]


def parquet(path: Path, count: int, group: int = 16, words: int = 8) -> Path:
    """A Parquet file with columns id, title, text, and `group` rows in a row group."""
    columns = {"id": [f"d{i}" for i in range(count)], "title": [f"T {i}" for i in range(count)]}
    pq.write_table(pa.table({**columns, "text": texts(count, words)}), path, row_group_size=group)
    return path


def files(store: Path) -> dict[str, bytes]:
    """Every stored document by name."""
    return {path.name: path.read_bytes() for path in stored(store)}


def children(pid: int | None = None) -> list[int]:
    """Processes that a process started, and theirs."""
    found, waiting = list[int](), [pid or os.getpid()]
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(entry)] = int(parent)
    while waiting:
        at = waiting.pop()
        below = [child for child, parent in parents.items() if parent == at]
        found += below
        waiting += below
    return found


def command_of(pid: int) -> str:
    """A process's command line; empty if it is gone."""
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def kill(pid: int) -> None:
    """End a process as a machine would that loses its power."""
    os.kill(pid, signal.SIGKILL)
