"""The verbs. Each is a few lines: read, open, do, show."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from kvilt import registry
from kvilt.cli import FAILED, bench, cache, evaluate, talk, train
from kvilt.cli.options import Answering, Loaded, Output, Run, Stored, verb
from kvilt.cli.several import Several
from kvilt.errors import MissingExtra

app = typer.Typer(
    help="Encode every document once, alone, and reuse its KV cache in any prompt.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for name, part in {"cache": cache, "bench": bench, "evaluate": evaluate, "train": train}.items():
    app.add_typer(part.app, name=name)
app.add_typer(evaluate.calibrating, name="calibrate")


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
TimeToLive = Annotated[float | None, Option("--ttl", help="Seconds until the caches expire.")]
Question = Annotated[
    str, Argument(metavar="[QUESTION]", help="What to answer from the documents; - for stdin, one question a line.")
]
Ask = Annotated[list[str] | None, Option("--question", help="What to ask; may be given several times.")]
Limit = Annotated[int, Option("--limit", min=1, help="Use this many documents.")]
Tokens = Annotated[int, Option("--tokens", min=1, help="Compare answers of up to this many tokens.")]
Kind = Annotated[str | None, Argument(metavar="[KIND]", help="strategy, store, compress or task; all if left out.")]
ForModel = Annotated[
    str | None, Argument(metavar="[MODEL]", help="Say which strategies this model can take, and what others lack.")
]
DemoModel = Annotated[str, Option("--model", "-m", help="Model to show; wrappers and checkpoints ship for builtin.")]
Asked = Annotated[int, Option("--questions", "-n", min=1, help="Questions to ask.")]
Picture = Annotated[Path, Option("--out", help="Where the plot goes.")]
Server = Annotated[str | None, Option("--vllm", metavar="URL", help="Examine a vLLM server instead.")]
ServedModel = Annotated[str, Argument(metavar="MODEL", help="Folder or hub name, as for vllm serve.")]
Rest = Annotated[list[str] | None, Argument(metavar="[OPTIONS OF vllm serve...]", help="For example --port 8001.")]
ServedBy = Annotated[str, Option("--strategy", "-s", help="As for encode.")]
Smaller = Annotated[str, Option("--compress", metavar="SPEC", help="As for encode.")]
Told = Annotated[str, Option("--system", help="System text of chats that bring none.")]
EncodeMissing = Annotated[bool, Option("--encode", help="Encode documents that are missing, in the background.")]
PrintOnly = Annotated[bool, Option("--print", help="Print the command instead of running it.")]
Version = Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def kvilt(version: Version = False) -> None:
    """Encode every document once, alone, and reuse its KV cache in any prompt."""


@verb(app)
def encode(options: Run, docs: Docs, dry_run: DryRun = False, ttl: TimeToLive = None) -> int:
    """Encode documents and store their caches. A rerun encodes only what is missing."""
    from kvilt.cli import work

    return work.encode(options, docs, dry_run, ttl)


@verb(app, cls=Several)
def ask(
    options: Run, answering: Answering, question: Question = "-", docs: DocsOption = None, pick: Pick = None
) -> int:
    """Answer a question over documents, reusing their caches."""
    from kvilt.cli import work

    return work.ask(options, answering, question, docs or [], pick or [])


@verb(app)
def verify(options: Run, docs: SomeDocs = None, question: Ask = None, limit: Limit = 4, tokens: Tokens = 64) -> int:
    """Check that caches are exact on this model, and how close each strategy comes to full recompute."""
    from kvilt.cli import check

    return 0 if check.verify(options, docs or [], question or [], limit, tokens) else FAILED


@verb(app)
def doctor(options: Run, docs: SomeDocs = None, vllm: Server = None) -> int:
    """Find out why documents are not reused, and what to do about it. Without a model only the store is examined."""
    from kvilt.cli import check

    return 0 if check.diagnose(options, docs or [], vllm) else FAILED


@verb(app, context_settings={"ignore_unknown_options": True})
def vllm(
    options: Stored,
    model: ServedModel,
    rest: Rest = None,
    strategy: ServedBy = registry.DEFAULT,
    compress: Smaller = "",
    system: Told = "",
    encode_missing: EncodeMissing = False,
    print_only: PrintOnly = False,
) -> int:
    """Serve documents in any order with vLLM. Options that Kvilt does not know go to `vllm serve`."""
    from kvilt.cli import work

    wanted = {"strategy": strategy, "compress": compress, "system": system, "encode": encode_missing}
    return work.serve(options, model, rest or [], wanted, print_only)


@verb(app, "list")
def list_(options: Loaded, kind: Kind = None, for_model: ForModel = None) -> None:
    """List strategies, stores, compressors and tasks with their options."""
    from kvilt.cli import catalogue, show

    options = dataclasses.replace(options, model=for_model)
    kinds = catalogue.listed(kind, options.load("full") if for_model else None)
    show.out(options.json, catalogue.as_data(kinds), catalogue.lines(kinds))


@verb(app)
def demo(options: Output, model: DemoModel = "builtin", questions: Asked = 40, out: Picture = Path("demo.png")) -> None:
    """Encode the built-in collection, ask about it with every strategy, and print one table."""
    from kvilt.cli import show
    from kvilt.lab import demo as story

    talk.silence_libraries(options.verbose, options.quiet)
    with talk.meter("demo") as meter:
        rows = story.run(model, questions, meter)
    heads = [story.COLUMNS[0], *(f"{column}>" for column in story.COLUMNS[1:])]
    lines = show.table(heads, map(story.cells, rows))
    show.out(options.json, [dataclasses.asdict(row) for row in rows], [f"{questions} questions", *lines])
    with contextlib.suppress(MissingExtra):
        story.plot(rows, out)
        talk.say(f"plot: {out}")
