"""Full recompute where it is faster, and where it is not a method that reuses; chosen for every prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self, cast

from kvilt import registry
from kvilt.errors import SpecError
from kvilt.plan import Plan
from kvilt.strategies.base import Probe, Strategy, reuse_all
from kvilt.strategies.full import recompute
from kvilt.types import ModelInfo, Prompt


@dataclass(frozen=True)
class Auto(Strategy):
    """Reuses as `reuse` does (auto:reuse=block, auto:reuse=[epic:tokens=16,sink=system]) where that is faster.

    Both plans' times to the first token are predicted from rates measured on this machine; the choice is in the usage."""

    reuse: str | Strategy = "block"
    method: Strategy | None = field(default=None, repr=False, compare=False, kw_only=True)

    def bind(self, info: ModelInfo) -> Self:
        """Make the method ready; documents are encoded as it wants them."""
        spec = self.reuse
        built = cast(Strategy, registry.build("strategy", spec.strip("[]"))) if isinstance(spec, str) else spec
        method = built.bind(info)
        if method.encoding is None:
            raise SpecError(f"auto:reuse={spec}: this method reuses nothing; name one that does.")
        return replace(self, encoding=method.encoding, method=method)

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """The faster plan; a method that looks first does not get to look where it cannot win."""
        full = recompute(prompt)
        limit = probe.seconds(full)
        least = probe.seconds(reuse_all(prompt).ask().plan())  # reusing everything: no method computes less
        if self.method is None or limit <= least:
            return replace(full, note=_note("full recompute", limit, least))
        plan = self.method.plan(prompt, probe)
        seconds = probe.seconds(plan)
        if limit <= seconds:
            return replace(full, note=_note("full recompute", limit, seconds))
        return replace(plan, note=_note("reuse", seconds, limit))


def _note(chosen: str, seconds: float, other: float) -> str:
    return f"{chosen}: predicted {seconds:.3f} s against {other:.3f} s"
