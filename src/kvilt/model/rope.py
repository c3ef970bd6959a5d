"""Moving keys: stored keys are rotated as if the document began at position 0; a rotation moves them to their place.

Rotations compose, so moving by `d` is one rotation by `d * inv_freq`, whatever position a row stands at. Values never move.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvilt.errors import ModelError
from kvilt.rows.codec import Packed
from kvilt.types import DocumentCache, Which, digest_of

Angles = tuple[Tensor, Tensor]  # cos and sin
SAFE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies do not depend on the length of the prompt


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary embedding of a model: what is needed to move its keys.

    YaRN multiplies cos and sin by `attention_scaling`; keys carry it once from when they were computed, so moving uses
    the plain angles. Channels beyond 2 * len(inv_freq) (partial rotary) are never rotated.
    """

    inv_freq: Tensor  # (rotary_dim / 2,) float64, CPU
    interleaved: bool = False  # GLM, Cohere: neighbouring channels are pairs; else channel i pairs with i + half
    scaling: float = 1.0  # of cos and sin (YaRN): keys carry it, so keys made under another one are other keys

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (a rope lives as long as its model)
    def _known(self, by: int, device: torch.device) -> Angles:
        return self.angles(torch.tensor(by), device)

    def angles(self, by: Tensor, device: torch.device) -> Angles:
        """cos and sin of moves by `by` positions, (..., rotary_dim / 2) float32."""
        angle = by.cpu()[..., None] * self.inv_freq
        return angle.cos().float().to(device), angle.sin().float().to(device)

    def pairs(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the two channels of every rotated pair, (..., rotary_dim / 2) each."""
        half = len(self.inv_freq)
        if self.interleaved:
            return keys[..., : 2 * half : 2], keys[..., 1 : 2 * half : 2]
        return keys[..., :half], keys[..., half : 2 * half]

    def move(self, keys: Tensor, by: int | Tensor | Angles, out: Tensor | None = None) -> Tensor:
        """Keys (..., head_dim) moved by `by` positions, computed in float32 and rounded once, written into `out` if given.

        `by` may differ from row to row: int64 (rows,) for keys (..., rows, head_dim), or the `angles` of that, made once
        for all layers. `out` must not overlap `keys`."""
        out = torch.empty_like(keys) if out is None else out
        if isinstance(by, int) and by == 0:
            return out.copy_(keys)
        if keys.dtype != torch.float32:  # half precision: rotate a float32 copy, round when it is written
            return out.copy_(self._rotate(keys.float(), torch.empty_like(keys, dtype=torch.float32), by))
        if out.dtype != torch.float32:
            return out.copy_(self._rotate(keys, torch.empty_like(keys), by))
        return self._rotate(keys, out, by)

    def _rotate(self, keys: Tensor, out: Tensor, by: int | Tensor | Angles) -> Tensor:
        if not isinstance(by, tuple):
            by = self._known(by, keys.device) if isinstance(by, int) else self.angles(by, keys.device)
        cos, sin = by
        (a, b), (x, y) = self.pairs(keys), self.pairs(out)
        torch.mul(a, cos, out=x).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=y).addcmul_(a, sin)
        rest = 2 * len(self.inv_freq)
        if rest < keys.shape[-1]:
            out[..., rest:] = keys[..., rest:]
        return out

    @property
    def identity(self) -> str:
        """What the keys depend on, for the cache key."""
        scaled = (str(self.scaling),) if self.scaling != 1.0 else ()
        return digest_of(self.inv_freq, str(self.interleaved), *scaled)


@dataclass(frozen=True, eq=False)
class Turned:
    """Packed rows as every reader expects them: keys rotated as if the document began at position 0.

    Placing takes the packed rows themselves and rotates once, from none to where each row stands."""

    packed: Packed
    rope: Rope
    offsets: Tensor  # (rows,) int64

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.packed.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.packed.nbytes

    def fetch(self, layer: int, which: Which, out: Tensor | None = None) -> Tensor:
        rows = self.packed.fetch(layer, which, out if which == "values" else None)
        return self.rope.move(rows, self.offsets, out) if which == "keys" else rows


def turned(cache: DocumentCache, rope: Rope) -> DocumentCache:
    """A cache as strategies and plans read it, whatever it is stored as."""
    if not isinstance(cache.layers, Packed):
        return cache
    return replace(cache, layers=Turned(cache.layers, rope, cache.offsets))


def rope_of(hf: nn.Module) -> Rope:
    """The rotary embedding of a transformers model; raises ModelError where its keys cannot be moved exactly."""
    frequencies = [f for m in hf.modules() if isinstance(f := getattr(m, "inv_freq", None), Tensor)]
    config: Any = hf.config
    check_rope_type(config)
    if not frequencies:
        raise ModelError(_no_rotary(hf))
    first = frequencies[0]
    if any(f.shape != first.shape or not torch.equal(f, first) for f in frequencies[1:]):
        raise ModelError(f"{config.model_type}: layers rotate with different frequencies, which Kvilt cannot move yet.")
    scalings = {float(s) for m in hf.modules() if isinstance(s := getattr(m, "attention_scaling", None), float | int)}
    return Rope(first.detach().double().cpu(), _is_interleaved(hf, len(first)), max(scalings, default=1.0))


def _no_rotary(hf: nn.Module) -> str:
    config: Any = hf.config
    if any(hasattr(m, "full_attention_inv_freq") or hasattr(m, "sliding_attention_inv_freq") for m in hf.modules()):
        kinds = sorted(set(getattr(config, "layer_types", None) or ()))
        return (
            f"{config.model_type} is refused: config field rope_parameters: a rotation for each kind of layer {kinds}."
        )
    return (
        f"config field model_type = {config.model_type!r} is refused: no rotary position embedding was found in it, "
        "so its keys cannot be moved to another place. Kvilt serves decoders with standard RoPE."
    )


def check_rope_type(config: Any) -> None:
    """Refuse rope types whose frequencies change with the length of the prompt."""
    for field in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, field, None)
        if not isinstance(parameters, dict):
            continue
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in SAFE_TYPES:
            raise ModelError(
                f"config field {field}.rope_type = {kind!r} is refused: its rotation depends on the length of the prompt, "
                f"so a stored key cannot be moved. Served: {', '.join(SAFE_TYPES)}."
            )
        if "mrope_section" in parameters:
            raise ModelError(f"config field {field}.mrope_section is refused: multi-axis positions are not supported.")


def _is_interleaved(hf: nn.Module, half: int) -> bool:
    """Ask the model's own code which channels it pairs, by rotating a marked key."""
    import sys

    for module in hf.modules():
        rotate = getattr(sys.modules.get(type(module).__module__), "rotate_half", None)
        if rotate is not None and hasattr(module, "layer_idx"):
            probe = torch.zeros(2 * half)
            probe[1] = 1.0
            return bool(rotate(probe)[0] == -1.0)
    return False
