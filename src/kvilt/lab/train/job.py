"""What a wrapper's training is made of: settings, checked data, the teacher's answers, vectors to start from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from kvilt.engine.engine import Engine
from kvilt.errors import TrainError, WrapperError
from kvilt.lab.train.data import Pick, Sample, Source, check_disjoint, draw, schedule, split_held_out
from kvilt.lab.train.dense import Parts, parts_of
from kvilt.lab.train.losses import Fidelity
from kvilt.lab.train.questions import with_questions
from kvilt.lab.train.teacher import Target, Teacher
from kvilt.strategies.kv_packet import KVPacket
from kvilt.strategies.linked_packet import LAYOUTS, LinkedPacket
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import digest_of


@dataclass(frozen=True)
class PacketConfig:
    """Settings of a wrapper's training; the defaults are the paper's where it names any."""

    header: int = 8  # learned vectors before a document
    trailer: int = 8  # and after it
    links: int = 0  # soft link vectors, computed at query time: linked_packet instead of kv_packet
    layout: str = "slots"  # of the link vectors: after every document, or "tail": after the last
    start: str = ""  # a trained wrapper to start from
    links_only: bool = False  # keep its header and trailer: stored documents stay valid
    loss: str = "kl"  # kl to the teacher's logits, or ce on the answers
    answers: str = "teacher"  # the teacher's own greedy answers, or "data": the data's
    top_k: int = 64  # teacher logits kept on disk per token; 0: all of them, computed again in every step
    answer_tokens: int = 64  # longest answer
    steps: int = 240
    batch: int = 64  # samples of one step
    micro_batch: int = 8  # samples of one pass
    lr: float = 0.0  # 0: a twentieth of the embedding matrix's standard deviation (5e-4 for Llama-3.1-8B)
    clip: float = 1.0  # largest gradient norm
    checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third more time
    views: int = 4  # draws of document order and count per sample
    fewest: int = 1  # documents of a draw at least; 0: always all
    held_out: float = 0.1  # share of the samples put aside when no held-out samples are given
    held_out_limit: int = 128  # held-out samples at most
    evaluate_every: int = 20  # steps between held-out evaluations and checkpoints
    patience: int = 5  # evaluations without a better one before the training stops
    seed: int = 1


@dataclass(frozen=True)
class Progress:
    """Where a training stands: `step` of `steps`, and the last loss and held-out result."""

    stage: str  # "questions", "teacher" or "train"
    step: int
    steps: int
    loss: float = math.nan
    held_out: Fidelity | float | None = None  # fidelity of a wrapper, loss of a fine-tuned model
    best_step: int = 0


Report = Callable[[Progress], None]


@dataclass(frozen=True, eq=False)
class Job:
    """Everything of one training that does not change while it runs."""

    engine: Engine
    config: PacketConfig
    sources: tuple[Source, ...]
    out: Path
    picks: list[Pick]
    prompts: dict[Pick, Parts]
    targets: dict[Pick, Target]
    held_out: list[Pick]
    lr: float
    tag: str
    report: Report


def check(c: PacketConfig) -> None:
    """Raise TrainError for settings that make no sense."""
    wrong = {
        "header, trailer, links": min(c.header, c.trailer, c.links) < 0 or c.header + c.trailer + c.links == 0,
        "layout": c.layout not in LAYOUTS,
        "loss": c.loss not in ("kl", "ce"),
        "answers": c.answers not in ("teacher", "data"),
        "links_only": c.links_only and not (c.start and c.links),
        "steps, batch, micro_batch, answer_tokens": min(c.steps, c.batch, c.micro_batch, c.answer_tokens) < 1,
        "evaluate_every, patience, views, held_out_limit": min(c.evaluate_every, c.patience, c.views, c.held_out_limit)
        < 1,
        "lr, clip, top_k, fewest": min(c.lr, c.clip, c.top_k, c.fewest) < 0 or not math.isfinite(c.lr),
    }
    found = [name for name, bad in wrong.items() if bad]
    if found:
        raise TrainError(f"bad setting: {found[0]} in {c}.")


def prepare(
    engine: Engine,
    sources: tuple[Source, ...],
    c: PacketConfig,
    out: Path,
    held_out: Sequence[Sample] | None,
    report: Report,
) -> Job:
    """Check all data, let the teacher answer, and lay out which sample is used when."""
    _check_samples([*(s for source in sources for s in source.samples), *(held_out or ())], c)
    report(Progress("questions", 0, 1))
    sources = with_questions(engine, sources, out, c.seed)
    if held_out is None:
        sources, held_out = split_held_out(sources, c.held_out, c.seed)
    else:
        aside = [Source(tuple(held_out), name="held-out")]
        held_out = with_questions(engine, aside, out / "held-out", c.seed)[0].samples
    check_disjoint(sources, held_out)
    every = (*sources, Source(_some(held_out, c.held_out_limit), name="held-out"))
    picks = schedule(sources, c.steps * c.batch, c.views, c.seed)
    tests = [Pick(len(sources), i, 0) for i in range(len(every[-1].samples))]
    prompts = {p: _draw(engine, every, p, c) for p in dict.fromkeys((*tests, *picks))}
    _check_lengths(engine, prompts.values(), c)
    teacher = Teacher(engine.model, out / "teacher", c.answer_tokens, c.top_k, c.answers == "teacher")
    targets = teacher.targets(list(prompts.values()), lambda n, of: report(Progress("teacher", n, of)))
    lr = c.lr or engine.info.embedding_stats[1] / 20
    tag = digest_of(engine.model.digest, json.dumps(asdict(c)), *(p.digest for p in prompts.values()))
    return Job(engine, c, every, out, picks, prompts, dict(zip(prompts, targets, strict=True)), tests, lr, tag, report)


def _check_samples(samples: Sequence[Sample], c: PacketConfig) -> None:
    for sample in samples:
        if not sample.documents or sample.plain or not sample.reuse:
            raise TrainError(
                f"{sample.where}: no documents to reuse: a wrapper is trained on questions over documents."
            )
        if c.answers == "data" and not sample.answers:
            raise TrainError(
                f'{sample.where}: no answer, but answers=data trains on the data\'s: add "answers": [...].'
            )


def _some(samples: Sequence[Sample], most: int) -> tuple[Sample, ...]:
    if not samples:
        raise TrainError("the held-out split is empty: early stopping needs some samples that are not trained on.")
    return tuple(samples[:: max(1, -(-len(samples) // most))])


def _draw(engine: Engine, sources: Sequence[Source], pick: Pick, c: PacketConfig) -> Parts:
    sample = sources[pick.source].samples[pick.index]
    return parts_of(engine.text, draw(sample, pick.view, c.seed, c.fewest, free=c.answers == "teacher"))


def _check_lengths(engine: Engine, prompts: Iterable[Parts], c: PacketConfig) -> None:
    strategy, context = student(initial(engine, c), c), engine.model.context_length
    for parts in prompts:
        end = parts.plan(strategy).end + c.answer_tokens
        if end > context:
            where = parts.sample.where
            raise TrainError(f"{where}: a prompt and its answer take {end} positions, the context holds {context}.")


def initial(engine: Engine, c: PacketConfig) -> Wrapper:
    """The wrapper that training starts from: a trained one, or vectors drawn like the rows of the embedding matrix.

    Raises WrapperError when the trained one is for another model or of another size."""
    (mean, std), width = engine.info.embedding_stats, engine.info.hidden_size
    generator = torch.Generator().manual_seed(c.seed)
    fresh = [torch.empty(n, width).normal_(mean, std, generator=generator) for n in (c.header, c.trailer, c.links)]
    begun = Wrapper.load(c.start).check(engine.info) if c.start else Wrapper(fresh[0], fresh[1])
    if (len(begun.header), len(begun.trailer)) != (c.header, c.trailer):
        sizes = f"header={len(begun.header)} and trailer={len(begun.trailer)}"
        raise WrapperError(f"wrapper {c.start} has {sizes}, not {c.header} and {c.trailer}: set them alike.")
    links = begun.links if c.links and begun.links is not None else fresh[2] if c.links else None
    if links is not None and len(links) != c.links:
        raise WrapperError(f"wrapper {c.start} has links={len(links)}, not {c.links}: set them alike.")
    return replace(begun, model=engine.model.digest, links=links, metadata={"layout": c.layout} if c.links else {})


def student(wrapper: Wrapper, c: PacketConfig) -> KVPacket:
    """The strategy that will serve the wrapper: it decides the mask to train under."""
    return LinkedPacket(layout=c.layout).holding(wrapper) if c.links else KVPacket().holding(wrapper)
