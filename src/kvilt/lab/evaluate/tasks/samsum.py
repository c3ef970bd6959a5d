"""SAMSum (Gliwa et al. 2019): the original JSON, or knkarthick/samsum on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvilt.lab.evaluate.tasks.summary import SummaryTask


@dataclass(frozen=True)
class SAMSum(SummaryTask):
    """Summaries of chats, twenty examples in context."""

    NAME: ClassVar[str] = "samsum"
    ALIASES: ClassVar[tuple[str, ...]] = ("samsum", "dev", "train", "test", "val")
    HUB: ClassVar[tuple[str, str | None]] = ("knkarthick/samsum", None)
    FIELDS: ClassVar[tuple[str, str]] = ("dialogue", "summary")
    KIND: ClassVar[str] = "Dialogue"

    answer_tokens: int = 128
    shots: int = 20

    def clean(self, text: str) -> str:
        """Plain line ends."""
        return text.replace("\r\n", "\n").strip()
