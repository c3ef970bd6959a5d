"""Passes that begin above the layers that a look has computed already, with the model's own code for all others."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kvilt.errors import ModelError
from kvilt.plan import Begun


def decoder_layers(hf: Any) -> tuple[str, nn.ModuleList]:
    """A model's decoder layers and where they are. Raises ModelError where they are not found."""
    for name, module in hf.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == hf.config.num_hidden_layers:
            return name, module
    raise ModelError(f"{hf.config.model_type}: decoder layers not found.")


@contextmanager
def beginning(hf: Any, begun: Begun | None) -> Iterator[Any]:
    """The model to call for a pass of this thread: without its lowest layers where something has begun with them."""
    if begun is None:
        yield hf
        return
    depth = len(begun.rows)
    with entering(decoder_layers(hf)[1][depth], begun.states[None]):
        yield above(hf, depth)


def above(hf: Any, first: int) -> Any:
    """The model without its lowest layers: other modules on the way, the same weights."""
    path, layers = decoder_layers(hf)
    *way, last = path.split(".")
    top = at = _shallow(hf)
    for name in way:
        at._modules[name] = at = _shallow(at._modules[name])
    at._modules[last] = layers[first:]
    return top


def _shallow(module: Any) -> Any:
    found = copy.copy(module)
    found._modules = dict(module._modules)
    return found


@contextmanager
def entering(layer: nn.Module, states: Tensor | None = None) -> Iterator[list[Tensor]]:
    """What goes into a decoder layer in this thread's passes, (1, computed, hidden) each; `states` take its place if given."""
    thread, seen = threading.get_ident(), list[Tensor]()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if threading.get_ident() != thread:
            return None
        seen.append(args[0])
        return None if states is None else ((states, *args[1:]), kwargs)

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
