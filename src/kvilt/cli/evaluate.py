"""`kvilt evaluate`: run tasks, make the table and the plot; and `kvilt calibrate`."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from typer import Argument, Option

from kvilt import registry
from kvilt.cli import show, talk
from kvilt.cli.options import Loaded, Output, group, verb
from kvilt.errors import UserError

if TYPE_CHECKING:
    from kvilt.lab.evaluate.tasks.base import Task

app = group("Measure answer quality and fidelity on datasets.")
calibrating = group("Fit a method's settings to your model and documents.")

TaskName = Annotated[
    str, Argument(metavar="TASK", help="Task with options (kvilt list task): nq:path=FILE,documents=20.")
]
Out = Annotated[Path, Option("--out", "-o", help="Folder of the records; run again with the same one to go on.")]
Strategies = Annotated[list[str] | None, Option("--strategy", "-s", help="Strategies; full is always run.")]
Compressions = Annotated[list[str] | None, Option(help="Compressions to run every strategy with ('' is none).")]
Store = Annotated[str, Option("--store", envvar="KVILT_STORE", help="Where caches are kept.")]
Limit = Annotated[int | None, Option("--limit", min=1, help="Samples (default: all).")]
Seed = Annotated[int, Option("--seed", help="Of the draw, and of the documents' order.")]
Shuffle = Annotated[bool, Option("--shuffle", help="Shuffle each sample's documents.")]
Folder = Annotated[Path, Argument(metavar="FOLDER", help="Folder of records.")]
By = Annotated[str | None, Option("--by", help="Split by position, hops, kind or needed.")]
Plot = Annotated[bool, Option("--plot/--no-plot", help="Draw quality over compute and over TTFT.")]
Docs = Annotated[list[str], Argument(metavar="DOCS...", help=".txt, .md or .jsonl files, or folders of them.")]
Profile = Annotated[Path, Option("--out", "-o", help="The profile, a JSON file.")]
Questions = Annotated[Path | None, Option(help="Text file, one question a line (default: made up from the documents).")]
Prompts = Annotated[int, Option("--prompts", min=1, help="Make up this many.")]
Group = Annotated[int, Option("--group", min=1, help="Documents in a prompt.")]


@verb(app)
def run(
    options: Loaded, task: TaskName, out: Out, strategy: Strategies = None, compress: Compressions = None,
    store: Store = "memory:budget=2GB", limit: Limit = None, seed: Seed = 0, shuffle: Shuffle = False,
) -> None:  # fmt: skip
    """Answer a task's questions with every strategy; writes one record file each, and prints the table."""
    from kvilt.lab.evaluate import runner
    from kvilt.lab.evaluate.report import report as made_report

    made = cast("Task", registry.build("task", task))
    system = made.system if options.system is None else options.system
    engine = dataclasses.replace(options, system=system).load("full", store)
    chosen = strategy or ["naive", "block", "epic:tokens=16"]
    with talk.meter(made.label) as meter:
        paths = runner.run(engine, chosen, made, out, limit, seed, meter, shuffle=shuffle, compressions=compress or [])
    show.out(options.json, {"records": [str(path) for path in paths]}, made_report(out).splitlines())


@verb(app)
def report(options: Output, out: Folder, by: By = None, plot: Plot = True) -> None:
    """Make the Markdown table (report.md) and the plots of a folder of records."""
    from kvilt.lab.evaluate import report as reports

    text, drawn = reports.report(out, by), reports.plot(out) if plot else []
    show.out(options.json, {"written": [str(out / "report.md"), *map(str, drawn)]}, text.splitlines())


@calibrating.callback()
def calibrate() -> None:
    """Fit a method's settings to your model and documents."""


@verb(calibrating)
def ape(
    options: Loaded, docs: Docs, out: Profile = Path("ape.json"), questions: Questions = None,
    prompts: Prompts = 48, group: Group = 5,
) -> None:  # fmt: skip
    """Choose APE's temperature and scale by closeness to full recompute; prints the strategy to use from then on."""
    from kvilt.lab.evaluate import calibrate as fitting

    if not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: there is no such folder.")
    documents, lines = options.read(docs), fitting.lines(questions)
    engine = options.load("ape")
    made_up = functools.partial(fitting.made_up, engine, documents, prompts, group)
    sets = made_up() if lines is None else fitting.asked(engine, documents, lines, group)
    with talk.meter("calibrating") as meter:
        profile = fitting.calibrate(engine, sets, on_progress=lambda number, line: meter(number, number, line))
    talk.say(f"KL to full recompute {profile.kl:.4f} nats per token, {profile.plain:.4f} with temperature and scale 1")
    profile.save(out)
    spec = f"ape:profile={out}"
    show.out(options.json, {"strategy": spec, **dataclasses.asdict(profile), "prompts": len(sets)}, [spec])
