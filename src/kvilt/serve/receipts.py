"""An answer while it is written, and its receipt: tokens, documents, the segments of the plan, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from kvilt.engine.encoder import Item
from kvilt.engine.text import Written
from kvilt.plan import Plan
from kvilt.serve.kept import Placing
from kvilt.serve.worker import Job
from kvilt.types import Answer


class First:
    """The first token is there: what is known by then."""

    def __init__(self, placing: Placing, times: dict[str, float]) -> None:
        self.placing, self.times = placing, times


class Telling:
    """The streamer of one answer: hands on its text piece by piece, as far as no stop string may begin in it."""

    def __init__(self, job: Job, tokenizer: Any, stops: Sequence[str], first: First) -> None:
        self.job, self.stops, self.first = job, stops, first
        self._written, self._held, self._over, self._begun = Written(tokenizer), "", False, False
        self._began = time.perf_counter()

    def put(self, tokens: Tensor) -> None:
        """Take tokens. Raises Cancelled, Late."""
        self.job.check()
        if not tokens.numel():
            self.first.times["prepare"] = time.perf_counter() - self._began
            return
        if not self._begun:
            self._begun = True
            self.first.times["prefill"] = time.perf_counter() - self._began - self.first.times["prepare"]
            self.job.emit(self.first)
        for token in tokens.flatten().tolist():
            if (piece := self._written.put(token)) and not self._over:
                self._hand_on(piece)

    def end(self) -> None:
        """Hand on what was held back."""
        if self._held and not self._over:
            self.job.emit(self._held)
        self._held = ""

    def _hand_on(self, piece: str) -> None:
        text = self._held + piece
        whole, self._over = cut(text, self.stops)
        held = 0 if self._over else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = whole[len(whole) - held :]
        if told := whole[: len(whole) - held]:
            self.job.emit(told)


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first stop string in it, and whether there is one."""
    at = min((found for stop in stops if (found := text.find(stop)) >= 0), default=-1)
    return (text, False) if at < 0 else (text[:at], True)


def _overlap(text: str, stop: str) -> int:
    """How many characters at a text's end a stop string may begin with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0)


def receipt(made: Answer, placing: Placing, waited: float) -> dict[str, Any]:
    """What an answer took: tokens, documents, segments of the plan, and seconds of every step."""
    usage, seconds = asdict(made.usage), {"queue": waited, **made.usage.steps_s}
    names = ("reused_tokens", "computed_tokens", "hits", "misses", "damaged", "bytes_loaded", "note")
    times = {"ttft": round(made.usage.ttft_s + waited, 6), "steps": {step: round(s, 6) for step, s in seconds.items()}}
    charged = {"charged": round(made.usage.charged, 4), "kept_tokens": placing.rows}
    told = {name: usage[name] for name in names}
    return {"strategy": made.strategy, **told, **charged, **times, **described(placing)}


def described(placing: Placing) -> dict[str, Any]:
    """The documents of a prompt, and the segments of its plan."""
    plan, fetched = placing.plan, placing.fetched
    documents = []
    for i in fetched.items:
        if i.document.id or i.document.text:
            hit = bool(plan.reused_count) and i.document.store and i.key.digest not in fetched.missing
            documents.append({"id": i.key.digest, "title": i.title, "tokens": len(i.ids), "hit": hit})
    return {"documents": documents, "segments": segments(plan, fetched.items, placing.rows)}


def segments(plan: Plan, items: Sequence[Item], kept: int = 0) -> list[dict[str, Any]]:
    """The segments of a plan: what they are, where they stand, and how many of their tokens are reused and computed."""
    rest, made = iter(items), []
    for s, base in zip(plan.segments, plan.bases, strict=True):
        item = next(rest, None) if s.name == "document" else None
        named = item is not None and bool(item.document.id or item.document.text)
        told = {
            "kind": "text" if item is not None and not named else s.name,
            "start": s.start,
            "tokens": s.length,
            "reused": int(s.reused.sum()),
            "computed": int(s.computed.sum()),
            "kept": max(0, min(len(s.places), kept - base)),
        }
        made.append({**told, "id": item.key.digest, "title": item.title} if named and item is not None else told)
    return made
