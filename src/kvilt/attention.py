"""Kvilt's attention function for transformers models: grouped heads without copies, and plans without mask where possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvilt.errors import ModelError

NAME = "kvilt"
# (layer, query, key, value, mask, scale) of one attention call, before it is made; what it returns takes the place of
# the ordinary result (batch, heads, computed, head_dim), None leaves it.
Hook = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor | None]
_hook: ContextVar[Hook | None] = ContextVar("hook", default=None)
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
    hook = _hook.get()
    replaced = hook(int(module.layer_idx), query, key, value, attention_mask, scaling) if hook else None  # type: ignore[arg-type]
    out = ordinary(query, key, value, attention_mask, scaling, dropout) if replaced is None else replaced
    return out.transpose(1, 2).contiguous(), None


def ordinary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention as every plan has it unless it says otherwise, (batch, heads, computed, head_dim)."""
    computed, rows = query.shape[2], key.shape[2]
    mask: Any = attention_mask
    causal = mask is None and computed == rows
    if mask is None and 1 < computed < rows:
        mask = causal_lower_right(computed, rows)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and computed > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@contextmanager
def using(hook: Hook | None) -> Iterator[None]:
    """Let a hook watch, or take over, the attention of the passes made inside (in this thread)."""
    token = _hook.set(hook)
    try:
        yield
    finally:
        _hook.reset(token)


def weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """What each computed token attends to: probabilities (heads, computed, rows) float32 of a batch of one."""
    _, heads, computed, dim = query.shape
    kv_heads, rows = key.shape[1:3]
    grouped = query[0].view(kv_heads, heads // kv_heads, computed, dim).float()
    scores = grouped @ key[0].float().transpose(-1, -2)[:, None] * (dim**-0.5 if scaling is None else scaling)
    if mask is None:
        last = torch.arange(rows - computed, rows, device=query.device)
        mask = torch.arange(rows, device=query.device)[None] <= last[:, None]
    seen = mask[0, 0] if mask.dim() == 4 else mask
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).view(heads, computed, rows)


def install(hf: nn.Module) -> None:
    """Make a transformers model attend through `attend`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    hf.set_attn_implementation(NAME)  # type: ignore[operator]


def causal(positions: Tensor) -> Tensor:
    """The ordinary causal mask over positions, (rows, rows) bool."""
    return torch.as_tensor(positions[None] <= positions[:, None])
