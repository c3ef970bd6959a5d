"""All verbs of the command line, and the two that belong nowhere else: `list` and `demo`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from kvilt.cli import bench, cache, catalogue, check, collections, lab, serving, show, talk, work
from kvilt.cli.options import Loaded, Output, Several, group, verb
from kvilt.errors import MissingExtra

app = group("Encode every document once, alone, and reuse its KV cache in any prompt.")
app.add_typer(cache.app, name="cache")
app.add_typer(collections.app, name="collection")
app.add_typer(bench.app, name="bench")
app.add_typer(lab.evaluating, name="evaluate")
app.add_typer(lab.training, name="train")
app.add_typer(lab.calibrating, name="calibrate")


def _version(wanted: bool) -> None:
    if wanted:
        from kvilt import __version__

        print(__version__)
        raise typer.Exit


Kind = Annotated[
    str | None, Argument(metavar="[KIND]", help="strategy, store, compress, retrieve or task; all if left out.")
]
ForModel = Annotated[
    str | None, Argument(metavar="[MODEL]", help="Say which strategies this model can take, and what others lack.")
]
DemoModel = Annotated[str, Option("--model", "-m", help="Model to show: builtin (a toy), smollm2-qa (real passages).")]
Asked = Annotated[int, Option("--questions", "-n", min=1, help="Questions to ask.")]
Picture = Annotated[Path, Option("--out", help="Where the plot goes.")]
Version = Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def kvilt(version: Version = False) -> None:
    """Encode every document once, alone, and reuse its KV cache in any prompt."""


verb(app, cls=Several)(work.encode)
verb(app, cls=Several)(work.ask)
verb(app, cls=Several)(work.chat)
verb(app)(check.verify)
verb(app)(check.doctor)
verb(app, context_settings={"ignore_unknown_options": True})(work.vllm)
verb(app)(serving.serve)


@verb(app, "list")
def list_(options: Loaded, kind: Kind = None, for_model: ForModel = None) -> None:
    """List strategies, stores, compressors and tasks with their options."""
    options = dataclasses.replace(options, model=for_model or (options.model if kind == "strategy" else None))
    kinds = catalogue.listed(kind, options.load("full") if options.model else None)
    show.out(options.json, catalogue.as_data(kinds), catalogue.lines(kinds))


@verb(app)
def demo(options: Output, model: DemoModel = "builtin", questions: Asked = 20, out: Picture = Path("demo.png")) -> None:
    """Encode documents that ship with the package, ask about them with every strategy, and print one table."""
    from kvilt.lab import demo as story

    talk.silence_libraries(options.verbose, options.quiet)
    with talk.meter("demo") as meter:
        rows = story.run(model, questions, meter)
    heads = [story.COLUMNS[0], *(f"{column}>" for column in story.COLUMNS[1:])]
    told = (*show.table(heads, map(story.cells, rows)), *story.examples(model, questions, rows))
    show.out(options.json, [dataclasses.asdict(row) for row in rows], [f"{questions} questions", *told])
    with contextlib.suppress(MissingExtra):
        story.plot(rows, out)
        talk.say(f"plot: {out}")
