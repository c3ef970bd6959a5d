"""Adapters that act in some passes, or on some tokens of a pass: while documents are encoded, or on a question alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvilt.errors import WrapperError
from kvilt.types import Adapter

Acting = tuple[Adapter, Tensor | None]  # an adapter, and the tokens it acts on, (tokens,) bool; None: all
_acting: ContextVar[tuple[Acting, ...]] = ContextVar("acting", default=())
_hooked: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # models, and the adapters they are ready for
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class _Addition:
    """A hook of one matrix of one layer: adds what the acting adapters hold for it."""

    kind: str
    layer: int

    def __call__(self, _: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
        x = given[0]  # (batch, tokens, in)
        for adapter, gate in _acting.get():
            if pair := _cast(adapter, x.dtype, x.device).get(self.kind):
                low = x @ pair[0][self.layer]
                out = out + (low if gate is None else low * gate[:, None].to(x)) @ pair[1][self.layer]
        return out


@contextmanager
def acting(hf: nn.Module, *adapters: tuple[Adapter | None, Tensor | None]) -> Iterator[None]:
    """Let adapters act in the passes made inside (in this thread), each on its tokens."""
    wanted = tuple((adapter, gate) for adapter, gate in adapters if adapter is not None)
    if not wanted:
        yield
        return
    for adapter, _ in wanted:
        _hook(hf, adapter)
    token = _acting.set(wanted)
    try:
        yield
    finally:
        _acting.reset(token)


@torch.no_grad()
def merge(hf: nn.Module, adapter: Adapter) -> None:
    """Work an adapter into a model's weights, rounded as its checkpoint's are: the same model in every dtype."""
    for module, kind, layer in _matrices(hf, adapter):
        a, b = adapter.matrices[kind]
        weight: Any = module.weight
        whole = weight.float() + (a[layer] @ b[layer]).T.to(weight.device)
        weight.copy_(whole.bfloat16().to(weight.dtype))


def _hook(hf: nn.Module, adapter: Adapter) -> None:
    if adapter.digest in _hooked.setdefault(hf, set()):
        return
    for module, kind, layer in _matrices(hf, adapter):
        if not any(isinstance(hook, _Addition) for hook in module._forward_hooks.values()):
            module.register_forward_hook(_Addition(kind, layer))
    _hooked[hf].add(adapter.digest)


def _matrices(hf: nn.Module, adapter: Adapter) -> list[tuple[nn.Module, str, int]]:
    """The matrices of a model that an adapter changes. Raises WrapperError where they do not fit."""
    found = []
    for name, module in hf.named_modules():
        match = LAYER.search(name)
        if match and (pair := adapter.matrices.get(match[2])) is not None:
            wanted, layer = getattr(getattr(module, "weight", None), "shape", None), int(match[1])
            if wanted != (pair[1].shape[2], pair[0].shape[1]) or layer >= len(pair[0]):
                raise WrapperError(f"the adapter does not fit {name}: it was trained for another model.")
            found.append((module, match[2], layer))
    if len(found) != sum(len(a) for a, _ in adapter.matrices.values()):
        raise WrapperError(f"the model lacks matrices that the adapter changes ({', '.join(adapter.matrices)}).")
    return found


@functools.lru_cache(maxsize=8)
def _cast(adapter: Adapter, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    return {kind: (a.to(device, dtype), b.to(device, dtype)) for kind, (a, b) in adapter.matrices.items()}
