"""Kvilt's attention function for transformers models: grouped heads without copies, and plans without mask where possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvilt.errors import ModelError

NAME = "kvilt"
UNSERVED = ("softcap", "s_aux", "position_bias", "attention_bias")  # what some models add to their attention scores


def attend(
    module: nn.Module,
    query: Tensor,  # (batch, heads, computed, head_dim)
    key: Tensor,  # (batch, kv_heads, rows, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,  # (batch or 1, 1, computed, rows) bool
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention; without a mask the last computed token stands on the last row (bottom-right causal)."""
    for name in UNSERVED:
        if more.get(name) is not None:
            raise ModelError(f"{type(module).__name__} is refused: its attention takes {name}, which Kvilt's has not.")
    computed, rows = query.shape[2], key.shape[2]
    mask: Any = attention_mask
    causal = mask is None and computed == rows
    if mask is None and 1 < computed < rows:
        mask = causal_lower_right(computed, rows)
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and computed > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def install(hf: nn.Module) -> None:
    """Make a transformers model attend through `attend`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    hf.set_attn_implementation(NAME)  # type: ignore[operator]


def causal(positions: Tensor) -> Tensor:
    """The ordinary causal mask over positions, (rows, rows) bool."""
    return torch.as_tensor(positions[None] <= positions[:, None])
