"""Choosing among stored documents: in some order, of some kind, to be shown or to be deleted. No model is loaded."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvilt.errors import UserError, did_you_mean
from kvilt.stores.entry import Entry

ORDERS: dict[str, Callable[[Entry], float]] = {  # what comes first is shown first
    "size": lambda e: -e.bytes,
    "used": lambda e: -e.used,
    "hits": lambda e: -e.hits,
    "age": lambda e: e.created,
}


@dataclass(frozen=True)
class Share:
    """What documents of one kind take in a store."""

    model: str
    dtype: str
    encoding: str
    compression: str
    namespace: str
    documents: int
    tokens: int
    bytes: int
    hits: int
    used: float  # seconds since the epoch


def ordered(entries: Iterable[Entry], order: str = "") -> list[Entry]:
    """Documents in an order of ORDERS: the largest, last used, most used or oldest first. Raises UserError."""
    if order and order not in ORDERS:
        raise UserError(f"no order is called {order!r}.{did_you_mean(order, ORDERS)} Known: {', '.join(ORDERS)}.")
    return sorted(entries, key=ORDERS[order]) if order else list(entries)


def shares(entries: Iterable[Entry]) -> list[Share]:
    """Who takes how much: documents by model, dtype, encoding, compression and namespace, the largest share first."""
    kinds: defaultdict[tuple[str, str, str, str, str], list[Entry]] = defaultdict(list)
    for e in entries:
        kinds[(e.fields.get("model", "")[:12], *variant(e))].append(e)
    made = [
        Share(
            *(model, dtype, encoding, compression, namespace),
            documents=len(group),
            tokens=sum(e.tokens for e in group),
            bytes=sum(e.bytes for e in group),
            hits=sum(e.hits for e in group),
            used=max(e.used for e in group),
        )
        for (model, dtype, encoding, compression, namespace), group in kinds.items()
    ]
    return sorted(made, key=lambda share: -share.bytes)


def surplus(
    entries: Iterable[Entry],
    budget: int | None = None,
    unused: float | None = None,
    model: str = "",
    order: str = "used",
) -> list[Entry]:
    """What goes: documents of a model (the beginning of its digest), those unused for `unused` seconds, and then, the
    last in order first, what is over the budget (bytes). Pinned ones stay.

    Raises UserError where nothing is asked for."""
    if budget is None and unused is None and not model:
        raise UserError("say what goes: --budget SIZE, --unused TIME or --model DIGEST (kvilt cache du shows them).")
    stored, now = ordered(entries, order), time.time()
    loose = [e for e in stored if not e.pinned]
    going = [
        e
        for e in loose
        if (model and e.fields.get("model", "").startswith(model)) or (unused is not None and now - e.used > unused)
    ]
    named = {e.key for e in going}
    excess = sum(e.bytes for e in stored) - sum(e.bytes for e in going) - (float("inf") if budget is None else budget)
    for e in reversed([e for e in loose if e.key not in named]):
        if excess <= 0:
            break
        going.append(e)
        excess -= e.bytes
    return going


def variant(stored: Entry) -> tuple[str, str, str, str]:
    """What tells several copies of one document apart: dtype, encoding, compression, namespace."""
    encoding, compression = stored.fields.get("encoding", ""), stored.fields.get("compression", "")
    return stored.fields.get("dtype", ""), short(encoding), compression or "none", stored.namespace


def short(text: str) -> str:
    """A text in which digests are cut to what people compare."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", text)
