"""What goes to stdout: JSON, or text and tables that stay whole in a pipe."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvilt.stores.sizes import show_size

if TYPE_CHECKING:
    from kvilt.check.doctor import Diagnosis
    from kvilt.check.gates import GateResult
    from kvilt.cli.compare import Closeness
    from kvilt.engine.encoder import EncodeReport
    from kvilt.plan import Plan
    from kvilt.stores.store import Entry, StoreStats
    from kvilt.types import Answer

WIDE = 10_000  # columns where no terminal sets a limit
BAR = 40  # characters
EXAMPLES = 3  # documents named for each reason


def as_json(data: object) -> None:
    """One line of JSON on stdout."""
    print(json.dumps(data, default=str))


def console(*, stderr: bool = False) -> Console:
    """A console that never cuts a table off unless a terminal is that narrow."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDE, highlight=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, stderr: bool = False) -> None:
    """Rows under headings; a heading that ends in ">" stands over numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold", show_header=any(columns))
    for column in columns:
        made.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    out = console(stderr=stderr)
    with out.capture() as text:
        out.print(made)
    for line in text.get().splitlines():  # the last column is filled up with blanks
        print(line.rstrip(), file=out.file)


def encoded(report: EncodeReport, dry_run: bool, as_data: bool) -> None:
    """What an encoding run did, or would do."""
    if as_data:
        as_json({**asdict(report), "dry_run": dry_run})
        return
    r, size = report, show_size(report.bytes)
    work = f"{r.encoded:,} to encode" if dry_run else f"{r.encoded:,} encoded"
    cost = (
        f"about {r.seconds:,.0f} s"
        if dry_run
        else f"{r.seconds:,.1f} s ({r.tokens / max(r.seconds, 1e-9):,.0f} tokens/s)"
    )
    print(f"{r.documents:,} documents: {work}, {r.present:,} already stored; {r.tokens:,} tokens, {size}, {cost}")


def usage(answer: Answer) -> str:
    """What an answer took, in one line."""
    u = answer.usage
    damaged = f", {u.damaged} damaged" if u.damaged else ""
    found = f"{u.hits} hits, {u.misses} misses{damaged}"
    tokens = f"{u.reused_tokens:,} tokens reused, {u.computed_tokens:,} computed ({u.charged:.1%} of full recompute)"
    time_ = f"{show_size(u.bytes_loaded)} loaded, first token after {u.ttft_s:.3f} s"
    note = f" ({u.note})" if u.note else ""
    return f"{answer.strategy}: {found}; {tokens}; {time_}{note}"


def plan(plan: Plan, names: Sequence[str], strategy: str) -> None:
    """The segments of a prompt on stderr: where each stands, and what of it is reused."""
    longest = max(s.length for s in plan.segments)
    documents = iter(names)
    rows = []
    for segment in plan.segments:
        name = (next(documents, "") or segment.name) if segment.name == "document" else segment.name
        reused, computed = int(segment.reused.sum()), int(segment.computed.sum())
        bar = Text("░" * round(BAR * reused / longest), "green") + Text("█" * -(-BAR * computed // longest), "yellow")
        rows.append((name, segment.start, segment.length, reused, computed, bar))
    table(("segment", "start>", "tokens>", "reused>", "computed>", strategy), rows, stderr=True)


def verified(results: Sequence[GateResult], rows: Sequence[Closeness], as_data: bool) -> None:
    """Gates, and how close strategies come to full recompute."""
    if as_data:
        gates = [{**asdict(r), "passed": r.passed} for r in results]
        as_json({"passed": all(r.passed for r in results), "gates": gates, "strategies": [asdict(r) for r in rows]})
        return
    checks = [
        (
            r.gate,
            Text("passed", "green") if r.passed else Text("FAILED", "red"),
            f"{r.worst:.1e}",
            f"{r.tolerance:.0e}",
            r.title,
        )
        for r in results
    ]
    table(("gate", "", "worst>", "tolerance>", "what must hold"), checks)
    print("\nAgainst full recompute (a method's own distance, not an error of this machine):")
    numbers = [(r.strategy, *_closeness(r)) for r in rows]
    table(("strategy", "same tokens>", "max logit difference>", "charged>", "answer"), numbers)


def _closeness(row: Closeness) -> tuple[str, str, str, str]:
    if row.note:
        return "", "", "", row.note
    return f"{row.agreement:.0%}", f"{row.max_logit_difference:.3g}", f"{row.charged:.1%}", row.text[:60]


def diagnosis(found: Diagnosis, as_data: bool) -> None:
    """What the doctor found, worst things with their remedy."""
    if as_data:
        as_json(
            {
                "healthy": found.healthy,
                "findings": [asdict(f) for f in found.findings],
                "documents": [asdict(v) for v in found.verdicts],
            }
        )
        return
    marks = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("PROBLEM", "red")}
    out = console()
    for f in found.findings:
        out.print(
            Text(*marks[f.status]), Text(f.what), Text(f"\n    fix: {f.fix}" if f.fix else ""), sep="  ", soft_wrap=True
        )
    hits = sum(v.reused for v in found.verdicts)
    if found.verdicts:
        print(f"{hits:,} of {len(found.verdicts):,} documents will be reused.")
    for (reason, fix), ids in found.by_reason().items():
        more = f" and {len(ids) - EXAMPLES:,} more" if len(ids) > EXAMPLES else ""
        print(f"  {len(ids):,} will not: {reason}.\n    documents: {', '.join(ids[:EXAMPLES])}{more}\n    fix: {fix}")


def catalogue(kinds: dict[str, list[dict[str, Any]]], as_data: bool) -> None:
    """Names with options and documentation."""
    if as_data:
        as_json(kinds)
        return
    for kind, names in kinds.items():
        rows = [(n["name"], ",".join(f"{k}={v}" for k, v in n["options"].items()), n["summary"]) for n in names]
        table((kind, "options", "what it is"), rows)
        print()


def entries(found: Sequence[Entry], as_data: bool) -> None:
    """Stored documents."""
    if as_data:
        as_json([asdict(e) for e in found])
        return
    rows = [
        (
            e.key[:12],
            e.title,
            f"{e.tokens:,}",
            show_size(e.bytes),
            e.hits,
            ago(e.used),
            "pinned" if e.pinned else "",
            e.fields.get("compression", ""),
            e.namespace,
        )
        for e in found
    ]
    table(("key", "title", "tokens>", "size>", "hits>", "used", "", "compression", "namespace"), rows)


def entry(found: Entry, as_data: bool) -> None:
    """One stored document, with what it was made by."""
    if as_data:
        as_json(asdict(found))
        return
    times = {"created": ago(found.created), "used": ago(found.used), "expires": _until(found.expires)}
    rows = {**asdict(found), **times, "bytes": show_size(found.bytes)}
    fields = rows.pop("fields")
    table(("", ""), [*rows.items(), *fields.items()])


def stats(found: StoreStats, as_data: bool) -> None:
    """Totals of a store."""
    if as_data:
        as_json(asdict(found))
        return
    rows = {
        **asdict(found),
        "bytes": show_size(found.bytes),
        "budget": show_size(found.budget) if found.budget else "none",
    }
    table(("", ""), rows.items())


def damage(found: Sequence[tuple[str, str]], left: int, as_data: bool) -> None:
    """Damaged documents of a store, and how many are whole."""
    if as_data:
        as_json({"damaged": [{"key": key, "reason": reason} for key, reason in found], "whole": left})
        return
    for key, reason in found:
        print(f"{key[:12]}  {reason}")
    print(f"{left:,} documents are whole, {len(found):,} damaged.")


def outcome(numbers: dict[str, int], as_data: bool) -> None:
    """What a change to a store came to."""
    if as_data:
        as_json(numbers)
        return
    print(
        ", ".join(f"{show_size(n)} freed" if name == "freed_bytes" else f"{n:,} {name}" for name, n in numbers.items())
    )


def ago(moment: float) -> str:
    """A time in the past, for people."""
    return f"{_span(time.time() - moment)} ago"


def _until(moment: float | None) -> str:
    return "never" if moment is None else f"in {_span(moment - time.time())}"


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"
