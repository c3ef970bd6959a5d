"""`kvilt collection`: stored documents as something that can be published, and taken in elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from kvilt.cli import FAILED, show, talk
from kvilt.cli.options import Output, Run, Stored, group, verb
from kvilt.corpora import collection as c
from kvilt.stores.sizes import show_size
from kvilt.stores.store import Store

app = group("Publish stored documents as a collection, and take collections in.")

Place = Annotated[Path, Argument(metavar="PATH", help="A folder, or a file that ends in .tar.")]
Digest = Annotated[str, Option(metavar="DIGEST", help="Documents of this model alone (kvilt cache du shows digests).")]
Table = Annotated[
    Path | None, Option(metavar="FILE", help="documents.jsonl of encode --tables: these alone, with ids.")
]
Licence = Annotated[str, Option(help="What others may do with it, as a name or a text.")]
Signing = Annotated[Path | None, Option("--sign", metavar="KEY", help="Sign with this private Ed25519 key (PEM).")]
Trusted = Annotated[str, Option(metavar="KEY", help="Take it only if this public key signed it (PEM file or hex).")]


@verb(app)
def export(
    options: Stored, path: Place, model: Digest = "", table: Table = None, licence: Licence = "", sign: Signing = None
) -> None:
    """Write stored documents and a manifest to a new folder or tar file."""
    ids = c.ids_of(table) if table else None
    chosen = [e for e in options.entries() if e.fields.get("model", "").startswith(model)]
    with talk.meter("exporting"):
        made = c.export(options.open_store(), chosen, path, ids=ids, licence=licence, key=sign)
    data = {"documents": len(made.documents), "bytes": made.bytes, "signed": sign is not None}
    show.out(options.json, data, [f"{data['documents']:,} documents, {show_size(made.bytes)} in {path}"])


@verb(app, "import")
def import_(options: Stored, path: Place, trusted: Trusted = "") -> int:
    """Check every document of a collection and store it."""
    return _read(options, c.open_collection(path, trusted), options.open_store())


@verb(app)
def verify(options: Output, path: Place, trusted: Trusted = "") -> int:
    """Read a collection completely, and compare it with its manifest and signature."""
    return _read(options, c.open_collection(path, trusted), None)


@verb(app)
def diff(options: Run, path: Place, trusted: Trusted = "") -> None:
    """Say what another model, strategy or compression would have to encode again."""
    d = c.difference(c.open_collection(path, trusted).manifest, options.engine(in_memory=True))
    total = (
        f"{d.again:,} of {d.documents:,} documents again: {d.tokens:,} tokens, {show_size(d.bytes)} before compression"
    )
    show.out(options.json, asdict(d), [total, *(f"  {n:,}: other {why}" for why, n in d.reasons.items())])


def _read(options: Output, found: c.Collection, store: Store | None) -> int:
    with talk.meter("reading every document"):
        taken = found.into(store)
    show.out(options.json, asdict(taken), show.taken(taken))
    return FAILED if taken.problems else 0
