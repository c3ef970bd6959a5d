"""`kvilt cache`: look at a store and tidy it. No model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from kvilt.cli import talk
from kvilt.cli.options import FAILED, Stored, verb
from kvilt.errors import UserError

if TYPE_CHECKING:
    from kvilt.stores.store import Entry
    from kvilt.stores.store import Store as CacheStore

SHORTEST = 4  # characters of a key that are worth looking up

app = typer.Typer(help="Look at a store and tidy it.", no_args_is_help=True, rich_markup_mode=None)

Key = Annotated[str, Argument(metavar="KEY", help="Title, or the beginning of a key.")]
Keys = Annotated[list[str] | None, Argument(metavar="[KEYS...]", help="Titles, or beginnings of keys.")]


@verb(app)
def ls(options: Stored) -> None:
    """List the stored documents, oldest first; with --namespace only those."""
    from kvilt.cli import show

    show.entries(_entries(options.open_store(), options.namespace), options.json)


@verb(app, "show")
def show_(options: Stored, key: Key) -> None:
    """Show one stored document and what it was made by."""
    from kvilt.cli import show

    show.entry(_find(_entries(options.open_store(), options.namespace), key), options.json)


@verb(app)
def rm(
    options: Stored,
    keys: Keys = None,
    everything: Annotated[bool, Option("--all", help="All of them; with --namespace all of those.")] = False,
) -> None:
    """Delete stored documents. Nothing is lost but the time to encode them again."""
    from kvilt.cli import show

    store = options.open_store()
    chosen = _chosen(store, keys, everything, options.namespace)
    removed = sum(store.delete(e.key) for e in chosen)
    show.outcome({"removed": removed, "freed_bytes": sum(e.bytes for e in chosen)}, options.json)


@verb(app)
def stats(options: Stored) -> None:
    """Show totals: documents, bytes, hits, misses, evictions, damage."""
    from kvilt.cli import show

    show.stats(options.open_store().stats(), options.json)


@verb(app)
def verify(options: Stored) -> int:
    """Read every document completely; damaged ones are set aside, and will be encoded again when they are needed."""
    from kvilt.cli import show

    store = options.open_store()
    with talk.status("reading every document"):
        damaged = store.verify()
    show.damage(damaged, store.stats().entries, options.json)
    return FAILED if damaged else 0


@verb(app)
def gc(options: Stored) -> None:
    """Delete expired documents, leftovers of killed writers, and what is over budget; bring the index up to date."""
    from kvilt.cli import show

    show.outcome({"freed_bytes": options.open_store().gc()}, options.json)


@verb(app)
def pin(
    options: Stored,
    keys: Keys = None,
    everything: Annotated[bool, Option("--all", help="All of them; with --namespace all of those.")] = False,
    release: Annotated[bool, Option("--release", help="Unpin instead.")] = False,
) -> None:
    """Keep documents from eviction and expiry."""
    from kvilt.cli import show

    store = options.open_store()
    chosen = _chosen(store, keys, everything, options.namespace)
    done = sum(store.pin(e.key, not release) for e in chosen)
    show.outcome({"unpinned" if release else "pinned": done}, options.json)


def _entries(store: CacheStore, namespace: str | None) -> list[Entry]:
    return [e for e in store.entries() if namespace in (None, e.namespace)]


def _chosen(store: CacheStore, keys: list[str] | None, everything: bool, namespace: str | None) -> list[Entry]:
    if bool(keys) == everything:
        raise UserError("say which documents: titles, beginnings of keys, or --all.")
    entries = _entries(store, namespace)
    return entries if everything else [_find(entries, key) for key in keys or []]


def _find(entries: list[Entry], wanted: str) -> Entry:
    """The one document with this title or beginning of a key."""
    prefix = wanted if len(wanted) >= SHORTEST else None
    found = [e for e in entries if e.title == wanted or (prefix and e.key.startswith(prefix))]
    if not found:
        raise UserError(f"no stored document is called {wanted!r} or has a key that begins so. See: kvilt cache ls.")
    if len(found) > 1:
        raise UserError(
            f"{len(found)} documents match {wanted!r}: {', '.join(e.key[:12] for e in found[:5])}. Give one key."
        )
    return found[0]
