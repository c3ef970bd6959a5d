"""Attention in blocks is attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvilt.model import attention

ROWS = 4 * attention.BLOCK
LIMITS = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2e-2, 2e-3), torch.float16: (5e-3, 1e-3)}


def made(count: int, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; two heads share keys."""
    torch.manual_seed(count)
    return tuple(torch.randn(1, h, n, 8).to(dtype) for h, n in ((4, count), (2, rows), (2, rows)))  # type: ignore[return-value]


def masks(kind: str, count: int) -> Tensor:
    """What each computed token sees, (count, ROWS) bool."""
    rows = torch.arange(ROWS)
    places = {
        "suffix": torch.arange(ROWS - count, ROWS),
        "scattered": torch.randperm(ROWS)[:count].sort().values,
        "links": (torch.arange(count) // 5 * 200 + torch.arange(count) % 5 + 190).clamp(max=ROWS - 1),
        "first": torch.arange(count),
        "with holes": torch.randperm(ROWS)[:count].sort().values,
        "backwards": torch.randperm(ROWS)[:count].sort(descending=True).values,
    }[kind]
    mask = rows[None] <= places[:, None]
    if kind == "with holes":  # as between documents that do not see each other
        mask &= torch.rand(mask.shape) < 0.5
        mask[torch.arange(count), places] = True
    return mask


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kind", ["suffix", "scattered", "links", "first", "with holes", "backwards"])
@pytest.mark.parametrize("count", [1, 2, 22, attention.BLOCK + 1, 3 * attention.BLOCK - 1])
def test_blocks_are_one_pass_under_the_mask(count: int, kind: str, dtype: torch.dtype) -> None:
    """Danger: a block reads rows behind its last, leaves out the end of what it sees, or counts a row in both parts."""
    query, key, value = made(count, dtype=dtype)
    mask = masks(kind, count)
    wanted = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, enable_gqa=True, scale=0.3
    )
    found = attention.Blocks.of(mask, 2, dtype)(0, query, key, value, None, 0.3)
    rtol, atol = LIMITS[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("count", [1, 22, attention.BLOCK + 1])
def test_the_last_tokens_need_no_mask_to_be_told(count: int) -> None:
    """Danger: blocks of the last tokens see one row too many or too few."""
    told = attention.Blocks.of(masks("suffix", count), 2, torch.float32)
    parts = made(count)
    found = attention.Blocks.last(count, ROWS, 2, torch.float32)(0, *parts, None, None)
    torch.testing.assert_close(found, told(0, *parts, None, None))


def test_one_token_is_ordinary_attention() -> None:
    """Danger: while decoding, heads are given the keys of other heads."""
    query, key, value = made(1)
    wanted = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    with torch.no_grad():
        torch.testing.assert_close(attention.ordinary(query, key, value, None, None), wanted)


def test_tokens_far_apart_have_blocks_of_their_own() -> None:
    """Danger: five link tokens behind each document are multiplied with all the rows behind them."""
    blocks = attention.Blocks.of(masks("links", 20), 2, torch.float32).blocks
    assert [b.tokens for b in blocks] == [slice(i, i + 5) for i in range(0, 20, 5)]
    assert [b.own.shape for b in blocks] == [(10, 5)] * 4


def test_rows_out_of_sight_are_not_read() -> None:
    """Danger: a value that is not a number, behind everything that a block sees, spoils it."""
    count = attention.BLOCK + 8
    query, key, value = made(count)
    value[:, :, count:] = torch.nan
    assert (
        attention.Blocks.of(masks("first", count), 2, torch.float32)(0, query, key, value, None, None).isfinite().all()
    )
