"""`kvilt train`: packet, linked-packet, kvlink. Data on stdout, progress on stderr."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer import Argument, Option

from kvilt.errors import TrainError

if TYPE_CHECKING:
    from kvilt.lab.train.data import Sample, Source
    from kvilt.lab.train.loop import Progress
    from kvilt.lab.train.packet import PacketConfig

app = typer.Typer(
    help="Train vectors for a frozen model (packet, linked-packet), or the model itself (kvlink).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
Config = TypeVar("Config")
LINE_SECONDS = 5.0  # between lines of progress

Model = Annotated[str, Option("--model", "-m", envvar="KVILT_MODEL", help="Folder or hub name of the model.")]
Data = Annotated[
    list[str], Argument(metavar="DATA...", help="JSONL files as [kind:]file[@weight]; kinds: docs/training.md.")
]
Out = Annotated[Path, Option("--out", "-o", help="Folder for the result; run again with the same one to resume.")]
HeldOut = Annotated[list[str] | None, Option("--held-out", help="Data to measure on (default: a share of DATA).")]
Set = Annotated[list[str] | None, Option("--set", help="A setting, as in --set steps=200; all: docs/training.md.")]
System = Annotated[str | None, Option("--system", help="Text in front of the documents; '' for none.")]
DType = Annotated[str, Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, Option("--device", help="auto, cpu or cuda.")]
Json = Annotated[bool, Option("--json", help="Print JSON on stdout.")]


@app.command("packet")
def packet(
    model: Model, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None, system: System = None,
    dtype: DType = "auto", device: Device = "auto", as_json: Json = False,
) -> None:  # fmt: skip
    """Train KV Packet's header and trailer; writes OUT/wrapper.safetensors."""
    from kvilt.lab.train.packet import PacketConfig

    _wrapper((model, dtype, device, system), data, held_out, _configured(PacketConfig(), setting), out, as_json)


@app.command("linked-packet")
def linked_packet(
    model: Model, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None, system: System = None,
    dtype: DType = "auto", device: Device = "auto", as_json: Json = False,
) -> None:  # fmt: skip
    """Train header, trailer and link vectors; writes OUT/wrapper.safetensors."""
    from kvilt.lab.train.packet import PacketConfig

    _wrapper((model, dtype, device, system), data, held_out, _configured(PacketConfig(links=4), setting), out, as_json)


@app.command("kvlink")
def kvlink(
    model: Model, data: Data, out: Out, held_out: HeldOut = None, setting: Set = None, as_json: Json = False
) -> None:
    """Fine-tune the model and its link tokens; writes a checkpoint to OUT."""
    from kvilt.lab.train.kinds import MIXTURE, weighted
    from kvilt.lab.train.kvlink import KVLinkConfig, train_kvlink

    sources, tests = _sources(data, held_out)
    config = _configured(KVLinkConfig(), setting)
    path = train_kvlink(model, weighted(sources, MIXTURE), config, out, tests, _Meter())
    _show({"checkpoint": str(path)}, as_json)


def _wrapper(
    model: tuple[str, str, str, str | None], data: Sequence[str], held_out: Sequence[str] | None, config: PacketConfig,
    out: Path, as_json: bool,
) -> None:  # fmt: skip
    from kvilt.engine.engine import Engine
    from kvilt.lab.train.packet import WRAPPER, train_packet

    sources, tests = _sources(data, held_out)
    name, dtype, device, system = model
    engine = Engine.load(name, "block", "memory", dtype=dtype, device=device, system=system)
    made = train_packet(engine, sources, config, out, tests, _Meter())
    _show({"wrapper": str(out / WRAPPER), "best": json.loads(made.metadata["best"])}, as_json)


def _sources(data: Sequence[str], held_out: Sequence[str] | None) -> tuple[list[Source], list[Sample] | None]:
    from kvilt.lab.train.data import HELD_OUT_SPLITS
    from kvilt.lab.train.kinds import source

    tests = [s for spec in held_out for s in source(spec, HELD_OUT_SPLITS).samples] if held_out else None
    return [source(spec) for spec in data], tests


def _configured(config: Config, settings: Sequence[str] | None) -> Config:
    """A configuration with "key=value" settings applied. Raises TrainError for unknown keys and wrong values."""
    known: dict[str, Any] = dataclasses.asdict(config)  # type: ignore[call-overload]
    changed = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if key not in known or not equals:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TrainError(f"--set {setting}: write key=value.{hint} Keys: {', '.join(known)}.")
        changed[key] = _converted(known[key], value, setting)
    made: Config = dataclasses.replace(config, **changed)  # type: ignore[type-var]
    return made


def _converted(default: Any, value: str, setting: str) -> Any:
    kind = type(default)
    if kind is bool and value.lower() in ("true", "false", "yes", "no", "1", "0"):
        return value.lower() in ("true", "yes", "1")
    if kind is tuple:
        return tuple(value.split("|"))
    try:
        return kind(value) if kind is not bool else kind(int(value))
    except ValueError as error:
        raise TrainError(f"--set {setting}: this setting is a {kind.__name__}.") from error


def _show(result: dict[str, Any], as_json: bool) -> None:
    lines = [f"{name}: {value}" for name, value in result.items()]
    print(json.dumps(result) if as_json else "\n".join(lines))


class _Meter:
    """Says on stderr how far a training is: a line that is rewritten on a terminal, one now and then elsewhere."""

    def __init__(self) -> None:
        self.began = self.spoke = time.monotonic()
        self.end, self.stage = "\r" if sys.stderr.isatty() else "\n", ""

    def __call__(self, p: Progress) -> None:
        """Hear of a step."""
        now, last = time.monotonic(), p.step == p.steps
        if p.stage == self.stage and not last and self.end == "\n" and now - self.spoke < LINE_SECONDS:
            return
        self.spoke, self.stage = now, p.stage
        left = "" if p.left != p.left else f", about {_duration(p.left)} left"
        loss = "" if p.loss != p.loss else f" loss {p.loss:.4f}"
        held_out = "" if p.held_out is None else f" | held out: {p.held_out} (best step {p.best_step})"
        line = f"{p.stage} {p.step:,}/{p.steps:,} after {_duration(now - self.began)}{left}{loss}{held_out}"
        print(f"{line:<100}", end="\n" if last else self.end, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
