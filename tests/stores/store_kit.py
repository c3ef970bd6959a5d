"""Document caches of random rows, and the stores that one contract suite runs on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from kvilt.rows.rows import TensorRows, whole
from kvilt.stores.blobs import Blob
from kvilt.stores.catalogue import Catalogue
from kvilt.stores.disk import DiskStore
from kvilt.stores.memory import MemoryStore
from kvilt.stores.remote.object import ObjectStore
from kvilt.stores.remote.redis import RedisStore
from kvilt.stores.sizes import parse_size
from kvilt.stores.store import Store
from kvilt.stores.tiered import TieredStore
from kvilt.types import CacheKey, DocumentCache, digest_of

POLICIES = ("lru", "lfu", "greedy-dual")
KINDS = ("memory", "disk", "tiered")


def make_key(seed: int, dtype: torch.dtype = torch.float32, namespace: str = "shared") -> CacheKey:
    return CacheKey("model", "tokenizer", "rope", str(dtype), "encoding", "", digest_of(f"document {seed}"), namespace)


def digest(seed: int, namespace: str = "shared") -> str:
    return make_key(seed, namespace=namespace).digest


def make_cache(
    seed: int,
    rows: int = 8,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    namespace: str = "shared",
    heads: int = 2,
) -> DocumentCache:
    """Always the same cache for the same arguments; `tokens` above `rows` makes it pruned."""
    random = torch.Generator().manual_seed(seed)
    data = torch.randn(2, 2, heads, rows, 4, generator=random).to(dtype)  # (layers, 2, heads, rows, head_dim)
    run = torch.arange(tokens or rows) + 1000 * seed
    return DocumentCache(run, torch.arange(rows), len(run), make_key(seed, dtype, namespace), TensorRows(data))


def same(one: DocumentCache | None, other: DocumentCache) -> bool:
    """Bit-exact equality of everything a document cache holds."""
    return (
        one is not None
        and one.key == other.key
        and (one.length, one.dropped) == (other.length, other.dropped)
        and torch.equal(one.tokens, other.tokens)
        and torch.equal(one.offsets, other.offsets)
        and torch.equal(whole(one.rows), whole(other.rows))
    )


def remote_store(kind: str, server: str, path: Path, **options: object) -> Store:
    """A store on a server, under a prefix that belongs to the path: an object store with what it keeps in a folder, too."""
    prefix = digest_of(str(path))[:16]
    if kind == "redis":
        return RedisStore(server, prefix=prefix, **options)
    url = f"file://{path}" if kind == "object" else f"s3://kvilt/{prefix}"
    return ObjectStore(url, server if kind != "object" else "", **{"fresh": 0.0, **options})


def make_store(
    kind: str,
    path: Path,
    policy: str = "lru",
    budget: int | None = None,
    quota: int | None = None,
    servers: Mapping[str, str] | None = None,
) -> Store:
    """A store with that budget and quota."""
    if servers is not None:
        parts = ["redis", "moto"] if kind == "remote tiers" else [kind]
        made = [remote_store(part, servers[part], path).last for part in parts]
        limits = policy, parse_size(budget, "budget"), parse_size(quota, "quota")
        stores = [Store(Catalogue(each.blobs, each.pins, None, *limits)) for each in made]
        return stores[0] if len(stores) == 1 else TieredStore(MemoryStore("1GB"), *stores)
    if kind == "memory":
        return MemoryStore(budget or "1GB", policy, quota)
    if kind == "disk":
        return DiskStore(str(path), budget, policy, quota)
    return TieredStore(memory="1GB", path=str(path), budget=budget, policy=policy, quota=quota)


def unit(rows: int = 8, tokens: int | None = None) -> int:
    """Bytes of one stored document."""
    store = MemoryStore()
    store.put(make_cache(999, rows, tokens))
    return store.stats().bytes


def stored(store: Store, seeds: Sequence[int]) -> set[int]:
    """Which documents are there."""
    return {seed for seed in seeds if store.contains([digest(seed)])}


def bytes_of(blob: Blob) -> bytes:
    data = bytearray(blob.size)
    blob.read(0, [memoryview(data)])
    return bytes(data)


def soon(work: Callable[[], object], seconds: float = 10.0) -> None:
    """Until it is so, within the time that a server is left alone."""
    until = time.monotonic() + seconds
    while not work():
        assert time.monotonic() < until
        time.sleep(0.05)


def damage(store: Store, seed: int) -> None:
    """One bit of a stored document's rows is changed, in every tier that has it."""
    for catalogue in store.catalogues:
        for blob in catalogue.blobs.get_many([digest(seed)]):
            if blob is not None:
                data = bytearray(bytes_of(blob))
                data[-1] ^= 4
                catalogue.blobs.delete(digest(seed))
                catalogue.blobs.put(digest(seed), [memoryview(data)])


def file_of(root: Path, seed: int) -> Path:
    key = digest(seed)
    return root / key[:2] / f"{key}.safetensors"


def flip(path: Path, at: int) -> None:
    """One bit of a file is changed."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
