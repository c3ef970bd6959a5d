"""Runs strategies over a task and writes per-sample records. For the command line:

    run(engine, strategies, task_spec, out_dir, limit=None, seed=0, on_progress=None,
        *, shuffle=False, first=False) -> list[Path]

Full recompute (the reference of fidelity) and the no-document floor are always run. Each strategy has a file of its own
in `out_dir`; a second call with the same settings goes on where the first one stopped, also after Ctrl-C.
`kvilt.lab.evaluate.report.report(out_dir)` makes the table."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import kvilt
from kvilt import registry
from kvilt.engine.engine import Engine
from kvilt.errors import UserError
from kvilt.lab.evaluate import fidelity, metrics
from kvilt.lab.evaluate.fidelity import Following
from kvilt.lab.evaluate.records import RecordFile, slug
from kvilt.lab.evaluate.tasks.base import Sample, Task
from kvilt.model.placing import Run
from kvilt.types import Answer, Usage, digest_of

Record = dict[str, Any]


@dataclass(frozen=True)
class Lane:
    """One row of the table: an engine under a strategy, and its record file."""

    role: str  # "full", "floor" or "strategy"
    label: str
    engine: Engine
    records: RecordFile


def run(
    engine: Engine, strategies: Sequence[Any], task_spec: str | Task, out_dir: str | Path, limit: int | None = None,
    seed: int = 0, on_progress: Callable[[int, int], None] = lambda done, total: None,
    *, shuffle: bool = False, first: bool = False, compressions: Sequence[str] = (),
) -> list[Path]:  # fmt: skip
    """Answer `limit` samples (all if None) with every strategy; returns the record files.

    The samples are a draw by `seed`, in which a smaller limit is a part of a larger one, or with `first` the first of
    the data. `shuffle` puts each sample's documents in another order. Raises UserError naming the sample that fails."""
    task = cast(Task, registry.build("task", task_spec)) if isinstance(task_spec, str) else task_spec
    if shuffle and task.ORDERED:
        raise UserError(f"the order of the documents is part of the task {task.NAME}: run it without shuffling.")
    if task.undated:
        engine = Engine(engine.model, engine.text.undated(), engine.strategy, engine.store, compress=engine.compression)
    samples = choose(task, limit, seed, shuffle=shuffle, first=first)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lanes = []
        for role, label, one in _rows(engine, strategies, compressions or [engine.compression]):
            file = out / f"{slug(task.label)}--{slug(label)}.jsonl"
            header = {**_header(role, label, one, task), "seed": seed, "shuffle": shuffle}
            lanes.append(Lane(role, label, one, stack.enter_context(closing(RecordFile(file, header)))))
        for sample in samples:
            with _named(task, sample, lanes[0]):  # what is too long is told before anything is computed
                lanes[0].engine.plan(sample.question, sample.documents)
        answered = (lane for sample in samples for lane in _run_sample(sample, lanes, task))
        for done, _ in enumerate(answered, 1):
            on_progress(done, len(samples) * len(lanes))
    return [lane.records.path for lane in lanes]


def choose(task: Task, limit: int | None, seed: int, *, shuffle: bool = False, first: bool = False) -> list[Sample]:
    """The samples that a run answers, documents shuffled if asked for."""
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}.")
    samples = list(task.samples())
    if not first:
        samples.sort(key=lambda s: digest_of(str(seed), s.id))
    chosen = samples[:limit]
    twice = [name for name, count in Counter(s.id for s in chosen).items() if count > 1]
    if twice:
        raise UserError(f"{task.NAME}: more than one sample has the id {twice[0]!r}; make the ids of the data unique.")
    return [_shuffled(s, seed) for s in chosen] if shuffle else chosen


def _shuffled(sample: Sample, seed: int) -> Sample:
    order = list(range(len(sample.documents)))
    random.Random(f"{seed} {sample.id}").shuffle(order)
    gold = [order.index(i) for i in sample.metadata.get("gold", [])]
    given = sample.documents
    return replace(sample, documents=tuple(given[i] for i in order), metadata={**sample.metadata, "gold": gold})


def _rows(engine: Engine, strategies: Sequence[Any], compressions: Sequence[Any]) -> list[tuple[str, str, Engine]]:
    """(role, label, engine) of full recompute, the floor, and every other strategy with every compression."""
    full = engine.with_strategy("full", compress="")
    chosen = {(str(full.strategy), ""): ("full", "full", full), ("floor", ""): ("floor", "no documents", full)}
    for strategy in strategies:
        for compress in compressions:
            other = engine.with_strategy(strategy, compress)
            label = f"{strategy} + {compress}" if str(compress) else str(strategy)
            chosen.setdefault((str(other.strategy), str(other.compression)), ("strategy", label, other))
    return list(chosen.values())


def _header(role: str, label: str, engine: Engine, task: Task) -> dict[str, Any]:
    """Every setting that shapes the records; a retrained wrapper changes `encoding`."""
    options = {key: value for key, value in task.options.items() if key != "path"}
    asked = {"task": task.NAME, "label": task.label, "version": task.VERSION, "options": options}
    scored = {"metrics": list(task.metrics), "max_new_tokens": task.max_new_tokens, "path": task.options.get("path")}
    ran = {"role": role, "name": label, "strategy": str(engine.strategy), "encoding": engine.encoder.encoding.digest}
    model = {"model": engine.info.digest, "system": digest_of(str(engine.info.system))[:16], "kvilt": kvilt.__version__}
    return {**asked, **scored, **ran, **model, **({"compression": made} if (made := str(engine.compression)) else {})}


@contextmanager
def _named(task: Task, sample: Sample, lane: Lane) -> Iterator[None]:
    """Says of an error which sample it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{task.NAME}, sample {sample.id}, {lane.label}: {error}") from error


def _run_sample(sample: Sample, lanes: list[Lane], task: Task) -> Iterator[Lane]:
    """Answer one sample in every lane that lacks it; the first lane is full recompute, which the others are held to."""
    prompt = digest_of(sample.question, *(part for d in sample.documents for part in (d.title or "", d.text)))[:16]
    reference = lanes[0]
    scores: Tensor | None = None  # full recompute's over its own answer, (tokens, vocab)
    for lane in lanes:
        if not lane.records.finished(sample.id, prompt):
            with _named(task, sample, lane):
                if lane is reference:
                    answer, run = _answer(lane, sample, task)
                    scores, close = torch.cat(run.given), {"agreement": True, "first_token": True, "kl": 0.0}
                else:
                    full = reference.records.done[sample.id]
                    if scores is None:
                        scores = reference.engine.score(sample.question, sample.documents, full["tokens"])
                    answer, run = _answer(lane, sample, task, full)
                    close = _closeness(task, answer, full, run.scores, scores)
            lane.records.append({**_record(lane, sample, task, answer), "prompt": prompt, **close})
        yield lane


def _answer(lane: Lane, sample: Sample, task: Task, full: Record | None = None) -> tuple[Answer, Following]:
    """The answer with every document at hand (what encoding costs is not part of a query), and the run behind it."""
    runs: list[Following] = []

    def through(run: Run) -> Run:
        runs.append(Following(run, full["tokens"] if full else ()))
        return runs[-1]

    documents = [] if lane.role == "floor" else list(sample.documents)
    if lane.role == "strategy" and lane.engine.strategy.encoding is not None:
        lane.engine.encode(documents)
    options: dict[str, Any] = {"max_new_tokens": task.max_new_tokens, "allow_empty": lane.role == "floor"}
    answer = lane.engine.answer(sample.question, documents, through=through, **options)
    usage = replace(answer.usage, ttft_s=answer.usage.ttft_s - runs[-1].seconds)
    if lane.role == "floor" and full:
        usage = _of_full(usage, full, lane.engine)
    return replace(answer, usage=usage), runs[-1]


def _of_full(usage: Usage, full: Record, engine: Engine) -> Usage:
    """The floor's compute in units of full recompute with the documents, as for every other row."""
    mine, whole = usage.computed_tokens, full["usage"]["computed_tokens"]
    linear = engine.info.linear_cost
    return replace(usage, charged=mine * (linear + (mine + 1) / 2) / (whole * (linear + (whole + 1) / 2)))


def _closeness(task: Task, answer: Answer, full: Record, scores: Tensor, wanted: Tensor) -> dict[str, Any]:
    """Fidelity to full recompute on the same prompt; both logits are over full recompute's answer."""
    return {
        "agreement": fidelity.same_text(task.extract(full["text"]), task.extract(answer.text)),
        "first_token": full["tokens"][:1] == list(answer.tokens[:1]),
        "kl": fidelity.divergence(wanted[: len(scores)], scores),
    }


def _record(lane: Lane, sample: Sample, task: Task, answer: Answer) -> dict[str, Any]:
    return {
        "id": sample.id,
        "group": sample.group,
        "task": f"{task.NAME} v{task.VERSION}",
        **{name: lane.records.header[name] for name in ("strategy", "model", "seed")},
        "text": answer.text,
        "tokens": list(answer.tokens),
        "answers": list(sample.answers),
        "metrics": metrics.score(task.metrics, task.extract(answer.text), sample.answers),
        "usage": asdict(answer.usage),
        "metadata": {**sample.metadata, "needed": len(sample.metadata.get("gold", []))},
    }
