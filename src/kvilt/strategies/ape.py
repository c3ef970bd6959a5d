"""APE, adaptive parallel encoding (arXiv 2502.05431, ICLR 2025): documents side by side at the same positions."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from kvilt.errors import SpecError
from kvilt.plan import ContextScaling, Plan
from kvilt.strategies.base import Probe, Strategy, begin
from kvilt.types import Encoding, ModelInfo, Prompt

FORMAT = "kvilt-ape-1"
DEFAULTS = (0.9, 0.9)  # the authors' temperature and scale


@dataclass(frozen=True)
class ApeProfile:
    """A temperature and a scale calibrated for one model (`kvilt calibrate ape`)."""

    temperature: float
    scale: float
    model: str  # digest of the weights
    kl: float  # to full recompute, nats per token, over prompts that were not used to choose
    plain: float  # the same of temperature and scale 1
    format: str = FORMAT

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, info: ModelInfo) -> ApeProfile:
        """Read a profile. Raises SpecError when it is none, or was made for other weights."""
        try:
            found = cls(**json.loads(Path(path).read_text()))
            known = found.format == FORMAT and _usable(found.temperature) and _usable(found.scale)
        except (OSError, ValueError, TypeError) as error:
            raise SpecError(f"ape: profile {path} is not readable: {error}.") from error
        if not known:
            raise SpecError(f"ape: {path} is not a profile of format {FORMAT}.")
        if found.model != info.digest:
            raise SpecError(f"ape: profile {path} was calibrated for other weights. Again: kvilt calibrate ape.")
        return found


@dataclass(frozen=True)
class Ape(Strategy):
    """Documents are encoded behind the system part, share one range of positions, and are attended to more sharply.

    The question starts after the longest of them; `temperature` and `scale` act on what it and the answer's tokens
    attend to among the documents (section 4 of the paper). A profile made by `kvilt calibrate ape` gives both."""

    temperature: float = 0.9
    scale: float = 0.9
    profile: str = ""

    def __post_init__(self) -> None:
        for name in ("temperature", "scale"):
            if not _usable(getattr(self, name)):
                raise SpecError(f"option {name} wants a number above 0, not {getattr(self, name)}.")

    @property
    def shares_positions(self) -> bool:
        return True

    def bind(self, info: ModelInfo) -> Self:
        """Take the system part as shared prefix, and the profile's numbers if there is one."""
        numbers = given = (self.temperature, self.scale)
        if self.profile:
            found = ApeProfile.load(self.profile, info)
            numbers = (found.temperature, found.scale)
            if given not in (DEFAULTS, numbers):
                raise SpecError("ape: give a profile, or temperature and scale, not both.")
        return replace(self, encoding=Encoding(before=info.system), temperature=numbers[0], scale=numbers[1])

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """Documents are reused side by side; those that are never stored, and the question, are computed after them."""
        layout = begin(prompt)
        stored = [d for d in prompt.documents if d.rows is not None]
        for document in stored:
            layout.reuse(document, at=prompt.system.length)
        for document in prompt.documents:
            if document.rows is None:
                layout.compute(document.placed_tokens, name="document")
        return layout.ask().plan(context=ContextScaling(self.temperature, self.scale))


def _usable(number: float) -> bool:
    return 0 < number < math.inf
