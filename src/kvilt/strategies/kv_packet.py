"""KV Packet (arXiv 2604.13226): a frozen model, and trained vectors around each document, stored with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from kvilt.errors import SpecError
from kvilt.strategies.base import Strategy, beside
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import ModelInfo


@dataclass(frozen=True)
class KVPacket(Strategy):
    """Every document is encoded between a header and a trailer of learned vectors; nothing is recomputed."""

    wrapper: str = ""
    default: ClassVar[str] = "packet.safetensors"  # beside the model's weights

    def bind(self, info: ModelInfo) -> Self:
        """Load the wrapper (default: a file beside the model) and check that it was trained for this model."""
        at = beside(self.wrapper, info, self.default)
        if not at:
            raise SpecError(f"{self} needs vectors (wrapper=FILE): kvilt train packet or kvilt train linked-packet.")
        return self.holding(Wrapper.load(at).check(info))

    def holding(self, wrapper: Wrapper) -> Self:
        """The strategy with a wrapper's vectors; trainers call it with the vectors they train."""
        return replace(self, encoding=wrapper.encoding())
