"""Collections: the files of stored documents with a manifest, in a folder or one tar file, for others to take in.

    manifest.json    format, version, the model, kinds (dtype, encoding, compression, namespace), licence, and of every document
                     its key, id, title, tokens, bytes, the digest of its token ids and BLAKE3 of its file
    manifest.sig     an Ed25519 signature of manifest.json, and the public key that belongs to it
    <key>.safetensors

A file's name is made from its key, never read from the manifest, and nothing is unpacked: every file is read, compared with the
manifest, checked against its own digests, and only then put into the store."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from kvilt.corpora.boxes import Box, open_box, writing
from kvilt.corpora.signing import sign, signed_by
from kvilt.errors import DamagedCache, OtherVersion, UserError
from kvilt.rows.files import json_lines, text_lines
from kvilt.stores.blobs import MemoryBlob, is_key
from kvilt.stores.entry import Entry
from kvilt.stores.store import Store

if TYPE_CHECKING:
    from kvilt.engine.engine import Engine

FORMAT, VERSION = "kvilt collection", 1
MANIFEST, SIGNATURE, SUFFIX = "manifest.json", "manifest.sig", ".safetensors"
MODEL = ("model", "tokenizer", "rope")
KIND = ("dtype", "encoding", "compression", "namespace")


@dataclass(frozen=True)
class Member:
    """One document of a collection."""

    key: str
    id: str
    title: str
    tokens: int
    bytes: int
    text: str  # digest of the token ids
    blake3: str  # of the file
    kind: int  # which of the manifest's


@dataclass(frozen=True)
class Manifest:
    """What a collection says of itself."""

    model: Mapping[str, str]
    kinds: Sequence[Mapping[str, str]]
    documents: Sequence[Member]
    licence: str = ""
    created: float = 0.0  # seconds since the epoch
    format: str = FORMAT
    version: int = VERSION

    def fields(self, member: Member) -> dict[str, str]:
        """A document's identity: the fields of its key."""
        return {**self.model, **self.kinds[member.kind], "tokens": member.text}

    @property
    def bytes(self) -> int:
        """Of all documents."""
        return sum(member.bytes for member in self.documents)


@dataclass(frozen=True)
class Collection:
    """A collection that was opened: its manifest is sound, its documents were not read yet."""

    box: Box
    manifest: Manifest
    signer: str = ""  # the public key, in hex; empty if nobody signed

    def file(self, member: Member) -> bytes:
        """A document's file. Raises DamagedCache where it is not what the manifest promises."""
        read = self.box.get(member.key + SUFFIX)
        if read is None:
            raise DamagedCache(member.key, "its file is missing")
        data = read()
        if len(data) != member.bytes or blake3(data).hexdigest() != member.blake3:
            raise DamagedCache(member.key, "its file is not the one that the manifest names")
        check(data, self.manifest.fields(member))
        return data

    def into(self, store: Store | None) -> Taken:
        """Check every document, and store it where there is a store. Raises StoreUnavailable."""
        new, problems = 0, []
        for member in self.manifest.documents:
            try:
                data = self.file(member)
                new += store is not None and store.take(member.key, data)
            except (DamagedCache, OtherVersion) as error:
                problems.append(str(error))
        whole = len(self.manifest.documents) - len(problems)
        return Taken(whole, new, problems, self.signer, self.manifest.licence)


@dataclass(frozen=True)
class Taken:
    """What was found in a collection, and how much of it a store did not have."""

    whole: int
    stored: int
    problems: Sequence[str]
    signer: str
    licence: str


def open_collection(path: Path, trusted: str = "") -> Collection:
    """A collection in a folder or a tar file. With `trusted`, the signer's public key (a PEM file or hex), no other is taken.

    Raises UserError for what is no collection, holds files that do not belong there, or is signed wrongly."""
    box = open_box(path)
    if MANIFEST not in box:
        raise UserError(f"{path} is no collection: it holds no {MANIFEST}.")
    raw, signer = box[MANIFEST](), ""
    if SIGNATURE in box or trusted:
        signature = box[SIGNATURE]() if SIGNATURE in box else None
        signer = signed_by(raw, signature, trusted, str(path))
    manifest = _manifest(raw, str(path))
    odd = set(box) - {MANIFEST, SIGNATURE, *(m.key + SUFFIX for m in manifest.documents)}
    if odd:
        raise UserError(f"{path} holds {min(odd)!r}, which its manifest does not name: nothing of it is taken.")
    return Collection(box, manifest, signer)


def _manifest(raw: bytes, path: str) -> Manifest:
    try:
        data = json.loads(raw)
        if data["format"] != FORMAT:
            raise ValueError
        if data["version"] != VERSION:
            raise UserError(f"{path} is a collection of version {data['version']!r:.20}; this Kvilt reads {VERSION}.")
        made = Manifest(**{**data, "documents": [Member(**member) for member in data["documents"]]})
        if set(made.model) != set(MODEL) or any(set(kind) != set(KIND) for kind in made.kinds):
            raise ValueError
        for member in made.documents:
            if not (is_key(member.key) and made.fields(member)) or min(member.bytes, member.tokens) < 0:
                raise ValueError
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no collection: its {MANIFEST} is malformed.") from error
    return made


def check(data: bytes, fields: Mapping[str, str]) -> None:
    """Read a document's file to the end. Raises DamagedCache, OtherVersion where it is not a whole one of this identity."""
    from kvilt.rows.file import open_cache
    from kvilt.rows.rows import whole
    from kvilt.types import CacheKey

    if rows := open_cache(MemoryBlob(data), CacheKey(**fields)).rows:
        whole(rows)


def export(
    store: Store,
    entries: Iterable[Entry],
    path: Path,
    *,
    ids: Mapping[str, str] | None = None,
    licence: str = "",
    key: Path | None = None,
) -> Manifest:
    """Write documents of a store to a new folder, or to a file that ends in .tar; `ids` are the documents' ids by key, and
    `key` is an Ed25519 private key in PEM to sign with.

    Raises UserError where they are several models' or the place is taken, DamagedCache for one that cannot be read whole."""
    chosen = [e for e in entries if ids is None or e.key in ids]
    models = {tuple(e.fields.get(name, "") for name in MODEL) for e in chosen}
    if len(models) != 1:
        why = f"they are {len(models)} models': give one with --model (kvilt cache du)" if models else "none is chosen"
        raise UserError(f"no collection can be made of these documents: {why}.")
    kinds: dict[tuple[str, ...], int] = {}
    members = []
    with writing(path) as add:
        for e in chosen:
            data = _read(store, e)
            kind = kinds.setdefault(tuple(e.fields[name] for name in KIND), len(kinds))
            named = (ids or {}).get(e.key, "")
            digest = blake3(data).hexdigest()
            members.append(Member(e.key, named, e.title, e.tokens, len(data), e.fields["tokens"], digest, kind))
            add(e.key + SUFFIX, data)
        described = [dict(zip(KIND, kind, strict=True)) for kind in kinds]
        made = Manifest(dict(zip(MODEL, models.pop(), strict=True)), described, members, licence, time.time())
        raw = json.dumps(asdict(made), indent=1).encode()
        if key is not None:
            add(SIGNATURE, sign(raw, key))
        add(MANIFEST, raw)  # last: without it a folder is no collection
    return made


def ids_of(table: Path) -> dict[str, str]:
    """Ids by key, of the first document with each, from the documents.jsonl of an encoding run. Raises DocumentError."""
    rows = [row for _, row in json_lines(text_lines(table), str(table))]
    return {str(row.get("key")): str(row.get("id") or "") for row in reversed(rows)}


def _read(store: Store, entry: Entry) -> bytes:
    (blob,) = store.last.get_many([entry.key])
    if blob is None:
        raise DamagedCache(entry.key, "it is gone")
    data = bytearray(blob.size)
    blob.read(0, [memoryview(data)])
    check(bytes(data), entry.fields)
    return bytes(data)


@dataclass(frozen=True)
class Difference:
    """What another model, strategy or compression would need again, and why."""

    documents: int
    again: int
    tokens: int  # as the collection's tokenizer counts them
    bytes: int  # before compression
    reasons: Mapping[str, int]  # documents by what is different


def difference(manifest: Manifest, engine: Engine) -> Difference:
    """Which texts of a collection an engine would have to encode, or compress, anew."""
    from kvilt.engine.encoder import NOTHING

    encoder = engine.encoder
    wanted = asdict(encoder.model.key(NOTHING, encoder.encoding, encoder.compression.identity(0)))
    names = (*MODEL, *KIND[:-1])  # a namespace changes the key, not what is computed
    fewest: dict[str, tuple[list[str], Member]] = {}  # by text, of the variant that differs least
    for member in manifest.documents:
        fields = manifest.fields(member)
        fields["compression"] = fields["compression"].partition(" title=")[0]
        other = [name for name in names if fields[name] != wanted[name]]
        if member.text not in fewest or len(other) < len(fewest[member.text][0]):
            fewest[member.text] = (other, member)
    again = [(other, member) for other, member in fewest.values() if other]
    tokens = sum(member.tokens for _, member in again)
    reasons = dict(Counter(", ".join(other) for other, _ in again))
    return Difference(len(fewest), len(again), tokens, tokens * engine.model.bytes_per_token, reasons)
