"""Reuse without any repair: the "no recompute" control of the papers."""

from __future__ import annotations

from dataclasses import dataclass

from kvilt.strategies.base import Strategy


@dataclass(frozen=True)
class Naive(Strategy):
    """Documents encoded with nothing in front, moved to their places, on a model that was never trained for it."""
