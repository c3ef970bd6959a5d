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
    from kvilt.stores.store import Store
    from kvilt.strategies.base import Strategy
    from kvilt.types import Answer, Document, DocumentCache, Encoding, Prompt, Usage

__version__ = "0.1.0"

_HOME = {
    "Answer": "types",
    "Store": "stores.store",
    "Document": "types",
    "DocumentCache": "types",
    "EncodeReport": "engine.encoder",
    "Encoding": "types",
    "Engine": "engine.engine",
    "KviltError": "errors",
    "Layout": "plan",
    "Model": "model.model",
    "Plan": "plan",
    "Prompt": "types",
    "Segment": "plan",
    "StoreError": "errors",
    "Strategy": "strategies.base",
    "Usage": "types",
    "UserError": "errors",
}

__all__ = [
    "Answer",
    "Document",
    "DocumentCache",
    "EncodeReport",
    "Encoding",
    "Engine",
    "KviltError",
    "Layout",
    "Model",
    "Plan",
    "Prompt",
    "Segment",
    "Store",
    "StoreError",
    "Strategy",
    "Usage",
    "UserError",
]


def __getattr__(name: str) -> object:
    """Public names are imported when they are first used: `import kvilt` alone does not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'kvilt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kvilt.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted({*globals(), *__all__})
