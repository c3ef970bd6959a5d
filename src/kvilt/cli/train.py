"""`kvilt train`: packet, linked-packet, kvlink."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from typer import Argument, Option

from kvilt import registry
from kvilt.cli import show, talk
from kvilt.cli.options import Loaded, group, verb
from kvilt.errors import TrainError

if TYPE_CHECKING:
    from kvilt.lab.train.data import Sample, Source
    from kvilt.lab.train.loop import Progress

app = group("Train vectors for a frozen model (packet, linked-packet), or the model itself (kvlink).")
Config = TypeVar("Config")

Data = Annotated[
    list[str], Argument(metavar="DATA...", help="JSONL files as [kind:]file[@weight]; kinds: docs/training.md.")
]
Out = Annotated[Path, Option("--out", "-o", help="Folder for the result; run again with the same one to go on.")]
HeldOut = Annotated[list[str] | None, Option("--held-out", help="Data to measure on (default: a share of DATA).")]
Set = Annotated[list[str] | None, Option("--set", help="A setting, as in --set steps=200; all: docs/training.md.")]


@verb(app)
def packet(options: Loaded, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None) -> None:
    """Train KV Packet's header and trailer; writes OUT/wrapper.safetensors."""
    _wrapper(options, data, out, held_out, setting or [])


@verb(app, "linked-packet")
def linked_packet(options: Loaded, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None) -> None:
    """Train header, trailer and link vectors; writes OUT/wrapper.safetensors."""
    _wrapper(options, data, out, held_out, ["links=4", *(setting or [])])


@verb(app)
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
    from kvilt.lab.train.packet import WRAPPER, PacketConfig, train_packet

    config, (sources, tests) = configured(PacketConfig, settings), _sources(data, held_out)
    engine = options.load("block")
    with talk.meter("training") as meter:
        made = train_packet(engine, sources, config, out, tests, functools.partial(_told, meter))
    best = json.loads(made.metadata["best"])
    lines = [f"wrapper: {out / WRAPPER}", *(f"best {name}: {value}" for name, value in best.items())]
    show.out(options.json, {"wrapper": str(out / WRAPPER), "best": best}, lines)


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
