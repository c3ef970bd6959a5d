"""Eviction scores and limits alone, and the sizes people write."""

from __future__ import annotations

import pytest
from kvilt.stores.memory import MemoryStore
from kvilt.stores.tiered import TieredStore
from store_kit import make_cache, make_key

from kvilt.errors import SpecError, StoreUnavailable
from kvilt.registry import build
from kvilt.stores.policy import Limits, Standing, make_policy
from kvilt.stores.sizes import parse_size, show_size


def test_scores_by_hand() -> None:
    assert make_policy("lru").score(9, 100, 50, 3.0) == 0.0
    assert make_policy("lfu").score(9, 100, 50, 3.0) == 9.0
    assert make_policy("greedy-dual").score(0, 100, 50, 3.0) == 5.0  # 3 + 1 * 100 / 50
    assert make_policy("greedy-dual").score(4, 100, 50, 3.0) == 13.0  # 3 + 5 * 100 / 50


def test_victims_meet_quota_first_and_count_for_the_budget() -> None:
    standings = {"a": [Standing("a1", 10, 0), Standing("a2", 10, 0)], "b": [Standing("b1", 10, 0)]}

    def victims(size: int, namespace: str, **limits: int) -> list[str]:
        ranked = lambda scope: standings[scope] if scope else [*standings["b"], *standings["a"]]  # noqa: E731
        held = lambda scope: sum(s.bytes for s in ranked(scope))  # noqa: E731
        return [s.key for s in Limits(**limits).victims(size, namespace, held, ranked)]

    assert victims(5, "a") == []
    assert victims(5, "a", budget=35) == []
    assert victims(5, "a", budget=34) == ["b1"]
    assert victims(5, "a", quota=20) == ["a1"]
    assert victims(5, "a", quota=20, budget=30) == ["a1"]
    assert victims(5, "a", quota=20, budget=20) == ["a1", "b1"]
    assert victims(0, "a", quota=5, budget=100) == ["a1", "a2"]
    with pytest.raises(StoreUnavailable, match="quota of 4 bytes: it is larger"):
        victims(5, "a", quota=4)


@pytest.mark.parametrize(("policy", "kept"), [("greedy-dual", {1, 4}), ("lru", {3, 4}), ("lfu", {3, 4})])
def test_greedy_dual_keeps_what_is_dear_for_its_size(policy: str, kept: set[int]) -> None:
    """A pruned document costs as much to encode again as a whole one, at a fraction of the bytes."""
    store = MemoryStore(5000, policy)
    store.put(make_cache(1, rows=2, tokens=16))  # 256 + 144 bytes: 16 / 400 = 0.04
    for i in (2, 3, 4):  # two of them fit, but not beside the first
        store.put(make_cache(i, rows=16))  # 2048 + 256 bytes: 16 / 2304 = 0.007
    assert store.contains(make_key(i).digest for i in range(5)) == {make_key(i).digest for i in kept}


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
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 parsecs", "-1GB", "1e9", "4iB", "0", "0.1", 0, "1,5GB"])
def test_bad_sizes(text: str | int) -> None:
    with pytest.raises(SpecError, match="budget="):
        parse_size(text, "budget")


def test_no_size_is_no_limit() -> None:
    assert parse_size(None) is None
    assert [show_size(n) for n in (7, 1500, 2_500_000, 10**9, 3 * 10**12)] == [
        *("7 bytes", "1.5 kB", "2.5 MB", "1.0 GB", "3.0 TB")
    ]


def test_spec_strings(tmp_path: object) -> None:
    memory = build("store", "memory:budget=1MB,policy=greedy-dual,quota=1000")
    assert isinstance(memory, MemoryStore)
    assert memory.stats().budget == 10**6
    tiered = build("store", f"tiered:memory=1MiB,path={tmp_path}/t,budget=2MB,policy=lfu")
    assert isinstance(tiered, TieredStore)
    assert [tier.stats().budget for tier in tiered.stores] == [1 << 20, 2 * 10**6]
    tiered.close()
    disk = build("store", f"disk:path={tmp_path}/d,budget=3000,quota=2kB")
    assert disk.stats().budget == 3000
    disk.close()
    with pytest.raises(SpecError, match="Did you mean 'budget'"):
        build("store", "memory:bugdet=1GB")
    with pytest.raises(SpecError, match="at least one"):
        TieredStore.of()
