"""`kvilt demo`: encode the shipped documents once, ask with every strategy, print one table."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvilt import builtin
from kvilt.engine.engine import Engine
from kvilt.engine.text import TextFormat
from kvilt.lab.evaluate.metrics import normalise
from kvilt.lab.evaluate.tasks.base import Sample
from kvilt.model.loading import load_model
from kvilt.registry import build
from kvilt.types import Answer, Document

UNTRAINED = ["full", "naive", "block:sink=system", "prompt_cache:slot=128", "epic:tokens=8"]
WRAPPERS = {"kv_packet": "kv_packet:wrapper={}", "linked_packet": "linked_packet:wrapper={}"}
CHECKPOINTS = {
    "builtin-kvlink0": "kvlink:links=0",
    "builtin-kvlink1": "kvlink:links=1",
    "builtin-kvlink5": "kvlink:links=5",
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    strategy: str
    answers: tuple[Answer, ...]
    right: int
    same: int  # answers equal to full recompute's


def demo(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model to show; wrappers and checkpoints ship for builtin.")
    ] = "builtin",
    questions: Annotated[int, typer.Option("--questions", "-n", help="Questions to ask.")] = 40,
    out: Annotated[Path, typer.Option("--out", help="Where the plot goes.")] = Path("demo.png"),
    store: Annotated[str, typer.Option("--store", help="Where caches are kept (default: a temporary folder).")] = "",
) -> None:
    """Encode the built-in collection, ask about it with every strategy, and print one table."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    err = Console(stderr=True)
    asked = _questions(questions)
    with tempfile.TemporaryDirectory() as folder:
        place = store or f"disk:path={folder}"
        rows = [_ask(name, engine, asked, err) for name, engine in _engines(model, place, err).items()]
    rows = _compared(rows)
    Console(width=120 if not err.is_terminal else None).print(_table(rows, len(asked)))
    if _plot(rows, len(asked), out):
        err.print(f"plot: {out}")


def _questions(count: int) -> list[Sample]:
    """The same number of every kind, in a fixed order."""
    kinds: dict[str, list[Sample]] = {}
    for sample in build("task", "builtin").samples():  # type: ignore[attr-defined]
        kinds.setdefault(sample.metadata["kind"], []).append(sample)
    each = -(-count // len(kinds))
    return [s for found in kinds.values() for s in found[:: max(1, len(found) // each)][:each]][:count]


def _engines(model: str, store: str, err: Console) -> dict[str, Engine]:
    """An engine per strategy; trained ones only where what was trained for this model is at hand."""
    first = _load(model, store, "full")
    engines = {spec: first.with_strategy(spec) for spec in UNTRAINED}
    for name, spec in WRAPPERS.items():
        path = builtin.model_path() / f"{name}.safetensors"
        if model == "builtin" and path.is_file():
            engines[name] = first.with_strategy(spec.format(path))
    for name, spec in CHECKPOINTS.items():
        if model == "builtin" and builtin.model_path().with_name(name.replace("builtin", "model")).is_dir():
            engines[spec] = _load(name, store, spec)
    documents = _encoded()
    for engine in track(list(engines.values()), "encoding", console=err):
        if engine.strategy.encoding is not None:
            engine.encode(documents)
    return engines


def _encoded() -> list[Document]:
    """What every strategy encodes: the whole collection."""
    return list(builtin.documents().values())


def _load(model: str, store: str, spec: str) -> Engine:
    loaded, tokenizer = load_model(model)
    strategy, keep = build("strategy", spec), build("store", store)
    return Engine(loaded, TextFormat.of(tokenizer), strategy, keep)  # type: ignore[arg-type]


def _ask(name: str, engine: Engine, asked: Sequence[Sample], err: Console) -> Row:
    answers = [engine.answer(s.question, s.documents, max_new_tokens=48) for s in track(asked, name, console=err)]
    right = sum(normalise(s.answers[0]) in normalise(a.text) for s, a in zip(asked, answers, strict=True))
    return Row(name, tuple(answers), right, 0)


def _compared(rows: Sequence[Row]) -> list[Row]:
    full = [normalise(a.text) for a in rows[0].answers]
    same = [sum(normalise(a.text) == f for a, f in zip(r.answers, full, strict=True)) for r in rows]
    return [Row(r.strategy, r.answers, r.right, s) for r, s in zip(rows, same, strict=True)]


def _table(rows: Sequence[Row], count: int) -> Table:
    table = Table(title=f"{count} questions, 5-10 documents each; every document encoded once")
    for column in ("strategy", "right", "as full", "reused", "computed", "charged", "TTFT ms", "KB loaded"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in rows:
        table.add_row(row.strategy, f"{100 * row.right / count:.0f} %", f"{100 * row.same / count:.0f} %", *_costs(row))
    return table


def _costs(row: Row) -> list[str]:
    usage = [a.usage for a in row.answers]
    tokens = [
        f"{median(values):.0f}" for values in ([u.reused_tokens for u in usage], [u.computed_tokens for u in usage])
    ]
    charged, ttft = median(u.charged for u in usage), 1000 * median(u.ttft_s for u in usage)
    return [*tokens, f"{100 * charged:.0f} %", f"{ttft:.1f}", f"{median(u.bytes_loaded for u in usage) / 1e3:.0f}"]


def _plot(rows: Sequence[Row], count: int, path: Path) -> bool:
    """Answers right over charged compute; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for row in rows:
        axes.plot(
            [100 * median(a.usage.charged for a in row.answers)], [100 * row.right / count], "o", label=row.strategy
        )
    axes.set(xlabel="charged compute, % of full recompute", ylabel="answers right, %", xlim=(0, 105), ylim=(0, 105))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return True
