"""KVLink (arXiv 2502.16002, NeurIPS 2025): trained link tokens, computed at query time, reconnect documents encoded alone."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvilt.errors import PromptError, SpecError, WrapperError
from kvilt.plan import Plan
from kvilt.strategies.base import Probe, Strategy, begin
from kvilt.types import ModelInfo, Prompt

DESCRIPTION = "kvlink.json"  # beside a checkpoint: which ids are its link tokens and markers
LLAMA3_VOCABULARY = 128256
LLAMA3_FIRST, LLAMA3_SLOTS, LLAMA3_MARKERS = 128011, 40, (128254, 128255)  # the published checkpoints' layout

PUBLISHED = re.compile(r"Llama-?\d+B-KVLink(\d)", re.IGNORECASE)  # in a hub name, or its folder in a cache

logger = logging.getLogger("kvilt")


@dataclass(frozen=True)
class LinkTokens:
    """Ids of a checkpoint's link tokens: slot n of the prompt always gets row n, whatever document stands there."""

    ids: tuple[tuple[int, ...], ...]  # (slots, links)
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    anchors: tuple[int, ...] = ()  # of a checkpoint that was trained with them, and the tokens of a chunk
    chunk: int = 0
    # a file beside the description: rows that ids below zero name, for models whose vocabulary is full
    vectors: str = ""

    @classmethod
    def from_json(cls, text: str) -> LinkTokens:
        """Read a description file. Raises SpecError when it is none."""
        try:
            raw = json.loads(text)
            ids = tuple(tuple(map(int, row)) for row in raw["ids"])
            start, end, anchors = (tuple(map(int, part)) for part in (raw["start"], raw["end"], raw.get("anchors", ())))
            found = cls(ids, start, end, anchors, int(raw.get("chunk", 0)), str(raw.get("vectors", "")))
        except (ValueError, KeyError, TypeError) as error:
            raise SpecError(f"kvlink: {DESCRIPTION} beside the model is not readable: {error!r}.") from error
        if len(set(map(len, ids))) > 1 or bool(anchors) != (found.chunk > 0):
            raise SpecError(f"kvlink: {DESCRIPTION}: every slot needs the same number of link tokens, anchors a chunk.")
        return found

    def to_json(self) -> str:
        """Write a description file."""
        anchored = {"anchors": self.anchors, "chunk": self.chunk} if self.chunk else {}
        own = {"vectors": self.vectors} if self.vectors else {}
        return json.dumps({"ids": self.ids, "start": self.start, "end": self.end, **anchored, **own})

    @classmethod
    def of(cls, info: ModelInfo, links: int) -> LinkTokens:
        """Untrained link tokens of any model: the published Llama layout, or reserved tokens."""
        if links:
            logger.warning("kvlink: no %s beside this model: its link tokens are untrained", DESCRIPTION)
        return cls.published(links) if info.vocab_size == LLAMA3_VOCABULARY else cls.reserve(info.reserved, links)

    @classmethod
    def trained(cls, info: ModelInfo) -> LinkTokens | None:
        """What the description beside the model's weights says, or the layout of one that the authors published, if any."""
        path = Path(info.directory or "") / DESCRIPTION
        if info.directory and path.is_file():
            return cls.from_json(path.read_text())
        known = PUBLISHED.search(info.directory or "") if info.vocab_size == LLAMA3_VOCABULARY else None
        return cls.published(int(known[1])) if known else None

    @classmethod
    def published(cls, links: int) -> LinkTokens:
        """The layout of the authors' Llama 3 checkpoints: id 128011 + slot * links + k."""
        slots = min(LLAMA3_SLOTS, (LLAMA3_MARKERS[0] - LLAMA3_FIRST) // links) if links else LLAMA3_SLOTS
        rows = [[LLAMA3_FIRST + slot * links + k for k in range(links)] for slot in range(slots)]
        return cls(tuple(map(tuple, rows)), LLAMA3_MARKERS[:1], LLAMA3_MARKERS[1:])

    @classmethod
    def reserve(cls, reserved: tuple[int, ...], links: int) -> LinkTokens:
        """Lay markers and as many slots as fit over a tokenizer's reserved tokens."""
        if links == 0:
            return cls(())
        if len(reserved) < 2 + links:
            lacking = f"{2 + links} reserved tokens, this tokenizer has {len(reserved)}"
            raise SpecError(f"kvlink:links={links} needs at least {lacking}. Train a checkpoint: kvilt train kvlink.")
        free = reserved[2:]
        rows = [free[i : i + links] for i in range(0, len(free) - links + 1, links)]
        return cls(tuple(rows), reserved[:1], reserved[1:2])

    @property
    def every(self) -> set[int]:
        """The ids of all these tokens."""
        return {*self.start, *self.end, *self.anchors, *(i for row in self.ids for i in row)}

    def renamed(self, names: Mapping[int, int], vectors: str) -> LinkTokens:
        """The same link tokens under other ids, their rows in a file of their own."""
        *ids, start, end = (tuple(names[i] for i in row) for row in (*self.ids, self.start, self.end))
        return replace(self, ids=tuple(ids), start=start, end=end, vectors=vectors)

    def free(self, reserved: tuple[int, ...]) -> tuple[int, ...]:
        """The reserved tokens that are none of these."""
        return tuple(i for i in reserved if i not in self.every)


@dataclass(frozen=True)
class KVLink(Strategy):
    """After every document stand `links` link tokens of its slot, computed online and never stored (section 2.2).

    Documents are encoded alone, without BOS; markers open and close the documents. Needs a checkpoint trained for it."""

    links: int = 5
    tokens: LinkTokens = field(default=LinkTokens(()), repr=False, kw_only=True)
    learned: Tensor | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.links < 0:
            raise SpecError(f"option links wants 0 or more, not {self.links}.")

    def bind(self, info: ModelInfo) -> Self:
        """Find the checkpoint's link tokens."""
        tokens = LinkTokens.trained(info) or self._undescribed(info)
        known = len(tokens.ids[0]) if tokens.ids else 0
        if self.links > known:
            raise SpecError(f"kvlink:links={self.links}: this checkpoint has {known} link tokens per document.")
        return replace(self, tokens=tokens, learned=_vectors(tokens, info))

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """Documents are reused; markers, link tokens and the question are computed."""
        if self.links and len(prompt.documents) > len(self.tokens.ids):
            there = f"{len(prompt.documents)} documents, but link tokens for {len(self.tokens.ids)} slots"
            raise PromptError(f"kvlink: {there}.")
        layout = begin(prompt).compute(torch.tensor(self.tokens.start), name="start")
        for slot, document in enumerate(prompt.documents):
            layout.reuse(document).compute(self._links(slot), name="links")
        return layout.compute(torch.tensor(self.tokens.end), name="end").ask().plan(learned=self.learned)

    def _undescribed(self, info: ModelInfo) -> LinkTokens:
        return LinkTokens.of(info, self.links)

    def _links(self, slot: int) -> Tensor:
        ids = self.tokens.ids[slot][: self.links] if self.links else ()
        return torch.tensor(ids, dtype=torch.long)


def _vectors(tokens: LinkTokens, info: ModelInfo) -> Tensor | None:
    """The rows that a checkpoint's link tokens have of their own, (vectors, hidden)."""
    if not tokens.vectors:
        return None
    at = Path(info.directory or "") / tokens.vectors
    try:
        found: Tensor = load_file(str(at))["vectors"].float()
    except (SafetensorError, OSError, KeyError) as error:
        raise WrapperError(f"{at}, which {DESCRIPTION} names, is not readable: {error}.") from error
    if found.shape[-1] != info.hidden_size or -min(tokens.every, default=0) > len(found):
        raise WrapperError(f"{at} holds {tuple(found.shape)} vectors, which do not fit the model and {DESCRIPTION}.")
    return found
