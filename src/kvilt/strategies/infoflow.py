"""InfoFlow-KV (arXiv 2603.05353, ICML 2026): the tokens that the question attends to in layers above the middle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvilt.errors import SpecError
from kvilt.plan import Plan
from kvilt.strategies.base import Probe
from kvilt.strategies.selection import Selective, asked, candidates, lay, layer_range, share, split, top
from kvilt.types import Prompt

DEFAULT = (0.6, 0.7)  # of the depth: the paper's layers 22 to 25 of 36


@dataclass(frozen=True)
class InfoFlow(Selective):
    """Tokens are scored by the L2 norm over question tokens of the attention they get, mean over heads and `layers`.

    `layers` is a range "first-last" (default: from 60 to 70 % of the depth). `reorder` places documents by the share of
    their tokens selected, highest last, and scores again at the new places ("double guided"). The first `boundary` tokens
    of each document are recomputed as well. The paper's pass over all tokens in layer 0 is left out (see `selection`)."""

    layers: str = ""
    reorder: bool = False
    boundary: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.boundary < 0:
            raise SpecError(f"option boundary wants 0 or more, not {self.boundary}.")
        layer_range(self.layers, self.depth, DEFAULT)

    def scores(self, prompt: Prompt, probe: Probe) -> Tensor:
        """Norm of the question's attention."""
        return asked(prompt, probe, layer_range(self.layers, self.depth, DEFAULT), "norm")

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """The selected tokens, the first of each document and the question are computed, in the order found best."""
        if self.reorder and 0 < self.ratio < 1:
            prompt = self._reordered(prompt, probe)
        first = [torch.arange(d.length) < self.boundary for d in prompt.documents]
        among = candidates(prompt)
        edge = among & torch.cat([among[:0], *first])
        return lay(prompt, self.select(prompt, probe) | edge).ask().plan()

    def _reordered(self, prompt: Prompt, probe: Probe) -> Prompt:
        among = torch.ones(sum(d.length for d in prompt.documents), dtype=torch.bool)
        chosen = split(prompt, top(self.scores(prompt, probe), among, share(self.ratio, among)))
        found = [float(marks.float().mean()) if len(marks) else 0.0 for marks in chosen]
        order = sorted(range(len(found)), key=found.__getitem__)
        names = tuple(prompt.names[i] for i in order) if prompt.names else ()
        return replace(prompt, documents=tuple(prompt.documents[i] for i in order), names=names)
