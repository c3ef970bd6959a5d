"""`kvilt evaluate`, `kvilt calibrate` and `kvilt train`: run tasks, fit a method's settings, train its vectors."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, cast

from typer import Argument, Option

from kvilt import registry
from kvilt.cli import show, talk
from kvilt.cli.options import Loaded, Output, group, verb
from kvilt.errors import TrainError, UserError

if TYPE_CHECKING:
    from kvilt.lab.evaluate.tasks.base import Task
    from kvilt.lab.train.data import Sample, Source
    from kvilt.lab.train.loop import Progress

evaluating = group("Measure answer quality and fidelity on datasets.")
calibrating = group("Fit a method's settings to your model and documents.")
training = group("Train vectors or adapters for a frozen model, or the model itself (kvlink).")

Config = TypeVar("Config")

TaskName = Annotated[
    str, Argument(metavar="TASK", help="Task with options (kvilt list task): nq:path=FILE,documents=20.")
]
Out = Annotated[Path, Option("--out", "-o", help="Folder for the result; run again with the same one to go on.")]
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
Data = Annotated[
    list[str], Argument(metavar="DATA...", help="JSONL files as [kind:]file[@weight]; kinds: docs/training.md.")
]
HeldOut = Annotated[list[str] | None, Option("--held-out", help="Data to measure on (default: a share of DATA).")]
Set = Annotated[list[str] | None, Option("--set", help="A setting, as in --set steps=200; all: docs/training.md.")]


@verb(evaluating)
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
    chosen = strategy or ["naive", registry.DEFAULT, "epic:tokens=16"]
    with talk.meter(made.label) as meter:
        paths = runner.run(engine, chosen, made, out, limit, seed, meter, shuffle=shuffle, compressions=compress or [])
    show.out(options.json, {"records": [str(path) for path in paths]}, made_report(out).splitlines())


@verb(evaluating)
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


@verb(training)
def packet(options: Loaded, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None) -> None:
    """Train KV Packet's header and trailer; writes OUT/wrapper.safetensors."""
    _wrapper(options, data, out, held_out, setting or [])


@verb(training, "linked-packet")
def linked_packet(options: Loaded, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None) -> None:
    """Train header, trailer and link vectors; writes OUT/wrapper.safetensors."""
    _wrapper(options, data, out, held_out, ["links=4", *(setting or [])])


@verb(training)
def writer(options: Loaded, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None) -> None:
    """Train an adapter that encodes documents, and vectors around them; writes OUT/adapter.safetensors and a wrapper."""
    _wrapper(options, data, out, held_out, ["adapter=writer", *(setting or [])])


@verb(training, "query-lora")
def query_lora(options: Loaded, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None) -> None:
    """Train an adapter of the questions; documents are encoded without it. Writes OUT/adapter.safetensors."""
    _wrapper(options, data, out, held_out, ["adapter=query", "header=0", "trailer=0", *(setting or [])])


@verb(training)
def kvlink(options: Loaded, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None) -> None:
    """Fine-tune the model and its link tokens; writes a checkpoint to OUT."""
    from kvilt.lab.train.kinds import MIXTURE, weighted
    from kvilt.lab.train.kvlink import KVLinkConfig, train_kvlink

    name, (sources, tests) = options.named(), _sources(data, held_out)
    own = [f"dtype={options.dtype}", *([] if options.system is None else [f"systems={options.system}"])]
    config = configured(KVLinkConfig, [*own, *(setting or [])])
    talk.silence_libraries(options.verbose, options.quiet)
    with talk.meter("training") as meter:
        tell = functools.partial(_told, meter)
        path = train_kvlink(name, weighted(sources, MIXTURE), config, out, tests, tell, options.device)
    show.out(options.json, {"checkpoint": str(path)}, [f"checkpoint: {path}"])


def _wrapper(
    options: Loaded, data: Sequence[str], out: Path, held_out: Sequence[str] | None, settings: Sequence[str]
) -> None:
    from kvilt.lab.train.packet import ADAPTER, WRAPPER, PacketConfig, train_packet

    config, (sources, tests) = configured(PacketConfig, settings), _sources(data, held_out)
    engine = options.load("block")
    with talk.meter("training") as meter:
        made = train_packet(engine, sources, config, out, tests, functools.partial(_told, meter))
    best = json.loads(made.metadata["best"])
    adapter = {"adapter": str(out / ADAPTER)} if config.adapter else {}
    files = adapter | ({"wrapper": str(out / WRAPPER)} if config.header + config.trailer + config.links else {})
    lines = [*(f"{name}: {path}" for name, path in files.items()), *(f"best {n}: {v}" for n, v in best.items())]
    show.out(options.json, {**files, "best": best}, lines)


def _sources(data: Sequence[str], held_out: Sequence[str] | None) -> tuple[list[Source], list[Sample] | None]:
    from kvilt.lab.train.data import HELD_OUT_SPLITS
    from kvilt.lab.train.kinds import source

    tests = [s for spec in held_out for s in source(spec, HELD_OUT_SPLITS).samples] if held_out else None
    return [source(spec) for spec in data], tests


def configured(cls: type[Config], settings: Sequence[str]) -> Config:
    """A configuration with "key=value" settings, the last of a key counts. Raises UserError for unknown ones."""
    pairs = [setting.partition("=") for setting in settings]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise TrainError(f"--set {wrong[0]}: write key=value.")
    given = registry.values(cls, {key: value for key, _, value in pairs}, "--set")
    return cls(**given)


def _told(meter: talk.Meter, p: Progress) -> None:
    """How far a training is, and about how long it will take."""
    left = "" if p.left != p.left else f", about {talk.span(p.left)} left in all"
    loss = "" if p.loss != p.loss else f", loss {p.loss:.4f}"
    held_out = "" if p.held_out is None else f"; held out, at best step {p.best_step}: {p.held_out}"
    meter(p.step, p.step, f"{p.stage} {p.step:,} of {p.steps:,}{left}{loss}{held_out}")
