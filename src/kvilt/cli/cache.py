"""`kvilt cache`: look at a store and tidy it. No model is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from typer import Argument, Option

from kvilt.cli import FAILED, show, talk
from kvilt.cli.options import Stored, group, verb
from kvilt.corpora import tidy
from kvilt.errors import UserError
from kvilt.rows.files import name_of
from kvilt.stores.entry import Entry
from kvilt.stores.sizes import parse_size, show_size

SHORTEST = 4  # characters of a key that are worth looking up
SPANS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

app = group("Look at a store and tidy it.")

Key = Annotated[str, Argument(metavar="KEY", help="Title, or the beginning of a key.")]
Keys = Annotated[list[str] | None, Argument(metavar="[KEYS...]", help="Titles, or beginnings of keys.")]
VARIANT = "Where a title is stored several times: which dtype, encoding, compression or namespace, or all."
Variant = Annotated[str, Option(help=VARIANT)]
Release = Annotated[bool, Option("--release", help="Unpin instead.")]
Sort = Annotated[str, Option(help="size, used, hits (most first) or age (oldest first, as without).")]
Budget = Annotated[str | None, Option(metavar="SIZE", help="Keep this much: 20GB.")]
Unused = Annotated[str | None, Option(metavar="TIME", help="Delete what was not used for so long: 30d, 12h.")]
Digest = Annotated[str, Option(metavar="DIGEST", help="Delete what this model made (kvilt cache du shows digests).")]
Keep = Annotated[str, Option("--keep", help="Within the budget keep what was used last, or has most hits.")]
DryRun = Annotated[bool, Option("--dry-run", help="Only say what would go.")]
Everything = Annotated[bool, Option("--all", help="All of them; with --namespace all of those.")]


@verb(app)
def ls(options: Stored, sort: Sort = "") -> None:
    """List the stored documents, oldest first; with --namespace only those."""
    entries = tidy.ordered(options.entries(), sort)
    show.out(options.json, [asdict(e) for e in entries], show.entries(entries))


@verb(app, "show")
def show_(options: Stored, key: Key, variant: Variant = "") -> None:
    """Show one stored document and what it was made by."""
    for entry in _matching(list(options.entries()), key, variant):
        show.out(options.json, asdict(entry), show.entry(entry))


@verb(app)
def rm(options: Stored, keys: Keys = None, everything: Everything = False, variant: Variant = "") -> None:
    """Delete stored documents. Nothing is lost but the time to encode them again."""
    store = options.open_store()
    removed = [e for e in _named(list(options.entries()), keys, everything, variant) if store.delete(e.key)]
    data = {"removed": len(removed), "freed_bytes": sum(e.bytes for e in removed)}
    show.out(options.json, data, [f"{len(removed):,} removed, {show_size(data['freed_bytes'])} freed"])


@verb(app)
def du(options: Stored) -> None:
    """Show what documents of each model, dtype, encoding, compression and namespace take, the most first."""
    held = tidy.shares(options.entries())
    show.out(options.json, [asdict(share) for share in held], show.shares(held))


@verb(app)
def prune(
    options: Stored,
    budget: Budget = None,
    unused: Unused = None,
    model: Digest = "",
    keep: Keep = "used",
    dry_run: DryRun = False,
) -> None:
    """Delete documents of a model, unused ones, or what is over a size. Pinned ones stay."""
    oldest = parse_span(unused) if unused else None
    going = tidy.surplus(options.entries(), parse_size(budget, "--budget"), oldest, model, keep)
    store = options.open_store()
    gone = going if dry_run else [e for e in going if store.delete(e.key)]
    data = {"removed": len(gone), "freed_bytes": sum(e.bytes for e in gone), "dry_run": dry_run}
    what = "would be removed" if dry_run else "removed"
    show.out(options.json, data, [f"{len(gone):,} {what}, {show_size(data['freed_bytes'])} freed"])


@verb(app)
def pin(
    options: Stored, keys: Keys = None, everything: Everything = False, variant: Variant = "", release: Release = False
) -> None:
    """Keep documents from eviction and expiry."""
    store, name = options.open_store(), "unpinned" if release else "pinned"
    done = sum(store.pin(e.key, not release) for e in _named(list(options.entries()), keys, everything, variant))
    show.out(options.json, {name: done}, [f"{done:,} {name}"])


@verb(app)
def stats(options: Stored) -> None:
    """Show totals: documents, bytes, hits, misses, evictions, damage."""
    total = options.open_store().stats()
    show.out(options.json, asdict(total), show.stats(total))


@verb(app)
def verify(options: Stored) -> int:
    """Read every document completely; damaged ones are set aside, and will be encoded again when they are needed."""
    with talk.meter("reading every document"):
        damaged = options.open_store().verify()
    whole = options.open_store().stats().entries
    total = f"{whole:,} documents are whole, {len(damaged):,} damaged."
    lines = [*(f"{key[:12]}  {reason}" for key, reason in damaged), total]
    data = {"damaged": [{"key": key, "reason": reason} for key, reason in damaged], "whole": whole}
    show.out(options.json, data, lines)
    return FAILED if damaged else 0


@verb(app)
def gc(options: Stored) -> None:
    """Delete expired documents, leftovers of killed writers, and what is over budget; bring the catalogue up to date."""
    freed = options.open_store().gc()
    show.out(options.json, {"freed_bytes": freed}, [f"{show_size(freed)} freed"])


def parse_span(text: str) -> float:
    """Seconds of "30d", "12h", "90m" or a number of seconds. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw]?)\s*", text)
    if match is None:
        raise UserError(f"{text!r} is no time: write it like 30d, 12h, 90m or a number of seconds.")
    return float(match[1]) * SPANS[match[2]]


def _named(entries: Sequence[Entry], keys: Sequence[str] | None, everything: bool, kind: str) -> list[Entry]:
    """The documents that titles or beginnings of keys name, or all of them. Raises UserError."""
    if bool(keys) == everything:
        raise UserError("say which documents: titles, beginnings of keys, or --all.")
    return list(entries) if everything else [e for key in keys or [] for e in _matching(entries, key, kind)]


def _matching(entries: Sequence[Entry], wanted: str, kind: str) -> list[Entry]:
    """The document with this title or beginning of a key; of several variants the one that is meant, or all.

    Raises UserError."""
    wanted = name_of(wanted)
    called = [e for e in entries if e.title == wanted or (len(wanted) >= SHORTEST and e.key.startswith(wanted))]
    if not called:
        raise UserError(f"no stored document is called {wanted!r} or has a key that begins so. See: kvilt cache ls.")
    meant = [e for e in called if kind in ("", "all") or any(v.startswith(kind) for v in tidy.variant(e))]
    if len(meant) == 1 or (meant and kind == "all"):
        return meant
    listed = "; ".join(" ".join((e.key[:12], *tidy.variant(e))) for e in called)
    raise UserError(f"{len(called)} documents match {wanted!r}: {listed}. Give a key, or --variant, or --variant all.")
