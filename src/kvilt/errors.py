"""Everything Kvilt raises on purpose.

KviltError
├── UserError               something the caller gave is wrong; nothing was lost
│   ├── SpecError           an unknown name or a malformed "name:key=value"
│   ├── DocumentError       a document that cannot be read or is empty
│   ├── PromptError         a question or prompt that cannot be answered
│   ├── ModelError          a model Kvilt cannot serve exactly
│   ├── WrapperError        learned vectors that do not belong to this model
│   ├── TrainError           training data or settings that cannot be used, or a training that broke down
│   └── MissingExtra        an optional package is not installed
└── StoreError              a cache store failed
    ├── DamagedCache        a stored document is truncated, altered or foreign
    ├── OtherVersion        a stored document of another format version: not damaged, not served
    ├── UnreadableCache     a stored document that cannot be read just now (an error of the disk or the network)
    └── StoreUnavailable    the store cannot be read or written (full, read-only, gone)

A message says what, where, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KviltError(Exception):
    """Base of all errors Kvilt raises on purpose."""


class UserError(KviltError):
    """Something the caller gave is wrong."""


class SpecError(UserError):
    """An unknown name or a malformed specification string."""


class DocumentError(UserError):
    """A document that cannot be read or is empty."""


class PromptError(UserError):
    """A question or prompt that cannot be answered."""


class ModelError(UserError):
    """A model that Kvilt cannot serve exactly."""


class WrapperError(UserError):
    """Learned vectors that do not belong to this model."""


class TrainError(UserError):
    """Training data or settings that cannot be used, or a training that broke down; what was trained so far is kept."""


class MissingExtra(UserError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Install it with: pip install 'kvilt[{extra}]'")


class StoreError(KviltError):
    """A cache store failed."""


class DamagedCache(StoreError):
    """A stored document is truncated, altered or foreign; it is never served."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"stored document {key[:16]} is damaged: {reason}")
        self.key = key
        self.reason = reason


class OtherVersion(StoreError):
    """A stored document of another format version: a miss, and never touched."""

    def __init__(self, key: str, version: str, known: str) -> None:
        super().__init__(f"stored document {key[:16]} has format version {version}, this Kvilt reads {known}")


class UnreadableCache(StoreError, OSError):
    """A stored document that cannot be read just now: a miss, and never touched."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"stored document {key[:16]} cannot be read: {reason}")
        self.key = key


class StoreUnavailable(StoreError):
    """The store cannot be read or written."""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest one of those that are known, or nothing."""
    near = difflib.get_close_matches(wrong, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
