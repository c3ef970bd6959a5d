"""Why documents are not reused, and what to do about it. Looking changes nothing: no use is counted, no file is moved.

A cache that is not found costs no error, only time: the document is encoded again. The doctor compares the identity
fields that stored documents carry in clear with those of the key that is looked for."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from kvilt.engine.encoder import Item
from kvilt.engine.engine import Engine
from kvilt.errors import DamagedCache, OtherVersion, StoreUnavailable
from kvilt.rows.header import read_header
from kvilt.rows.rows import whole
from kvilt.stores.store import Entry, Store
from kvilt.types import Document, Encoding

AGAIN = "kvilt encode it again"
REASONS = {  # identity field -> why a document is not found, and what to do
    "model": ("it was encoded by other weights", "give the --model it was encoded with"),
    "tokenizer": ("it was encoded with another tokenizer", "restore the tokenizer's files"),
    "rope": ("the model's rotary settings changed", "restore rope_parameters in config.json"),
    "dtype": ("it was stored in another dtype", "give the checkpoint it was encoded with"),
    "encoding": ("it was encoded with other things around it", "give the --strategy it was encoded for"),
    "compression": ("it was compressed otherwise", "give the --compress it was encoded with"),
    "namespace": ("it belongs to another namespace", "give its --namespace"),
}


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
    """Everything that was seen."""

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


def examine_store(store: Store) -> list[Finding]:
    """Whether the store can be written, what in it is damaged, and whether its catalogue knows every document."""
    places = [Path(s.path) for s in getattr(store, "stores", [store]) if getattr(s, "path", None)]
    if not places:
        text = "this store forgets everything when the process ends."
        return [Finding("note", text, "Keep caches on a disk: --store disk.")]
    findings = [finding for path in places for finding in (_writable(path), *_aside(path))]
    return [*findings, *_damaged(store), *_catalogue(store)]


def _writable(path: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        fix = "Free space, change its permissions, or give another: --store disk:path=FOLDER."
        text = f"the store {path} cannot be written ({error.strerror}): new documents are never kept."
        return Finding("problem", text, fix)
    return Finding("ok", f"the store {path} can be read and written.")


def _aside(path: Path) -> Iterator[Finding]:
    reasons = sorted((path / "aside").glob("*.reason"))
    if reasons:
        last = reasons[-1].read_text(encoding="utf-8", errors="replace").strip()
        text = f"{len(reasons):,} damaged files were set aside in {path / 'aside'} (the last: {last})."
        yield Finding("note", text, "kvilt encode the documents again. If more keep coming, check the disk.")


def _damaged(store: Store) -> Iterator[Finding]:
    """Documents whose headers cannot be read."""
    broken: dict[str, list[str]] = defaultdict(list)
    for key, _ in store.last.list():
        try:
            for blob in filter(None, store.last.get_many([key])):
                with contextlib.closing(blob):
                    read_header(key, blob)
        except DamagedCache as error:
            broken[error.reason].append(key)
        except OtherVersion:
            broken["they are of another version of Kvilt"].append(key)
        except OSError as error:
            broken[f"it cannot be read: {error.strerror}"].append(key)
    fix = "kvilt cache verify sets damaged ones aside; encode them again. Unreadable ones: change permissions."
    for why, keys in broken.items():
        yield Finding("problem", f"{len(keys):,} stored documents are not served: {why} ({keys[0][:12]}).", fix)


def _catalogue(store: Store) -> Iterator[Finding]:
    files = {key for key, _ in store.last.list()}
    try:
        known = store.last.rows().keys()
    except StoreUnavailable as error:
        yield Finding("problem", f"the catalogue cannot be used: {error}", "Delete it: it is built again.")
        return
    if not files:
        yield Finding("note", "the store is empty.", "kvilt encode documents into it, or check --store.")
    elif unknown := files - known:
        text = f"the catalogue does not know {len(unknown):,} stored documents: they are reused, but never evicted."
        yield Finding("note", text, "kvilt cache gc enters them.")
    else:
        yield Finding("ok", f"{len(files):,} documents are stored, and the catalogue knows them all.")


def examine_documents(engine: Engine, documents: Sequence[Document]) -> Diagnosis:
    """For every document whether the engine will find it in its store, and why not."""
    if engine.strategy.encoding is None:
        text = f"{engine.label} reuses nothing."
        return Diagnosis([Finding("problem", text, "Choose another strategy: kvilt list strategy.")])
    failed: list[str] = []
    lookup, items = _Lookup(engine), engine.encoder.items(documents, failed)
    findings = [Finding("problem", message, "Split it.") for message in failed]
    return Diagnosis([*findings, *lookup.system()], [lookup.verdict(item) for item in items])


class _Lookup:
    """Stored documents by what they can be recognised by."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.by_tokens: dict[str, list[Entry]] = defaultdict(list)
        self.by_title: dict[str, list[Entry]] = defaultdict(list)
        for entry in engine.store.entries():
            self.by_tokens[entry.fields.get("tokens", "")].append(entry)
            self.by_title[entry.title].append(entry)

    def verdict(self, item: Item) -> Verdict:
        """One document's."""
        name = item.title or item.key.digest[:12]
        (cache,) = self.engine.store.get_many([item.key], counted=False)
        if cache is None or cache.rows is None:
            return Verdict(name, False, *self._why(item))
        try:
            for layer in range(cache.rows.shape[0]):
                whole(cache.rows, slice(layer, layer + 1))
        except DamagedCache as error:
            return Verdict(name, False, f"the stored file is damaged ({error.reason})", f"{AGAIN}.")
        return Verdict(name, True)

    def system(self) -> Iterator[Finding]:
        """Whether the prompt's system part is the one that was used before."""
        ids = torch.tensor(self.engine.info.system, dtype=torch.long)
        key = self.engine.model.key(ids, Encoding(), namespace=self.engine.namespace)
        before = [e for e in self.by_title["system"] if e.fields.get("model") == key.model]
        if before and len(ids) and not self.engine.store.contains([key.digest]):
            text = "the text before the documents is not the one used before: --system or the chat template changed."
            fix = "Documents are reused all the same, except with sink=system; give the old --system to undo it."
            yield Finding("note", text, fix)

    def _why(self, item: Item) -> tuple[str, str]:
        wanted = asdict(item.key)
        same_text, same_name = self.by_tokens[item.key.tokens], self.by_title[item.title] if item.title else []
        if not (same_text or same_name):
            fix = "kvilt encode it; kvilt cache pin keeps it."
            return "it was never encoded into this store, or was evicted or expired since", fix
        nearest = min(same_text or same_name, key=lambda entry: len(_differences(wanted, entry)))
        if same_text or nearest.fields.get("tokenizer") != wanted["tokenizer"]:
            return self._explained(wanted, nearest)
        text = f"its text is not the one stored under this name ({nearest.tokens:,} tokens then, {len(item.ids):,} now)"
        return text, f"{AGAIN}, or restore the text (title and blanks count too)."

    def _explained(self, wanted: dict[str, str], entry: Entry) -> tuple[str, str]:
        differ = _differences(wanted, entry)
        if not differ:
            return "its file is gone, damaged or expired", f"{AGAIN}."
        if "dtype" in differ:  # weights in another dtype have another digest, which says nothing more
            differ = [name for name in differ if name != "model"]
        reasons = [self._reason(name, entry.fields.get(name, ""), wanted[name]) for name in differ]
        return "; ".join(reasons), f"{', '.join(REASONS[name][1] for name in differ)}, or {AGAIN} for these settings."

    def _reason(self, name: str, stored: str, wanted: str) -> str:
        now = self.engine.strategy.encoding or Encoding()
        if name == "encoding" and now.before and now.before == self.engine.info.system and "before" in stored:
            return "it was encoded behind another system text (sink=system: --system or the template changed)"
        return f"{REASONS[name][0]} ({_short(stored)} stored, {_short(wanted)} now)"


def _short(value: str) -> str:
    """An identity field for people: digests are cut to what one compares."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", value) or "none"


def _differences(wanted: dict[str, str], entry: Entry) -> list[str]:
    return [name for name in wanted if name != "tokens" and entry.fields.get(name) != wanted[name]]
