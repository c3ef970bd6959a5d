"""Adapters for a frozen reader: one that writes documents (SemPIC, arXiv 2607.28069), one that asks (ATTUNER, arXiv 2609.36722)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from kvilt.errors import SpecError
from kvilt.plan import Plan
from kvilt.rows import adapter as files
from kvilt.strategies.base import Probe, Strategy, beside
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import Adapter, Encoding, ModelInfo, Prompt

WRAPPERS = "wrapper.safetensors", "writer-wrapper.safetensors"  # beside an adapter: of a training, of a shipped model


@dataclass(frozen=True)
class Writer(Strategy):
    """Documents are encoded with an adapter and read without it: nothing is recomputed, and any engine can read them.

    `wrapper` puts learned vectors around each document as KV Packet does; it defaults to a file beside the adapter, and the
    adapter to one beside the model's weights."""

    adapter: str = ""
    wrapper: str = ""

    def bind(self, info: ModelInfo) -> Self:
        """Load adapter and wrapper, and check that they were trained for this model."""
        at = beside(self.adapter, info, "writer.safetensors")
        if not at:
            raise SpecError("writer needs an adapter that documents are encoded with: writer:adapter=FILE (LoRA).")
        around = [file for name in WRAPPERS if (file := Path(at).with_name(name)).is_file()]
        return replace(self, encoding=_encoding(at, self.wrapper or next(map(str, around), ""), info))

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """Everything is reused, the question is computed."""
        return replace(super().plan(prompt, probe), writer=self.encoding.adapter if self.encoding else None)


@dataclass(frozen=True)
class QueryLoRA(Strategy):
    """Question and answer are computed with an adapter; documents are stored without it, so it can change at any time.

    `writer` and `wrapper` are those of documents that were encoded with an adapter or with vectors around them."""

    adapter: str = ""
    writer: str = ""
    wrapper: str = ""
    reader: Adapter | None = field(default=None, repr=False, compare=False, kw_only=True)

    def bind(self, info: ModelInfo) -> Self:
        """Load what is named, and check that it was trained for this model."""
        at = beside(self.adapter, info, "query.safetensors")
        if not at:
            raise SpecError("query_lora needs an adapter for questions: query_lora:adapter=FILE (LoRA).")
        reader = files.check(files.load(at), at, info, "query")
        return replace(self, reader=reader, encoding=_encoding(self.writer, self.wrapper, info))

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """Everything is reused, the question is computed with the adapter."""
        writer = self.encoding.adapter if self.encoding else None
        return replace(super().plan(prompt, probe), writer=writer, reader=self.reader)


def _encoding(adapter: str | Path, wrapper: str, info: ModelInfo) -> Encoding:
    frame = Wrapper.load(wrapper).check(info).encoding() if wrapper else Encoding()
    return replace(frame, adapter=files.check(files.load(adapter), adapter, info, "writer")) if adapter else frame
