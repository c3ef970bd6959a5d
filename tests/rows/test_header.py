"""Headers that are sound by their digest and odd otherwise: whoever lists a store must get past them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blake3 import blake3

from core_kit import Bytes, fake
from kvilt.errors import DamagedCache, KviltError, OtherVersion
from kvilt.rows.file import open_cache, pack
from kvilt.rows.header import VERSION, Header, read_header
from kvilt.rows.rows import TensorRows, whole
from kvilt.types import DocumentCache

CACHE = fake(range(5), offsets=[0, 2, 3])
KEY = CACHE.key.digest
DATA = b"".join(pack(CACHE, title="a title", created=5.0))
SIZE = 8 + int.from_bytes(DATA[:8], "little")
Parts = dict[str, Any]


def sealed(data: Any) -> bytes:
    """A file with this header, whose digest is good. A text is taken as it is."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    text += " " * (-(8 + len(text.encode())) % 64)
    raw = len(text.encode()).to_bytes(8, "little") + text.encode()
    digest = blake3(raw[:35]).update(raw[99:]).hexdigest().encode()
    return raw[:35] + digest + raw[99:] + DATA[SIZE:]


def parts() -> Parts:
    return json.loads(DATA[8:SIZE])


def changed(change: Callable[[Parts], object]) -> bytes:
    data = parts()
    change(data)
    return sealed(data)


def meta(**values: Any) -> bytes:
    return changed(lambda data: data["__metadata__"].update(values))


def span(name: str, **values: Any) -> bytes:
    return changed(lambda data: data[name].update(values))


def fields(change: Callable[[Parts], object]) -> bytes:
    known = json.loads(parts()["__metadata__"]["fields"])
    change(known)
    return meta(fields=json.dumps(known))


def without(*path: str) -> bytes:
    def drop(data: Parts) -> None:
        for name in path[:-1]:
            data = data[name]
        del data[path[-1]]

    return changed(drop)


TOLD = ("codec", "key", "fields", "length", "dropped", "title", "created", "digest.tokens", "digest.digests")
DEEP = '{"__metadata__":' + json.dumps(parts()["__metadata__"], separators=(",", ":")) + ',"rows":' + "[" * 100_000
ODD: dict[str, bytes] = {
    **{f"no {name}": without(name) for name in ("tokens", "offsets", "digests", "rows")},
    **{f"no {name}": without("__metadata__", name) for name in TOLD},
    **{f"no {name} of rows": without("rows", name) for name in ("shape", "dtype", "data_offsets")},
    **{f"{value!r} as title": meta(title=value) for value in (["a"], {"a": 1}, 7, None)},
    "half a character as title": meta(title="\udcff"),
    "a list as key": meta(key=[KEY]),
    "a list as codec": meta(codec=["raw"]),
    "a huge shape": span("rows", shape=[1e30, 2, 1, 3, 2]),
    "an infinite shape": sealed(json.dumps(parts(), separators=(",", ":")).replace("[1,2,1,3,2]", "[1,2,1,3,1e999]")),
    "a huge axis of nothing": changed(
        lambda d: (d["rows"].update(shape=[10**30, 2, 0, 3, 2]), d["digests"].update(shape=[10**30, 0, 32]))
    ),
    "a negative shape": span("rows", shape=[-1, 2, -1, 3, 2]),
    "a text as shape": span("rows", shape="abcde"),
    "too few axes": span("rows", shape=[2, 3, 2]),
    "a number as tokens": span("tokens", shape=[]),
    "tokens of two axes": span("tokens", shape=[5, 1]),
    "an unknown dtype": span("rows", dtype="Q7"),
    "a list as dtype": span("rows", dtype=["F32"]),
    "offsets that are texts": span("rows", data_offsets=["a", "b"]),
    "offsets backwards": span("rows", data_offsets=[500, 100]),
    "offsets inside the header": span("rows", data_offsets=[-100, -52]),
    "a list instead of a span": changed(lambda d: d.update(rows=[1])),
    "a length that is none": meta(length="long"),
    "a length too large": meta(length=str(10**18)),
    "a length below zero": meta(length="-5", dropped="10"),
    "more dropped than run": meta(dropped="1"),
    "a time that is none": meta(created="yesterday"),
    "a time that is no number": meta(created="nan"),
    "a time beyond all calendars": meta(created="1e300"),
    "a time before all": meta(created="-1e18"),
    "fields that are a list": meta(fields="[1]"),
    "fields that are no JSON": meta(fields="{"),
    "fields nested deep": meta(fields="[" * 100_000),
    "a list as namespace": fields(lambda f: f.update(namespace=["a"])),
    "half a character as namespace": fields(lambda f: f.update(namespace="\udcff")),
    "metadata that is a list": changed(lambda d: d.update(__metadata__=["header"])),
    "nested deep": sealed(DEEP),
    "a list": sealed("[" + json.dumps(parts(), separators=(",", ":")) + "]"),
    "no JSON": sealed(json.dumps(parts(), separators=(",", ":"))[:-1]),
    "not UTF-8": sealed(json.dumps(parts(), separators=(",", ":"))).replace(b"a title", b"a t\xfftle"),
    "a long number": sealed(json.dumps(parts(), separators=(",", ":")).replace("[1,2,1,3,2]", "[" + "9" * 9999 + "]")),
    "nothing": b"",
    "zeros": bytes(5000),
    "a length beyond the file": (1 << 62).to_bytes(8, "little") + DATA[8:],
    "another program's": len(b"{}").to_bytes(8, "little") + b"{}",
    "another document's": b"".join(pack(fake(range(6)))),
}  # fmt: skip


def test_the_file_that_all_of_them_are_made_from_is_sound() -> None:
    """Danger: everything below is refused for another reason than its oddity."""
    assert sealed(parts()) != DATA  # padded otherwise
    header = read_header(KEY, Bytes(sealed(parts())))
    assert (header.title, header.created, header.tokens, header.namespace) == ("a title", 5.0, 5, "shared")
    assert whole(open_cache(Bytes(sealed(parts())), CACHE.key).rows).shape == (1, 2, 1, 3, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ODD)
def test_an_odd_header_is_damage_and_nothing_else(name: str) -> None:
    """Danger: one file with a good digest, and every later command of every user ends in a traceback, for good."""
    with pytest.raises(DamagedCache) as error:
        read_header(KEY, Bytes(ODD[name]))
    assert error.value.key == KEY
    assert "object" not in error.value.reason
    assert "\n" not in str(error.value)


CODEC_OF_NOTHING = meta(codec="int8")
PLACES = torch.tensor([0, 2, 99])


@pytest.mark.parametrize(
    "data",
    [
        CODEC_OF_NOTHING,
        meta(codec="mystery"),
        fields(lambda f: f.update(more="1")),
        fields(lambda f: f.update(model="other")),
        fields(lambda f: f.pop("namespace")),
        b"".join(pack(DocumentCache(CACHE.tokens, PLACES, 5, CACHE.key, CACHE.rows))),
        b"".join(pack(DocumentCache(CACHE.tokens, PLACES - 1, 5, CACHE.key, CACHE.rows))),
        changed(lambda d: d.update(scales_keys=d["rows"])),
    ],
)
def test_a_sound_header_of_something_else_is_damage_when_it_is_opened(data: bytes) -> None:
    """Danger: an answer dies in the middle of a pass, with an error that names no document."""
    with pytest.raises(DamagedCache):
        open_cache(Bytes(data), CACHE.key)


def test_whatever_an_odd_header_holds_it_is_listed_or_damaged() -> None:
    """Danger: the oddity that nobody thought of."""
    dice, listed = random.Random(0), 0
    values = [
        None,
        [],
        {},
        "",
        "x",
        -1,
        0,
        1,
        2.5,
        True,
        10**40,
        "0",
        "-1",
        "1e400",
        [[1]],
        {"a": {}},
        "\ud800",
        "a" * 9999,
    ]
    for _ in range(400):
        data = parts()
        for _ in range(dice.choice([1, 1, 2, 3])):
            holder = dice.choice(
                [data, data["__metadata__"], *(data[n] for n in ("rows", "tokens", "digests", "offsets"))]
            )
            if not isinstance(holder, dict) or not holder:
                break
            name = dice.choice([n for n in holder if n not in ("header", "format", "version", "__metadata__")] or ["x"])
            if dice.random() < 0.2:
                holder.pop(name, None)
            else:
                holder[name] = dice.choice(values)
            if not all(isinstance(data.get(n), dict) for n in ("__metadata__", "rows", "tokens", "digests", "offsets")):
                break
        blob = Bytes(sealed(data))
        try:
            header = read_header(KEY, blob)
        except DamagedCache:
            continue
        listed += 1
        shown(header)
        try:
            whole(open_cache(blob, CACHE.key).rows)  # type: ignore[arg-type]
        except KviltError:
            continue
    assert listed > 3


def shown(header: Header) -> None:
    """What a listing does with a header."""
    f"{header.key} {header.title} {header.namespace} {header.tokens:d} {header.created:.0f} {header.bytes:d}".encode()


def test_a_file_of_another_version_is_neither_served_nor_damaged() -> None:
    """Danger: an older Kvilt over the same folder throws away what a newer one wrote, or the other way round."""
    for version in ("1", "3", "20"):
        newer = parts()
        newer["__metadata__"]["version"] = version
        newer["__metadata__"].pop("fields")  # whatever else is different there
        newer["rows"] = {"kind": "of another world"}
        for data in (sealed(newer), sealed(newer)[:-9], sealed(newer)[:300] + b"?" + sealed(newer)[301:]):
            with pytest.raises(OtherVersion, match=f"format version {version}, this Kvilt reads {VERSION}"):
                read_header(KEY, Bytes(data))
    large = TensorRows(torch.zeros(1, 2, 1, 3, 2))
    assert read_header(KEY, Bytes(b"".join(pack(DocumentCache(CACHE.tokens, CACHE.offsets, 5, CACHE.key, large)))))
