"""`kvilt encode`, `kvilt ask`, `kvilt chat` and `kvilt vllm`."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from kvilt import registry
from kvilt.cli import USER, show, talk
from kvilt.cli.options import CHUNK, DOCS, Answering, Asking, Run, Stored, option, utf8
from kvilt.errors import DocumentError, PromptError, UserError, did_you_mean
from kvilt.rows.files import name_of, replacing

if TYPE_CHECKING:
    from kvilt.corpora.estimate import Estimate
    from kvilt.corpora.retrieval import Find
    from kvilt.engine.encoder import EncodeReport, Progress
    from kvilt.engine.engine import Engine
    from kvilt.types import Answer, Document

STDIN = "-"
NAMED = 100  # documents that failed, a line each

Docs = Annotated[list[str], Argument(metavar="DOCS...", help=DOCS)]
DryRun = Annotated[bool, Option("--dry-run", help="Only say how much there is to do.")]
TimeToLive = Annotated[float | None, Option(help="Seconds until the caches expire.")]
Chunk = Annotated[str, Option("--chunk", metavar="SPEC", help=CHUNK)]
Save = Annotated[Path | None, Option("--save", help="Write what is encoded as JSON lines, to be asked with --docs.")]
Question = Annotated[
    str, Argument(metavar="[QUESTION]", help="What to answer from the documents; - for stdin, one question a line.")
]
ServedModel = Annotated[str, Argument(metavar="MODEL", help="Folder or hub name, as for vllm serve.")]
Rest = Annotated[list[str] | None, Argument(metavar="[OPTIONS OF vllm serve...]", help="For example --port 8001.")]


@dataclass(frozen=True)
class Served(Stored):
    """What a server is told."""

    strategy: str = option(registry.DEFAULT, "--strategy", "-s", help="As for encode.")
    compress: str = option("", metavar="SPEC", help="As for encode.")
    system: str = option("", help="System text of chats that bring none.")
    encode: bool = option(False, "--encode", help="Encode documents that are missing, in the background.")
    print_only: bool = option(False, "--print", help="Print the command instead of running it.")


@dataclass(frozen=True)
class Crew:
    """Who encodes a corpus that is too large for one process, and where it is told."""

    workers: int = option(1, "--workers", min=1, help="Processes that share the work; with --ray, actors.")
    ray: str = option("", "--ray", metavar="[ADDRESS]", help="Encode with Ray: here, or on the cluster at ADDRESS.")
    gpus: float = option(0.0, "--gpus", min=0, help="With --ray: GPUs of each actor.")
    columns: str = option("", metavar="text=NAME,...", help="Parquet columns of text, title and id.")
    tables: Path | None = option(None, metavar="FOLDER", help="Write documents.jsonl and failed.jsonl there.")  # noqa: RUF009


@dataclass(frozen=True)
class Costs:
    """What a dry run reckons with."""

    gb_month: float = option(0.023, "--price-gb", min=0, help="With --dry-run: a GB kept for a month costs this.")
    gpu_hour: float = option(
        1.79, "--price-gpu-hour", min=0, help="With --dry-run: an hour of this machine costs this."
    )
    per_request: int = option(10, "--per-request", min=1, help="With --dry-run: documents of a request.")


def encode(
    options: Run, crew: Crew, costs: Costs, docs: Docs, dry_run: DryRun = False, ttl: TimeToLive = None,
    chunk: Chunk = "", save: Save = None,
) -> int:  # fmt: skip
    """Encode documents and store their caches. A rerun encodes only what is missing."""
    if ttl is not None and not 0 < ttl < math.inf:
        raise UserError(f"--ttl {ttl:g}: a number of seconds above 0.")
    from kvilt.corpora import chunks, sources

    if (crew != Crew() or sources.is_needed(docs)) and not dry_run:
        return _corpus(options, crew, docs, ttl, bool(chunk or save))

    cut = chunks.cutter(chunk)
    bad: list[str] = []  # every document that cannot be encoded is named, and the exit code says so
    documents = options.read(docs, lambda error: bad.append(str(error)), crew.columns)
    if bad and not documents:
        raise DocumentError(f"nothing to encode: {' '.join(bad)}")
    engine = options.engine()
    documents = cut(documents, engine.text)
    if save is not None and not dry_run:
        chunks.save(documents, save)
    if engine.strategy.encoding is None:
        talk.warn("this strategy reuses nothing: documents are encoded for the plain ones (block, naive, ...).")
    encoder = engine.encoder if ttl is None else dataclasses.replace(engine.encoder, ttl=ttl)
    with talk.meter("encoding") as meter:
        if dry_run:
            from kvilt.corpora.estimate import estimate

            foreseen = estimate(engine, documents, **vars(costs))
            return _reported(options, foreseen.report, bad, foreseen)
        report = encoder.encode(documents, functools.partial(_told, meter), keep_going=True)
    return _reported(options, report, bad)


def _corpus(options: Run, crew: Crew, docs: list[str], ttl: float | None, cut: bool) -> int:
    from kvilt.corpora.encode import encode_corpus
    from kvilt.integrations.ray import on_ray

    if cut:
        raise UserError(
            "--chunk and --save read all documents first: encode what --save wrote with --workers or --ray."
        )
    same = ("strategy", "store", "system", "dtype", "device", "compress", "trust_remote_code")
    given = {name: getattr(options, name) for name in same} | {"namespace": options.namespace or "shared", "ttl": ttl}
    talk.silence_libraries(options.verbose, options.quiet)
    given |= {"workers": crew.workers, "columns": crew.columns, "tables": crew.tables}
    with talk.meter("encoding") as meter:
        run = on_ray(crew.ray, crew.gpus) if crew.ray else None
        report = encode_corpus(docs, options.named(), run=run, on_progress=meter, **given)
    return _reported(options, report, ())


def _reported(options: Run, report: EncodeReport, bad: Sequence[str], foreseen: Estimate | None = None) -> int:
    """Show what was done, or would be, and name the documents that failed; the exit code."""
    failed, dry_run = (*bad, *report.failed), foreseen is not None
    data = dataclasses.asdict(report) | {"failed": failed, "dry_run": dry_run}
    data |= {"costs": {k: v for k, v in vars(foreseen).items() if k != "report"}} if foreseen else {}
    show.out(options.json, data, [show.encoded(report, dry_run), *(show.costs(foreseen) if foreseen else ())])
    for message in failed[:NAMED]:
        talk.fail(message)
    if len(failed) > NAMED:
        talk.fail(f"{len(failed) - NAMED:,} more could not be encoded: --tables FOLDER lists them all.")
    return USER if failed else 0


def _told(meter: talk.Meter, p: Progress) -> None:
    speed = f"{p.tokens / max(p.seconds, 1e-9):,.0f} tokens/s"
    meter(p.tokens, p.total_tokens, f"{p.done:,} of {p.total:,} documents stored, {speed}")


def ask(answering: Answering, options: Run, question: Question = STDIN) -> int:
    """Answer a question over documents, reusing their caches."""
    many = question == STDIN
    _check(question, answering.docs or [], options.json, answering)
    engine, _, find = _opened(answering, options)
    failed = 0
    for asked in _lines() if many else [question]:
        try:
            _answer(engine, asked, find(asked), options.json, answering, many)
        except PromptError as error:
            if not many:
                raise
            failed += 1  # the next one may be answered
            talk.fail(f"{asked!r}: {error}")
            show.out(options.json, {"question": asked, "error": str(error)}, [""])
        sys.stdout.flush()
    return USER if failed else 0


def chat(asking: Asking, options: Run) -> int:
    """Ask over documents in several turns. What begins with / is a command; /help lists them."""
    if STDIN in (asking.docs or []):
        raise UserError("questions come from standard input: give documents as files.")
    from kvilt.corpora.chat import Chat, typed

    opened, by_hand = _opened(asking, options), sys.stdin.isatty()
    made = Chat(*opened, _shown, talk.say, talk.fail, asking.settings(), options.json, by_hand)
    if by_hand:
        talk.say(f"{len(made.documents):,} documents; /help lists commands, Ctrl-D ends.")
    failed = made.run(typed() if by_hand else _lines())
    return USER if failed and not by_hand else 0


def _opened(asking: Asking, options: Run) -> tuple[Engine, list[Document], Find]:
    """The engine, the documents that are asked about, and what finds those for a question."""
    from kvilt.corpora import chunks, retrieval

    cut, _ = chunks.cutter(asking.chunk), asking.retrieve and registry.build("retrieve", asking.retrieve)  # mistakes
    documents = options.read(asking.docs or [])
    if not documents:
        raise PromptError("no documents: give some with --docs.")
    if asking.pick:  # in the order of the ids
        documents = [_named(documents, name_of(wanted)) for wanted in asking.pick]
    engine = options.engine(without_store=True)
    documents = cut(documents, engine.text)
    read = () if asking.pick or asking.chunk else asking.docs or ()
    return engine, documents, retrieval.finder(asking.retrieve, documents, read)


def _check(question: str, paths: Sequence[str], as_json: bool, wanted: Answering) -> None:
    """Raise UserError for what can be seen to be wrong before a model is loaded."""
    if not utf8(question, "the question").strip():
        raise PromptError("the question is empty.")
    if as_json and wanted.stream:
        raise UserError("--stream prints text and --json one object at the end: give one of them.")
    if question == STDIN and (wanted.stream or wanted.logits or STDIN in paths):
        raise UserError("questions come from standard input: --stream, --logits and --docs - are for one question.")
    if question == STDIN and sys.stdin.isatty():
        talk.say("one question a line; Ctrl-D ends.")
    if wanted.logits is not None and (wanted.logits.is_dir() or not wanted.logits.absolute().parent.is_dir()):
        raise UserError(f"cannot write {wanted.logits}: it is a folder, or there is no such folder.")


def _lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise PromptError(f"line {number} of standard input is not UTF-8.") from error
        if text:
            yield text


def _named(documents: list[Document], wanted: str) -> Document:
    """The document with this id or file name."""
    named = [d for d in documents if d.id == wanted] or [d for d in documents if Path(d.id or "").name == wanted]
    if not named:
        known = {name for d in documents for name in (d.id or "", Path(d.id or "").name)}
        raise DocumentError(f"no document has the id {wanted!r}.{did_you_mean(wanted, known)}")
    if len(named) > 1:
        raise DocumentError(f"{len(named)} documents are called {wanted!r}: {', '.join(str(d.id) for d in named[:3])}.")
    return named[0]


def _answer(
    engine: Engine, question: str, documents: list[Document], as_json: bool, wanted: Answering, many: bool
) -> None:
    give = functools.partial(_streamed, engine) if wanted.stream else engine.answer
    answer = give(question, documents, **wanted.settings())
    if wanted.logits is not None:
        _write_logits(answer, wanted.logits)
    text = " ".join(answer.text.split()) if many else answer.text  # a line for a line
    if as_json:
        used = {"documents": [d.id for d in documents]} if wanted.retrieve else {}
        show.out(True, {"question": question, **used, **answer.as_dict()}, ())
    elif not wanted.stream:
        print(_terminal(text))
    talk.say(show.usage(answer))
    if wanted.explain:  # by now every cache is there
        names = [d.id or d.title or "" for d in documents]
        for line in show.plan(engine.plan(question, documents), names, answer.strategy):
            talk.say(line)


def _streamed(engine: Engine, question: str, documents: list[Document], **settings: Any) -> Answer:
    """The answer, printed while it is generated."""
    pieces = engine.stream(question, documents, **settings)
    while isinstance(piece := next(pieces), str):
        _shown(piece)
    print()
    return piece


def _shown(piece: str) -> None:
    print(_terminal(piece), end="", flush=True)


def _terminal(text: str) -> str:
    """An answer as it is in a pipe, and without control characters on a terminal."""
    return talk.shown(text, keep="\n\t") if sys.stdout.isatty() else text


def _write_logits(answer: Answer, path: Path) -> None:
    from safetensors.torch import save

    assert answer.logits is not None
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(save({"logits": answer.logits.contiguous()}))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error


def vllm(options: Served, model: ServedModel, rest: Rest = None) -> int:
    """Serve documents in any order with vLLM. Options that Kvilt does not know go to `vllm serve`."""
    from kvilt.integrations.vllm import launch
    from kvilt.integrations.vllm.deployment import Settings

    wanted = {name: getattr(options, name) for name in ("store", "strategy", "compress", "system", "encode")}
    settings = Settings(namespace=options.namespace or Settings.namespace, **wanted)
    line, environment = launch.command(model, settings, rest or [])
    show.out(options.json, {"command": line, "environment": environment}, [launch.shown(line, environment)])
    sys.stdout.flush()
    if not options.print_only:
        launch.run(line, environment)
    return 0
