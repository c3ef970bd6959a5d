"""Who has to go when a store is full: one pure interface for memory and disk.

Every entry carries a score, set when it is stored and again whenever it is used. The lowest score goes first; among
equals the one unused for longest. A policy is nothing but its score.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvilt.errors import SpecError, StoreUnavailable
from kvilt.stores.sizes import parse_size, show_size

Score = Callable[[int, int, int, float], float]  # (hits, tokens, bytes, clock) -> score


@dataclass(frozen=True)
class Policy:
    """An eviction order. `clock` is the highest score evicted so far, so that old fame fades under greedy-dual."""

    name: str
    score: Score


@dataclass(frozen=True)
class Standing:
    """What eviction needs to know of one entry."""

    key: str
    bytes: int
    score: float


POLICIES: dict[str, Score] = {
    "lru": lambda hits, tokens, size, clock: 0.0,  # all equal: last use decides
    "lfu": lambda hits, tokens, size, clock: float(hits),
    # GDSF: frequency x cost / size over an inflating clock; the cost of losing a document is encoding its tokens again
    "greedy-dual": lambda hits, tokens, size, clock: clock + (hits + 1) * tokens / max(size, 1),
}


def make_policy(name: str) -> Policy:
    """The policy of that name. Raises SpecError."""
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SpecError(f"unknown eviction policy {name!r}.{hint} Known: {', '.join(POLICIES)}.")
    return Policy(name, POLICIES[name])


@dataclass(frozen=True)
class Limits:
    """Bytes a whole store (`budget`) and each namespace in it (`quota`) may hold; None is unlimited."""

    budget: int | None = None
    quota: int | None = None

    @classmethod
    def of(cls, budget: str | int | None, quota: str | int | None) -> Limits:
        """From friendly sizes. Raises SpecError."""
        return cls(parse_size(budget, "budget"), parse_size(quota, "quota"))

    def victims(
        self,
        size: int,
        namespace: str,
        held: Callable[[str | None], int],
        ranked: Callable[[str | None], Iterable[Standing]],
    ) -> list[Standing]:
        """Whom to evict so that `size` more bytes fit; pinned entries are not among `ranked`.

        `held` gives the bytes of a namespace (None: of the store), `ranked` its evictable entries, worst first.
        Raises StoreUnavailable when even evicting all of them would not make room.
        """
        chosen: dict[str, Standing] = {}
        for name, limit, scope in (("quota", self.quota, namespace), ("budget", self.budget, None)):
            if limit is None:
                continue
            excess = held(scope) + size - limit - sum(s.bytes for s in chosen.values())
            for standing in ranked(scope) if excess > 0 else ():
                if standing.key not in chosen:
                    chosen[standing.key] = standing
                    excess -= standing.bytes
                if excess <= 0:
                    break
            if excess > 0 and size:
                raise StoreUnavailable(_no_room(name, limit, size))
        return list(chosen.values())


def _no_room(name: str, limit: int, size: int) -> str:
    why = "it is larger than that" if size > limit else "the rest is pinned"
    return (
        f"a document of {show_size(size)} does not fit the store's {name} of {show_size(limit)}: {why}. "
        f"Raise the {name}, or unpin documents."
    )
