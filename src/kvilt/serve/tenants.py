"""Who asks. Every key is a tenant of its own; its namespace follows from the key, so nobody can name another's documents."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from kvilt.errors import UserError

LEAST = 16  # characters of a key


class Tenants:
    """The keys of a server. Without keys everybody is let in, and may name any namespace.

    One key alone protects the server's own namespace; several are tenants that see nothing of each other."""

    def __init__(self, keys: Iterable[str], namespace: str = "shared") -> None:
        self.namespace = namespace
        self._keys = [key.encode() for key in dict.fromkeys(keys)]
        if short := [key for key in self._keys if len(key) < LEAST or not key.isascii() or key.split() != [key]]:
            raise UserError(f"a key must be at least {LEAST} ASCII characters without spaces: {len(short)} are not.")

    @classmethod
    def of(cls, environment: str, file: Path | None) -> Tenants:
        """The keys of an environment variable and of a file, one a line; # begins a comment. Raises UserError."""
        keys = [os.environ[environment]] if os.environ.get(environment) else []
        if file is not None:
            try:
                lines = file.read_text("utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read the keys in {file}: {error}") from error
            keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not keys:
                raise UserError(f"{file} holds no keys.")
        return cls(keys)

    @property
    def asked_for(self) -> bool:
        """Whether a key is needed."""
        return bool(self._keys)

    def namespace_of(self, authorization: str | None, salt: str | None = None) -> str | None:
        """The namespace of who sends this header; None for a wrong key or none. `salt` names a part of it."""
        if not self._keys:
            return salt or self.namespace
        scheme, _, given = (authorization or "").partition(" ")
        found = b""
        for key in self._keys:  # all of them, whichever it is: the time taken tells nothing
            same = hmac.compare_digest(hashlib.sha256(key).digest(), hashlib.sha256(given.strip().encode()).digest())
            found = key if same else found
        if not found or scheme.lower() != "bearer":
            return None
        if len(self._keys) == 1 and not salt:
            return self.namespace
        return "tenant-" + hmac.new(found, f"kvilt {salt or ''}".encode(), hashlib.sha256).hexdigest()[:40]
