"""The file format: readable by others, and no altered bit goes unnoticed."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kvilt.rows.format import file_size, open_file, read_header, write_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from store_kit import make_cache, make_key, same

from kvilt.errors import DamagedCache
from kvilt.stores import format as store_format
from kvilt.types import CacheKey


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / f"{make_key(1).digest}.safetensors"


def read_all(path: Path, expected: CacheKey | None = None) -> None:
    layers = open_file(path, expected).layers
    for name in layers.header.spans:
        layers.read(name)


def alter(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_stock_library_reads_it(path: Path, dtype: torch.dtype) -> None:
    cache = make_cache(1, dtype=dtype, rows=5, tokens=9)
    write_file(path, cache, title='quotes " and ✓', namespace="books")
    tensors = load_file(path)
    assert set(tensors) == {"tokens", "offsets", "keys.0", "keys.1", "values.0", "values.1"}
    assert torch.equal(tensors["tokens"], cache.tokens)
    assert torch.equal(tensors["values.1"], cache.layers.values[1])
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    assert (meta["format"], meta["version"], meta["codec"]) == ("kvilt", "1", "raw")
    assert (meta["title"], meta["namespace"], meta["length"]) == ('quotes " and ✓', "books", "9")
    assert CacheKey(**json.loads(meta["fields"])) == cache.key
    assert meta["key"] == cache.key.digest


def test_sizes_and_times(path: Path) -> None:
    cache = make_cache(1)
    size = write_file(path, cache, title="a title", created=12.5, expires=99.25)
    assert size == path.stat().st_size == file_size(cache, title="a title")
    header = read_header(path)
    assert (header.title, header.created, header.expires, header.bytes) == ("a title", 12.5, 99.25, size)
    assert read_header(path).spans["keys.0"].start % 4096 == 0
    assert os.listdir(path.parent) == [path.name]


def test_empty_and_large_documents(path: Path) -> None:
    for cache in (make_cache(1, rows=0, tokens=3), make_cache(2, rows=1500, heads=3, dim=65), make_cache(3, heads=600)):
        write_file(path, cache)
        found = open_file(path, cache.key)
        assert same(found, cache)
        _, heads, rows, dim = cache.layers.shape
        out = torch.zeros(heads, rows + 7, dim)[:, 3 : 3 + rows]
        assert torch.equal(found.layers.fetch(0, "keys", out), cache.layers.fetch(0, "keys"))


def test_a_stored_cache_can_be_stored_again(path: Path, tmp_path: Path) -> None:
    write_file(path, make_cache(1))
    write_file(tmp_path / "copy.safetensors", open_file(path))
    assert same(open_file(tmp_path / "copy.safetensors"), make_cache(1))


def test_an_open_document_survives_its_file(path: Path) -> None:
    write_file(path, make_cache(1))
    found = open_file(path)
    path.unlink()
    assert same(found, make_cache(1))
    fd = found.layers._fd
    found.layers.close()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)


def test_any_flipped_bit_is_noticed(path: Path) -> None:
    """Every byte of the file, and every bit of the header's beginning."""
    write_file(path, make_cache(1, rows=3, tokens=5), title="\u00e9", namespace="aA")
    chance = random.Random(0)
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    text_end = len(path.read_bytes()[:header].rstrip())
    places = [(at, bit) for at in range(700) for bit in (0, 5)]
    places += [(at, chance.randrange(8)) for at in range(700, text_end)]
    places += [(at, chance.randrange(8)) for at in range(text_end, header, 50)]
    places += [(at, chance.randrange(8)) for at in range(header, size)]
    for at, bit in places:
        alter(path, at, bit)
        with pytest.raises(DamagedCache):
            read_all(path)
        alter(path, at, bit)
    read_all(path, make_key(1))


def test_any_truncation_or_growth_is_noticed(path: Path) -> None:
    write_file(path, make_cache(1))
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 41), *range(12), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCache):
            read_all(path)
        path.write_bytes(whole[:length] + bytes(len(whole) - length) if length < len(whole) - 1 else whole + b"\0")
        with pytest.raises(DamagedCache):
            read_all(path)


def test_damage_after_opening_is_noticed(path: Path) -> None:
    write_file(path, make_cache(1))
    layers = open_file(path).layers
    span = layers.header.spans["values.1"]
    alter(path, span.start + 40, 3)
    layers.fetch(0, "keys")
    for out in (None, torch.zeros(2, 8, 4), torch.zeros(2, 9, 4)[:, 1:]):
        with pytest.raises(DamagedCache, match=r"values\.1 does not match"):
            layers.fetch(1, "values", out)
    os.truncate(path, span.start + 1)
    with pytest.raises(DamagedCache, match="cut off"):
        layers.fetch(1, "values")


def test_foreign_files_are_refused(path: Path) -> None:
    save_file({"keys.0": torch.zeros(2, 3, 4)}, path, metadata={"format": "pt"})
    with pytest.raises(DamagedCache, match="not one of Kvilt's"):
        open_file(path)
    for content in (b"", b"hello", b"\0" * 5000, b"\xff" * 5000, os.urandom(9000)):
        path.write_bytes(content)
        with pytest.raises(DamagedCache):
            open_file(path)


def test_other_versions_and_codecs_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_format, "VERSION", "2")
        write_file(path, make_cache(1))
        assert open_file(path).key == make_key(1)
    with pytest.raises(DamagedCache, match="format version 2, this Kvilt reads 1"):
        open_file(path)
    write_file(path, make_cache(1))
    monkeypatch.setattr(store_format, "READERS", {})
    with pytest.raises(DamagedCache, match="codec 'raw' is not known"):
        open_file(path)


@pytest.mark.parametrize("name", ["model", "tokenizer", "rope", "dtype", "encoding", "compression", "tokens"])
def test_another_identity_is_never_served(path: Path, name: str) -> None:
    write_file(path, make_cache(1))
    with pytest.raises(DamagedCache, match="another document"):
        open_file(path, replace(make_key(1), **{name: "other"}))


def test_a_failed_write_leaves_nothing(path: Path) -> None:
    cache = make_cache(1)
    uneven = replace(cache.layers, values=(cache.layers.values[0], torch.zeros(2, 3, 4)))
    with pytest.raises(ValueError, match=r"values\.1"):
        write_file(path, replace(cache, layers=uneven))
    assert os.listdir(path.parent) == []


def test_a_buffer_of_the_wrong_shape_is_refused(path: Path) -> None:
    write_file(path, make_cache(1))
    with pytest.raises(ValueError, match="buffer"):
        open_file(path).layers.fetch(0, "keys", torch.zeros(2, 7, 4))
