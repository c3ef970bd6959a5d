"""Every kind of rows reads alike: some layers, into memory of any dtype and any strides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from core_kit import Bytes, fake, make_key
from kvilt.rows.codec import CODECS, QuantisedRows
from kvilt.rows.file import open_cache, pack
from kvilt.rows.rows import PartRows, TensorRows, select, whole
from kvilt.types import DocumentCache, Rows

LAYERS, HEADS, COUNT, DIM = 3, 4, 70, 16
INDEX = torch.tensor([0, 1, 5, 33, 69])


def data(dtype: torch.dtype = torch.float32, count: int = COUNT) -> Tensor:
    """(layers, 2, heads, rows, head_dim), always the same."""
    return torch.randn(LAYERS, 2, HEADS, count, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)


def cache(rows: Rows) -> DocumentCache:
    count = rows.shape[2]
    return dataclasses.replace(fake(range(count)), rows=rows)


def stored(rows: Rows) -> Rows:
    """The rows as they come back from a file."""
    blob = Bytes(b"".join(pack(cache(rows))))
    found = open_cache(blob, make_key(torch.arange(rows.shape[2]))).rows
    assert found is not None
    return found


def raw(dtype: torch.dtype = torch.float32) -> Rows:
    return TensorRows(data(dtype))


def quantised(name: str) -> Rows:
    return QuantisedRows.of(raw(), CODECS[name])


KINDS: dict[str, Callable[[], Rows]] = {
    "tensor": raw,
    "tensor, bfloat16": lambda: raw(torch.bfloat16),
    "file": lambda: stored(raw()),
    "file, bfloat16": lambda: stored(raw(torch.bfloat16)),
    "file, long": lambda: stored(TensorRows(data(count=200))),  # heads of more than 8 KiB are read without a copy
    "int8": lambda: quantised("int8"),
    "int4 file": lambda: stored(quantised("int4")),
    "fp8 file": lambda: stored(quantised("fp8")),
    "selected": lambda: PartRows(raw(), INDEX),
    "selected of a file": lambda: PartRows(stored(raw()), INDEX),
    "selected of int8": lambda: PartRows(quantised("int8"), INDEX),
    "selected twice": lambda: PartRows(PartRows(raw(), INDEX), torch.tensor([0, 3])),
    "heads": lambda: PartRows(raw(), heads=slice(1, 3)),
    "heads of a file": lambda: PartRows(stored(raw()), heads=slice(2, 4)),
    "heads of int4 in a file": lambda: PartRows(stored(quantised("int4")), heads=slice(0, 1)),
    "heads of selected of fp8": lambda: PartRows(PartRows(quantised("fp8"), INDEX), heads=slice(1, None, 2)),
    "selected of heads": lambda: PartRows(PartRows(raw(), heads=slice(1, 3)), INDEX),
}


@pytest.fixture(params=KINDS)
def rows(request: pytest.FixtureRequest) -> Rows:
    return KINDS[request.param]()


@pytest.mark.parametrize("layers", [slice(0, 3), slice(1, 2), slice(1, 3), slice(2, 9), slice(3, 3), slice(None)])
def test_reading_some_layers_is_slicing_all_of_them(rows: Rows, layers: slice) -> None:
    """Danger: layer 1 is read where layer 0 was asked for, or a range goes beyond the last layer."""
    assert rows.shape[0] == LAYERS
    everything = whole(rows)
    assert everything.shape == (LAYERS, 2, *rows.shape[1:])
    assert everything.dtype == rows.dtype
    assert everything.isfinite().all()
    assert everything.float().std() > 0.5  # not the zeros of fresh memory
    assert torch.equal(whole(rows, layers), everything[layers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_memory_can_be_read_into(rows: Rows, dtype: torch.dtype) -> None:
    """Danger: rows land beside their place in a buffer that is larger, or are cut instead of rounded."""
    wanted, (_, heads, count, dim) = whole(rows).to(dtype), rows.shape
    buffer = torch.full((LAYERS, 2, heads, count + 7, dim), torch.nan, dtype=dtype)
    rows.read(slice(None), buffer[:, :, :, 3 : 3 + count])
    assert torch.equal(buffer[:, :, :, 3 : 3 + count], wanted)
    assert buffer[:, :, :, :3].isnan().all()
    assert buffer[:, :, :, 3 + count :].isnan().all()
    turned = torch.empty(dim, count, heads, 2, LAYERS, dtype=dtype).permute(4, 3, 2, 1, 0)
    rows.read(slice(None), turned)
    assert torch.equal(turned, wanted)


def test_what_was_read_is_the_readers_own(rows: Rows) -> None:
    """Danger: keys are rotated in place in the stored tensor, or in memory that the next read uses again."""
    first = whole(rows)
    kept = first.clone()
    second = whole(rows)
    second.fill_(9)
    assert torch.equal(first, kept)
    assert torch.equal(whole(rows), kept)


def test_bytes_are_counted_as_they_are_stored() -> None:
    """Danger: usage and budgets count what rows would take elsewhere."""
    full = LAYERS * 2 * HEADS * COUNT * DIM * 4
    sizes = {name: KINDS[name]().nbytes for name in KINDS}
    assert sizes["tensor"] == sizes["file"] == full == 2 * sizes["file, bfloat16"]
    assert sizes["selected"] == sizes["selected of a file"] == full * 5 // 70
    assert sizes["selected twice"] == full * 2 // 70
    assert sizes["heads"] == full // 2
    assert sizes["int8"] == full // 4 + LAYERS * 2 * HEADS * (COUNT + DIM) * 2  # bfloat16 scales: a step and a lowest
    assert sizes["selected of int8"] == sizes["int8"] * 5 // 70
    assert sizes["int4 file"] == full // 8 + LAYERS * 2 * HEADS * (COUNT + 2 * DIM) * 2


def test_selected_rows_are_those_of_the_index() -> None:
    """Danger: a row number is taken for a place, or the order of the index is lost."""
    assert torch.equal(whole(PartRows(raw(), INDEX)), data()[..., INDEX, :])
    assert torch.equal(whole(KINDS["selected twice"]()), data()[..., [0, 33], :])
    assert torch.equal(whole(KINDS["heads"]()), data()[:, :, 1:3])
    none = PartRows(raw(), torch.zeros(0, dtype=torch.long))
    assert whole(none).shape == (LAYERS, 2, HEADS, 0, DIM)
    assert none.nbytes == 0


def test_selecting_keeps_the_places_of_what_is_left() -> None:
    """Danger: rows close up, and every key behind a dropped one is rotated to another place."""
    made = dataclasses.replace(fake(range(100), offsets=range(30, 100)), rows=raw())
    some = select(select(made, INDEX), torch.tensor([1, 4]))
    assert some.offsets.tolist() == [31, 99]
    assert (some.length, some.placed_tokens.tolist()) == (100, list(range(100)))
    assert torch.equal(whole(some.rows), data()[..., [1, 69], :])  # type: ignore[arg-type]
    assert not some.is_lossless
    assert select(dataclasses.replace(made, rows=None), INDEX).rows is None


def test_documents_without_rows_of_some_kind() -> None:
    """Danger: an empty document divides by its length."""
    empty = TensorRows(torch.zeros(LAYERS, 2, HEADS, 0, DIM))
    for rows in (
        empty,
        stored(empty),
        PartRows(empty, torch.zeros(0, dtype=torch.long)),
        PartRows(empty, heads=slice(2)),
    ):
        assert whole(rows).shape[3] == rows.nbytes == 0
