"""The sizes people write, and the specifications of stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvilt.errors import SpecError
from kvilt.registry import build
from kvilt.stores.disk import DiskStore
from kvilt.stores.memory import MemoryStore
from kvilt.stores.sizes import parse_size, show_size
from kvilt.stores.store import Store
from kvilt.stores.tiered import TieredStore


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("200GB", 200 * 10**9),
        ("4GiB", 4 << 30),
        ("512MB", 512 * 10**6),
        ("1.5 kb", 1500),
        ("2T", 2 * 10**12),
        (" 8mib ", 8 << 20),
        ("7B", 7),
        (12345, 12345),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    """Danger: a budget a thousand times too small or too large."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 parsecs", "-1GB", "1e9", "4iB", "0", "0.1", 0, "1,5GB"])
def test_bad_sizes(text: str | int) -> None:
    """Danger: a slip of the pen is taken for a size."""
    with pytest.raises(SpecError, match="budget="):
        parse_size(text, "budget")


def test_sizes_for_people() -> None:
    """Danger: figures that nobody can read."""
    assert parse_size(None) is None
    assert [show_size(n) for n in (7, 1500, 2_500_000, 10**9, 3 * 10**12)] == [
        *("7 bytes", "1.5 kB", "2.5 MB", "1.0 GB", "3.0 TB")
    ]


def test_specifications(tmp_path: Path) -> None:
    """Danger: the documented specifications build another store, or none."""
    memory = build("store", "memory:budget=1MB,policy=greedy-dual,quota=1000")
    assert isinstance(memory, MemoryStore)
    assert memory.stats().budget == 10**6
    assert build("store", "memory").stats().budget == 4 * 10**9
    disk = build("store", f"disk:path={tmp_path}/d,budget=3000,quota=2kB")
    assert isinstance(disk, DiskStore)
    assert disk.stats().budget == 3000
    for spec in (
        "tiered:memory=1MiB,path={}/t,budget=2MB,policy=lfu",
        "tiered:memory:budget=1MiB|disk:path={}/u,budget=2MB",
    ):
        tiered = build("store", spec.format(tmp_path))
        assert isinstance(tiered, TieredStore)
        assert isinstance(tiered, Store)
        assert [tier.stats().budget for tier in tiered.stores] == [1 << 20, 2 * 10**6]
        tiered.close()
    disk.close()
    with pytest.raises(SpecError, match="Did you mean 'budget'"):
        build("store", "memory:bugdet=1GB")
