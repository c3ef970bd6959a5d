"""Linked packet, Kvilt's own: KV Packet's stored header and trailer, and soft link vectors computed at query time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch

from kvilt.errors import SpecError, WrapperError
from kvilt.plan import Plan
from kvilt.strategies.base import Probe, begin
from kvilt.strategies.kv_packet import KVPacket
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import Prompt

LAYOUTS = ("slots", "tail")


@dataclass(frozen=True)
class LinkedPacket(KVPacket):
    """A frozen model reads packets (KV Packet) that link vectors, the same in every slot, reconnect as KVLink's do.

    `layout` "slots" puts the link vectors after every document, "tail" all of them once after the last document: then
    every computed token stands after every reused one, and any engine with prefix injection can serve it. "auto" is the
    layout that the wrapper was trained for."""

    layout: str = "auto"
    default = "linked.safetensors"
    links: tuple[int, ...] = field(default=(), repr=False, kw_only=True)

    def holding(self, wrapper: Wrapper) -> Self:
        """The strategy with a wrapper's vectors. Raises WrapperError without link vectors or for another layout."""
        trained = wrapper.metadata.get("layout", "")
        layout = (trained or LAYOUTS[0]) if self.layout == "auto" else self.layout
        if layout not in LAYOUTS:
            raise SpecError(f"linked_packet: layout must be auto, {' or '.join(LAYOUTS)}, not {layout!r}.")
        if wrapper.links is None:
            raise WrapperError("this wrapper holds no link vectors: use kv_packet, or kvilt train linked-packet.")
        if trained and layout != trained:
            raise WrapperError(f"this wrapper was trained for layout={trained}, not layout={layout}.")
        links = tuple(wrapper.link_ids().tolist())
        return replace(self, encoding=wrapper.encoding(), layout=layout, links=links)

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """System and packets are reused; link vectors and the question are computed."""
        layout, links = begin(prompt), torch.tensor(self.links, dtype=torch.long)
        for document in prompt.documents:
            layout.reuse(document)
            if self.layout != "tail":
                layout.compute(links, name="links")
        if self.layout == "tail":
            layout.compute(links, name="links")
        return layout.ask().plan(learned=self.encoding.learned if self.encoding else None)
