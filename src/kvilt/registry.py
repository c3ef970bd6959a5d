"""One lazy table: name -> "module:Class", and the specifications that name and configure them: "kvlink:links=5".

A specification is a name, or name:option=value,option=value. A value that holds a comma, a | or a + stands in single or
double quotation marks, and a quotation mark inside is written twice: disk:path='/data/a,b'. All other characters, brackets
too, stand for themselves. Stores behind one another are joined by |: tiered:memory:budget=2GB|disk:path=caches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import re
import typing
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from kvilt.errors import SpecError, did_you_mean

DEFAULT = "block:sink=system"  # the best strategy without training (docs/strategies.md)
TABLE: dict[str, dict[str, str]] = {
    "strategy": {
        "full": "kvilt.strategies.full:FullRecompute",
        "block": "kvilt.strategies.block:BlockAttention",
        "naive": "kvilt.strategies.naive:Naive",
        "kvlink": "kvilt.strategies.kvlink:KVLink",
        "anchors": "kvilt.strategies.anchors:Anchors",
        "kv_packet": "kvilt.strategies.kv_packet:KVPacket",
        "linked_packet": "kvilt.strategies.linked_packet:LinkedPacket",
        "writer": "kvilt.strategies.writer:Writer",
        "query_lora": "kvilt.strategies.writer:QueryLoRA",
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
        "ranked": "kvilt.strategies.ranked:Ranked",
    },
    "store": {
        "memory": "kvilt.stores.memory:MemoryStore",
        "disk": "kvilt.stores.disk:DiskStore",
        "tiered": "kvilt.stores.tiered:TieredStore",
        "object": "kvilt.stores.remote.object:ObjectStore",
        "redis": "kvilt.stores.remote.redis:RedisStore",
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
    "retrieve": {
        "bm25": "kvilt.corpora.retrieval:BM25",
    },
    "task": {
        "nq": "kvilt.lab.evaluate.tasks.published:NaturalQuestions",
        "2wiki": "kvilt.lab.evaluate.tasks.published:TwoWiki",
        "triviaqa": "kvilt.lab.evaluate.tasks.published:TriviaQA",
        "hotpotqa": "kvilt.lab.evaluate.tasks.published:HotpotQA",
        "musique": "kvilt.lab.evaluate.tasks.published:MuSiQue",
        "qa": "kvilt.lab.evaluate.tasks.qa:FileQA",
        "multinews": "kvilt.lab.evaluate.tasks.summary:MultiNews",
        "samsum": "kvilt.lab.evaluate.tasks.summary:SAMSum",
        "niah": "kvilt.lab.evaluate.tasks.niah:NeedleInAHaystack",
        "biography": "kvilt.lab.evaluate.tasks.biography:Biography",
        "babi": "kvilt.lab.evaluate.tasks.babi:Babi",
        "builtin": "kvilt.lab.evaluate.tasks.builtin:Builtin",
    },
}

BASES = {"strategy": "kvilt.strategies.base:Strategy", "store": "kvilt.stores.store:Store"}
QUOTED = r"""'(?:[^']|'')*'|"(?:[^"]|"")*\""""


def names(kind: str) -> dict[str, str]:
    """Every name of a kind with its "module:Class", third-party entry points (group "kvilt.<kind>") included."""
    others = {e.name: e.value for e in entry_points(group=f"kvilt.{kind}")}
    return {**TABLE[kind], **others, **TABLE[kind]}


def load(kind: str, name: str) -> type:
    """The class behind a name."""
    path = TABLE[kind].get(name) or names(kind).get(name)  # entry points are looked up on the disk: only where needed
    if path is None:
        table = names(kind)
        hint = did_you_mean(name, table)
        raise SpecError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(sorted(table))}.")
    cls = _imported(path)
    if kind in BASES and not issubclass(cls, _imported(BASES[kind])):
        raise SpecError(f"{kind} {name!r} ({path}) is not a {BASES[kind].partition(':')[2]}.")
    return cls


def _imported(path: str) -> type:
    module, _, attribute = path.partition(":")
    try:
        return typing.cast(type, getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{path} cannot be imported: {error}.") from error


def split(text: str, separator: str) -> list[str]:
    """Cut a text at every separator (one character) that stands in no quoted value."""
    marks = re.finditer(rf"=\s*(?:{QUOTED})|{re.escape(separator)}", text)
    cuts = [mark.start() for mark in marks if mark[0] == separator]
    return [text[a:b] for a, b in zip([0, *(c + 1 for c in cuts)], [*cuts, len(text)], strict=True)]


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """The name and the options of a specification, or of a repr: "Epic(tokens=16, sink='none')"."""
    if written := re.fullmatch(r"\s*([A-Za-z]\w*)\((.*)\)\s*", spec, re.DOTALL):
        classes = {path.partition(":")[2]: name for table in TABLE.values() for name, path in table.items()}
        name, rest = classes.get(written[1], written[1]), written[2]
    else:
        name, _, rest = spec.partition(":")
    options: dict[str, str] = {}
    for pair in filter(str.strip, split(rest, ",")):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise SpecError(
                f"bad option {pair!r} in {spec!r}: write name:key=value, and a value with commas in quotes."
            )
        if key in options:
            raise SpecError(f"option {key!r} stands twice in {spec!r}.")
        options[key] = _unquoted(value, spec)
    return name.strip(), options


def _unquoted(value: str, spec: str) -> str:
    if value[:1] not in ("'", '"'):
        return value
    if not re.fullmatch(QUOTED, value, re.DOTALL):
        raise SpecError(f"the quotation mark of {value!r} in {spec!r} is not closed at the value's end.")
    return value[1:-1].replace(value[0] * 2, value[0])


def build(kind: str, spec: Any) -> Any:
    """Make the object that a specification describes; what is no text is such an object already."""
    if not isinstance(spec, str):
        return spec
    head, *others = split(spec, "|")
    if others:  # stores behind one another: the parts are specifications of the same kind
        name, _, first = head.partition(":")
        return _made(kind, spec, load(kind, name.strip()), *(build(kind, part) for part in (first, *others)))
    name, options = parse(spec)
    cls = load(kind, name)
    return _made(kind, spec, cls, **values(cls, options, f"{kind} {name!r}"))


def values(cls: type, options: Mapping[str, str], what: str) -> dict[str, object]:
    """Texts as the options of a class want them. Raises SpecError for unknown options and wrong values of `what`."""
    known = parameters(cls)
    for key in options:
        if key not in known:
            names = ", ".join(known) or "none"
            raise SpecError(f"{what} has no option {key!r}.{did_you_mean(key, known)} Options: {names}.")
    return {key: _converted(value, known[key], f"{key} of {what}") for key, value in options.items()}


def _made(kind: str, spec: str, cls: type, /, *parts: object, **options: object) -> object:
    try:
        return cls(*parts, **options)
    except (TypeError, ValueError, OverflowError) as error:
        raise SpecError(f"cannot build {kind} {spec!r}: {error}.") from error


@functools.cache
def parameters(cls: type) -> dict[str, object]:
    """Options of a class and their types; dataclass fields kept out of the repr are not options."""
    hints = typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)  # type: ignore[misc]
    hidden = {f.name for f in dataclasses.fields(cls) if not f.repr} if dataclasses.is_dataclass(cls) else set()
    return {
        p: hints.get(p, str) for p in inspect.signature(cls).parameters if not p.startswith("_") and p not in hidden
    }


def spec_of(made: object) -> str:
    """The specification that builds an object like this one: "epic:sink=none,tokens=16"."""
    cls: Any = type(made)
    options = {key: getattr(made, key, None) for key in parameters(cls)}
    written = ",".join(f"{key}={_quoted(value)}" for key, value in options.items() if value not in (None, ""))
    return f"{_name_of(cls)}:{written}" if written else _name_of(cls)


@functools.cache
def _name_of(cls: type) -> str:
    path = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for kind in TABLE for name, known in names(kind).items() if known == path), cls.__qualname__)


def _quoted(value: object) -> str:
    text = str(value)
    plain = text == text.strip() and not set(text) & set(",|+") and text[:1] not in ("'", '"')
    return text if plain else "'" + text.replace("'", "''") + "'"


def _converted(value: str, hint: object, where: str) -> object:
    options = [h for h in typing.get_args(hint) if h is not type(None)] or [hint]
    if typing.get_origin(hint) is tuple:
        return tuple(value.split("|"))
    if value == "None" and type(None) in typing.get_args(hint):
        return None
    if bool in options and value.lower() in ("true", "false", "yes", "no", "1", "0"):
        return value.lower() in ("true", "yes", "1")
    for kind in (int, float):
        if kind in options:
            with contextlib.suppress(ValueError):
                if abs(number := kind(value)) < 1 << 63 or kind is float:  # what tensors can count to
                    return number
    if str in options or not {int, float, bool} & set(options):
        return value
    raise SpecError(f"option {where} wants {getattr(hint, '__name__', hint)}, not {value!r}.")
