"""Names and specification strings: found lazily, converted by type, refused with the nearest name."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from kvilt import registry
from kvilt.errors import SpecError
from kvilt.strategies.base import Strategy


class Folder:
    """Something with a path, as a store has, or with others behind it."""

    def __init__(self, *parts: object, path: str = "", note: str | None = None) -> None:
        self.parts, self.path, self.note = parts, path, note


@dataclass(frozen=True)
class Outside(Strategy):
    """A strategy of somebody else's package."""

    size: int = 3
    share: float = 0.5
    label: str = "a"
    on: bool = False
    limit: int | None = None
    budget: str | int = "4GB"


def offer(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    """Entry points as an installed package would declare them."""
    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda group: [EntryPoint(n, v, group) for n, v in found.items() if "strategy" in group],
    )


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, table in registry.TABLE.items() for n in table])
def test_every_name_leads_to_a_class(kind: str, name: str) -> None:
    """Danger: a name in the list that cannot be used."""
    assert isinstance(registry.load(kind, name), type)


@pytest.mark.parametrize(
    ("kind", "wrong", "near"),
    [
        ("strategy", "blok", "block"),
        ("strategy", "kv-packet", "kv_packet"),
        ("store", "dsk", "disk"),
        ("task", "2wik", "2wiki"),
    ],
)
def test_unknown_names_suggest_the_nearest(kind: str, wrong: str, near: str) -> None:
    """Danger: a typing error is answered with a traceback."""
    with pytest.raises(SpecError, match=f"unknown {kind} '{wrong}'. Did you mean '{near}'"):
        registry.build(kind, wrong)


def test_a_name_like_no_other_lists_them_all() -> None:
    """Danger: a wild suggestion is worse than none."""
    with pytest.raises(SpecError, match=r"unknown store 'zzz'. Known: disk, memory, object, redis, tiered"):
        registry.build("store", "zzz")
    with pytest.raises(SpecError, match="unknown strategy ''"):
        registry.build("strategy", "")


def test_options_are_converted_by_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: "false" is true, "10" is a string, a budget of "4GB" is refused because a number would do as well."""
    offer(monkeypatch, outside=f"{__name__}:Outside")
    built: Any = registry.build("strategy", "outside: size=7, share=0.25,label=x=y,on=yes,limit=9,budget=2GB")
    assert (built.size, built.share, built.label, built.on, built.limit, built.budget) == (
        7,
        0.25,
        "x=y",
        True,
        9,
        "2GB",
    )
    assert registry.build("strategy", "outside") == Outside()
    for text, value in (("false", False), ("0", False), ("No", False), ("1", True), ("TRUE", True)):
        assert registry.build("strategy", f"outside:on={text}") == Outside(on=value)
    assert registry.build("strategy", "outside:budget=17") == Outside(budget=17)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("outside:size", "bad option 'size'"),
        ("outside:=3", "bad option '=3'"),
        ("outside:size=x", "option size of strategy 'outside' wants"),
        ("outside:size=1.5", "option size of strategy 'outside' wants"),
        ("outside:on=maybe", "on of strategy 'outside' wants"),
        ("outside:sise=1", "Did you mean 'size'"),
        ("outside:size=1,size=2", "stands twice"),
        ("outside:encoding=x", "has no option 'encoding'"),
    ],
)
def test_bad_options_name_what_is_wrong(monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    """Danger: an option that is misspelt or set twice is silently not what the caller thinks."""
    offer(monkeypatch, outside=f"{__name__}:Outside")
    with pytest.raises(SpecError, match=message):
        registry.build("strategy", spec)


def test_other_packages_add_names_but_replace_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: an installed package changes what `block` means."""
    offer(monkeypatch, outside=f"{__name__}:Outside", block=f"{__name__}:Outside")
    assert registry.load("strategy", "outside") is Outside
    assert registry.load("strategy", "block").__module__ == "kvilt.strategies.block"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.at_all:Thing", "cannot be imported"),
        (f"{__name__}:Nothing", "cannot be imported"),
        ("kvilt.stores.store:Store", "is not a Strategy"),
    ],
)
def test_an_entry_point_that_is_no_strategy_is_refused(
    monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    """Danger: a broken plug-in is an AttributeError in the middle of an answer."""
    offer(monkeypatch, plug=target)
    with pytest.raises(SpecError, match=message):
        registry.build("strategy", "plug")


def test_hidden_fields_are_no_options() -> None:
    """Danger: what `bind` fills can be set to a string from the command line."""
    assert list(registry.parameters(registry.load("strategy", "kvlink"))) == ["links"]
    assert set(registry.parameters(registry.load("strategy", "linked_packet"))) == {"wrapper", "layout"}


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("task:path=/a b/c", "/a b/c"),
        ("task:path='/a,b'", "/a,b"),
        ('task:path="/a,b"', "/a,b"),
        ("task:path='it''s, here'", "it's, here"),
        ("task:path=/o'brien", "/o'brien"),
        ("task:path=[x]", "[x]"),
        ("task: path = ' padded ' ", " padded "),
        ("task:path='a|b,note=1'", "a|b,note=1"),
        ("task:path=redis://u:p@host:1/0?a=b", "redis://u:p@host:1/0?a=b"),
        ("task:path=''", ""),
        ("Folder(path='/a,b', note=None)", "/a,b"),
    ],
)
def test_one_rule_quotes_values(monkeypatch: pytest.MonkeyPatch, spec: str, path: str) -> None:
    """Danger: a folder whose name holds a comma or a bracket cannot be named, or another folder is used."""
    monkeypatch.setitem(registry.TABLE["task"], "task", f"{__name__}:Folder")
    built: Any = registry.build("task", spec)
    assert (built.path, built.note) == (path, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("task:path=[x, y]", "bad option ' y]'.*in quotes"),
        ("task:path=/a,b", "bad option 'b'"),
        ("task:path='/a,b", "bad option 'b'|not closed"),
        ("task:path='a", "not closed"),
        ("task:path='a'b", "not closed at the value's end"),
        ("task:path='", "not closed"),
    ],
)
def test_what_is_quoted_badly_is_refused(monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    """Danger: half of a path is taken for the path."""
    monkeypatch.setitem(registry.TABLE["task"], "task", f"{__name__}:Folder")
    with pytest.raises(SpecError, match=message):
        registry.build("task", spec)


def test_one_behind_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the options of one tier are read as those of another."""
    monkeypatch.setitem(registry.TABLE["task"], "task", f"{__name__}:Folder")
    built: Any = registry.build("task", "task:task:path='a|,b',note=1|task:path=c")
    assert [(part.path, part.note) for part in built.parts] == [("a|,b", "1"), ("c", None)]


def test_a_repr_and_a_spec_build_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: what a table or an answer prints cannot be typed."""
    offer(monkeypatch, outside=f"{__name__}:Outside")
    for made in (Outside(), Outside(size=7, share=1e-9, label="a,b'|c", on=True, limit=9, budget=17)):
        assert registry.build("strategy", registry.spec_of(made)) == made
    for spec in ("block", "naive", "epic:tokens=3,sink=2", "kvlink:links=0", "cacheblend:ratio=0.2"):
        made = registry.build("strategy", spec)
        assert registry.build("strategy", repr(made)) == made == registry.build("strategy", str(made))
        assert str(made).startswith(spec.partition(":")[0])
    assert str(registry.build("strategy", "block:sink=none")) == "block:sink=none"
    assert registry.spec_of(registry.build("strategy", "kv_packet")) == "kv_packet"


def test_the_table_imports_nothing_until_it_is_asked() -> None:
    """Danger: `kvilt --help` loads torch."""
    code = "import sys, kvilt.registry as r; r.names('store'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
