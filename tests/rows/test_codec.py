"""Codecs: how far decoded rows are from what was encoded, how many bytes they take, and that stores keep every bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kvilt.rows.format import file_size, open_file, write_file
from kvilt.stores.base import CacheStore
from torch import Tensor

import zoo
from core_kit import DOCUMENTS, QUESTION, cache_of, engine_of, ids, off, pruned
from kvilt.errors import DamagedCache, ModelError
from kvilt.model.model import Model
from kvilt.model.rope import turned
from kvilt.plan import Layout
from kvilt.rows.codec import CODECS, GRID, PackedLayers
from kvilt.stores.disk import DiskStore
from kvilt.stores.memory import MemoryStore
from kvilt.stores.tiered import TieredStore
from kvilt.types import DocumentCache, Prompt, Which

ERRORS = {"int8": 0.01, "int4": 0.12, "fp8": 0.03}  # relative, root mean square
BYTES = {"int8": 0.54, "int4": 0.30, "fp8": 0.53}  # of bfloat16's, head_dim 64
SHAPES = [(8, 500, 64), (2, 64, 128), (3, 130, 80), (4, 1, 64), (2, 0, 64)]


def rows_like_a_model(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Channels of unlike size and mean, as un-rotated keys have them."""
    random = torch.Generator().manual_seed(seed)
    rows, size, mean = (torch.randn(n, generator=random) for n in (shape, (shape[0], 1, shape[2]), (shape[2],)))
    return rows * size + 4 * mean


def packed(cache: DocumentCache, name: str, family: str = "llama") -> DocumentCache:
    """The cache as the codec stores it."""
    assert cache.layers is not None
    move = zoo.model_of(family).rope.move
    layers = PackedLayers.of(cache.layers, CODECS[name], lambda keys: move(keys, -cache.offsets))
    return DocumentCache(cache.tokens, cache.offsets, cache.length, cache.key, layers, cache.dropped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CODECS)
def test_decoded_rows_are_close_and_never_off_by_more_than_a_step(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Danger: a scale rounded down clips the largest numbers; a last, shorter block gets its neighbour's scale."""
    codec = CODECS[name]
    sides: tuple[Which, Which] = ("keys", "values")
    for which in sides:
        rows = rows_like_a_model(shape).to(dtype)
        numbers, grid = codec.pack(rows, which)
        found = codec.unpack(numbers, grid, which)
        assert found.dtype == torch.float32
        assert found.shape == rows.shape
        error = found - rows.float()
        assert error.norm() <= ERRORS[name] * rows.float().norm()
        if name != "fp8" and rows.numel():  # a float's step grows with the number
            assert error.abs().max() <= 0.51 * grid[0].max()
        into = torch.empty(shape, dtype=dtype)
        assert torch.equal(codec.unpack(numbers, grid, which, into), found.to(dtype))


@pytest.mark.parametrize("name", CODECS)
def test_constant_and_extreme_channels(name: str) -> None:
    """Danger: a channel without any range divides by zero; tiny and huge numbers leave the range of their scale."""
    for value in (0.0, 1e-20, 3.5, -70000.0, 1e9):
        rows = torch.full((2, 70, 64), value)
        for which in ("keys", "values"):
            found = CODECS[name].unpack(*CODECS[name].pack(rows, which), which)  # type: ignore[arg-type]
            assert torch.allclose(found, rows, rtol=0.01)


def test_keys_are_packed_without_rotation() -> None:
    """Danger: a channel whose rotation turns with the position uses its whole range, and nothing is gained by it."""
    model = zoo.model_of("llama")
    flat = rows_like_a_model((2, 1, 16)).expand(2, 300, 16)  # the same key at every place, but for its rotation
    turning = model.rope.move(flat, torch.arange(300))
    codec = CODECS["int4"]
    assert (codec.unpack(*codec.pack(flat, "keys"), "keys") - flat).norm() < 0.005 * flat.norm()
    assert (codec.unpack(*codec.pack(turning, "keys"), "keys") - turning).norm() > 0.02 * flat.norm()


def test_channels_that_cannot_be_paired_are_refused() -> None:
    """Danger: an odd number of channels loses its last one."""
    with pytest.raises(ModelError, match="use int8"):
        CODECS["int4"].pack(torch.zeros(2, 3, 5), "keys")


@pytest.mark.parametrize("name", CODECS)
def test_bytes_are_the_packed_ones_everywhere(name: str, tmp_path: Path) -> None:
    """Danger: budgets, listings and usage count what the rows would take unpacked."""
    layers = {f"{w}.{i}": rows_like_a_model((8, 500, 64)) for w in ("keys", "values") for i in range(2)}
    parts = {}
    for key, rows in layers.items():
        parts[key], parts[key + GRID] = CODECS[name].pack(rows, key.split(".")[0])  # type: ignore[arg-type]
    found = PackedLayers(CODECS[name], parts)
    assert found.shape == (2, 8, 500, 64)
    assert found.nbytes == sum(p.nbytes for p in parts.values()) <= BYTES[name] * 2 * 4 * rows.numel()
    key = cache_of(zoo.model_of("llama"), ids(4)).key
    cache = DocumentCache(torch.arange(500), torch.arange(500), 500, key, found)
    size = write_file(tmp_path / f"{key.digest}.safetensors", cache)
    assert file_size(cache) == size < found.nbytes + 20000
    store = MemoryStore()
    store.put(cache)
    assert store.stats().bytes == found.nbytes + cache.tokens.nbytes + cache.offsets.nbytes


def stores(path: Path) -> list[CacheStore]:
    return [MemoryStore(), DiskStore(str(path / "disk")), TieredStore("1GB", str(path / "tiered"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CODECS)
def test_stores_give_back_every_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Danger: a store decodes and encodes again, or hands out buffers that the next read overwrites."""
    plain = cache_of(zoo.model_of("llama"), ids(70))
    made = packed(pruned(plain, torch.tensor([0, 2, 3, 50, 69])), name)
    assert isinstance(made.layers, PackedLayers)
    for store in stores(tmp_path):
        store.put(made)
        if isinstance(store, TieredStore):
            assert store.stores[0].delete(made.key.digest)  # so that it comes back from the disk
        for reader in (store, *getattr(store, "stores", ())[::-1]):
            found = reader.get(made.key)
            assert found is not None
            assert found.nbytes == made.nbytes
            assert found.layers is not None
            assert found.layers.shape == made.layers.shape
            assert torch.equal(found.offsets, made.offsets)
            parts = {n: found.layers.read(n).clone() for n in made.layers.specs}  # type: ignore[attr-defined]
            assert all(torch.equal(parts[n].view(torch.uint8), made.layers.read(n).view(torch.uint8)) for n in parts)
            out = torch.empty(made.layers.shape[1:], dtype=dtype)
            assert torch.equal(found.layers.fetch(3, "keys", out), made.layers.fetch(3, "keys").to(dtype))
        assert store.verify() == []


@pytest.mark.parametrize("name", CODECS)
def test_a_damaged_packed_file_is_noticed(name: str, tmp_path: Path) -> None:
    """Danger: a flipped bit in numbers or grid is decoded and served."""
    made = packed(cache_of(zoo.model_of("llama"), ids(70)), name)
    path = tmp_path / f"{made.key.digest}.safetensors"
    write_file(path, made)
    header = open_file(path).layers.header  # type: ignore[union-attr]
    whole = path.read_bytes()
    for part in ("keys.2", f"keys.2{GRID}", "values.0", f"values.0{GRID}"):
        at = header.spans[part].start + 1
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        layers = open_file(path, made.key).layers
        assert layers is not None
        which, layer = part.split(".")[:2]
        with pytest.raises(DamagedCache, match="does not match its digest"):
            layers.fetch(int(layer), which)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("keep", [None, torch.tensor([0, 1, 5, 6, 11])])
def test_rows_are_placed_by_one_rotation_and_rounded_once(model: Model, name: str, keep: Tensor | None) -> None:
    """Danger: packed keys are rotated twice, by the wrong row's place, or rounded to the model's dtype in between."""
    cache, fresh = cache_of(model, ids(12, 1)), torch.arange(12) < 3
    cache = cache if keep is None else pruned(cache, keep)
    family = next(f for f in zoo.FAMILIES if zoo.model_of(f) is model)
    read = turned(packed(cache, name, family), model.rope)
    assert read.layers is not None
    flat = read.layers.packed.fetch(2, "keys")  # type: ignore[attr-defined]
    empty = DocumentCache(ids(0), ids(0), 0, cache.key)
    for recomputed in (None, fresh):
        plan = Layout(Prompt(empty, (read,), ids(4))).compute(ids(5)).reuse(read, recomputed).ask().plan()
        _, placed = model.run(plan)
        segment = plan.segments[1]
        rows = plan.bases[1] + segment.reused[segment.places].nonzero()[:, 0]
        source = segment.reused[cache.offsets]
        wanted = model.rope.move(flat[:, source], 5 + cache.offsets[source])
        assert torch.equal(placed.buffer[2, 0][:, rows], wanted)
        model.pool.give(placed.buffer)
    again = model.rope.move(flat, cache.offsets)
    assert torch.equal(read.layers.fetch(2, "keys"), again)
    into = torch.empty(again.shape, dtype=torch.bfloat16)
    assert torch.equal(read.layers.fetch(2, "keys", into), again.bfloat16())


def test_int8_answers_like_the_model_itself() -> None:
    """Danger: errors of rows add up to another answer."""
    plain = engine_of().score(QUESTION, DOCUMENTS, [75, 80, 90])
    found = {n: engine_of().with_strategy("block", n).score(QUESTION, DOCUMENTS, [75, 80, 90]) for n in CODECS}
    distance = {n: off(logits, plain) for n, logits in found.items()}
    assert 0 < distance["int8"] < 0.02
    assert distance["int8"] < min(distance["fp8"], distance["int4"]) < 0.5


def test_eight_bit_floats_are_read_exactly() -> None:
    """Danger: small numbers without a leading one, or the sign, are lost on the way through float16."""
    every = torch.tensor([i for i in range(256) if i & 0x7F != 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(CODECS["fp8"].spread(every), every.float())
