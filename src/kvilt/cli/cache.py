"""`kvilt cache`: look at a store and tidy it. No model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from kvilt.cli import FAILED, show, talk
from kvilt.cli.options import Stored, group, verb
from kvilt.errors import UserError
from kvilt.rows.files import name_of
from kvilt.stores.sizes import show_size

if TYPE_CHECKING:
    from kvilt.stores.store import Entry

SHORTEST = 4  # characters of a key that are worth looking up

app = group("Look at a store and tidy it.")

Key = Annotated[str, Argument(metavar="KEY", help="Title, or the beginning of a key.")]
Keys = Annotated[list[str] | None, Argument(metavar="[KEYS...]", help="Titles, or beginnings of keys.")]
VARIANT = "Where a title is stored several times: which dtype, encoding, compression or namespace, or all."
Variant = Annotated[str, Option(help=VARIANT)]
Release = Annotated[bool, Option("--release", help="Unpin instead.")]
Everything = Annotated[bool, Option("--all", help="All of them; with --namespace all of those.")]


@verb(app)
def ls(options: Stored) -> None:
    """List the stored documents, oldest first; with --namespace only those."""
    entries = list(options.entries())
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
    removed = [e for e in _chosen(options.entries(), keys, everything, variant) if store.delete(e.key)]
    data = {"removed": len(removed), "freed_bytes": sum(e.bytes for e in removed)}
    show.out(options.json, data, [f"{len(removed):,} removed, {show_size(data['freed_bytes'])} freed"])


@verb(app)
def pin(
    options: Stored, keys: Keys = None, everything: Everything = False, variant: Variant = "", release: Release = False
) -> None:
    """Keep documents from eviction and expiry."""
    store, name = options.open_store(), "unpinned" if release else "pinned"
    done = sum(store.pin(e.key, not release) for e in _chosen(options.entries(), keys, everything, variant))
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


def _chosen(entries: Iterable[Entry], keys: list[str] | None, everything: bool, variant: str) -> list[Entry]:
    if bool(keys) == everything:
        raise UserError("say which documents: titles, beginnings of keys, or --all.")
    stored = list(entries)
    return stored if everything else [entry for key in keys or [] for entry in _matching(stored, key, variant)]


def _matching(entries: list[Entry], wanted: str, variant: str) -> list[Entry]:
    """The document with this title or beginning of a key; of several variants the one that is meant, or all."""
    wanted = name_of(wanted)
    called = [e for e in entries if e.title == wanted or (len(wanted) >= SHORTEST and e.key.startswith(wanted))]
    if not called:
        raise UserError(f"no stored document is called {wanted!r} or has a key that begins so. See: kvilt cache ls.")
    meant = [e for e in called if variant in ("", "all") or any(v.startswith(variant) for v in show.variant(e))]
    if len(meant) == 1 or (meant and variant == "all"):
        return meant
    listed = "; ".join(" ".join((e.key[:12], *show.variant(e))) for e in called)
    raise UserError(f"{len(called)} documents match {wanted!r}: {listed}. Give a key, or --variant, or --variant all.")
