"""`kvilt list`: names, options and what they are, read from the source files: nothing heavy is imported for a list."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from kvilt import registry
from kvilt.cli import talk
from kvilt.cli.show import table
from kvilt.errors import SpecError, UserError, did_you_mean

if TYPE_CHECKING:
    from kvilt.engine.engine import Engine


_NEXT = re.compile(r"\n[^\s)]")  # where a class ends


@dataclass(frozen=True)
class Name:
    """One name of a kind; `fits` says of a strategy whether a model can take it, where one is given."""

    name: str
    summary: str
    options: dict[str, object] = field(default_factory=dict)
    fits: str = ""


def listed(kind: str | None, engine: Engine | None = None) -> dict[str, list[Name]]:
    """Every name of a kind, or of all kinds. Raises SpecError for an unknown kind."""
    known = list(registry.TABLE)
    if kind is not None and kind not in known:
        raise SpecError(f"unknown kind {kind!r}.{did_you_mean(kind, known)} Known: {', '.join(known)}.")
    kinds = [kind] if kind else known
    return {k: [_name(k, name, path, engine) for name, path in registry.names(k).items()] for k in kinds}


def _name(kind: str, name: str, path: str, engine: Engine | None) -> Name:
    try:
        summary = " ".join((ast.get_docstring(_class(path)[1]) or "").partition("\n\n")[0].split())
        options = _options(path)
    except (OSError, ImportError, ValueError, SyntaxError) as error:
        return Name(name, f"not available: {error}")
    return Name(name, summary, options, _fits(name, engine) if engine and kind == "strategy" else "")


def _fits(name: str, engine: Engine) -> str:
    """Whether a model can take a strategy, and what it lacks if it cannot, or was not trained for."""
    with talk.heard() as warnings:
        try:
            chosen = getattr(engine.with_strategy(name).strategy, "method", None)
        except UserError as error:
            return f"no: {error}"
    default, _, options = registry.DEFAULT.partition(":")
    told = [f"chooses {chosen}"] if chosen else [f"the default with {options}"] if name == default else []
    said = [f"with a {'; '.join(warnings)}"] if warnings else [*told, *_kept(name, engine)]
    return ", ".join(["yes", *said])


def _kept(name: str, engine: Engine) -> list[str]:
    """What a strategy kept of full recompute's right answers (benchmarks/real.md), where a model that ships says so."""
    told = Path(engine.model.directory or "") / "kept.json"
    kept = json.loads(told.read_text("utf-8")).get(name) if engine.model.directory and told.is_file() else None
    return [f"kept {kept} of full's right answers to SQuAD"] if kept else []


def as_data(kinds: dict[str, list[Name]]) -> dict[str, list[dict[str, object]]]:
    """For JSON."""
    return {
        kind: [{k: v for k, v in asdict(n).items() if k != "fits" or v} for n in names] for kind, names in kinds.items()
    }


def lines(kinds: dict[str, list[Name]]) -> Iterator[str]:
    """Tables with one row a name."""
    for kind, names in kinds.items():
        fits = any(n.fits for n in names)
        rows = [(n.name, _written(n.options), *([n.fits] if fits else []), n.summary) for n in names]
        yield from table((kind, "options", *(["this model"] if fits else []), "what it is"), rows)
        yield ""


def _written(options: dict[str, object]) -> str:
    return ",".join(key if value is None else f"{key}={value}" for key, value in options.items())


@functools.cache
def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.has_location:
        raise ImportError(f"no source of {module}")
    return Path(spec.origin or "").read_text(encoding="utf-8")


@functools.cache
def _class(path: str) -> tuple[str, ast.ClassDef]:
    """The class that "module:Class" stands for, and the module where it is defined; only its own lines are parsed."""
    module, _, name = path.partition(":")
    source = _source(module)
    start = max(source.find(f"\nclass {name}{end}") for end in "(:") + 1
    if start:
        last = _NEXT.search(source, start)
        (node,) = ast.parse(source[start : last.start() if last else None]).body
        return module, cast(ast.ClassDef, node)
    names = rf"[^(\n]*\b{name}\b|\([^)]*\b{name}\b"
    if origin := re.search(rf"^from (\S+) import (?:{names})", source, re.MULTILINE):
        return _class(f"{origin[1]}:{name}")
    raise ImportError(f"{module} has no class {name}")


def _options(path: str) -> dict[str, object]:
    """Options of a class with their defaults ("": must be given), literals of its `__init__` or of a dataclass and its bases."""
    module, cls = _class(path)
    options: dict[str, object] = {}
    for base in cls.bases:
        with contextlib.suppress(ImportError):  # Python's own have no options
            options |= _options(f"{module}:{base.id}") if isinstance(base, ast.Name) else {}
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = [*node.args.args[1:], *node.args.kwonlyargs][::-1]
            defaults = [*node.args.defaults, *node.args.kw_defaults][::-1]
            pairs = itertools.zip_longest(arguments, defaults)
            options = {argument.arg: ast.literal_eval(default) if default else "" for argument, default in pairs}
        elif isinstance(node, ast.AnnAssign) and node.value and not re.search("ClassVar|repr=False", ast.unparse(node)):
            options[ast.unparse(node.target)] = ast.literal_eval(node.value)
    return {name: value for name, value in options.items() if not name.startswith("_")}
