"""What every verb shares: options that mean the same everywhere, and what they open."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer
from typer import Option
from typer.core import TyperCommand

from kvilt import registry
from kvilt.cli import talk
from kvilt.errors import DocumentError, StoreUnavailable, UserError

if TYPE_CHECKING:
    from kvilt.engine.engine import Engine
    from kvilt.stores.store import Entry, Store
    from kvilt.types import Document

KEYWORD = inspect.Parameter.KEYWORD_ONLY
DOCS = "Texts, .md, .jsonl, code, PDF, DOCX or HTML files, folders of them, or - for stdin."
CHUNK = "Cut documents at sentence ends: tokens=512,overlap=0."
SHOWN = 3  # skipped files named one by one
OF_SEVERAL = {"--docs", "-d", "--pick"}  # options that take several values, as in `--docs *.txt`

ADDRESS = re.compile(r"auto|local|ray://\S+|[\w.-]+:\d+").fullmatch  # of a Ray cluster

Verb = Callable[..., int | None]
_opened: list[Store] = []  # by the verb that runs


def option(default: Any, *names: str, **more: Any) -> Any:
    """A field of an option group: its default, the names of the option, and what else typer is to know."""
    return dataclasses.field(default=default, metadata={"option": Option(*names, **more)})


@dataclass(frozen=True)
class Output:
    """How a verb speaks."""

    json: bool = option(False, "--json", help="Print JSON on stdout.")
    quiet: bool = option(False, "--quiet", "-q", help="Say nothing on stderr but errors.")
    verbose: bool = option(False, "--verbose", "-v", help="Show what the libraries say, too.")

    def read(
        self, paths: Sequence[str], on_bad: Callable[[DocumentError], None] | None = None, columns: str = ""
    ) -> list[Document]:
        """The documents that paths name; what is skipped is told."""
        from kvilt.corpora import readers, sources

        skipped: list[str] = []
        documents = sources.read_all(paths, skipped.append, on_bad, columns)
        for path in skipped[:SHOWN]:
            talk.say(f"skipped {path}: {readers.why(path)}.")
        if len(skipped) > SHOWN:
            talk.say(f"skipped {len(skipped) - SHOWN} more files.")
        return documents


@dataclass(frozen=True)
class Stored(Output):
    """A verb on a store."""

    store: str = option(
        "disk", envvar="KVILT_STORE", help="Where caches are kept: memory, disk or tiered, with options."
    )
    namespace: str | None = option(None, "--namespace", help="Whose documents (of a store that many share).")

    def open_store(self) -> Store:
        """The store, the same whenever a verb asks. Raises UserError, StoreUnavailable."""
        utf8(self.namespace or "", "--namespace")
        if not _opened:
            _opened.append(cast("Store", registry.build("store", self.store)))
        return _opened[0]

    def entries(self) -> Iterator[Entry]:
        """Every stored document, of the namespace if one is given."""
        return (e for e in self.open_store().entries() if self.namespace in (None, e.namespace))


@dataclass(frozen=True)
class Loaded(Output):
    """A verb that loads a model."""

    model: str | None = option(None, "--model", "-m", envvar="KVILT_MODEL", help="Folder or hub name of the model.")
    dtype: str = option("auto", "--dtype", help="auto, float32, bfloat16 or float16.")
    device: str = option("auto", "--device", help="auto, cpu or cuda.")
    system: str | None = option(None, "--system", help="Text in front of the documents; '' for none.")
    trust_remote_code: bool = option(False, "--trust-remote-code", help="Run Python code that comes with the model.")

    def named(self) -> str:
        """The model's name. Raises UserError where none is given."""
        utf8(self.system or "", "--system")
        if not self.model:
            raise UserError("no model: give --model FOLDER or --model HUB_NAME, or set KVILT_MODEL.")
        return self.model

    def load(self, strategy: object, store: object = "memory", **more: Any) -> Engine:
        """An engine with the model. Raises UserError where it cannot be loaded."""
        name = self.named()
        with talk.meter(f"loading {name}"):
            from kvilt.engine.engine import Engine

            talk.silence_libraries(self.verbose, self.quiet)
            more["system"] = more.get("system") if self.system is None else self.system
            more |= {o: getattr(self, o) for o in ("dtype", "device", "trust_remote_code")}
            return Engine.load(name, strategy, store, **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run(Loaded, Stored):
    """A verb that runs a model with a strategy and a store."""

    strategy: str = option(
        registry.DEFAULT, "--strategy", "-s", help="How caches are reused (kvilt list strategy): kvlink:links=5."
    )
    compress: str = option("", metavar="SPEC", help="Make caches smaller (kvilt list compress): keydiff:keep=0.5+int8.")

    def engine(self, *, without_store: bool = False, in_memory: bool = False) -> Engine:
        """The engine. `without_store` makes do without one that cannot be opened, `in_memory` leaves the user's alone."""
        from kvilt.compress.base import Compression

        strategy = registry.build("strategy", self.strategy)  # before the model: mistakes show at once
        more: dict[str, Any] = {"compress": Compression.of(self.compress)}
        more |= {"namespace": self.namespace} if self.namespace else {}
        self.named()
        store: object = "memory"
        try:
            store = store if in_memory else self.open_store()
        except StoreUnavailable as error:
            if not without_store:
                raise
            talk.warn(f"{error} Answering without it.")
        engine = self.load(strategy, store, **more)
        if self.strategy == registry.DEFAULT:
            with contextlib.suppress(UserError):  # of files that nobody asked for
                trained = str(registry.build("strategy", "auto").bind(engine.info).method)
                if trained != registry.DEFAULT:
                    talk.say(f"this model was trained for {trained}: --strategy auto uses that.")
        return engine


@dataclass(frozen=True)
class Asking:
    """What is asked about, and how an answer is generated; greedy unless a temperature or a top-p is given."""

    docs: list[str] | None = option(  # noqa: RUF009 - a field
        None, "--docs", "-d", metavar="PATH...", help="Documents, as for encode; takes several."
    )
    pick: list[str] | None = option(None, metavar="ID...", help="Ids of those to use, in order; takes several.")  # noqa: RUF009
    chunk: str = option("", metavar="SPEC", help=CHUNK)
    retrieve: str = option("", metavar="SPEC", help="Answer from the best documents only: bm25:top=8.")
    max_new_tokens: int = option(128, "--max-new-tokens", min=1, help="Longest answer.")
    temperature: float | None = option(None, "--temperature", min=0, help="Sample; 0 is greedy.")
    top_p: float | None = option(None, "--top-p", min=0, max=1, help="Sample from the likeliest tokens.")
    seed: int | None = option(None, "--seed", help="Sample the same answer again.")

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `Engine.answer`."""
        wanted: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "seed": self.seed}
        if (self.temperature or (self.temperature is None and self.top_p is not None)) and self.top_p != 0:
            wanted |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {name: value for name, value in wanted.items() if value is not None}


@dataclass(frozen=True)
class Answering(Asking):
    """How an answer is given."""

    stream: bool = option(False, "--stream", help="Print the answer while it is generated.")
    logits: Path | None = option(None, "--logits", help="Write the first token's logits.")  # noqa: RUF009 - a field
    explain: bool = option(False, "--explain", help="Show the plan of the prompt on stderr.")


def utf8(text: str, what: str) -> str:
    """The text. Raises UserError where the shell gave bytes that are not UTF-8."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{what} is not UTF-8: check the terminal's encoding.")
    return text


def group(about: str) -> typer.Typer:
    """Verbs that belong together, with what they are about."""
    return typer.Typer(help=about, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def verb(app: typer.Typer, name: str | None = None, **settings: Any) -> Callable[[Verb], Verb]:
    """Register a function with a parameter `options: Output` as a verb; it returns its exit code if that is not 0."""

    def register(function: Verb) -> Verb:
        app.command(name, **settings)(flat(function))
        return function

    return register


def flat(function: Verb) -> Verb:
    """A function as typer should see it: the fields of its option groups are parameters of their own."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    own = [p.replace(annotation=hints[n]) for n, p in inspect.signature(function).parameters.items() if n not in groups]
    grouped = [field for group in groups.values() for field in _fields(group)]

    @functools.wraps(function)
    def run(**given: Any) -> int | None:
        for name, group in groups.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in dataclasses.fields(group)})
        with talk.speaking(given["options"].quiet):
            try:
                return function(**given)
            finally:
                while _opened:
                    _opened.pop().close()  # writes down what was used

    parameters = [p.replace(kind=KEYWORD) for p in (*own, *grouped)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _fields(group: Any) -> list[inspect.Parameter]:
    """Options of a group, those of the most special class first."""
    hints, fields = get_type_hints(group), {f.name: f for f in dataclasses.fields(group)}
    names = [name for cls in group.__mro__ if dataclasses.is_dataclass(cls) for name in cls.__annotations__]
    kinds = [(name, Annotated[hints[name], fields[name].metadata["option"]]) for name in names]
    return [inspect.Parameter(n, KEYWORD, default=fields[n].default, annotation=kind) for n, kind in kinds]


def spread(arguments: Sequence[str]) -> Iterator[str]:
    """Repeat an option before each of its values: `--docs a b` becomes `--docs a --docs b`."""
    option, taken = "", False
    for position, argument in enumerate(arguments):
        if argument == "--":
            yield from arguments[position:]
            return
        named = argument.startswith("-") and argument != "-"
        if named:
            option = argument if argument in OF_SEVERAL else ""
        elif option and taken:
            yield option
        yield argument
        taken = not named


class Several(TyperCommand):
    """A command in which the options OF_SEVERAL take several values, and --ray an address or none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse with repeated options and missing addresses written out."""
        following = [*args, ""][1:]
        full = [f"{a}=local" if a == "--ray" and not ADDRESS(b) else a for a, b in zip(args, following, strict=True)]
        return super().parse_args(ctx, list(spread(full)))
