"""`kvilt train`: what a strategy needs to be trained."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer import Argument, Option

from kvilt import registry
from kvilt.cli import show, talk
from kvilt.cli.options import Loaded, Named, verb
from kvilt.errors import TrainError

if TYPE_CHECKING:
    from kvilt.lab.train.data import Sample, Source
    from kvilt.lab.train.loop import Progress

app = typer.Typer(
    help="Train vectors for a frozen model (packet, linked-packet), or the model itself (kvlink).",
    rich_markup_mode=None,
)
Config = TypeVar("Config")
Data = Annotated[
    list[str], Argument(metavar="DATA...", help="JSONL files as [kind:]file[@weight]; kinds: docs/training.md.")
]
Out = Annotated[Path, Option("--out", "-o", help="Folder for the result; run again with the same one to resume.")]
HeldOut = Annotated[list[str] | None, Option("--held-out", help="Data to measure on (default: a share of DATA).")]
Set = Annotated[list[str] | None, Option("--set", help="A setting, as in --set steps=200; all: docs/training.md.")]


@verb(app)
def packet(options: Loaded, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None) -> None:
    """Train KV Packet's header and trailer; writes OUT/wrapper.safetensors."""
    _wrapper(options, data, out, held_out, setting or [])


@verb(app)
def linked_packet(options: Loaded, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None) -> None:
    """Train header, trailer and link vectors; writes OUT/wrapper.safetensors."""
    _wrapper(options, data, out, held_out, ["links=4", *(setting or [])])


@verb(app)
def kvlink(options: Named, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None) -> None:
    """Fine-tune the model and its link tokens; writes a checkpoint to OUT."""
    from kvilt.lab.train.kinds import MIXTURE, weighted
    from kvilt.lab.train.kvlink import KVLinkConfig, train_kvlink

    sources, tests = _sources(data, held_out)
    config = configured(KVLinkConfig(), setting or [])
    with talk.meter("training") as meter:
        tell = functools.partial(_told, meter)
        path = train_kvlink(options.named(), weighted(sources, MIXTURE), config, out, tests, tell)
    show.out(options.json, {"checkpoint": str(path)}, [f"checkpoint: {path}"])


def _wrapper(
    options: Loaded, data: Sequence[str], out: Path, held_out: Sequence[str] | None, settings: Sequence[str]
) -> None:
    from kvilt.lab.train.packet import WRAPPER, PacketConfig, train_packet

    config, (sources, tests) = configured(PacketConfig(), settings), _sources(data, held_out)
    engine = options.load("block")
    with talk.meter("training") as meter:
        made = train_packet(engine, sources, config, out, tests, functools.partial(_told, meter))
    best = json.loads(made.metadata["best"])
    show.out(
        options.json, {"wrapper": str(out / WRAPPER), "best": best}, [f"wrapper: {out / WRAPPER}", f"best: {best}"]
    )


def _sources(data: Sequence[str], held_out: Sequence[str] | None) -> tuple[list[Source], list[Sample] | None]:
    from kvilt.lab.train.data import HELD_OUT_SPLITS
    from kvilt.lab.train.kinds import source

    tests = [s for spec in held_out for s in source(spec, HELD_OUT_SPLITS).samples] if held_out else None
    return [source(spec) for spec in data], tests


def configured(config: Config, settings: Sequence[str]) -> Config:
    """A configuration with "key=value" settings applied. Raises UserError for unknown keys and wrong values."""
    pairs = {key.strip(): value for key, _, value in (setting.partition("=") for setting in settings)}
    if wrong := next((s for s in settings if "=" not in s), None):
        raise TrainError(f"--set {wrong}: write key=value.")
    cls: Any = type(config)
    changed: Config = dataclasses.replace(config, **registry.values(cls, pairs, "--set"))  # type: ignore[type-var]
    return changed


def _told(meter: talk.Meter, p: Progress) -> None:
    loss = "" if p.loss != p.loss else f", loss {p.loss:.4f}"
    held_out = "" if p.held_out is None else f", held out: {p.held_out} (best step {p.best_step})"
    meter.label = p.stage
    meter(p.step, p.steps, f"{p.step:,}/{p.steps:,}{loss}{held_out}", None if p.left != p.left else p.left)
