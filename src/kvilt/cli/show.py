"""What goes to stdout: JSON, or lines for people, in which control characters of others are written out."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvilt.cli.talk import shown, span
from kvilt.corpora.tidy import variant
from kvilt.stores.sizes import show_size

if TYPE_CHECKING:
    from kvilt.check.doctor import Diagnosis
    from kvilt.corpora.collection import Taken
    from kvilt.corpora.estimate import Estimate
    from kvilt.corpora.tidy import Share
    from kvilt.engine.encoder import EncodeReport
    from kvilt.plan import Plan
    from kvilt.stores.store import Entry, StoreStats
    from kvilt.types import Answer

BAR = 40  # characters
EXAMPLES = 3  # documents named for each reason


def out(as_json: bool, data: object, lines: Iterable[str]) -> None:
    """One line of JSON, or lines for people."""
    for line in [json.dumps(data, default=str)] if as_json else map(shown, lines):
        print(line)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Lines of a table; a heading that ends in ">" stands over numbers."""
    cells = [[shown(cell) for cell in row] for row in rows]
    cells = [[head.rstrip(">") for head in heads], *cells] if any(heads) else cells
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        padded = (gap + c if head.endswith(">") else c + gap for head, c, gap in zip(heads, row, gaps, strict=True))
        yield "  ".join(padded).rstrip()


def _width(text: str) -> int:
    """Columns of a terminal."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def encoded(report: EncodeReport, dry_run: bool) -> str:
    """What an encoding run did, or would do."""
    r, speed = report, f"{report.tokens / max(report.seconds, 1e-9):,.0f} tokens/s"
    work = f"{r.encoded:,} to encode" if dry_run else f"{r.encoded:,} encoded"
    cost = f"about {r.seconds:,.0f} s" if dry_run else f"{r.seconds:,.1f} s ({speed})"
    size = show_size(r.bytes)
    return f"{r.documents:,} documents: {work}, {r.present:,} already stored; {r.tokens:,} tokens, {size}, {cost}"


def costs(e: Estimate) -> Iterator[str]:
    """What encoding and requests cost."""
    yield f"to encode, once: {_money(e.encoding)}; to keep, a month: {_money(e.storage_month)}"
    if e.request_tokens:
        yield f"a million requests of {e.request_tokens:,} tokens of documents, to the first token:"
        yield f"  prefilled  {_money(e.prefill_million)}  ({e.prefill_s:.3f} s each)"
        yield f"  reused     {_money(e.reuse_million)}  ({e.reuse_s:.3f} s each, with loading from the local disk)"
        pays = "never" if e.break_even_month is None else f"from {e.break_even_month:,.0f} requests a month on"
        yield f"  keeping them pays {pays}"


def _money(amount: float) -> str:
    """An amount in cents, or where it is less than that what matters of it."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"


def taken(t: Taken) -> Iterator[str]:
    """What was found in a collection."""
    yield from t.problems
    signed = f"signed by {t.signer}" if t.signer else "not signed"
    yield f"{t.whole:,} documents are whole, {len(t.problems):,} are not; {t.stored:,} stored; {signed}"


def usage(answer: Answer) -> str:
    """What an answer took, in one line."""
    u = answer.usage
    caches = f"{u.hits} hits, {u.misses} misses" + (f", {u.damaged} damaged" if u.damaged else "")
    tokens = f"{u.reused_tokens:,} tokens reused, {u.computed_tokens:,} computed ({u.charged:.1%} of full recompute)"
    loaded = f"{show_size(u.bytes_loaded)} loaded, first token after {u.ttft_s:.3f} s"
    return f"{answer.strategy}: {caches}; {tokens}; {loaded}" + (f" ({u.note})" if u.note else "")


def plan(plan: Plan, names: Sequence[str], strategy: str) -> Iterator[str]:
    """The segments of a prompt: where each stands, and what of it is reused."""
    longest = max(s.length for s in plan.segments)
    documents = iter(names)
    rows = []
    for segment in plan.segments:
        name = (next(documents, "") or segment.name) if segment.name == "document" else segment.name
        reused, computed = int(segment.reused.sum()), int(segment.computed.sum())
        bar = "░" * round(BAR * reused / longest) + "█" * -(-BAR * computed // longest)
        rows.append((name, segment.start, segment.length, reused, computed, bar))
    return table(("segment", "start>", "tokens>", "reused>", "computed>", strategy), rows)


def entries(stored: Iterable[Entry]) -> Iterator[str]:
    """Stored documents."""
    heads = ("key", "title", "tokens>", "size>", "hits>", "used", "", "dtype", "encoding", "compression", "namespace")
    rows = [
        (e.key[:12], e.title, f"{e.tokens:,}", show_size(e.bytes), e.hits, ago(e.used), "pinned" if e.pinned else "",
         *variant(e))
        for e in stored
    ]  # fmt: skip
    return table(heads, rows)


def shares(held: Iterable[Share]) -> Iterator[str]:
    """What documents of each kind take."""
    heads = (
        "size>",
        "documents>",
        "tokens>",
        "hits>",
        "used",
        "model",
        "dtype",
        "encoding",
        "compression",
        "namespace",
    )
    kinds = ("model", "dtype", "encoding", "compression", "namespace")
    rows = [
        (show_size(s.bytes), f"{s.documents:,}", f"{s.tokens:,}", s.hits, ago(s.used), *(getattr(s, k) for k in kinds))
        for s in held
    ]
    return table(heads, rows)


def entry(stored: Entry) -> Iterator[str]:
    """One stored document, with what it was made by."""
    times = {"created": ago(stored.created), "used": ago(stored.used), "expires": _until(stored.expires)}
    rows = {**asdict(stored), **times, "bytes": show_size(stored.bytes)}
    fields = rows.pop("fields")
    return table(("", ""), [*rows.items(), *fields.items()])


def stats(total: StoreStats) -> Iterator[str]:
    """Totals of a store."""
    sizes = {"bytes": show_size(total.bytes), "budget": show_size(total.budget) if total.budget else "none"}
    return table(("", ""), {**asdict(total), **sizes}.items())


def diagnosis(made: Diagnosis) -> Iterator[str]:
    """What the doctor found, with remedies."""
    for f in made.findings:
        yield f"{'PROBLEM' if f.status == 'problem' else f.status}  {f.what}"
        if f.fix:
            yield f"    fix: {f.fix}"
    if made.verdicts:
        yield f"{sum(v.reused for v in made.verdicts):,} of {len(made.verdicts):,} documents will be reused."
    for (reason, fix), ids in made.by_reason().items():
        more = f" and {len(ids) - EXAMPLES:,} more" if len(ids) > EXAMPLES else ""
        yield f"  {len(ids):,} will not: {reason}."
        yield f"    documents: {', '.join(ids[:EXAMPLES])}{more}"
        yield f"    fix: {fix}"


def ago(moment: float) -> str:
    """A time in the past, for people."""
    return f"{span(time.time() - moment)} ago"


def _until(moment: float | None) -> str:
    return "never" if moment is None else f"in {span(moment - time.time())}"
