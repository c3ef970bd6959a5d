"""Who has to go when a store is full: the entry with the lowest score, among equals the one unused for longest."""

from __future__ import annotations

from collections.abc import Callable

from kvilt.errors import SpecError, did_you_mean

Score = Callable[[int, int, int, float], float]  # (hits, tokens, bytes, clock) -> score, set whenever it is used

POLICIES: dict[str, Score] = {
    "lru": lambda hits, tokens, size, clock: 0.0,  # all equal: last use decides
    "lfu": lambda hits, tokens, size, clock: float(hits),
    # GDSF: frequency x cost / size over an inflating clock; the cost of losing a document is encoding its tokens again
    "greedy-dual": lambda hits, tokens, size, clock: clock + (hits + 1) * tokens / max(size, 1),
}


def make_policy(name: str) -> Score:
    """The score of the policy of that name. Raises SpecError."""
    if name not in POLICIES:
        hint = did_you_mean(name, POLICIES)
        raise SpecError(f"unknown eviction policy {name!r}.{hint} Known: {', '.join(POLICIES)}.")
    return POLICIES[name]
