"""The rotation that puts stored keys where they are used: the model's own, in place, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from core_kit import ids, off
from kvilt.model import attention
from kvilt.model.model import Model
from kvilt.rows.rows import Rotation

FAR = torch.tensor([0, 1, 2, 37, 700, 977, 1023, 1024, 4095, 7999, 8000])
PLAIN = Rotation(1.0 / 10000 ** (torch.arange(0, 16, 2) / 16))
KINDS = {
    "halves": PLAIN,
    "neighbours": Rotation(PLAIN.inv_freq, interleaved=True),
    "partial": Rotation(PLAIN.inv_freq[:4]),
    "partial neighbours": Rotation(PLAIN.inv_freq[:4], interleaved=True),
}


def keys_of_a_pass(model: Model, token: int, positions: Tensor) -> Tensor:
    """Layer 0's keys of one token at several positions, as the model itself rotates them, (heads, positions, head_dim)."""
    seen: dict[int, Tensor] = {}
    with torch.no_grad(), attention.using(lambda layer, query, key, *_: seen.__setitem__(layer, key[0].clone())):
        model.hf.base_model(torch.full((1, len(positions)), token), position_ids=positions[None], use_cache=False)
    return seen[0]


def test_a_rotated_key_is_the_one_that_the_model_computes_there(model: Model) -> None:
    """Danger: scaling applied twice (YaRN), channels paired wrongly (GLM), unrotated channels touched (Phi), angles that
    drift from the model's at far positions."""
    wanted = keys_of_a_pass(model, int(ids(1, 3)), FAR)
    plain = wanted[:, :1].expand_as(wanted).clone()  # position 0: not rotated
    found = model.rotation.rotate(plain, model.rotation.angles(FAR))
    assert off(found, wanted) < 2e-6
    assert off(plain, wanted) > 0.1  # rotating is not nothing
    assert off(model.rotation.rotate(wanted, model.rotation.angles(FAR), back=True), plain) < 2e-6


def test_angles_are_those_of_the_models_rotary_module(model: Model) -> None:
    """Danger: angles in float64 are more exact, and not the model's: 5e-4 off at position 8,000."""
    rotary: Any = next(m for m in model.hf.modules() if hasattr(m, "inv_freq"))
    wanted = rotary(torch.zeros(1, 1, 1), FAR[None])
    half = len(model.rotation.inv_freq)
    for found, own in zip(model.rotation.angles(FAR), wanted, strict=True):
        torch.testing.assert_close(found, own[0, :, :half] / model.rotation.scaling, rtol=0, atol=3e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind: str) -> None:
    """Danger: every test compares two ways that share the same wrong pairs."""
    rotation, keys = KINDS[kind], torch.randn(2, 3, 16)
    positions = torch.tensor([0, 5, 300])
    wanted, half = keys.clone(), len(rotation.inv_freq)
    for pair, frequency in enumerate(rotation.inv_freq.tolist()):
        a, b = (2 * pair, 2 * pair + 1) if rotation.interleaved else (pair, pair + half)
        angle = positions * frequency
        wanted[..., a] = keys[..., a] * angle.cos() - keys[..., b] * angle.sin()
        wanted[..., b] = keys[..., b] * angle.cos() + keys[..., a] * angle.sin()
    torch.testing.assert_close(rotation.rotate(keys, rotation.angles(positions)), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_rotating_in_place_is_rotating(kind: str, dtype: torch.dtype) -> None:
    """Danger: one half of a pair is written before the other half has read it; neighbouring rows of the buffer change."""
    rotation, positions = KINDS[kind], torch.arange(5, 12)
    buffer = torch.randn(2, 3, 9, 16).to(dtype)
    before, rows = buffer.clone(), buffer[:, :, 1:8]
    wanted = rotation.rotate(rows, rotation.angles(positions))
    assert wanted.dtype == dtype
    assert rotation.rotate(rows, rotation.angles(positions), rows) is rows
    assert torch.equal(rows, wanted)
    assert not torch.equal(rows, before[:, :, 1:8])
    assert torch.equal(buffer[:, :, [0, 8]], before[:, :, [0, 8]])
    back = rotation.rotate(rows, rotation.angles(positions), rows, back=True)
    torch.testing.assert_close(back, before[:, :, 1:8], rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_rotated_in_float32_and_rounded_once(kind: str, dtype: torch.dtype) -> None:
    """Danger: a rotation computed in bfloat16 loses three digits before it is rounded."""
    rotation, keys = KINDS[kind], torch.randn(3, 50, 16).to(dtype)
    angles = rotation.angles(torch.arange(1234, 1284))
    exact = rotation.rotate(keys.float(), angles)
    assert torch.equal(rotation.rotate(keys, angles), exact.to(dtype))
    assert torch.equal(rotation.rotate(keys, angles, torch.empty(3, 50, 16)), exact)  # into float32: not rounded at all
    assert torch.equal(rotation.rotate(keys.float(), angles, torch.empty(3, 50, 16, dtype=dtype)), exact.to(dtype))


@pytest.mark.parametrize("kind", ["partial", "partial neighbours"])
def test_channels_beyond_the_rotary_ones_never_change(kind: str) -> None:
    """Danger: partial rotary models get their position-free channels rotated, or left unwritten in a used buffer."""
    rotation, keys = KINDS[kind], torch.randn(2, 5, 16)
    angles, buffer = rotation.angles(torch.arange(77, 82)), torch.full((2, 5, 16), torch.nan)
    assert torch.equal(rotation.rotate(keys, angles, buffer)[..., 8:], keys[..., 8:])
    assert not torch.equal(buffer[..., :8], keys[..., :8])
    assert torch.equal(rotation.rotate(keys, angles, keys.clone())[..., 8:], keys[..., 8:])


def test_angles_do_not_depend_on_what_was_asked_before() -> None:
    """Danger: a table that grew in the wrong direction, or that serves the first prompt's length for ever."""
    asked = [torch.tensor(p) for p in ([3], [9000, 2], [1023, 1024], [0], [100_000], [70_001, 5, 5])]
    fresh = [Rotation(PLAIN.inv_freq).angles(positions) for positions in asked]
    grown = Rotation(PLAIN.inv_freq)
    for positions, wanted in zip(asked, fresh, strict=True):
        for found, own in zip(grown.angles(positions), wanted, strict=True):
            torch.testing.assert_close(found, own, rtol=0, atol=1e-7)
    assert [part.shape for part in grown.angles(torch.zeros(0, dtype=torch.long))] == [(0, 8)] * 2


def test_only_the_distance_counts_however_far_it_is() -> None:
    """Danger: a document far behind stands somewhere between two positions."""
    rotation, keys = Rotation(1.0 / 500000 ** (torch.arange(0, 64, 2) / 64)), torch.randn(2, 9, 64)

    def at(start: int) -> tuple[Tensor, Tensor]:
        return rotation.angles(torch.arange(start, start + 9))

    there = rotation.rotate(keys, at(100_003))
    assert off(rotation.rotate(there, at(100_003), back=True), keys) < 1e-6
    near, far = (
        (rotation.rotate(keys, at(first)) * rotation.rotate(keys.flip(1), at(first + 7))).sum(-1) for first in (0, 2003)
    )
    assert off(far, near) < 1e-3


def test_the_served_families_cover_every_kind_of_rotation() -> None:
    """Danger: a refactored zoo tests the same rotation nine times."""
    rotations = {family: zoo.model_of(family).rotation for family in zoo.FAMILIES}
    assert {f for f, r in rotations.items() if r.interleaved} == {"glm-interleaved"}
    partial = {f for f, r in rotations.items() if 2 * len(r.inv_freq) < zoo.model_of(f).shape.head_dim}
    assert partial == {"glm-interleaved", "phi-partial-rotary"}
    assert {f for f, r in rotations.items() if r.scaling != 1} == {"llama-yarn-tied-mha"}
