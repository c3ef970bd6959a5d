"""`kvilt demo`: encode a collection once, ask with every strategy, print one table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import cast

from kvilt import builtin
from kvilt.engine.engine import Engine
from kvilt.lab import pages
from kvilt.lab.evaluate.metrics import normalise
from kvilt.lab.evaluate.tasks.base import Sample, Task
from kvilt.registry import build
from kvilt.stores.disk import DiskStore
from kvilt.stores.store import Store
from kvilt.types import Answer

UNTRAINED = ["full", "naive", "block:sink=system"]
STRATEGIES = {"builtin": [*UNTRAINED, "prompt_cache:slot=128", "epic:tokens=8", "kv_packet", "linked_packet"]}
STRATEGIES["smollm2-qa"] = [*UNTRAINED, "linked_packet", "writer"]
CHECKPOINTS = {"builtin": {"builtin-kvlink0": "kvlink:links=0", "builtin-kvlink5": "kvlink:links=5"}}
CHECKPOINTS["smollm2-qa"] = CHECKPOINTS["smollm2-kvlink5"] = {"smollm2-kvlink5": "kvlink:links=5"}
COLUMNS = ("strategy", "right", "as full", "reused", "computed", "charged", "TTFT ms", "KB loaded")
SHOWN = 3  # answers to read


@dataclass(frozen=True)
class Row:
    """One line of the table: shares of right answers and of answers equal to full recompute's, and medians of costs."""

    strategy: str
    right: float
    same: float
    reused_tokens: float
    computed_tokens: float
    charged: float
    ttft_s: float
    bytes_loaded: float
    answers: tuple[str, ...] = ()


def run(model: str, questions: int, on_progress: Callable[[int, int, str], None]) -> list[Row]:
    """Encode everything, and ask every question with every strategy; full recompute first."""
    asked, rows = asked_of(model, questions), list[Row]()
    with tempfile.TemporaryDirectory() as folder, closing(DiskStore(folder)) as store:
        engines = _engines(model, store, asked, on_progress)
        reference: list[str] = []
        for number, (name, engine) in enumerate(engines.items()):
            answers = []
            for k, s in enumerate(asked):
                done = (len(engines) + number) * len(asked) + k
                on_progress(done, 2 * len(engines) * len(asked), f"asking with {name}")
                answers.append(engine.answer(s.question, s.documents, max_new_tokens=48))
            texts = [normalise(a.text) for a in answers]
            reference = reference or texts
            right = [any(normalise(x) in text for x in s.answers) for s, text in zip(asked, texts, strict=True)]
            same = [text == full for text, full in zip(texts, reference, strict=True)]
            rows.append(_row(name, right, same, answers))
    return rows


def examples(model: str, questions: int, rows: Sequence[Row]) -> list[str]:
    """Some questions, the answers that count as right, and what full recompute and the last strategies said."""
    lines = []
    for k, s in enumerate(asked_of(model, questions)[:: max(1, questions // SHOWN)][:SHOWN]):
        lines += ["", f"{s.question}  ({' / '.join(dict.fromkeys(s.answers))})"]
        lines += [f"  {r.strategy}: {r.answers[k * max(1, questions // SHOWN)]}" for r in (rows[0], *rows[-2:])]
    return lines


def _row(name: str, right: Sequence[bool], same: Sequence[bool], answers: Sequence[Answer]) -> Row:
    fields = ("reused_tokens", "computed_tokens", "charged", "ttft_s", "bytes_loaded")
    costs = [median(getattr(a.usage, field) for a in answers) for field in fields]
    texts = tuple(a.text.strip() for a in answers)
    return replace(Row(name, sum(right) / len(right), sum(same) / len(same), *costs), answers=texts)


def asked_of(model: str, count: int) -> list[Sample]:
    """The same number of every kind in a fixed order, or of the real questions the first."""
    if model.startswith("smollm2"):
        papers = builtin.wikipedia()
        return [
            Sample(q["id"], q["question"], tuple(papers[name] for name in q["documents"]), tuple(q["answers"]), {})
            for q in builtin.wikipedia_questions()[:count]
        ]
    kinds: dict[str, list[Sample]] = {}
    for sample in cast(Task, build("task", "builtin")).samples():
        kinds.setdefault(sample.metadata["kind"], []).append(sample)
    each = -(-count // len(kinds))
    return [s for some in kinds.values() for s in some[:: max(1, len(some) // each)][:each]][:count]


def _engines(
    model: str, store: Store, asked: Sequence[Sample], on_progress: Callable[[int, int, str], None]
) -> dict[str, Engine]:
    """An engine per strategy, documents encoded; trained ones only where what was trained for this model is at hand."""
    first = Engine.load(model, "full", store)
    engines = {spec: first.with_strategy(spec) for spec in STRATEGIES.get(model, UNTRAINED)}
    engines |= {spec: Engine.load(name, spec, store) for name, spec in CHECKPOINTS.get(model, {}).items()}
    for number, (name, engine) in enumerate(engines.items()):
        on_progress(number * len(asked), 2 * len(engines) * len(asked), f"encoding for {name}")  # one scale with asking
        if engine.strategy.encoding is not None:
            engine.encode(list({d.content: d for s in asked for d in s.documents}.values()))
    return engines


def cells(row: Row) -> list[str]:
    """A row of the table, under COLUMNS."""
    shares = [f"{100 * share:.0f} %" for share in (row.right, row.same)]
    tokens = [f"{row.reused_tokens:.0f}", f"{row.computed_tokens:.0f}", f"{100 * row.charged:.0f} %"]
    return [row.strategy, *shares, *tokens, f"{1000 * row.ttft_s:.1f}", f"{row.bytes_loaded / 1e3:.0f}"]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Answers right over charged compute. Raises MissingExtra without matplotlib."""
    figure, axes = pages.figure(7, 4.5)
    for row in rows:
        axes.plot([100 * row.charged], [100 * row.right], "o", label=row.strategy)
    axes.set(xlabel="charged compute, % of full recompute", ylabel="answers right, %", xlim=(0, 105), ylim=(0, 105))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
