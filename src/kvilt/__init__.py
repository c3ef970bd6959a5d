"""Kvilt: encode every document once, alone, and reuse its KV cache in any prompt."""

__version__ = "0.1.0"
