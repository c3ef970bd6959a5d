"""Why documents are not reused, and what to do about it.

A cache that is not found costs no error, only time: the document is encoded again. The doctor compares the identity
fields that stored documents carry in clear with those of the key that is looked for."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from kvilt.engine.encoder import Item
from kvilt.engine.engine import Engine
from kvilt.errors import DamagedCache, StoreUnavailable
from kvilt.rows.header import read_header
from kvilt.stores.store import Entry
from kvilt.stores.store import Store as CacheStore
from kvilt.stores.store import Store as DiskStore
from kvilt.stores.store import Store as TieredStore
from kvilt.types import Document, DocumentCache, Encoding

ENCODE = "kvilt encode"


@dataclass(frozen=True)
class Finding:
    """One thing about the store or the set-up; a problem costs reuse, a note may."""

    status: Literal["ok", "note", "problem"]
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether one document will be reused, and if not, why."""

    id: str
    reused: bool
    reason: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything found."""

    findings: list[Finding] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def __add__(self, other: Diagnosis) -> Diagnosis:
        return Diagnosis(self.findings + other.findings, self.verdicts + other.verdicts)

    @property
    def healthy(self) -> bool:
        """Whether nothing stands in the way of reuse."""
        return all(f.status != "problem" for f in self.findings) and all(v.reused for v in self.verdicts)

    def by_reason(self) -> dict[tuple[str, str], list[str]]:
        """(reason, fix) -> ids of the documents that will not be reused."""
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for verdict in self.verdicts:
            if not verdict.reused:
                groups[verdict.reason, verdict.fix].append(verdict.id)
        return dict(groups)


# ---------------------------------------------------------------------------------------------------------------- store


def examine_store(store: CacheStore) -> list[Finding]:
    """Whether the store can be read and written, what is damaged, and whether its index knows every file."""
    tiers = store.stores if isinstance(store, TieredStore) else [store]
    disks = [tier for tier in tiers if isinstance(tier, DiskStore)]
    if not disks and tiers == [store]:
        return [
            Finding(
                "note", "this store forgets everything when the process ends.", "Keep caches on a disk: --store disk."
            )
        ]
    return [finding for disk in disks for finding in _disk(disk)]


def _disk(store: DiskStore) -> list[Finding]:
    from kvilt.stores.folder import Folder

    folder = Folder(store.path)
    findings = [*_writable(store.path), *_files(folder), *_aside(folder)]
    try:
        findings += _index(store, folder)
    except StoreUnavailable as error:
        findings.append(
            Finding(
                "problem", f"the index cannot be used: {error}", f"Delete {store.path / 'index.sqlite'}: it is rebuilt."
            )
        )
    return findings


def _writable(path: Path) -> list[Finding]:
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        fix = "Free space, change its permissions, or give another: --store disk:path=FOLDER."
        return [
            Finding(
                "problem", f"the store {path} cannot be written ({error.strerror}): new documents are never kept.", fix
            )
        ]
    return [Finding("ok", f"the store {path} can be read and written.")]


def _files(folder: Any) -> list[Finding]:
    """Damaged and unreadable files, by their headers."""
    broken: dict[str, list[str]] = defaultdict(list)
    for key in folder.scan():
        try:
            read_header(folder.file(key))
        except FileNotFoundError:
            continue
        except DamagedCache as error:
            broken[error.reason].append(key)
        except OSError as error:
            broken[f"it cannot be read: {error.strerror}"].append(key)
    fix = f"kvilt cache verify sets damaged files aside; {ENCODE} them again. Unreadable ones: change permissions."
    return [
        Finding("problem", f"{len(keys):,} stored files are not served: {why} ({keys[0][:12]}).", fix)
        for why, keys in broken.items()
    ]


def _aside(folder: Any) -> list[Finding]:
    reasons = sorted(folder.aside.glob("*.reason")) if folder.aside.is_dir() else []
    if not reasons:
        return []
    last = reasons[-1].read_text(encoding="utf-8", errors="replace").strip()
    what = f"{len(reasons):,} damaged files were set aside in {folder.aside} (the last: {last})."
    return [Finding("note", what, f"{ENCODE} the documents again. If more keep coming, check the disk.")]


def _index(store: DiskStore, folder: Any) -> list[Finding]:
    known = {entry.key for entry in store.entries()}
    files = set(folder.scan())
    if not files:
        return [Finding("note", f"the store {store.path} is empty.", f"{ENCODE} documents into it, or check --store.")]
    unknown = files - known
    if unknown:
        what = (
            f"the index does not know {len(unknown):,} stored documents: they are reused, but never listed or evicted."
        )
        return [Finding("note", what, "kvilt cache gc adopts them.")]
    return [Finding("ok", f"{len(files):,} documents are stored, and the index knows them all.")]


# ------------------------------------------------------------------------------------------------------------ documents


def examine_documents(engine: Engine, documents: Sequence[Document]) -> Diagnosis:
    """For every document whether the engine will find it in its store, and why not."""
    if engine.strategy.encoding is None:
        note = Finding(
            "problem", f"{engine.strategy!r} reuses nothing.", "Choose another strategy: kvilt list strategy."
        )
        return Diagnosis([note])
    lookup = _Lookup(engine, list(engine.store.entries()))
    findings = lookup.system() if documents else []
    return Diagnosis(findings, [lookup.verdict(item) for item in engine.encoder.items(documents)])


class _Lookup:
    """Stored documents by what they can be recognised by."""

    def __init__(self, engine: Engine, entries: Iterable[Entry]) -> None:
        self.engine = engine
        self.by_tokens: dict[str, list[Entry]] = defaultdict(list)
        self.by_title: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            self.by_tokens[entry.fields.get("tokens", "")].append(entry)
            self.by_title[entry.title].append(entry)

    def verdict(self, item: Item) -> Verdict:
        """One document's."""
        name = item.title or item.key.digest[:12]
        there = self.engine.store.contains([item.key.digest])  # unlike `get`, no use and no miss is counted
        cache = self.engine.store.get(item.key) if there else None
        if cache is None:
            return Verdict(name, False, *self._why(item))
        try:
            _read(cache)
        except DamagedCache as error:
            self.engine.store.set_aside(error.key, error.reason)
            return Verdict(
                name, False, f"the stored file is damaged ({error.reason}); it was set aside", f"{ENCODE} it again."
            )
        return Verdict(name, True)

    def system(self) -> list[Finding]:
        """Whether the prompt's system part is the one that was used before."""
        ids = torch.tensor(self.engine.info.system, dtype=torch.long)
        key = self.engine.model.key(ids, Encoding())
        before = [e for e in self.by_title["system"] if e.fields.get("model") == key.model]
        if not before or not len(ids) or self.engine.store.contains([key.digest]):
            return []
        what = "the text before the documents is not the one used before: --system or the chat template changed."
        return [
            Finding(
                "note",
                what,
                "Documents are reused all the same, except with sink=system; give the old --system to undo it.",
            )
        ]

    def _why(self, item: Item) -> tuple[str, str]:
        wanted = asdict(item.key)
        same_text = self.by_tokens[item.key.tokens]
        if same_text:
            nearest = min(same_text, key=lambda e: len(_differences(wanted, e)))
            return self._explain(wanted, nearest)
        same_name = [e for e in self.by_title[item.title] if item.title]
        if not same_name:
            return (
                "it was never encoded into this store, or was evicted or expired since",
                f"{ENCODE} it; kvilt cache pin keeps it.",
            )
        nearest = min(same_name, key=lambda e: len(_differences(wanted, e)))
        if nearest.fields.get("tokenizer") != wanted["tokenizer"]:
            return self._explain(wanted, nearest)
        text = f"its text is not the one stored under this name ({nearest.tokens:,} tokens then, {len(item.ids):,} now)"
        return text, f"{ENCODE} it again, or restore the text (title, line ends and blanks count too)."

    def _explain(self, wanted: dict[str, str], entry: Entry) -> tuple[str, str]:
        differ = _differences(wanted, entry)
        if not differ:
            return "its file is gone, damaged or expired", f"{ENCODE} it again."
        if "dtype" in differ:  # weights in another dtype have another digest, which says nothing more
            differ = [name for name in differ if name != "model"]
        reasons = [self._reason(name, entry.fields.get(name, ""), wanted[name]) for name in differ]
        fixes = ", ".join(dict.fromkeys(fix for _, fix in reasons))
        return "; ".join(reason for reason, _ in reasons), f"{fixes}, or {ENCODE} again for these settings."

    def _reason(self, name: str, stored: str, wanted: str) -> tuple[str, str]:
        """Why one identity field differs, and what to do."""
        pair = f"{stored[:12] or 'none'} stored, {wanted[:12] or 'none'} now"
        return {
            "model": (f"it was encoded by other weights ({pair})", "give the --model it was encoded with"),
            "tokenizer": (
                f"it was encoded with another tokenizer ({pair})",
                "restore the tokenizer's files",
            ),
            "rope": (
                f"the model's rotary settings changed ({pair})",
                "restore rope_parameters in config.json",
            ),
            "dtype": (f"it was encoded in another dtype ({pair})", f"give --dtype {stored}"),
            "encoding": (self._encodings(stored), "give the --strategy it was encoded for"),
            "compression": (
                f"it was compressed otherwise ({stored or 'not at all'} stored, {wanted or 'not at all'} now)",
                "give the --compress it was encoded with",
            ),
        }[name]

    def _encodings(self, stored: str) -> str:
        now = self.engine.strategy.encoding or Encoding()
        before = "plain" if stored == Encoding().digest else "with another wrapper, sink or anchors"
        if now.before and now.before == self.engine.info.system:
            return (
                f"it was encoded {before}, not behind this system text (sink=system: --system or the template changed)"
            )
        wants = "plain" if now.digest == Encoding().digest else "its own wrapper, sink or anchors"
        return f"it was encoded {before}; {self.engine.strategy!r} wants {wants}"


def _differences(wanted: dict[str, str], entry: Entry) -> list[str]:
    return [name for name in wanted if name != "tokens" and entry.fields.get(name) != wanted[name]]


def _read(cache: DocumentCache) -> None:
    assert cache.layers is not None
    for layer in range(cache.layers.shape[0]):
        cache.layers.fetch(layer, "keys")
        cache.layers.fetch(layer, "values")
