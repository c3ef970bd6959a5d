"""Time to first token of strategies over context length, beside full prefill and beside the floor.

Everything a request pays is inside: tokenisation, keys, reading the documents' files, placing, the pass, picking the token.
The floor is the forward pass of the computed tokens alone over an already placed buffer, plus the bytes of the reused
rows at the rate at which `readinto` reads the same files into a reused buffer."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvilt.engine.engine import Engine
from kvilt.errors import UserError
from kvilt.lab.bench.subject import DOCUMENT_TOKENS, Subject
from kvilt.lab.bench.timing import seconds, summary, take_turns
from kvilt.lab.pages import figure, markdown
from kvilt.model.model import Model
from kvilt.plan import Plan
from kvilt.registry import build
from kvilt.stores.disk import DiskStore
from kvilt.stores.memory import MemoryStore
from kvilt.strategies.base import Strategy
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import Document

LONG_CONTEXT = 6000  # tokens; full prefill of longer prompts takes minutes and is measured once


@dataclass(frozen=True, eq=False)
class Setting:
    """One context length: engines that share a model and a store, and a prompt."""

    engines: dict[str, Engine]
    documents: list[Document]
    question: str
    store: DiskStore


def run(
    subject: Subject, counts: Sequence[int], strategies: Sequence[str], repeats: int,
    note: Callable[[str], None], keep: Path | None = None, compress: str = "", memory: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """TTFT rows per number of documents, full prefill always among them; caches are kept in `keep` for the next run.

    With `memory` every reusing strategy is measured once more with its documents in this process's memory. Counts that the
    model's context does not hold are left out. Raises UserError when it holds none."""
    context, s = subject.model.context_length, subject.model.shape
    fitting = [n for n in counts if (n + 1) * DOCUMENT_TOKENS <= context]
    if len(fitting) < len(counts):
        most = context // DOCUMENT_TOKENS - 1
        note(f"the context of {subject.name} holds {context} tokens: at most {most} documents.")
    if not fitting:
        raise UserError(f"{min(counts)} documents of {DOCUMENT_TOKENS} tokens: the context holds {context} tokens.")
    points, specs = [], list(dict.fromkeys(["full", *strategies]))
    with tempfile.TemporaryDirectory() as temporary:
        for count in fitting:
            note(f"{count} documents of {DOCUMENT_TOKENS} tokens: encoding")
            made = setting(subject, specs, keep or Path(temporary), count, compress, memory)
            note(f"{count} documents of {DOCUMENT_TOKENS} tokens: measuring")
            rows = measure(made, repeats, full_once=count * DOCUMENT_TOKENS > LONG_CONTEXT)
            made.store.close()
            tokens = sum(len(subject.text.document_ids(document)) for document in made.documents)
            points.append({"documents": count, "context": tokens, "rows": rows})
    made_with = {"dtype": str(s.dtype).removeprefix("torch."), "device": str(s.device), "repeats": repeats}
    return {"shape": subject.name, **made_with, "compress": compress, "points": points}


def setting(
    subject: Subject, specs: Sequence[str], folder: Path, documents: int, compress: str = "", memory: bool = False
) -> Setting:
    """Encode the documents for every strategy; WRAPPER in a specification stands for random vectors."""
    logging.getLogger("kvilt").setLevel(logging.ERROR)
    store, wrapper = DiskStore(str(folder / "store")), folder / "wrapper.safetensors"
    if not wrapper.is_file():
        header, trailer, links = torch.randn(3, 8, subject.model.hf.config.hidden_size) * 0.02
        folder.mkdir(parents=True, exist_ok=True)
        Wrapper(header, trailer, links=links).save(wrapper)
    engines, texts = {}, subject.documents(documents)
    for spec in specs:
        strategy = build("strategy", spec.replace("WRAPPER", f"'{wrapper}'"))
        assert isinstance(strategy, Strategy)
        engines[spec] = Engine(subject.model, subject.text, strategy, store, compress=compress)
        if engines[spec].strategy.encoding is not None:
            engines[spec].encode(texts)
            if memory:
                held = MemoryStore("64GB")
                engines[f"{spec} (memory)"] = Engine(subject.model, subject.text, strategy, held, compress=compress)
                engines[f"{spec} (memory)"].encode(texts)
    return Setting(engines, texts, subject.question, store)


def measure(made: Setting, repeats: int, full_once: bool = False) -> dict[str, dict[str, Any]]:
    """TTFT, floor and steps of every strategy, in turns; a first round of all but full prefill warms up."""
    steps: dict[str, dict[str, float]] = {}

    def ttft(name: str) -> Callable[[], float]:
        def once() -> float:
            usage = made.engines[name].answer(made.question, made.documents, max_new_tokens=1).usage
            steps[name] = usage.steps_s
            return usage.ttft_s

        return once

    turns = {name: ttft(name) for name in made.engines}
    reusing = {name: e for name, e in made.engines.items() if e.strategy.encoding is not None}
    plans = {name: e.plan(made.question, made.documents) for name, e in reusing.items()}
    turns |= {f"{name} forward": _forward(made.engines[name].model, plan) for name, plan in plans.items()}
    files = _files(made, next(iter(plans.values()))) if plans else []
    turns["readinto"] = lambda: _readinto(files)
    for warm in (t for name, t in turns.items() if name != "full"):
        warm()
    times = take_turns(turns, repeats, once=("full",) if full_once else ())
    rate = sum(f.stat().st_size for f in files) / summary(times["readinto"])["median"]
    return {name: _row(name, made, times, plans.get(name), rate) | {"steps_s": steps[name]} for name in made.engines}


def _files(made: Setting, plan: Plan) -> list[Path]:
    """The files that a plan reads."""
    keys = [s.cache.key.digest for s in plan.segments if s.cache is not None]
    return [next(made.store.path.rglob(f"{key}*.safetensors")) for key in keys]


def _row(name: str, made: Setting, times: dict[str, list[float]], plan: Plan | None, rate: float) -> dict[str, Any]:
    taken = summary(times[name])
    row: dict[str, Any] = {"ttft_s": taken, "of_full": taken["median"] / summary(times["full"])["median"]}
    if plan is None:
        return row
    loaded = sum(s.cache.nbytes for s in plan.segments if s.cache is not None and s.reused.any())
    forward = summary(times[f"{name} forward"])["median"]
    floor = forward + loaded / rate
    row |= {"forward_s": forward, "bytes": loaded, "readinto_bytes_per_s": rate, "floor_s": floor}
    row |= {"of_floor": taken["median"] / floor, "computed_tokens": len(plan.computed_rows)}
    return {**row, "charged": plan.charged(made.engines[name].info.linear_cost)}


def _forward(model: Model, plan: Plan) -> Callable[[], float]:
    """The computed tokens' pass alone over rows that lie in the buffer already."""

    def once() -> float:
        with model.placed(plan) as placed:
            placed.place_all()
            return seconds(lambda: model.forward(plan, placed, 1))

    return once


def _readinto(files: Sequence[Path]) -> float:
    """Reading the files whole into one reused buffer."""
    buffer = memoryview(bytearray(max(f.stat().st_size for f in files)))

    def once() -> None:
        for path in files:
            with open(path, "rb", buffering=0) as file:
                file.readinto(buffer)

    once()  # the buffer's pages exist
    return seconds(once)


def table(result: dict[str, Any]) -> str:
    """Markdown: one row per context and strategy."""
    heads = ("context", "strategy", "runs", "TTFT s", "of full", "floor s", "TTFT / floor", "computed", "MB loaded")
    lines = [(point["context"], name, row) for point in result["points"] for name, row in point["rows"].items()]
    return markdown(heads, [_cells(*line) for line in lines])


def _cells(context: int, name: str, row: dict[str, Any]) -> list[str]:
    taken, share = row["ttft_s"], f"{100 * row['of_full']:.2f} %" if "of_full" in row else ""
    head = [str(context), re.sub(":wrapper=[^ ]*", "", name), str(taken["n"]), f"{taken['median']:.3f}", share]
    if "floor_s" not in row:
        return [*head, "", "", "", ""]
    costs = [f"{row['floor_s']:.3f}", f"{row['of_floor']:.2f}", str(row["computed_tokens"])]
    return [*head, *costs, f"{row['bytes'] / 1e6:.0f}"]


def plot(result: dict[str, Any], path: Path) -> None:
    """TTFT over context length, logarithmic, beside full prefill and the floor. Raises MissingExtra without matplotlib."""
    drawn, axes = figure(7, 4.5)
    for name in dict.fromkeys(name for p in result["points"] for name in p["rows"]):
        here = [(p["context"], p["rows"][name]) for p in result["points"] if name in p["rows"]]
        contexts, rows = [c for c, _ in here], [row for _, row in here]
        line = axes.plot(
            contexts, [r["ttft_s"]["median"] for r in rows], "o-", label=re.sub(":wrapper=[^ ]*", "", name)
        )
        if all("floor_s" in r for r in rows):
            axes.plot(contexts, [r["floor_s"] for r in rows], ":", color=line[0].get_color())
    axes.set(xscale="log", yscale="log", xlabel="context tokens", ylabel="time to first token, s")
    axes.set_title(f"{result['shape']}, {result['dtype']}, {result['device']} (dotted: floor)")
    axes.legend()
    drawn.savefig(path, dpi=120)
