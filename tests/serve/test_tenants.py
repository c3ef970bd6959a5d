"""Keys and the namespaces that follow from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvilt.errors import UserError
from kvilt.serve.tenants import Tenants
from kvilt.stores.store import check_namespace

KEY, OTHER = "a-key-of-sixteen-or-more", "another-key-of-sixteen"


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_one_key_protects_the_namespace_of_the_command_line() -> None:
    """Danger: what `kvilt encode` stored is not found by a server with a key."""
    one = Tenants([KEY], "mine")
    assert one.namespace_of(bearer(KEY)) == "mine"
    assert one.namespace_of(bearer(OTHER)) is None
    assert one.namespace_of(None) is None
    salted = one.namespace_of(bearer(KEY), "shared")
    assert salted not in (None, "mine", "shared")


def test_several_keys_are_tenants_whose_namespaces_nobody_can_name() -> None:
    """Danger: a tenant names another's namespace as its salt, and is let in."""
    two = Tenants([KEY, OTHER], "shared")
    first, second = two.namespace_of(bearer(KEY)), two.namespace_of(bearer(OTHER))
    assert len({first, second, "shared"}) == 3
    for salt in ("shared", str(first), "", "x"):
        assert two.namespace_of(bearer(OTHER), salt) != first
        check_namespace(str(two.namespace_of(bearer(OTHER), salt)))
    assert two.namespace_of(bearer(KEY)) == first
    assert two.namespace_of(f"bearer  {KEY} ") == first  # as some clients write it


def test_without_keys_everybody_is_let_in() -> None:
    """Danger: a server on the own machine asks for a key that nobody gave it."""
    free = Tenants([], "shared")
    assert not free.asked_for
    assert free.namespace_of(None) == "shared"
    assert free.namespace_of(None, "other") == "other"


def test_keys_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a key that can be guessed, an empty file, or a line that is read as two keys."""
    monkeypatch.setenv("KEYS", KEY)
    file = tmp_path / "keys"
    file.write_text(f"# comment\n\n{OTHER}\n")
    assert Tenants.of("KEYS", file).namespace_of(bearer(OTHER))
    assert Tenants.of("KEYS", None).namespace_of(bearer(KEY)) == "shared"
    for text in ("short\n", "two words are no key\n", "k\u00e9y-of-sixteen-letters\n", "# nothing\n", ""):
        file.write_text(text)
        with pytest.raises(UserError):
            Tenants.of("NOT_SET", file)
