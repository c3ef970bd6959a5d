"""What a strategy is: an encoding for documents and a plan for prompts. Strategies know no model, no store and no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from kvilt import registry
from kvilt.errors import SpecError
from kvilt.plan import Layout, Plan
from kvilt.types import DocumentCache, Encoding, ModelInfo, Prompt


class Probe(Protocol):
    """The probe passes that a strategy may run before it decides. They are charged to the answer."""

    def layers(self, plan: Plan, count: int) -> list[DocumentCache]:
        """What the lowest `count` layers hold for each of a plan's segments, as caches of their own."""

    def attention(
        self, plan: Plan, layers: Sequence[int], pool: Literal["mean", "max", "norm"] = "mean", last: int | None = None
    ) -> Tensor:
        """Attention that each row of a plan gets from its last `last` computed tokens (default: all), (layers, rows)."""

    def queries(self, plan: Plan, layers: Sequence[int]) -> list[Tensor]:
        """A plan's computed tokens' queries in some layers without rotation, (heads, computed, head_dim) each."""

    def keys(self, cache: DocumentCache, layer: int) -> Tensor:
        """A document's stored keys of a layer, without rotation, (kv_heads, rows, head_dim) float32."""


@dataclass(frozen=True)
class Strategy:
    """A reuse method; its fields are its configuration, and str() of it, a specification, is written into every result.

    `encoding` is None when the method reuses nothing. Fields that `bind` fills are kept out of the repr."""

    encoding: Encoding | None = field(default=Encoding(), repr=False, compare=False, kw_only=True)

    def __str__(self) -> str:
        """The specification that builds it: "block:sink=none"."""
        return registry.spec_of(self)

    @property
    def shares_positions(self) -> bool:
        """Whether documents stand side by side at the same positions instead of one after the other."""
        return False

    def bind(self, info: ModelInfo) -> Self:
        """The strategy made ready for a model: ids and learned vectors looked up and checked."""
        return self

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """Decide what is reused, what is computed and where it stands; unless a method says otherwise, system and
        documents are reused one after the other and the question is computed. `probe` runs plans in part."""
        return reuse_all(prompt).ask().plan(learned=self.encoding.learned if self.encoding else None)


@dataclass(frozen=True)
class Plain(Strategy):
    """A method whose documents are encoded with nothing learned around them.

    `sink` puts a shared prefix in front of each document while it is encoded, whose rows are dropped: "none", "system"
    (the prompt's own system part) or a number of BOS tokens. It takes over the attention that first tokens attract."""

    sink: str = "none"

    def bind(self, info: ModelInfo) -> Self:
        """Resolve the sink to token ids."""
        return replace(self, encoding=Encoding(before=sink_tokens(self.sink, info)))


def sink_tokens(sink: str, info: ModelInfo) -> tuple[int, ...]:
    """Token ids of a sink option."""
    if sink in ("none", "0", ""):
        return ()
    if sink == "system":
        return info.system
    if not sink.isdecimal() or len(sink) > 6:
        raise SpecError(f"option sink wants 'none', 'system' or a number of BOS tokens, not {sink!r}.")
    if info.sink is None:
        raise SpecError("option sink: this tokenizer has no BOS, EOS or padding token; use sink=system.")
    return (info.sink,) * int(sink)


def beside(given: str, info: ModelInfo, name: str) -> str:
    """The file that an option names, else the one of this name beside the model's weights, else nothing."""
    own = Path(info.directory or "") / name
    return given or (str(own) if info.directory and own.is_file() else "")


def begin(prompt: Prompt) -> Layout:
    """A layout that starts with the system part."""
    return Layout(prompt).reuse(prompt.system, name="system")


def reuse_all(prompt: Prompt) -> Layout:
    """System part and every document reused, one after the other: the plan of every method that recomputes nothing."""
    layout = begin(prompt)
    for document in prompt.documents:
        layout.reuse(document)
    return layout


def has_exact_prefix(prompt: Prompt) -> bool:
    """Whether the first document was encoded behind exactly what it now stands behind, and lost nothing since.

    Its rows are then those of a full prefill: recomputing them changes nothing."""
    first = prompt.documents[0] if prompt.documents else None
    if first is None or first.rows is None or not (first.is_lossless and prompt.system.is_lossless):
        return False
    return torch.equal(first.tokens[: first.dropped], prompt.system.placed_tokens)
