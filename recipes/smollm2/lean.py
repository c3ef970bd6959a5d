"""SmolLM2 as plain tensors: packed rows under a mask rule, adapters that act on chosen tokens, learned vectors.

The GPU road uses flex attention and compiled layers; the other, dense masks and plain PyTorch, is the one that tests
hold equal to transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HEADS, KV_HEADS, DIM, EPS, THETA = 9, 3, 64, 1e-5, 100_000.0
ALPHA = 32.0  # adapters are multiplied by ALPHA / rank
READER = "reader_q"


@dataclass
class Shape:
    """Sizes; those of SmolLM2-135M unless a test says otherwise."""

    layers: int = 30
    hidden: int = 576
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    dim: int = DIM
    inner: int = 1536
    vocabulary: int = 49152


@dataclass
class Base:
    """Frozen weights, stacked over layers: what is multiplied together stands together."""

    shape: Shape
    embed: Tensor  # (vocabulary, hidden)
    norm: Tensor
    layers: dict[str, Tensor]  # n1 n2 (layers, hidden), qkv o up down (layers, out, in)

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Base:
        """From the weights that weights.load gives."""
        per = lambda name: torch.stack([weights[f"{i}.{name}"] for i in range(shape.layers)]).to(dtype)  # noqa: E731
        layers = {name: per(name) for name in ("n1", "n2", "o", "down")}
        layers["qkv"] = torch.cat([per("q"), per("k"), per("v")], 1)
        layers["up"] = torch.cat([per("gate"), per("up")], 1)
        return cls(shape, weights["embed"].to(dtype), weights["norm"].to(dtype), layers)

    def tensors(self) -> dict[str, Tensor]:
        """All weights by name."""
        return {"embed": self.embed, "norm": self.norm, **self.layers}

    def copy(self, tensors: Mapping[str, Tensor]) -> Base:
        """The same model with other weights."""
        return Base(self.shape, tensors["embed"], tensors["norm"], {n: tensors[n] for n in self.layers})


def adapters(shape: Shape, rank: int, reader_rank: int, device: Any, seed: int = 0) -> dict[str, Tensor]:
    """LoRA matrices of all layers in float32, stacked: `a` drawn, `b` zero."""
    s, generator = shape, torch.Generator().manual_seed(seed)
    q, kv = s.heads * s.dim, s.kv_heads * s.dim
    sizes = {
        "a_qkv": (s.hidden, 3 * rank),
        "b_q": (rank, q),
        "b_k": (rank, kv),
        "b_v": (rank, kv),
        "a_o": (q, rank),
        "b_o": (rank, s.hidden),
        "a_up": (s.hidden, 2 * rank),
        "b_gate": (rank, s.inner),
        "b_up": (rank, s.inner),
        "a_down": (s.inner, rank),
        "b_down": (rank, s.hidden),
        "a_reader": (s.hidden, reader_rank),
        "b_reader": (reader_rank, q),
    }
    made = {}
    for name, size in sizes.items():
        drawn = (
            torch.rand(s.layers, *size, generator=generator) * 2 - 1 if name[0] == "a" else torch.zeros(s.layers, *size)
        )
        made[name] = (drawn / size[0] ** 0.5).to(device)
    return made


def merged(base: Base, ad: Mapping[str, Tensor]) -> Base:
    """The base with the adapter that acts everywhere worked into its weights."""
    s, rank = base.shape, ad["b_q"].shape[1]
    scale = ALPHA / rank
    a_q, a_k, a_v = ad["a_qkv"].split(rank, -1)
    a_gate, a_up = ad["a_up"].split(rank, -1)
    product = lambda a, b: (a @ b).transpose(1, 2) * scale  # noqa: E731
    delta = {
        "qkv": torch.cat([product(a_q, ad["b_q"]), product(a_k, ad["b_k"]), product(a_v, ad["b_v"])], 1),
        "o": product(ad["a_o"], ad["b_o"]),
        "up": torch.cat([product(a_gate, ad["b_gate"]), product(a_up, ad["b_up"])], 1),
        "down": product(ad["a_down"], ad["b_down"]),
    }
    changed = {n: (w.float() + delta[n]).to(w.dtype) if n in delta else w for n, w in base.tensors().items()}
    return Base(s, base.embed, base.norm, {n: changed[n] for n in base.layers})


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), EPS).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(rows, length, heads, dim) rotated in float32."""
    wide = x.float()
    half = wide.shape[-1] // 2
    other = torch.cat([-wide[..., half:], wide[..., :half]], -1)
    return (wide * cos + other * sin).to(x.dtype)


def _before(
    x: Tensor, cos: Tensor, sin: Tensor, gates: Tensor, w: list[Tensor], s: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (rows, heads, length, dim), keys and values repeated for the query heads that share them."""
    n1, qkv, a_qkv, b_q, b_k, b_v, a_reader, b_reader = w
    heads, kv, dim = s
    rows, length, _ = x.shape
    acts, reads = gates[..., :1], gates[..., 1:]
    h = _rms(x, n1)
    q, k, v = (h @ qkv.T).split([heads * dim, kv * dim, kv * dim], -1)
    down_q, down_k, down_v = ((h @ a_qkv) * (acts * (ALPHA / b_q.shape[0]))).chunk(3, -1)
    reader = ((h @ a_reader) * (reads * (ALPHA / b_reader.shape[0]))) @ b_reader
    q = (q + down_q @ b_q + reader).view(rows, length, heads, dim)
    k = (k + down_k @ b_k).view(rows, length, kv, dim)
    v = (v + down_v @ b_v).view(rows, length, kv, dim)
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    k, v = (t.repeat_interleave(heads // kv, 2) for t in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _after(x: Tensor, attended: Tensor, gates: Tensor, w: list[Tensor]) -> Tensor:
    """The rest of a layer behind its attention (rows, heads, length, dim)."""
    n2, o, up, down, a_o, b_o, a_up, b_gate, b_up, a_down, b_down = w
    acts = gates[..., :1] * (ALPHA / b_o.shape[0])
    flat = attended.transpose(1, 2).flatten(2)
    x = x + flat @ o.T + ((flat @ a_o) * acts) @ b_o
    h = _rms(x, n2)
    gate, wide = (h @ up.T).chunk(2, -1)
    down_gate, down_up = ((h @ a_up) * acts).chunk(2, -1)
    inner = F.silu(gate + down_gate @ b_gate) * (wide + down_up @ b_up)
    return x + inner @ down.T + ((inner @ a_down) * acts) @ b_down


BEFORE = ("n1", "qkv", "a_qkv", "b_q", "b_k", "b_v", "a_reader", "b_reader")
AFTER = ("n2", "o", "up", "down", "a_o", "b_o", "a_up", "b_gate", "b_up", "a_down", "b_down")


@dataclass
class Seen:
    """What every token sees: a mask for dense attention, or flex attention's block mask."""

    dense: Tensor | None = None  # (rows, 1, length, length) bool
    blocks: Any = None


def dense_mask(context: Tensor, group: Tensor, branch: Tensor, positions: Tensor) -> Tensor:
    """The mask rule on (rows, length) numbers, (rows, length, length) bool."""
    n = context.shape[1]
    order = torch.arange(n, device=context.device)
    same = context[:, :, None] == context[:, None]
    alone = (group[:, :, None] == group[:, None]) & (order[None] <= order[:, None])
    shown = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
    live = shown & (positions[:, None] <= positions[:, :, None])
    return same & torch.where(group[:, :, None] > 0, alone, live)


def _blocks(mask: Tensor, rule: Any, size: int = 128) -> Any:
    """Flex attention's block mask, from the mask itself: ten times faster than from the rule."""
    from torch.nn.attention.flex_attention import BlockMask

    rows, length, _ = mask.shape
    tiles = mask.view(rows, length // size, size, length // size, size)
    whole = tiles.all(4).all(2)
    part = tiles.any(4).any(2) & ~whole
    listed = []
    for kind in (part, whole):
        listed += [
            kind.sum(-1, dtype=torch.int32)[:, None],
            kind.int().argsort(dim=-1, descending=True, stable=True).int()[:, None],
        ]
    return BlockMask.from_kv_blocks(*listed, BLOCK_SIZE=size, mask_mod=rule)


@dataclass
class Model:
    """Runs packed rows. `flex` and `compiled` are the GPU's; both default to what any machine can do."""

    base: Base
    flex: bool = False
    compiled: bool = False
    kernels: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kernels:
            return
        self.kernels = {"before": _before, "after": _after}
        if self.flex:
            from torch.nn.attention.flex_attention import flex_attention

            self.kernels["flex"] = torch.compile(flex_attention, dynamic=False)
        if self.compiled:
            self.kernels |= {n: torch.compile(self.kernels[n], dynamic=False) for n in ("before", "after")}

    def seen(self, context: Tensor, group: Tensor, branch: Tensor, positions: Tensor) -> Seen:
        """The mask of a batch."""
        if not self.flex:
            return Seen(dense_mask(context, group, branch, positions)[:, None])
        c, g, b, p = (t.int() for t in (context, group, branch, positions))

        def rule(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = c[row, q] == c[row, k]
            alone = (g[row, q] == g[row, k]) & (k <= q)
            live = ((b[row, k] == 0) | (b[row, k] == b[row, q])) & (p[row, k] <= p[row, q])
            return same & torch.where(g[row, q] > 0, alone, live)

        return Seen(blocks=_blocks(dense_mask(c, g, b, p), rule))

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, (rows, length, 1, dim) float32."""
        dim = self.base.shape.dim
        frequencies = THETA ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
        angle = positions.float()[..., None] * frequencies
        angle = torch.cat([angle, angle], -1)[:, :, None]
        return angle.cos(), angle.sin()

    def embedded(self, ids: Tensor, vectors: Tensor | None) -> Tensor:
        """(rows, length, hidden); ids from the vocabulary on are learned vectors."""
        size = self.base.shape.vocabulary
        x = self.base.embed[ids.clamp(max=size - 1)]
        if vectors is None or not len(vectors):
            return x
        learned = vectors.to(x.dtype)[(ids - size).clamp(min=0)]
        return torch.where((ids >= size)[..., None], learned, x)

    def hidden(
        self, x: Tensor, positions: Tensor, seen: Seen, gates: Tensor, ad: Mapping[str, Tensor], keep: Any = None
    ) -> Tensor:
        """Last hidden states (rows, length, hidden); `keep(layer, keys, values)` is shown every layer's."""
        cos, sin = self.angles(positions)
        s = self.base.shape
        sizes = (s.heads, s.kv_heads, s.dim)
        cast = {n: t.to(x.dtype).unbind(0) for n, t in {**self.base.layers, **ad}.items()}
        for i in range(s.layers):
            q, k, v = self.kernels["before"](x, cos, sin, gates, [cast[n][i] for n in BEFORE], sizes)
            if keep is not None:
                k, v = keep(i, k, v)
            attended = self._attend(q, k, v, seen)
            x = self.kernels["after"](x, attended, gates, [cast[n][i] for n in AFTER])
        return _rms(x, self.base.norm)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
        if seen.blocks is not None:
            return self.kernels["flex"](q, k, v, block_mask=seen.blocks)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.dense)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 (…, vocabulary)."""
        return (hidden @ self.base.embed.to(hidden.dtype).T).float()
