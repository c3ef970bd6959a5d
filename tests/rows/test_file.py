"""A cache as bytes: everything comes back, others can read it, and nothing that was altered is ever served."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import zoo
from core_kit import Bytes, cache_of, ids, pruned, rows_of
from kvilt.errors import DamagedCache, DocumentError, OtherVersion
from kvilt.rows.codec import CODECS, QuantisedRows
from kvilt.rows.file import open_cache, pack
from kvilt.rows.header import MAX_TITLE, read_header
from kvilt.rows.rows import DIRECT, PartRows, TensorRows, whole
from kvilt.types import CacheKey, DocumentCache, Encoding

TEXT = ids(9, 4)


def made(encoding: Encoding | None = None, dtype: torch.dtype = torch.float32) -> DocumentCache:
    cache = cache_of(zoo.model_of("llama"), TEXT, encoding)
    return dataclasses.replace(cache, rows=TensorRows(rows_of(cache).to(dtype)))


def quantised(cache: DocumentCache, name: str) -> DocumentCache:
    assert cache.rows is not None
    return dataclasses.replace(cache, rows=QuantisedRows.of(cache.rows, CODECS[name]))


CACHES: dict[str, Callable[[], DocumentCache]] = {
    "float32": made,
    "bfloat16": lambda: made(dtype=torch.bfloat16),
    "float16": lambda: made(dtype=torch.float16),
    "int8": lambda: quantised(made(), "int8"),
    "int4": lambda: quantised(made(), "int4"),
    "fp8": lambda: quantised(made(), "fp8"),
    "behind a sink": lambda: made(Encoding(before=(0, 0, 5))),
    "packet": lambda: made(Encoding((-1,), (-2,), keep=True, learned=torch.ones(2, 64))),
    "anchored": lambda: made(Encoding(chunk=4, anchors=(8, 9))),
    "pressed": lambda: pruned(made(), torch.tensor([0, 3, 4, 8])),
    "pressed, anchored, int4": lambda: quantised(
        pruned(made(Encoding((7,), chunk=4, anchors=(8,))), torch.tensor([4])), "int4"
    ),
}


def tiny(name: str = "") -> DocumentCache:
    """The smallest document with chunks, of one layer and one head; float32 unless a codec is named."""
    cache = made(Encoding(chunk=4, anchors=(8,)))
    cache = dataclasses.replace(cache, rows=TensorRows(rows_of(cache)[:1, :, :1, :, :2].contiguous()))
    return quantised(cache, name) if name else cache


def data_of(cache: DocumentCache, **options: object) -> bytes:
    return b"".join(pack(cache, **options))  # type: ignore[arg-type]


def same(one: DocumentCache, other: DocumentCache) -> bool:
    """Bit for bit the same document."""
    assert one.rows is not None
    assert other.rows is not None
    chunks = [(c.chunks if c.chunks is not None else torch.zeros(0)).tolist() for c in (one, other)]
    return (
        (one.key, one.length, one.dropped) == (other.key, other.length, other.dropped)
        and (one.rows.shape, one.rows.dtype, one.nbytes) == (other.rows.shape, other.rows.dtype, other.nbytes)
        and chunks[0] == chunks[1]
        and all(map(torch.equal, (one.tokens, one.offsets), (other.tokens, other.offsets)))
        and torch.equal(bits(one), bits(other))
    )


def bits(cache: DocumentCache) -> Tensor:
    return rows_of(cache).view(torch.uint8)


def noticed(data: bytes, cache: DocumentCache) -> str:
    """What becomes of a file: "damaged", "other", or an AssertionError if it is served and differs."""
    try:
        assert same(open_cache(Bytes(data), cache.key), cache), "wrong rows were served"
    except DamagedCache:
        return "damaged"
    except OtherVersion:
        return "other"
    return "served"


# --- there and back ---


@pytest.mark.parametrize("name", CACHES)
def test_every_kind_of_document_comes_back_as_it_was(name: str) -> None:
    """Danger: chunks, dropped tokens or the places of kept rows are forgotten; scales get another shape."""
    cache = CACHES[name]()
    found = open_cache(Bytes(data_of(cache)), cache.key)
    assert same(found, cache)
    assert torch.equal(found.own_tokens, cache.own_tokens)
    assert found.is_lossless == cache.is_lossless
    assert found.rows is not None
    assert torch.equal(whole(found.rows, slice(1, 3)), rows_of(cache)[1:3])
    assert same(open_cache(Bytes(data_of(found)), cache.key), cache)  # a stored cache can be stored again


def long() -> DocumentCache:
    """A document of three layers whose heads are large enough to be read without a copy."""
    places = torch.arange(2 + DIRECT // 64)
    rows = TensorRows(torch.randn(3, 2, 2, len(places), 16))
    return dataclasses.replace(made(), rows=rows, offsets=places, tokens=places, length=len(places))


def test_long_rows_are_read_straight_into_the_buffer() -> None:
    """Danger: blocks of more than 8 KiB take another way, and land beside their place or unchecked."""
    cache = long()
    count = cache.length
    data = bytearray(data_of(cache))
    buffer = torch.full((3, 2, 2, count + 9, 16), torch.nan)
    found = open_cache(blob := Bytes(bytes(data)), cache.key)
    before = blob.asked
    found.rows.read(slice(1, 3), buffer[1:, :, :, 4 : 4 + count])  # type: ignore[union-attr]
    assert blob.asked - before == cache.nbytes * 2 // 3
    assert torch.equal(buffer[1:, :, :, 4 : 4 + count], rows_of(cache)[1:])
    assert buffer[0].isnan().all()
    assert buffer[:, :, :, :4].isnan().all()
    assert buffer[:, :, :, 4 + count :].isnan().all()
    data[-5] ^= 1
    with pytest.raises(DamagedCache, match="rows of layer 2"):
        open_cache(Bytes(bytes(data)), cache.key).rows.read(slice(0, 3), buffer[..., 4 : 4 + count, :])  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "anchored", "int4"])
def test_any_safetensors_library_reads_it(name: str, tmp_path: Path) -> None:
    """Danger: a corpus of caches that only this version of one program can read."""
    cache, path = CACHES[name](), tmp_path / "document.safetensors"
    path.write_bytes(data_of(cache, title='quotes " and ✓', created=12.5))
    tensors = load_file(path)
    assert torch.equal(tensors["tokens"], cache.tokens)
    assert torch.equal(tensors["offsets"], cache.offsets)
    assert set(tensors) - {"chunks", "scales_keys", "scales_values"} == {"tokens", "offsets", "digests", "rows"}
    if name != "int4":
        assert torch.equal(tensors["rows"], rows_of(cache))
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    assert (meta["format"], meta["version"], meta["title"]) == ("kvilt", "2", 'quotes " and ✓')
    assert CacheKey(**json.loads(meta["fields"])) == cache.key
    header = read_header(cache.key.digest, Bytes(path.read_bytes()))
    assert (header.title, header.created, header.tokens, header.namespace) == (
        meta["title"],
        12.5,
        len(cache.tokens),
        "shared",
    )
    assert header.bytes == path.stat().st_size
    assert header.spans["rows"].start % 4096 == 0


def test_a_file_is_hardly_larger_than_its_rows() -> None:
    """Danger: a header per layer, or pages of padding for each."""
    for name in CACHES:
        cache = CACHES[name]()
        assert len(data_of(cache)) <= 4096 + cache.nbytes + 32 * 4 * 6 + 24 * len(cache.tokens)


def test_a_read_asks_for_what_it_needs_alone() -> None:
    """Danger: opening a document, or one layer of it, reads the whole file."""
    cache = long()
    found = open_cache(blob := Bytes(data_of(cache)), cache.key)
    assert blob.asked <= (16 << 10) + 16 * cache.length + 32 * 3 * 4
    before = blob.asked
    whole(found.rows, slice(2, 3))  # type: ignore[arg-type]
    assert blob.asked - before == cache.nbytes // 3


# --- nothing that was altered is served ---


def test_no_byte_of_a_file_can_change_unnoticed() -> None:
    """Danger: a flipped bit anywhere, in the header's padding or the length of a span, is served as another document."""
    cache = tiny()
    data = data_of(cache, title="é")
    other = [at for at in range(len(data)) if noticed(flipped(data, at, at % 8), cache) == "other"]
    version = data.index(b'"version":"2"') + len('"version":"')
    assert set(other) <= {version}
    assert noticed(data, cache) == "served"


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


@pytest.mark.parametrize("name", CODECS)
def test_no_bit_of_quantised_rows_or_scales_can_change_unnoticed(name: str) -> None:
    """Danger: scales have no digest, and a flipped bit in one doubles a whole channel."""
    cache = tiny(name)
    data = data_of(cache)
    first = 8 + int.from_bytes(data[:8], "little")
    assert {noticed(flipped(data, at, bit), cache) for at in range(first, len(data)) for bit in (0, 7)} == {"damaged"}


def test_no_length_but_the_whole_one_is_served() -> None:
    """Danger: a file cut off by a full disk, or with something appended, is half a document."""
    cache = tiny()
    data = data_of(cache)
    for length in (*range(1500), *range(1500, 4096, 97), *range(4096, len(data))):
        assert noticed(data[:length], cache) == "damaged", length
        if length % 50 == 0:
            assert noticed(data[:length] + bytes(len(data) - length), cache) in ("damaged", "served")  # zeros instead
    assert noticed(data + b"\0", cache) == "damaged"


def test_a_file_that_is_cut_or_altered_after_it_was_opened_is_noticed() -> None:
    """Danger: only opening checks, and what rots on the disk meanwhile is served."""
    cache = CACHES["float32"]()
    blob = Bytes(data_of(cache))
    found = open_cache(blob, cache.key)
    assert found.rows is not None
    whole(found.rows, slice(0, 1))
    blob.data[-3] ^= 1
    for _ in range(2):
        with pytest.raises(DamagedCache, match="rows of layer 3 does not match its digest"):
            whole(found.rows, slice(0, 4))
    whole(found.rows, slice(0, 3))
    del blob.data[-8:]
    with pytest.raises(DamagedCache, match="cut off"):
        whole(found.rows, slice(3, 4))


def test_a_reader_of_some_heads_verifies_what_it_reads() -> None:
    """Danger: a tensor-parallel rank serves rotten heads, because only whole layers have a digest."""
    cache = CACHES["float32"]()
    data = data_of(cache)
    start = read_header(cache.key.digest, Bytes(data)).spans["rows"].start
    half = cache.nbytes // 4 // 4  # keys or values of one of two heads in a layer
    for side in (0, 1):
        at = start + side * 2 * half + half + 3  # the second head
        rows = open_cache(Bytes(flipped(data, at, 2)), cache.key).rows
        with pytest.raises(DamagedCache):
            whole(PartRows(rows, heads=slice(1, 2)), slice(0, 1))  # type: ignore[arg-type]
    rows = open_cache(Bytes(data), cache.key).rows
    assert torch.equal(whole(PartRows(rows, heads=slice(1, 2))), rows_of(cache)[:, :, 1:])  # type: ignore[arg-type]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(CacheKey)])
def test_another_identity_is_never_served(field: str) -> None:
    """Danger: a file that was renamed, or a collision of file names, answers for another document."""
    cache = tiny()
    other = dataclasses.replace(cache.key, **{field: "other"})
    with pytest.raises(DamagedCache, match="another document"):
        open_cache(Bytes(data_of(cache)), other)


def test_errors_of_the_device_are_not_damage() -> None:
    """Danger: one EIO of a network disk, and a sound file is thrown away."""

    class Failing(Bytes):
        def read(self, offset: int, into: object) -> None:
            raise OSError(5, "Input/output error")

    cache = tiny()
    blob = Failing(data_of(cache))
    with pytest.raises(OSError, match="Input/output"):
        open_cache(blob, cache.key)
    found = open_cache(Bytes(data_of(cache)), cache.key)
    found.rows.blob = blob  # type: ignore[union-attr]
    with pytest.raises(OSError, match="Input/output"):
        rows_of(found)


# --- limits ---


def test_what_nobody_could_read_again_is_not_written() -> None:
    """Danger: an id of 64 MB is stored, never served, and set aside at every question."""
    cache = tiny()
    assert noticed(data_of(cache, title="é" * (MAX_TITLE // 2)), cache) == "served"
    with pytest.raises(DocumentError, match="longer than 4096 bytes"):
        pack(cache, title="é" * (MAX_TITLE // 2) + "x")
    long = dataclasses.replace(cache, key=dataclasses.replace(cache.key, compression="x" * (1 << 20)))
    with pytest.raises(DocumentError, match="take more than"):
        pack(long)
    with pytest.raises(ValueError, match="no rows to store"):
        pack(dataclasses.replace(cache, rows=None))


def test_a_title_with_half_a_character_is_stored_readably() -> None:
    """Danger: a file name in Latin-1 becomes a title that no library can read and no terminal can print."""
    cache = tiny()
    header = read_header(cache.key.digest, Bytes(data_of(cache, title="caf\udce9\nx")))
    assert header.title == "caf?\nx"
