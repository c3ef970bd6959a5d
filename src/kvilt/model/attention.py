"""Kvilt's attention function for transformers models: grouped heads without copies, and plans without mask where possible."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvilt.errors import ModelError
from kvilt.plan import Dense

NAME = "kvilt"
# (layer, query, key, value, mask, scale) of one attention call, before it is made; what it returns takes the place of
# the ordinary result (batch, heads, computed, head_dim), None leaves it.
Hook = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor | None]
_hook: ContextVar[Hook | None] = ContextVar("hook", default=None)
BLOCK = 256  # computed tokens attended at a time on a CPU, where a mask would not spare work
GAP = 128  # rows between two computed tokens from which on each has a block of its own
SAMPLE = 16  # numbers of each tensor that are compared at every request
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
    if computed == 1 and mask is None and query.device.type == "cpu" and not torch.is_grad_enabled():
        return flash(query, key, value, None, scaling)[0]  # several times faster than the same through `enable_gqa`
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


def flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Attention on a CPU, (batch, heads, computed, head_dim), and the log-sum-exp of its scores, (batch, heads, computed).

    Heads that share keys stand beside each other as more queries, so that every row is read once. `mask` is added to the
    scores, (heads / kv_heads * computed, rows)."""
    batch, heads, computed, dim = query.shape
    shared = query.reshape(batch, key.shape[1], -1, dim)
    added = None if mask is None else mask.expand(batch, 1, *mask.shape)
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = run(shared, key, value, 0.0, False, attn_mask=added, scale=scaling)
    return out.reshape(query.shape), sums.reshape(batch, heads, computed)


@dataclass(frozen=True, eq=False)
class Block:
    """Computed tokens that are attended together, and what they see."""

    tokens: slice
    common: int  # all of them see every row before this one
    own: Tensor  # added to the scores of the rows from there on, (heads / kv_heads * tokens, rows): 0 or -inf


@dataclass(frozen=True, eq=False)
class Blocks:
    """A hook: attention on a CPU whose mask covers only the rows that not all of a block's tokens see.

    The rows before are attended without a mask, and both parts merged by their log-sum-exps in float32. torch's CPU kernels
    multiply what a mask hides, and take several times as long under one."""

    blocks: list[Block]

    @classmethod
    def of(cls, allowed: Tensor, group: int, dtype: torch.dtype) -> Blocks:
        """From what each computed token sees, (computed, rows) bool; `group` heads share keys."""
        hidden = torch.cat([~allowed, torch.ones(len(allowed), 1, dtype=torch.bool)], 1).to(torch.uint8)
        seen_all, count = hidden.argmax(1), len(allowed)  # rows before the first that a token does not see
        jumps = ((seen_all.diff().abs() > GAP).nonzero()[:, 0] + 1).tolist()
        cuts = [0, *jumps, count]
        starts = [i for a, b in itertools.pairwise(cuts) for i in range(a, b, BLOCK)]
        blocks = []
        for first, end in zip(starts, [*starts[1:], count], strict=True):
            common, part = int(seen_all[first:end].min()), allowed[first:end]
            last = int(part.any(0).nonzero()[-1]) + 1
            if common < last:  # a row that all see stays with the others: no token may be left without any
                common = max(0, common - 1)
            own = part[:, common:last]
            added = torch.zeros(own.shape, dtype=dtype).masked_fill_(~own, -torch.inf)
            blocks.append(Block(slice(first, end), common, added.repeat(group, 1)))
        return cls(blocks)

    @classmethod
    def last(cls, computed: int, rows: int, group: int, dtype: torch.dtype) -> Blocks:
        """Of the last `computed` of so many rows, each of which sees itself and all before it."""
        later = torch.full((BLOCK, BLOCK), -torch.inf, dtype=dtype).triu(1)
        blocks = []
        for first in range(0, computed, BLOCK):
            count = min(BLOCK, computed - first)
            own = later[:count, :count].repeat(group, 1)
            blocks.append(Block(slice(first, first + count), rows - computed + first, own))
        return cls(blocks)

    def __call__(
        self, _: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        out = torch.empty_like(query)
        for block in self.blocks:
            out[:, :, block.tokens] = self._attend(block, query[:, :, block.tokens], key, value, scaling)
        return out

    def _attend(self, block: Block, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        common, end = block.common, block.common + block.own.shape[1]
        if common == end:  # one token, or tokens at one position
            return flash(query, key[:, :, :end], value[:, :, :end], None, scaling)[0]
        own, sums = flash(query, key[:, :, common:end], value[:, :, common:end], block.own, scaling)
        if not common:
            return own
        shared, more = flash(query, key[:, :, :common], value[:, :, :common], None, scaling)
        return torch.lerp(own.float(), shared.float(), torch.sigmoid(more - sums)[..., None]).to(query.dtype)


@contextmanager
def using(hook: Hook | None) -> Iterator[None]:
    """Let a hook watch, or take over, the attention of the passes made inside (in this thread).

    Hooks nest: the outer one is asked first, the inner one where that leaves the result."""
    outer = _hook.get()

    def both(*call: Any) -> Tensor | None:
        found = outer(*call) if outer else None
        return hook(*call) if hook and found is None else found

    token = _hook.set(both if outer and hook else hook or outer)
    try:
        yield
    finally:
        _hook.reset(token)


def scores(query: Tensor, key: Tensor, scaling: float | None) -> Tensor:
    """Attention scores of a batch of one before the mask, (kv_heads, heads / kv_heads, computed, rows) float32."""
    _, heads, computed, dim = query.shape
    grouped = query[0].view(key.shape[1], heads // key.shape[1], computed, dim).float()
    return grouped @ key[0].float().transpose(-1, -2)[:, None] * (dim**-0.5 if scaling is None else scaling)


def seen(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """What each computed token sees, (computed, rows) bool."""
    if mask is not None:
        return mask[0, 0] if mask.dim() == 4 else mask
    computed, rows = query.shape[2], key.shape[2]
    last = torch.arange(rows - computed, rows, device=query.device)
    return torch.arange(rows, device=query.device)[None] <= last[:, None]


def weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """What each computed token attends to: probabilities (heads, computed, rows) float32 of a batch of one."""
    found = scores(query, key, scaling).masked_fill(~seen(mask, query, key), -torch.inf)
    return found.softmax(-1).flatten(0, 1)


def mixed(found: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights (kv_heads, group, computed, rows) over values (1, kv_heads, rows, head_dim): (1, heads, computed, head_dim)."""
    return (found @ value[0].float()[:, None]).flatten(0, 1)[None].to(dtype)


def in_one(dense: Dense) -> Hook | None:
    """What a plan asks of attention, in another way, for the one pass that it is held to.

    `twopart.TwoPart` as one softmax over adjusted scores; mixed rows from the encoded and the computed row beside each other."""
    if dense.twins is not None:
        return _mixing(dense, dense.twins)
    if dense.context is None or dense.scaling is None:
        return None
    context, t, scale = dense.context, dense.scaling.temperature, dense.scaling.scale

    def hook(_: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
        found, inside = scores(query, key, scaling), context.to(query.device)
        total = (found / t).masked_fill(~inside, -torch.inf).logsumexp(-1, keepdim=True)
        found = torch.where(inside, found / t + (scale * t - 1) * total, found)
        return mixed(found.masked_fill(~seen(mask, query, key), -torch.inf).softmax(-1), value, query.dtype)

    return hook


def _mixing(dense: Dense, twins: Tensor) -> Hook:
    fresh, stored = dense.computed[twins >= 0], twins[twins >= 0]

    def hook(_: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
        key, value = key.clone(), value.clone()
        for rows in (key, value):
            rows[:, :, fresh] = dense.blend * rows[:, :, fresh] + (1 - dense.blend) * rows[:, :, stored]
        return ordinary(query, key, value, mask, scaling)

    return hook


def install(hf: nn.Module) -> None:
    """Make a transformers model attend through `attend`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    hf.set_attn_implementation(NAME)  # type: ignore[operator]


def causal(positions: Tensor) -> Tensor:
    """The ordinary causal mask over positions, (rows, rows) bool."""
    return torch.as_tensor(positions[None] <= positions[:, None])


class Look:
    """What shows that tensors were changed: where they lie, how often they were written to, and some numbers of each."""

    def __init__(self) -> None:
        self._views: tuple[object, list[list[Tensor]]] = (None, [])

    @torch.no_grad()
    def at(self, tensors: Iterable[Tensor]) -> tuple[object, ...]:
        """Compare it with what it was: about a millisecond for a model."""
        plain = [t for t in tensors if type(t) in (Tensor, nn.Parameter)]
        where = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in plain]
        if where != self._views[0]:
            steps = [(t, max(1, t.numel() // SAMPLE)) for t in plain if t.numel() and t.is_contiguous()]
            views = [t.as_strided((min(SAMPLE, t.numel()),), (step,)) for t, step in steps]
            kinds = {(v.dtype, v.device) for v in views}
            self._views = (where, [[v for v in views if (v.dtype, v.device) == kind] for kind in kinds])
        return where, [torch.cat(group).cpu().view(torch.uint8).numpy().tobytes() for group in self._views[1]]
