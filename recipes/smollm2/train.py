"""Teach SmolLM2-135M to answer over several documents, and train every reuse method on it: one GPU, some minutes.

Run: python recipes/smollm2/train.py DATA OUT [--deadline SECONDS] [--stages ...]; DATA holds what data.py and weights.py
wrote. Every stage has its own time box and writes its file as soon as it is done; run again, finished stages are not repeated."""

from __future__ import annotations

import argparse
import json
import queue
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import data
import evaluation
import lean
import numpy as np
import torch
import weights
from lean import Base, Model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import rows
from rows import IGNORE, Method

FULL = Method(reuse=False)
KVLINK = Method(markers=True, everywhere=True, slots=40)
PACKET = Method(header=8, trailer=8)


@dataclass(frozen=True)
class Stage:
    """One training: what is trained, from where, on what, for how long."""

    name: str
    method: Method
    seconds: float
    start: tuple[str, ...] = ()  # stages whose results it starts from
    trained: tuple[str, ...] = ("adapter",)  # adapter, reader, vectors, or weights (all of them)
    distilled: bool = (
        True  # KL to full recompute of the taught model, which stays frozen; else gold answers, from the instruct model
    )
    lr: float = 1.2e-3
    vector_lr: float = 8e-3


STAGES = (
    Stage("teach", Method(reuse=False, everywhere=True), 65, distilled=False),
    Stage("writer_packet", replace(PACKET, writer=True), 50, trained=("adapter", "vectors")),
    Stage("kvlink5", replace(KVLINK, links=5), 50, trained=("adapter", "vectors"), distilled=False),
    Stage("packet", PACKET, 25, trained=("vectors",)),
    Stage("writer", Method(writer=True), 40),
    Stage("query", Method(reader=True), 25, trained=("reader",)),
    Stage("linked", replace(PACKET, links=5), 22, start=("packet",), trained=("vectors",)),
    Stage("kvlink0", KVLINK, 50, trained=("adapter", "vectors"), distilled=False),
    Stage("kvlink1", replace(KVLINK, links=1), 50, trained=("adapter", "vectors"), distilled=False),
    Stage("writer_packet_query", replace(PACKET, writer=True, reader=True), 20, ("writer_packet",), ("reader",)),
    Stage("weights", FULL, 40, trained=("weights",), distilled=False, lr=2e-4),
    # a second run, on questions made of 12,000 more passages (data.py --text), says what more time is worth
    Stage(
        "writer_more",
        replace(PACKET, writer=True),
        180,
        ("writer_packet",),
        ("adapter", "vectors"),
        lr=8e-4,
        vector_lr=4e-3,
    ),
    Stage("teach_more", Method(reuse=False, everywhere=True), 90, distilled=False),
)
SMALL = ("packet", "query", "linked", "writer_packet_query")  # come back in one file


@dataclass
class Settings:
    """Sizes of a run."""

    rows: int = 8
    length: int = 4096
    rank: int = 16
    reader_rank: int = 16
    context: int = 3000  # longest context drawn
    room: int = 14  # tokens of an evaluated answer
    flex: bool = True
    compiled: bool = True
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"


@dataclass
class Run:
    """What all stages share."""

    settings: Settings
    arrays: Mapping[str, Any]
    base: Base
    out: Path
    started: float
    deadline: float
    taught: Base | None = None
    kernels: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)  # answers: label, set, question
    smoke: bool = False
    drawn: dict[Any, Any] = field(default_factory=dict)  # test contexts
    texts: Any = None

    def say(self, text: str) -> None:
        line = f"{time.time() - self.started:6.1f}s {text}"
        self.log.append(line)
        print(line, flush=True)

    @property
    def left(self) -> float:
        return self.deadline - (time.time() - self.started)


# --- batches --------------------------------------------------------------------------------------------------------


@dataclass
class Fed:
    """A batch on the device."""

    ids: Tensor
    positions: Tensor
    context: Tensor
    group: Tensor
    branch: Tensor
    gates: Tensor  # (rows, length, 2): where the document adapter and the question adapter act
    labels: Tensor
    questions: int
    tokens: int
    ends: list[tuple[int, int]]
    asked: list[tuple[str, int]]


def fed(batch: rows.Batch, s: Settings) -> Fed:
    """Move a batch to the device."""
    put = lambda a, kind: torch.from_numpy(a).to(kind).to(s.device, non_blocking=True)  # noqa: E731
    ints = {n: put(getattr(batch, n), torch.int32) for n in ("positions", "context", "group", "branch")}
    gates = torch.stack([put(batch.writer, s.dtype), put(batch.reader, s.dtype)], -1)
    ids, labels = put(batch.ids, torch.int64), put(batch.labels, torch.int64)
    tokens = int((batch.context >= 0).sum())
    return Fed(
        ids,
        **ints,
        gates=gates,
        labels=labels,
        questions=len(batch.ends),
        tokens=tokens,
        ends=batch.ends,
        asked=batch.asked,
    )


class Feeder:
    """Packs batches in a thread of its own."""

    def __init__(self, run: Run, stage: Stage, methods: Sequence[Method]) -> None:
        s = run.settings
        reserve = "with" if stage.distilled else "without"
        self.sampler = iter(rows.Sampler(run.arrays, seed=sum(map(ord, stage.name)), length=s.context, reserve=reserve))
        self.run, self.methods, self.ready = run, methods, queue.Queue[list[rows.Batch]](4)
        self.on = True
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        s, vocabulary = self.run.settings, self.run.base.shape.vocabulary
        while self.on:
            filled = rows.fill(self.sampler, s.rows, s.length, self.methods[0])
            made = [rows.pack(filled, m, vocabulary, s.length) for m in self.methods]
            while self.on:
                try:
                    self.ready.put(made, timeout=0.5)
                    break
                except queue.Full:
                    continue

    def next(self) -> list[Fed]:
        return [fed(batch, self.run.settings) for batch in self.ready.get()]


# --- learned things ---------------------------------------------------------------------------------------------------


@dataclass
class Learned:
    """Adapters (stacked over layers), vectors, or whole weights; all float32."""

    adapter: dict[str, Tensor]
    vectors: dict[str, Tensor]  # fixed (n, hidden); link (links, hidden); slots (slots, links, hidden), added to link
    weights: dict[str, Tensor] = field(default_factory=dict)

    def table(self) -> Tensor | None:
        """The learned vectors in the order of their ids, (vectors, hidden)."""
        if not self.vectors:
            return None
        links = self.vectors["link"]
        if "slots" in self.vectors:
            links = (links[None] + self.vectors["slots"]).flatten(0, 1)
        return torch.cat([self.vectors["fixed"], links])


def begin(run: Run, stage: Stage) -> Learned:
    """Where a stage starts: fresh adapters, vectors near the embeddings of real tokens, or an earlier stage's."""
    s, base, m = run.settings, run.base, stage.method
    adapter = lean.adapters(base.shape, s.rank, s.reader_rank, s.device)
    vectors: dict[str, Tensor] = {}
    if m.vectors:
        embed = base.embed.float()
        line = torch.from_numpy(run.arrays["system/0"].astype(np.int64)).to(s.device)
        generator = torch.Generator().manual_seed(1)
        noise = lambda *size: torch.randn(*size, generator=generator).to(s.device) * 0.01  # noqa: E731
        newline = embed[line[-1]]  # a head ends with a line break
        fixed = [embed[line[: m.header]], newline.expand(m.trailer + 2 * m.markers, -1)]
        width = base.shape.hidden
        vectors["fixed"] = torch.cat(fixed) + noise(m.header + m.trailer + 2 * m.markers, width)
        vectors["link"] = newline.expand(m.links, -1) + noise(m.links, width)
        if m.slots and m.links:
            vectors["slots"] = noise(m.slots, m.links, width)
    for name in stage.start:
        found = load(run.out, name, s.device)
        adapter |= found.adapter
        vectors |= {n: v for n, v in found.vectors.items() if n == "fixed" or not m.links}
    if "weights" in stage.trained:
        return Learned(adapter, {}, {n: w.float().clone() for n, w in base.tensors().items()})
    return Learned(adapter, vectors)


def groups(stage: Stage, learned: Learned) -> list[dict[str, Any]]:
    """What the optimizer changes."""
    reader = [t for n, t in learned.adapter.items() if n.endswith("_reader")]
    adapter = [t for n, t in learned.adapter.items() if not n.endswith("_reader")]
    every = {
        "adapter": (adapter, stage.lr),
        "reader": (reader, stage.lr),
        "vectors": (list(learned.vectors.values()), stage.vector_lr),
        "weights": (list(learned.weights.values()), stage.lr),
    }
    return [
        {"params": [t for t in every[n][0] if t.numel()], "lr": every[n][1], "top": every[n][1]} for n in stage.trained
    ]


def save(out: Path, stage: Stage, learned: Learned, note: Mapping[str, Any]) -> None:
    """Write what a stage trained, adapters in float16, vectors in float32."""
    kept: dict[str, Tensor] = {}
    if "adapter" in stage.trained:
        kept |= {n: t.half() for n, t in learned.adapter.items() if not n.endswith("_reader")}
    if "reader" in stage.trained:
        kept |= {n: t.half() for n, t in learned.adapter.items() if n.endswith("_reader")}
    if "vectors" in stage.trained:
        kept |= {f"vectors.{n}": t for n, t in learned.vectors.items()}
    kept = {n: t.detach().contiguous().cpu() for n, t in kept.items()}
    told = {"note": json.dumps(note)}
    if stage.name not in SMALL:
        save_file(kept, str(out / f"{stage.name}.safetensors"), told)
        return
    file = out / "small.safetensors"
    others = load_file(str(file)) if file.is_file() else {}
    save_file({**others, **{f"{stage.name}/{n}": t for n, t in kept.items()}}, str(file), told)


def is_done(out: Path, name: str) -> bool:
    """Whether a stage's result is there."""
    if name not in SMALL:
        return (out / f"{name}.safetensors").is_file()
    file = out / "small.safetensors"
    return file.is_file() and any(key.startswith(f"{name}/") for key in load_file(str(file)))


def load(out: Path, name: str, device: str) -> Learned:
    """What a stage trained."""
    file = out / ("small" if name in SMALL else name)
    found = load_file(f"{file}.safetensors", device)
    if name in SMALL:
        found = {key.removeprefix(f"{name}/"): t for key, t in found.items() if key.startswith(f"{name}/")}
    vectors = {n.removeprefix("vectors."): t.float() for n, t in found.items() if n.startswith("vectors.")}
    return Learned({n: t.float() for n, t in found.items() if not n.startswith("vectors.")}, vectors)


# --- training -----------------------------------------------------------------------------------------------------------


def train(run: Run, stage: Stage) -> tuple[Model, Learned]:
    """One stage, for as long as its box and the deadline allow."""
    s = run.settings
    base = run.taught if stage.distilled else run.base
    assert base is not None
    learned = begin(run, stage)
    model = Model(base, s.flex, s.compiled, kernels=run.kernels)
    optimizer = torch.optim.AdamW(groups(stage, learned), betas=(0.9, 0.98), weight_decay=0.0)
    for t in (*learned.adapter.values(), *learned.vectors.values(), *learned.weights.values()):
        t.requires_grad_()
    trained = [t for g in optimizer.param_groups for t in g["params"]]
    feeder = Feeder(run, stage, [stage.method, FULL] if stage.distilled else [stage.method])
    box, begun = min(stage.seconds, run.left - 20), 0.0
    step = questions = tokens = 0
    smooth: Tensor | None = None
    while True:
        now = time.time()
        if step == 2:
            begun = now  # compiling is not counted
        share = (now - begun) / box if step >= 2 else 0.0
        if share >= 1 or (run.left < 15):
            break
        factor = min(1.0, (step + 1) / 20) * (1 - share) + 1e-3
        for g in optimizer.param_groups:
            g["lr"] = g["top"] * factor
        student, *full = feeder.next()
        loss = loss_of(model, learned, student, full[0] if full else None)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        for t in (*learned.adapter.values(), *learned.vectors.values(), *learned.weights.values()):
            t.grad = None
        step, questions, tokens = step + 1, questions + student.questions, tokens + student.tokens
        smooth = loss.detach() if smooth is None else 0.95 * smooth + 0.05 * loss.detach()
        if step in (1, 2, 5, 20) or step % 100 == 0:
            run.say(
                f"{stage.name} step {step} loss {float(smooth):.4f} questions {questions} tokens {tokens} share {share:.2f}"
            )
    feeder.on = False
    seconds = time.time() - begun
    note = {
        "steps": step,
        "questions": questions,
        "tokens": tokens,
        "seconds": seconds,
        "loss": float(smooth) if smooth is not None else 0.0,
    }
    if s.device == "cuda":
        note["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    run.say(f"{stage.name} done {json.dumps(note)} {tokens / max(seconds, 1e-9):.0f} tokens/s")
    run.results[f"train/{stage.name}"] = note
    if not learned.weights:  # whole weights are a yardstick; they stay where they are
        save(run.out, stage, learned, note)
    return model, learned


def loss_of(model: Model, learned: Learned, batch: Fed, full: Fed | None) -> Tensor:
    """Cross-entropy with the gold answers, or KL to full recompute at the same tokens."""
    target = None
    if full is not None:
        with torch.no_grad():
            zero = {n: t.detach() for n, t in learned.adapter.items()}
            target = at_labels(model, full, None, {**zero}, gates_off=True).log_softmax(-1)
    if learned.weights:
        model = replace(
            model, base=model.base.copy({n: w.to(model.base.embed.dtype) for n, w in learned.weights.items()})
        )
    logits = at_labels(model, batch, learned.table(), learned.adapter)
    if target is None:
        labels = batch.labels[batch.labels != IGNORE]
        return F.cross_entropy(logits, labels)
    return F.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean")


def at_labels(
    model: Model, batch: Fed, table: Tensor | None, adapter: Mapping[str, Tensor], gates_off: bool = False
) -> Tensor:
    """float32 logits of the tokens that predict something, (labels, vocabulary)."""
    seen = model.seen(batch.context, batch.group, batch.branch, batch.positions)
    x = model.embedded(batch.ids, table)
    if torch.is_grad_enabled() and not x.requires_grad:
        x.requires_grad_()  # the same graph in every stage: nothing is compiled twice
    gates = torch.zeros_like(batch.gates) if gates_off else batch.gates
    hidden = model.hidden(x, batch.positions, seen, gates, adapter)
    return model.logits(hidden[batch.labels != IGNORE])


# --- the whole run ------------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> Run:
    """Read data and weights; check that flex attention gives what dense attention gives."""
    started = time.time()
    s = Settings(rows=args.rows, length=args.length)
    if args.device == "cpu":
        s = replace(s, device="cpu", flex=False, compiled=False, dtype=torch.float32, context=args.length // 2)
    arrays = data.load(args.data / "data-train.npz.xz")
    if (args.data / "data-test.npz.xz").is_file():
        arrays |= data.load(args.data / "data-test.npz.xz")
    base = lean.Base.of(*_weights(args, s), s.dtype)
    run = Run(s, arrays, base, args.out, started, args.deadline, smoke=args.smoke)
    run.out.mkdir(parents=True, exist_ok=True)
    if any(name.startswith("squad_dev") for name in arrays):
        run.texts = evaluation.Texts(args.data)
    run.say(f"ready on {torch.cuda.get_device_name() if s.device == 'cuda' else 'cpu'}, torch {torch.__version__}")
    run.kernels = _kernels(run)
    return run


def _weights(args: argparse.Namespace, s: Settings) -> tuple[dict[str, Tensor], lean.Shape]:
    """The model's own weights; `--layers` and `--smoke` make up those that are not there, to try the machine."""
    shape = lean.Shape(layers=args.layers)
    if not args.smoke:
        return weights.load(args.data, s.device), shape
    found = weights.load(args.data, s.device, parts=(0,))
    for i in range(weights.FIRST_PART, args.layers):
        found |= {f"{i}.{n}": found[f"{i % weights.FIRST_PART}.{n}"] for n in weights.NAMES.values()}
    return found, shape


def _kernels(run: Run) -> dict[str, Any]:
    """The fastest kernels that work here, tried on a real batch."""
    s = run.settings
    stage = STAGES[1]
    feeder = Feeder(run, stage, [stage.method])
    batch = feeder.next()[0]
    feeder.on = False
    learned = begin(run, stage)
    small = replace(run.base, shape=replace(run.base.shape, layers=1))
    wanted = None
    for flex, compiled in dict.fromkeys([(False, False), (s.flex, False), (s.flex, s.compiled)]):
        try:
            model = Model(small, flex, compiled)
            adapter = {n: (t + 0.01).requires_grad_() for n, t in learned.adapter.items()}
            few = replace(
                batch,
                **{
                    n: getattr(batch, n)[:2]
                    for n in ("ids", "positions", "context", "group", "branch", "gates", "labels")
                },
            )
            used = few if not (flex or compiled) else batch
            table = learned.table()
            count = int((few.labels != IGNORE).sum())
            logits = at_labels(model, used, table, adapter)[:count]
            logits.square().mean().backward()  # type: ignore[no-untyped-call]
            got = torch.cat([logits.detach().flatten()[::997], adapter["b_v"].grad.flatten() * 1e3])  # type: ignore[union-attr]
            wanted = got if wanted is None else wanted
            off = float((got - wanted).norm() / wanted.norm())
            run.say(f"kernels flex={flex} compiled={compiled}: relative difference {off:.1e}")
            if off > 0.03:
                raise RuntimeError("too far from dense attention")
            s.flex, s.compiled, kernels = flex, compiled, model.kernels
        except Exception as error:
            run.say(f"kernels flex={flex} compiled={compiled} do not work: {error!r}"[:600])
    return kernels


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--deadline", type=float, default=540)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0, help="every stage's time box, instead of its own")
    parser.add_argument("--stages", default=",".join(s.name for s in STAGES))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    run = prepare(args)
    todo = [s for s in STAGES if s.name in args.stages.split(",")]
    for stage in todo:
        if run.taught is None and is_done(run.out, "teach"):
            run.taught = lean.merged(run.base, load(run.out, "teach", run.settings.device).adapter)
        if is_done(run.out, stage.name):
            continue
        if run.left < 40 and not args.smoke:
            run.say(f"no time for {stage.name}: run again, or with a longer --deadline")
            continue
        try:
            stage = replace(stage, seconds=args.seconds or stage.seconds)
            model, learned = train(run, stage)
            if stage.name == "weights" and run.texts:
                model.base = model.base.copy({n: w.detach().to(run.settings.dtype) for n, w in learned.weights.items()})
                sets = {"squad5": 60} if run.smoke else evaluation.CHEAP
                evaluation.report(run, "weights/full", model, stage.method, learned, sets)
        except Exception:
            run.say(f"{stage.name} FAILED\n{traceback.format_exc()[-1500:]}")
        torch.cuda.empty_cache() if run.settings.device == "cuda" else None
    if run.texts:
        evaluation.everything(run, [s for s in todo if s.name != "weights"])
    run.say("end")


if __name__ == "__main__":
    main()
