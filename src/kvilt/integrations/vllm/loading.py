"""The worker's part: rows of stored documents are read, their keys rotated, and written into vLLM's paged cache.

All requests of a step are loaded together, some layers at a time: few calls, and rows that are still in the CPU's cache when
they are written. On CUDA that runs in a thread, through pinned memory and a stream of its own; each layer waits for its rows."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from kvilt import registry
from kvilt.errors import DamagedCache, StoreError
from kvilt.integrations.vllm.deployment import Settings
from kvilt.integrations.vllm.plans import Piece
from kvilt.rows.rows import Angles, PartRows, Rotation
from kvilt.stores.store import Store
from kvilt.types import CacheKey, Rows

GROUP_BYTES = 16 << 20
LAYER = re.compile(r"\.(\d+)\.")

logger = logging.getLogger("kvilt")


@dataclass(frozen=True)
class Load:
    """What one request needs before its step: stored rows for slots of its blocks."""

    request: str
    pieces: tuple[Piece, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Source:
    """One stored document of a load: its rows, where each goes, and to which position its key is rotated."""

    key: CacheKey
    rows: Rows
    slots: Tensor  # (rows,) int64 into the paged cache, -1: nowhere
    positions: Tensor  # (rows,) int64


class Loader:
    """Fills slots of the paged cache from a store, one step after another."""

    def __init__(
        self, store: Store, rotation: Rotation, dtype: torch.dtype, block_size: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self.store, self.rotation, self.dtype, self.block_size = store, rotation, dtype, block_size
        self.rank, self.ranks = rank, ranks
        self._fill: Fill | None = None

    @classmethod
    def of(cls, settings: Settings, rotation: Rotation, vllm_config: Any) -> Loader:
        """The loader of this worker."""
        from vllm.distributed import get_tensor_model_parallel_rank

        store = cast(Store, registry.build("store", settings.store))
        ranks = vllm_config.parallel_config.tensor_parallel_size
        rank = get_tensor_model_parallel_rank() if ranks > 1 else 0
        return cls(store, rotation, vllm_config.model_config.dtype, vllm_config.cache_config.block_size, rank, ranks)

    def start(self, loads: Sequence[Load], layers: Mapping[str, Any]) -> None:
        """Begin to load what a step needs into these attention layers, by name; on a CPU it is there when this returns."""
        self._fill = Fill(self, loads, {name: layer for name, layer in layers.items() if _is_attention(layer)})
        self._fill.start()

    def wait(self, name: str) -> None:
        """Return once a layer is filled, as far as work queued after this call can tell."""
        if self._fill is not None:
            self._fill.wait(name)

    def finish(self) -> Fill | None:
        """End of the step: what was loaded in it."""
        fill, self._fill = self._fill, None
        if fill is not None:
            fill.finish()
        return fill

    def own_heads(self, rows: Rows) -> Rows:
        """The heads that this rank holds; where there are fewer heads than ranks, ranks share one."""
        heads = rows.shape[1]
        if self.ranks == 1:
            return rows
        each = max(1, heads // self.ranks)
        first = self.rank * each if heads >= self.ranks else self.rank * heads // self.ranks
        return PartRows(rows, heads=slice(first, first + each))

    def sources(self, load: Load) -> tuple[list[Source], list[tuple[CacheKey, set[int]]]]:
        """A request's documents, and those that are not there any more with their blocks."""
        keys = list(dict.fromkeys(piece.key for piece in load.pieces))
        caches = dict(zip(keys, self.store.get_many(keys), strict=True))
        blocks = torch.tensor(load.blocks)
        last: dict[tuple[CacheKey, int], Source] = {}  # by document and place
        sources: list[Source] = []
        missing: list[tuple[CacheKey, set[int]]] = []
        for piece in load.pieces:
            at = torch.arange(piece.slot, piece.slot + piece.count)
            slots = blocks[at // self.block_size] * self.block_size + at % self.block_size
            rows, cache = slice(piece.first, piece.first + piece.count), caches[piece.key]
            place = piece.key, piece.base
            if cache is None or cache.rows is None or rows.stop > len(cache.offsets):
                missing.append((piece.key, set((slots // self.block_size).tolist())))
                continue
            if place not in last or bool((last[place].slots[rows] >= 0).any()):  # side by side twice: rows in two slots
                nowhere = torch.full((len(cache.offsets),), -1)
                last[place] = Source(piece.key, self.own_heads(cache.rows), nowhere, piece.base + cache.offsets)
                sources.append(last[place])
            last[place].slots[rows] = slots
        return sources, missing

    def angles(self, positions: Tensor, device: torch.device) -> Angles:
        """cos and sin at any positions, also below 0."""
        cos, sin = self.rotation.angles(positions.abs(), device)
        return cos, sin * positions.sign().to(device)[:, None]

    def set_aside(self, key: CacheKey, error: Exception) -> None:
        """Take a document out of service whose rows are damaged; whatever else went wrong may pass."""
        logger.warning("document %s is computed: %s", key.digest[:16], error)
        if isinstance(error, DamagedCache):
            try:
                self.store.set_aside(key.digest, error.reason)
            except StoreError as unavailable:
                logger.warning("not set aside: %s", unavailable)


class Fill:
    """The loads of one step."""

    def __init__(self, loader: Loader, loads: Sequence[Load], layers: Mapping[str, Any]) -> None:
        self.loader, self.loads, self.layers = loader, loads, layers
        self.failed: set[int] = set()  # blocks that could not be filled
        self.bad: set[str] = set()  # digests of the documents that could not be read
        self.sizes: dict[str, int] = {}  # bytes of each request
        self.seconds = 0.0
        self.device = next(iter(layers.values())).kv_cache.device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._ready = {name: threading.Event() for name in layers}
        self._marks: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, name="kvilt-loader", daemon=True)

    def start(self) -> None:
        """Load now, or on CUDA in a thread while the step is prepared."""
        if self.stream is None:
            self._run()
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # earlier work may still use the blocks
            self._thread.start()

    def wait(self, name: str) -> None:
        """Return once a layer is filled."""
        if self.stream is not None and name in self._ready:
            self._ready[name].wait()
            if name in self._marks:
                torch.cuda.current_stream(self.device).wait_event(self._marks[name])

    def finish(self) -> None:
        """Return when nothing is loaded any more."""
        if self.stream is not None:
            self._thread.join()

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            with torch.no_grad(), torch.cuda.stream(self.stream):
                self._fill(self._sources())
        except Exception:  # a worker that dies takes every request with it; these fail alone
            logger.exception("documents were not loaded")
            self.failed |= {block for load in self.loads for block in load.blocks}
        finally:
            self.seconds = time.perf_counter() - began
            for event in self._ready.values():
                event.set()

    def _sources(self) -> list[Source]:
        sources: list[Source] = []
        for load in self.loads:
            mine, missing = self.loader.sources(load)
            for key, blocks in missing:
                self.failed |= blocks
                self.bad.add(key.digest)
            self.sizes[load.request] = sum(source.rows.nbytes for source in mine)
            sources += mine
        return sources

    def _fill(self, sources: list[Source]) -> None:
        if not sources:
            return
        layers = sorted((_number(name), name) for name in self.layers)
        slots, dtype = torch.cat([s.slots for s in sources]), self.loader.dtype
        shape = (2, sources[0].rows.shape[1], len(slots), sources[0].rows.shape[3])
        group = max(1, GROUP_BYTES // (math.prod(shape) * dtype.itemsize))
        angles = self.loader.angles(torch.cat([s.positions for s in sources]), self.device)
        buffer = torch.empty(group, *shape, dtype=dtype) if self.stream is None else None  # one: fresh memory is slow
        for start in range(0, len(layers), group):
            part = layers[start : start + group]
            rows = torch.empty(group, *shape, dtype=dtype, pin_memory=True) if buffer is None else buffer
            rows = rows[: len(part)]
            self._read(sources, slots, slice(part[0][0], part[-1][0] + 1), rows)
            self._write(part, rows.to(self.device, non_blocking=True), angles, slots.to(self.device))

    def _read(self, sources: list[Source], slots: Tensor, layers: slice, out: Tensor) -> None:
        """Read some layers of all documents into `out` (layers, 2, heads, rows, head_dim)."""
        at = 0
        for source in sources:
            end = at + len(source.slots)
            try:
                if bool((slots[at:end] >= 0).any()):
                    source.rows.read(layers, out[:, :, :, at:end])
            except (StoreError, OSError, EOFError) as error:
                self.failed |= set((slots[at:end][slots[at:end] >= 0] // self.loader.block_size).tolist())
                slots[at:end] = -1
                self.bad.add(source.key.digest)
                self.loader.set_aside(source.key, error)
            at = end

    def _write(self, part: list[tuple[int, str]], rows: Tensor, angles: Angles, slots: Tensor) -> None:
        """Rotate keys and write rows (layers, 2, heads, rows, head_dim) into the paged cache of these layers."""
        for (_, name), both in zip(part, rows, strict=True):
            layer = self.layers[name]
            self.loader.rotation.rotate(both[0], angles, both[0])
            keys, values = both.transpose(1, 2) if self.stream is None else both.transpose(1, 2).contiguous()
            layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)
            if self.stream is not None:
                self._marks[name] = self.stream.record_event()
            self._ready[name].set()


def _is_attention(layer: Any) -> bool:
    return getattr(layer, "kv_cache", None) is not None and hasattr(getattr(layer, "impl", None), "do_kv_cache_update")


def _number(name: str) -> int:
    """A layer's number from its name."""
    match = LAYER.search(name)
    if match is None:
        raise ValueError(f"attention layer {name!r} has no number")
    return int(match[1])
