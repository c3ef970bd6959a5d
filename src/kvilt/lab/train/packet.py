"""Training for a frozen reader by self-distillation: wrappers (KV Packet, arXiv 2604.13226, section 3; Kvilt's linked packet)
and adapters, of the documents (a writer, arXiv 2607.28069) or of the questions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch

from kvilt.engine.engine import Engine
from kvilt.errors import TrainError, WrapperError
from kvilt.lab.train import checkpoint
from kvilt.lab.train.data import Pick, Sample, Source, check_samples, draw, held_apart, sources_of
from kvilt.lab.train.dense import Parts, parts_of, row_of
from kvilt.lab.train.loop import Example, Loop, Progress, Report, Run, Settings
from kvilt.lab.train.questions import with_questions
from kvilt.lab.train.teacher import Target, Teacher
from kvilt.lab.train.trained import LowRank, Trained, Vectors, Where
from kvilt.rows import adapter as adapters
from kvilt.strategies.kv_packet import KVPacket
from kvilt.strategies.linked_packet import LAYOUTS, LinkedPacket
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import digest_of

WRAPPER, ADAPTER = "wrapper.safetensors", "adapter.safetensors"  # results
TRAINING = "training"  # a folder that may go then
ADAPTERS = {"writer": "encoded", "query": "asked"}  # which rows of a pass each kind of adapter acts on
ADAPTER_LR = 1e-3
VECTORS = ("header", "trailer", "links")


@dataclass(frozen=True)
class PacketConfig(Settings):
    """Settings of a training for a frozen reader; the defaults are the paper's where it names any."""

    adapter: str = ""  # train one, too: "writer" encodes the documents, "query" reads the question; "": vectors alone
    rank: int = 16  # of the adapter

    header: int = 8  # learned vectors before a document
    trailer: int = 8  # and after it
    links: int = 0  # soft link vectors, computed at query time: linked_packet instead of kv_packet
    layout: str = "slots"  # of the link vectors: after every document, or "tail": after the last
    start: str = ""  # a trained wrapper to start from
    links_only: bool = False  # keep its header and trailer: stored documents stay valid
    loss: str = "kl"  # kl to the teacher's distributions, or ce on the answers
    answers: str = "teacher"  # the teacher's own greedy answers, or "data": the data's
    top_k: int = 64  # tokens of the teacher's distributions that are kept; the rest count as one
    answer_tokens: int = 64  # longest answer
    lr: float = (
        0.0  # 0: a twentieth of the embedding matrix's standard deviation (5e-4 for Llama-3.1-8B); adapters 1e-3
    )
    views: int = 4  # draws of document order and count per sample
    fewest: int = 1  # documents of a draw at least; 0: always all

    def wrong(self) -> dict[str, bool]:
        """What may be wrong, and whether it is."""
        vectors = (self.header, self.trailer, self.links)
        return {
            **super().wrong(),
            "header, trailer, links": min(vectors) < 0 or (sum(vectors) == 0 and not self.adapter),
            "adapter": self.adapter not in ("", *ADAPTERS),
            "rank": self.rank < 1,
            "layout": self.layout not in LAYOUTS,
            "loss": self.loss not in ("kl", "ce"),
            "answers": self.answers not in ("teacher", "data"),
            "links_only": self.links_only and not (self.start and self.links),
            "views, top_k, answer_tokens, fewest": min(self.views, self.top_k, self.answer_tokens, self.fewest + 1) < 1,
        }


def train_packet(
    engine: Engine, samples: Sequence[Sample] | Sequence[Source], config: PacketConfig, out: str | Path,
    held_out: Sequence[Sample] | None = None, on_progress: Report = lambda _: None,
) -> Wrapper:  # fmt: skip
    """Train vectors around documents, or an adapter, or both for a frozen model; OUT/wrapper.safetensors and
    OUT/adapter.safetensors get the best held-out step.

    Run again with the same arguments, it goes on from its last checkpoint and ends with the same vectors; with more
    `steps` it goes on beyond its end. Raises TrainError for bad data or settings before anything is trained, and when the
    loss is no longer a number."""
    config.check()
    c, folder, sources = config, Path(out) / TRAINING, sources_of(samples)
    c = replace(c, lr=c.lr or (ADAPTER_LR if c.adapter else engine.info.embedding_stats[1] / 20))
    check_samples([*(s for source in sources for s in source.samples), *(held_out or ())], c.answers == "data")
    on_progress(Progress("questions", 0, 1))
    if held_out is not None:
        held_out = with_questions(engine, [Source(tuple(held_out))], folder / "held-out", c.seed)[0].samples
    sources = with_questions(engine, sources, folder, c.seed)
    sources, tests = held_apart(sources, held_out, c.held_out, c.held_out_limit, c.seed)
    wrapper = initial(engine, c)
    run = _run(engine, wrapper, (*sources, tests), c, folder, on_progress)
    state, sizes = Loop(run).train(), {s.name or "data": len(s.samples) for s in (*sources, tests)}
    making = wrapper.metadata | _making(engine, run, state, sizes)
    vectors = {name: v for name, v in run.trained.values().items() if name in VECTORS}
    made = replace(wrapper, **vectors, metadata=making)  # type: ignore[arg-type]
    if vectors:
        made.save(Path(out) / WRAPPER)
    if isinstance(run.trained, LowRank):
        adapters.save(run.trained.adapter(), Path(out) / ADAPTER, **making, role=c.adapter)
        run.trained.release()
    return made


def _run(
    engine: Engine, wrapper: Wrapper, sources: Sequence[Source], c: PacketConfig, folder: Path, report: Report
) -> Run:
    """The teacher's answers, and which sample is used when."""
    prompts, targets = dict[Pick, Parts](), dict[Pick, Target]()
    strategy = student(wrapper, c)
    parts = {n: v for n in VECTORS if (v := getattr(wrapper, n)) is not None and len(v)}
    trained: Trained = Vectors(engine.model, parts, VECTORS[:2] if c.links_only else ())
    if c.adapter:
        only, where = ("q_proj",) if c.adapter == "query" else (), cast(Where, ADAPTERS[c.adapter])
        trained = LowRank(engine.model, c.rank, only=only, where=where, seed=c.seed, vectors=parts)

    def example(pick: Pick) -> Example:
        row = row_of(strategy, prompts[pick], targets[pick].answer)
        return Example(row, targets[pick].top() if c.loss == "kl" else None)

    def size(pick: Pick) -> int:
        if pick not in prompts:
            sample = sources[pick.source].samples[pick.index]
            drawn = draw(sample, pick.view, c.seed, c.fewest, free=c.answers == "teacher")
            prompts[pick] = parts_of(engine.text, drawn)
        return prompts[pick].size

    run = Run(c, trained, sources, c.views, example, size, folder, report)
    every = dict.fromkeys(sorted((*run.tests, *run.picks), key=size))
    _check_lengths(engine, prompts.values(), strategy, c)
    checkpoint.claim(folder, c, engine.model.digest, *(s.digest for source in sources for s in source.samples))
    middle = prompts[run.tests[len(run.tests) // 2]]
    trial = Example(row_of(strategy, middle, torch.zeros(c.answer_tokens, dtype=torch.long)))
    left, began = run.left(checkpoint.steps_done(folder), trial), time.monotonic()

    def asked(tokens: int, total: int) -> None:
        ahead = (time.monotonic() - began) / tokens * (total - tokens) if tokens else 0.0
        report(Progress("teacher", tokens, total, left + ahead))

    trained.idle()
    teacher = Teacher(engine.model, folder / "teacher", c.answer_tokens, c.top_k, c.answers == "teacher")
    targets.update(zip(every, teacher.targets([prompts[p] for p in every], asked), strict=True))
    return run


def _check_lengths(engine: Engine, prompts: Iterable[Parts], strategy: KVPacket, c: PacketConfig) -> None:
    context = engine.model.context_length
    for p in prompts:
        end = p.plan(strategy).end + c.answer_tokens
        if end > context:
            raise TrainError(f"{p.sample.where}: prompt and answer take {end} positions, the context holds {context}.")


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


def _making(engine: Engine, run: Run, state: checkpoint.State, data: dict[str, int]) -> dict[str, str]:
    """All that is known of a wrapper's making."""
    text, sizes = engine.text, {name: len(v) for name, v in run.trained.values().items()}
    return {
        "template": digest_of(text.system_ids(), text.tail),
        "tokenizer": engine.model.tokenizer_digest,
        "vectors": json.dumps(sizes),
        "config": json.dumps(asdict(run.settings)),
        "data": json.dumps(data),
        "best": json.dumps({"step": state.best[0], **asdict(state.best[1])}),
        "history": json.dumps(state.history),
    }
