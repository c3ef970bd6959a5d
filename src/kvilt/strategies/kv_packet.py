"""KV Packet (arXiv 2604.13226): a frozen model, and trained vectors around each document, stored with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from kvilt.errors import SpecError
from kvilt.strategies.base import Strategy, beside
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import ModelInfo


@dataclass(frozen=True)
class KVPacket(Strategy):
    """Every document is encoded between a header and a trailer of learned vectors; nothing is recomputed."""

    wrapper: str = ""

    def bind(self, info: ModelInfo) -> Self:
        """Load the wrapper (default: packet.safetensors beside the model) and check that it was trained for this model."""
        at = beside(self.wrapper, info, "packet.safetensors")
        if not at:
            raise SpecError("kv_packet needs trained vectors: kv_packet:wrapper=FILE (train them: kvilt train packet).")
        return self.holding(Wrapper.load(at).check(info))

    def holding(self, wrapper: Wrapper) -> Self:
        """The strategy with a wrapper's vectors; trainers call it with the vectors they train."""
        return replace(self, encoding=wrapper.encoding())
