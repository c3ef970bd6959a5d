"""Attention in blocks is attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvilt.model import attention


@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("count", [attention.BLOCK + 1, 2 * attention.BLOCK, 3 * attention.BLOCK - 1])
def test_blocks_are_one_pass_under_the_mask(count: int, scattered: bool) -> None:
    """Danger: a block reads rows behind its last, or leaves out the end of what it sees; a ragged last block is lost."""
    torch.manual_seed(count)
    rows = 4 * attention.BLOCK
    query, key, value = torch.randn(1, 4, count, 8), torch.randn(1, 2, rows, 8), torch.randn(1, 2, rows, 8)
    places = torch.randperm(rows)[:count].sort().values if scattered else torch.arange(rows - count, rows)
    mask = (torch.arange(rows)[None] <= places[:, None])[None, None]
    if scattered:
        mask &= torch.rand(mask.shape) < 0.5  # holes, as between documents
        mask[0, 0, torch.arange(count), places] = True
    wanted = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    found = attention.ordinary(query, key, value, mask if scattered else None, None)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_rows_out_of_sight_are_not_read() -> None:
    """Danger: a value that is not a number, behind everything that a block sees, spoils it."""
    count, rows = attention.BLOCK + 8, 2 * attention.BLOCK
    query, key, value = torch.randn(1, 2, count, 8), torch.randn(1, 2, rows, 8), torch.randn(1, 2, rows, 8)
    value[:, :, count:] = torch.nan
    mask = torch.arange(rows)[None] <= torch.arange(count)[:, None]
    assert attention.ordinary(query, key, value, mask[None, None], None).isfinite().all()
