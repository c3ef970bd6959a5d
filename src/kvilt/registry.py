"""One lazy table: name -> "module:Class", and the spec strings that name and configure them: "kvlink:links=5"."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
import typing
from importlib.metadata import entry_points

from kvilt.errors import SpecError

TABLE: dict[str, dict[str, str]] = {
    "strategy": {
        "full": "kvilt.strategies.full:FullRecompute",
        "block": "kvilt.strategies.block:BlockAttention",
        "naive": "kvilt.strategies.naive:Naive",
        "kvlink": "kvilt.strategies.kvlink:KVLink",
        "anchors": "kvilt.strategies.anchors:Anchors",
        "kv_packet": "kvilt.strategies.kv_packet:KVPacket",
        "linked_packet": "kvilt.strategies.linked_packet:LinkedPacket",
        "prompt_cache": "kvilt.strategies.prompt_cache:PromptCache",
        "epic": "kvilt.strategies.epic:Epic",
        "auto": "kvilt.strategies.auto:Auto",
        "ape": "kvilt.strategies.ape:Ape",
        "cacheblend": "kvilt.strategies.cacheblend:CacheBlend",
        "a3": "kvilt.strategies.a3:A3",
        "prophetkv": "kvilt.strategies.prophetkv:ProphetKV",
        "infoflow": "kvilt.strategies.infoflow:InfoFlow",
        "sam_kv": "kvilt.strategies.sam_kv:SamKV",
        "turborag": "kvilt.strategies.turborag:TurboRAG",
        "random": "kvilt.strategies.random:RandomRecompute",
    },
    "store": {
        "memory": "kvilt.stores.memory:MemoryStore",
        "disk": "kvilt.stores.disk:DiskStore",
        "tiered": "kvilt.stores.tiered:TieredStore",
    },
    "compress": {
        "llmlingua2": "kvilt.compress.text:LLMLingua2",
        "int8": "kvilt.rows.codec:Int8",
        "int4": "kvilt.rows.codec:Int4",
        "fp8": "kvilt.rows.codec:Fp8",
        "keydiff": "kvilt.compress.press:KeyDiff",
        "knorm": "kvilt.compress.press:KNorm",
        "leverage": "kvilt.compress.press:Leverage",
        "cur": "kvilt.compress.press:Cur",
        "kvzip": "kvilt.compress.press:KVzip",
        "random": "kvilt.compress.press:Random",
    },
    "task": {
        "nq": "kvilt.lab.evaluate.tasks.nq:NaturalQuestions",
        "2wiki": "kvilt.lab.evaluate.tasks.two_wiki:TwoWiki",
        "triviaqa": "kvilt.lab.evaluate.tasks.triviaqa:TriviaQA",
        "hotpotqa": "kvilt.lab.evaluate.tasks.hotpotqa:HotpotQA",
        "musique": "kvilt.lab.evaluate.tasks.musique:MuSiQue",
        "qa": "kvilt.lab.evaluate.tasks.qa:FileQA",
        "multinews": "kvilt.lab.evaluate.tasks.multinews:MultiNews",
        "samsum": "kvilt.lab.evaluate.tasks.samsum:SAMSum",
        "niah": "kvilt.lab.evaluate.tasks.niah:NeedleInAHaystack",
        "biography": "kvilt.lab.evaluate.tasks.biography:Biography",
        "babi": "kvilt.lab.evaluate.tasks.babi:Babi",
        "builtin": "kvilt.lab.evaluate.tasks.builtin:Builtin",
    },
}


BASES = {"strategy": "kvilt.strategies.base:Strategy", "store": "kvilt.stores.base:CacheStore"}


def names(kind: str) -> dict[str, str]:
    """Every name of a kind with its "module:Class", third-party entry points (group "kvilt.<kind>") included."""
    found = {e.name: e.value for e in entry_points(group=f"kvilt.{kind}")}
    return {**found, **TABLE[kind]}


def load(kind: str, name: str) -> type:
    """The class behind a name."""
    table = names(kind)
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SpecError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(sorted(table))}.")
    cls = _imported(table[name])
    if kind in BASES and not issubclass(cls, _imported(BASES[kind])):
        raise SpecError(f"{kind} {name!r} ({table[name]}) is not a {BASES[kind].partition(':')[2]}.")
    return cls


def _imported(path: str) -> type:
    module, _, attribute = path.partition(":")
    try:
        return typing.cast(type, getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{path} cannot be imported: {error}.") from error


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """Split "name:key=value,key=[a value, with commas]"."""
    name, _, rest = spec.partition(":")
    options: dict[str, str] = {}
    for pair in filter(None, re.split(r",(?![^\[]*\])", rest)):
        key, eq, value = pair.partition("=")
        if not eq or not key.strip():
            raise SpecError(f"bad option {pair!r} in {spec!r}: write name:key=value,key=value.")
        if key.strip() in options:
            raise SpecError(f"option {key.strip()!r} stands twice in {spec!r}.")
        options[key.strip()] = value.strip()
    return name.strip(), options


def build(kind: str, spec: str) -> object:
    """Make the object that a spec string describes."""
    name, options = parse(spec)
    cls = load(kind, name)
    known = parameters(cls)
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SpecError(f"{kind} {name!r} has no option {key!r}.{hint} Options: {', '.join(known) or 'none'}.")
    try:
        return cls(**{key: _convert(value, known[key], f"{name}:{key}") for key, value in options.items()})
    except TypeError as error:
        raise SpecError(f"cannot build {kind} {spec!r}: {error}.") from error


def parameters(cls: type) -> dict[str, object]:
    """Options of a class and their types; dataclass fields kept out of the repr are not options."""
    hints = typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)  # type: ignore[misc]
    hidden = {f.name for f in dataclasses.fields(cls) if not f.repr} if dataclasses.is_dataclass(cls) else set()
    return {
        p: hints.get(p, str) for p in inspect.signature(cls).parameters if not p.startswith("_") and p not in hidden
    }


def _convert(value: str, hint: object, where: str) -> object:
    options = [h for h in typing.get_args(hint) if h is not type(None)] or [hint]
    if bool in options and value.lower() in ("true", "false", "yes", "no", "1", "0"):
        return value.lower() in ("true", "yes", "1")
    for kind in (int, float):
        if kind in options:
            try:
                return kind(value)
            except ValueError:
                continue
    if str in options or not {int, float, bool} & set(options):
        return value
    raise SpecError(f"option {where} wants {hint}, not {value!r}.")
