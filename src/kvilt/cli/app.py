"""The verbs. Each is a few lines: read, open, do, show."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from kvilt.cli import cache, mount, talk
from kvilt.cli.options import FAILED, Answering, Output, Run, verb
from kvilt.cli.several import Several

app = typer.Typer(
    help="Encode every document once, alone, and reuse its KV cache in any prompt.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(cache.app, name="cache")


def _version(wanted: bool) -> None:
    if wanted:
        from kvilt import __version__

        print(__version__)
        raise typer.Exit


WHAT = ".txt, .md or .jsonl files, folders of them, or - for stdin."
Docs = Annotated[list[str], Argument(metavar="DOCS...", help=WHAT)]
SomeDocs = Annotated[list[str] | None, Argument(metavar="[DOCS...]", help=WHAT)]
DocsOption = Annotated[
    list[str] | None, Option("--docs", "-d", metavar="PATH...", help="Documents, as for encode; takes several.")
]
Pick = Annotated[
    list[str] | None, Option("--pick", metavar="ID...", help="Ids of those to use, in order; takes several.")
]
DryRun = Annotated[bool, Option("--dry-run", help="Only say how much there is to do.")]
TimeToLive = Annotated[float | None, Option("--ttl", min=0, help="Seconds until the caches expire.")]
Question = Annotated[str, Argument(metavar="QUESTION", help="What to answer from the documents.")]
Ask = Annotated[str, Option("--question", help="What to ask.")]
Limit = Annotated[int, Option("--limit", min=1, help="Use this many documents.")]
Tokens = Annotated[int, Option("--tokens", min=1, help="Compare answers of this many tokens.")]
Kind = Annotated[str | None, Argument(metavar="[KIND]", help="strategy, store, compress or task; all if left out.")]
Version = Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")]
ANY_QUESTION = "What do the documents say?"


@app.callback()
def kvilt(version: Version = False) -> None:
    """Encode every document once, alone, and reuse its KV cache in any prompt."""


@verb(app)
def encode(options: Run, docs: Docs, dry_run: DryRun = False, ttl: TimeToLive = None) -> None:
    """Encode documents and store their caches. A rerun encodes only what is missing."""
    from kvilt.cli import show, work

    documents = options.read(docs)
    encoder = work.encoder(options.engine(), ttl)
    with talk.encoding() as meter:
        report = encoder.dry_run(documents) if dry_run else encoder.encode(documents, meter)
    show.encoded(report, dry_run, options.json)


@verb(app, cls=Several)
def ask(options: Run, answering: Answering, question: Question, docs: DocsOption = None, pick: Pick = None) -> None:
    """Answer a question over documents, reusing their caches."""
    from kvilt.cli import work

    work.check_request(question, options.json, answering)
    documents = work.choose(options.read(docs or []), pick or [])
    engine = options.engine(without_store=True)
    work.deliver(work.answer(engine, question, documents, answering), options.json, answering)
    if answering.explain:
        work.explain(engine, question, documents)


@verb(app)
def verify(
    options: Run, docs: SomeDocs = None, question: Ask = ANY_QUESTION, limit: Limit = 4, tokens: Tokens = 16
) -> int:
    """Check that caches are exact on this model, and how close each strategy comes to full recompute."""
    from kvilt.cli import compare, show

    documents = compare.some(options.read(docs), limit) if docs else compare.SAMPLES
    engine = compare.in_memory(options.engine(without_store=True))
    results = compare.gates(engine, documents, question)
    rows = compare.strategies(engine, options.strategy, documents, question, tokens)
    show.verified(results, rows, options.json)
    return 0 if all(r.passed for r in results) else FAILED


@verb(app)
def doctor(options: Run, docs: SomeDocs = None) -> int:
    """Find out why documents are not reused, and what to do about it. Without a model only the store is examined."""
    from kvilt.cli import show, work

    diagnosis = work.diagnose(options, docs or [])
    show.diagnosis(diagnosis, options.json)
    return 0 if diagnosis.healthy else FAILED


@verb(app, "list")
def list_(options: Output, kind: Kind = None) -> None:
    """List strategies, stores, compressors and tasks with their options."""
    from kvilt.cli import show, work

    show.catalogue(work.catalogue(kind), options.json)


mount.add(app, "bench", "kvilt.lab.bench.cli", "Measure time to first token, load and encoding.")
mount.add(app, "evaluate", "kvilt.lab.evaluate.cli", "Measure answer quality on datasets.")
mount.add(app, "calibrate", "kvilt.lab.evaluate.calibrate", "Fit a method's settings to your model and documents: ape.")
mount.add(app, "train", "kvilt.lab.train.cli", "Train what a strategy needs: kvlink, packet.")
mount.add(app, "demo", "kvilt.lab.demo", "See it work on the built-in model and documents.")
