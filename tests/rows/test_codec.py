"""Codecs: how far decoded rows are from what was encoded, how many bytes they take, and that they are placed like any others."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import zoo
from core_kit import DOCUMENTS, QUESTION, cache_of, engine_of, ids, layout, off, placed_rows, pruned, rotated
from kvilt.errors import ModelError
from kvilt.rows.codec import CODECS, SIDES, QuantisedRows
from kvilt.rows.rows import TensorRows, select, whole
from kvilt.types import DocumentCache

ERRORS = {"int8": 0.01, "int4": 0.12, "fp8": 0.03}  # relative, root mean square
BYTES = {"int8": 0.54, "int4": 0.30, "fp8": 0.53}  # of bfloat16's, head_dim 64
SHAPES = [(1, 8, 500, 64), (2, 2, 64, 128), (1, 3, 130, 80), (3, 4, 1, 64), (2, 2, 0, 64)]
AXES = {"keys": -2, "values": -1}


def rows_like_a_model(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Channels of unlike size and mean, as keys without rotation have them, (layers, heads, rows, head_dim)."""
    random = torch.Generator().manual_seed(seed)
    layers, heads, _, dim = shape
    rows, size, mean = (torch.randn(n, generator=random) for n in (shape, (layers, heads, 1, dim), (dim,)))
    return rows * size + 4 * mean


def quantised(cache: DocumentCache, name: str) -> DocumentCache:
    """The cache as the codec stores it."""
    assert cache.rows is not None
    return dataclasses.replace(cache, rows=QuantisedRows.of(cache.rows, CODECS[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CODECS)
def test_decoded_rows_are_close_and_never_off_by_more_than_a_step(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Danger: a scale rounded down clips the largest numbers; a last, shorter block gets its neighbour's scale."""
    codec = CODECS[name]
    for axis in AXES.values():
        rows = rows_like_a_model(shape).to(dtype)
        numbers, scales = codec.quantise(rows, axis)
        assert scales.shape == codec.scales(shape, axis)
        assert numbers.shape == (*shape[:3], shape[3] // codec.to_item)
        found = codec.dequantise(numbers, scales, axis)
        assert found.dtype == torch.float32
        assert found.shape == rows.shape
        error = found - rows.float()
        assert error.norm() <= ERRORS[name] * rows.float().norm()
        if name != "fp8" and rows.numel():  # a float's step grows with the number
            assert error.abs().max() <= 0.51 * scales[:, 0].max()


@pytest.mark.parametrize("name", CODECS)
def test_constant_and_extreme_channels(name: str) -> None:
    """Danger: a channel without any range divides by zero; tiny and huge numbers leave the range of their scale."""
    for value in (0.0, 1e-20, 3.5, -70000.0, 1e9):
        rows = torch.full((1, 2, 70, 64), value)
        for axis in AXES.values():
            assert torch.allclose(CODECS[name].dequantise(*CODECS[name].quantise(rows, axis), axis), rows, rtol=0.01)


def test_keys_share_their_scales_along_the_rows_and_values_along_the_channels() -> None:
    """Danger: sides are swapped, and a large channel of the keys drowns all others."""
    assert dict(SIDES) == {"scales_keys": -2, "scales_values": -1}
    keys = torch.randn(1, 1, 40, 16) * torch.logspace(-3, 3, 16)
    values = (
        keys.transpose(-1, -2).repeat(1, 1, 1, 2)[..., :16].contiguous()
    )  # (1, 1, 16, 16): a scale of its own to a row
    both = torch.stack([keys[:, :, :16], values], 1)
    found = whole(QuantisedRows.of(TensorRows(both), CODECS["int8"]))
    assert off(found[:, 0, ..., 0], both[:, 0, ..., 0]) < 0.01  # the smallest channel
    assert off(found[:, 1, :, 0], both[:, 1, :, 0]) < 0.01  # the smallest row


def test_keys_are_quantised_without_rotation() -> None:
    """Danger: a channel that turns with the position uses its whole range, and nothing is gained by it."""
    model = zoo.model_of("llama")
    flat = rows_like_a_model((1, 2, 1, 16)).expand(1, 2, 300, 16)  # the same key at every place, but for its rotation
    turning = rotated(model, flat, torch.arange(300))
    codec = CODECS["int4"]
    assert (codec.dequantise(*codec.quantise(flat, -2), -2) - flat).norm() < 0.005 * flat.norm()
    assert (codec.dequantise(*codec.quantise(turning, -2), -2) - turning).norm() > 0.02 * flat.norm()
    engine = engine_of("block", compress="int4")
    same = engine.encoder.make(engine.encoder.items([dataclasses.replace(DOCUMENTS[0], text="a" * 60, title=None)]))[0]
    assert same.rows is not None
    first = whole(same.rows, slice(0, 1))[0, 0, :, :60].float()  # layer 0: the same key sixty times, and a newline's
    assert off(first, first[:, :1].expand_as(first)) < 0.02


def test_channels_that_cannot_be_paired_are_refused() -> None:
    """Danger: an odd number of channels loses its last one."""
    with pytest.raises(ModelError, match="use int8"):
        CODECS["int4"].quantise(torch.zeros(1, 2, 3, 5), -2)


@pytest.mark.parametrize("name", CODECS)
def test_bytes_are_those_of_the_quantised_numbers(name: str) -> None:
    """Danger: budgets, listings and usage count what the rows would take decoded."""
    rows = torch.stack([rows_like_a_model((2, 8, 500, 64), seed) for seed in (0, 1)], 1)
    found = QuantisedRows.of(TensorRows(rows), CODECS[name])
    assert found.shape == (2, 8, 500, 64)
    assert found.nbytes == sum(part.nbytes for part in found.parts().values()) <= BYTES[name] * 2 * rows.numel()
    assert list(found.parts()) == ["rows", "scales_keys", "scales_values"]
    assert off(whole(found), rows) < 0.2


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("keep", [None, torch.tensor([0, 1, 5, 6, 11])])
@pytest.mark.parametrize("family", ["llama", "llama-yarn-tied-mha", "phi-partial-rotary", "glm-interleaved"])
def test_rows_are_placed_by_one_rotation(family: str, name: str, keep: Tensor | None) -> None:
    """Danger: decoded keys are rotated twice or by the wrong row's place, or rounded on their way."""
    model = zoo.model_of(family)
    cache, fresh = cache_of(model, ids(12, 1)), torch.arange(12) < 3
    read = quantised(cache if keep is None else pruned(cache, keep), name)
    assert read.rows is not None
    flat = whole(read.rows)
    for recomputed in (None, fresh):
        plan = layout(ids(4), read).compute(ids(5)).reuse(read, recomputed).ask().plan()
        segment = plan.segments[1]
        rows = plan.bases[1] + segment.reused[segment.places].nonzero()[:, 0]
        source = segment.reused[read.offsets]
        found = placed_rows(model, plan)[2, :, :, rows]
        assert torch.equal(found[0], rotated(model, flat[2, 0][:, source], 5 + read.offsets[source]))
        assert torch.equal(found[1], flat[2, 1][:, source])


@pytest.mark.parametrize("name", CODECS)
def test_selected_quantised_rows_are_those_of_the_index(name: str) -> None:
    """Danger: a selection is made among the rows as they are stored, where two share a byte or a scale."""
    cache = quantised(cache_of(zoo.model_of("llama"), ids(12, 1)), name)
    some = select(cache, torch.tensor([2, 3, 9]))
    assert cache.rows is not None
    assert some.rows is not None
    assert torch.equal(whole(some.rows), whole(cache.rows)[..., [2, 3, 9], :])


def test_int8_answers_like_the_model_itself() -> None:
    """Danger: errors of rows add up to another answer."""
    plain = engine_of().score(QUESTION, DOCUMENTS, [75, 80, 90])
    distance = {n: off(engine_of(compress=n).score(QUESTION, DOCUMENTS, [75, 80, 90]), plain) for n in CODECS}
    assert 0 < distance["int8"] < 0.02
    assert distance["int8"] < min(distance["fp8"], distance["int4"]) < 0.5


def test_eight_bit_floats_are_read_exactly() -> None:
    """Danger: small numbers without a leading one, or the sign, are lost on the way through float16."""
    every = torch.tensor([i for i in range(256) if i & 0x7F != 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(CODECS["fp8"].spread(every), every.float())
