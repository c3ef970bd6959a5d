"""Kvilt: encode every document once, alone, and reuse its KV cache in any prompt."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvilt.engine.encoder import EncodeReport
    from kvilt.engine.engine import Engine
    from kvilt.errors import KviltError, StoreError, UserError
    from kvilt.model.model import Model
    from kvilt.plan import Layout, Plan, Segment
    from kvilt.serve.aio import AsyncEngine
    from kvilt.stores.store import Store
    from kvilt.strategies.base import Strategy
    from kvilt.types import Answer, Document, DocumentCache, Encoding, Prompt, Usage

    CacheStore = Store

__version__ = "0.1.0"
__all__ = [
    "Answer", "AsyncEngine", "CacheStore", "Document", "DocumentCache", "EncodeReport", "Encoding", "Engine", "KviltError",
    "Layout", "Model", "Plan", "Prompt", "Segment", "Store", "StoreError", "Strategy", "Usage", "UserError",
]  # fmt: skip

_HOME = {
    "engine.encoder": ("EncodeReport",),
    "engine.engine": ("Engine",),
    "errors": ("KviltError", "StoreError", "UserError"),
    "model.model": ("Model",),
    "plan": ("Layout", "Plan", "Segment"),
    "serve.aio": ("AsyncEngine",),
    "stores.store": ("Store",),
    "strategies.base": ("Strategy",),
    "types": ("Answer", "Document", "DocumentCache", "Encoding", "Prompt", "Usage"),
}


def __getattr__(name: str) -> object:
    """Public names are imported when they are first used: `import kvilt` alone does not load torch."""
    name = "Store" if name == "CacheStore" else name
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"kvilt.{module}"), name)
    raise AttributeError(f"module 'kvilt' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted({*globals(), *__all__})
