"""`kvilt evaluate`: run tasks, make the table and the plot. Tables on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

if TYPE_CHECKING:
    from kvilt.lab.evaluate.runner import Progress

app = typer.Typer(
    help="Measure answer quality and fidelity on datasets.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
LINE_SECONDS = 5.0  # between lines of progress

Out = Annotated[Path, Option("--out", "-o", help="Folder of the records; run again with the same one to resume.")]


@app.command()
def run(
    task: Annotated[
        str, Argument(metavar="TASK", help="Task with options (kvilt list task): nq:path=FILE,documents=20.")
    ],
    model: Annotated[str, Option("--model", "-m", envvar="KVILT_MODEL", help="Folder or hub name of the model.")],
    out: Out,
    strategy: Annotated[list[str] | None, Option("--strategy", "-s", help="Strategies; full is always run.")] = None,
    compress: Annotated[
        list[str] | None, Option("--compress", help="Compressions to run every strategy with ('' is none).")
    ] = None,
    store: Annotated[str, Option("--store", envvar="KVILT_STORE", help="Where caches are kept.")] = "memory:budget=2GB",
    limit: Annotated[int | None, Option("--limit", help="Samples (default: all).")] = None,
    seed: Annotated[int, Option("--seed", help="Of the draw, and of the documents' order.")] = 0,
    shuffle: Annotated[bool, Option("--shuffle", help="Shuffle each sample's documents.")] = False,
    system: Annotated[
        str | None, Option("--system", help="Text in front of the documents (default: the task's own).")
    ] = None,
    dtype: Annotated[str, Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, Option("--device", help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Answer a task's questions with every strategy; writes one record file each, and prints the table."""
    from transformers.utils import logging

    from kvilt import registry
    from kvilt.engine.engine import Engine
    from kvilt.lab.evaluate import report as reports
    from kvilt.lab.evaluate import runner

    logging.disable_progress_bar()
    made = registry.build("task", task)
    text = system if system is not None else getattr(made, "system", None)
    engine = Engine.load(model, "full", store, system=text, dtype=dtype, device=device)
    chosen = strategy or ["naive", "block", "epic:tokens=16"]
    more = {"shuffle": shuffle, "compressions": compress or []}
    runner.run(engine, chosen, made, out, limit, seed, _Meter(), **more)  # type: ignore[arg-type]
    typer.echo(reports.report(out))


@app.command()
def report(
    out: Annotated[Path, Argument(metavar="FOLDER", help="Folder of records.")],
    by: Annotated[str | None, Option("--by", help="Split by position, hops, kind or needed.")] = None,
    plot: Annotated[bool, Option("--plot/--no-plot", help="Draw quality over compute and over TTFT.")] = True,
    as_json: Annotated[bool, Option("--json", help="Print paths of what was written as JSON.")] = False,
) -> None:
    """Make the Markdown table (report.md) and the plots of a folder of records."""
    from kvilt.lab.evaluate import report as reports

    text = reports.report(out, by)
    drawn = reports.plot(out) if plot else []
    written = [str(out / "report.md"), *map(str, drawn)]
    typer.echo(json.dumps({"written": written}) if as_json else text)


class _Meter:
    """A line of progress now and then."""

    def __init__(self) -> None:
        self.spoke = self.began = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self.spoke < LINE_SECONDS and progress.done < progress.total:
            return
        self.spoke = now
        left = (now - self.began) / progress.done * (progress.total - progress.done)
        print(f"{progress.task}: {progress.done}/{progress.total}, {left:.0f} s left", file=sys.stderr)
