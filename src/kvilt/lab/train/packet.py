"""Training of wrappers by self-distillation: KV Packet (arXiv 2604.13226, section 3) and Kvilt's linked packet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from kvilt.engine.engine import Engine
from kvilt.errors import TrainError
from kvilt.lab.train import state as checkpoints
from kvilt.lab.train.data import Pick, Sample, Source, sources_of
from kvilt.lab.train.dense import IGNORE, collate, frozen, logits_of, row_of
from kvilt.lab.train.job import Job, PacketConfig, Progress, Report, check, initial, prepare, student
from kvilt.lab.train.losses import Fidelity, Tally, TopK, cross_entropy, divergence
from kvilt.lab.train.state import State
from kvilt.lab.train.teacher import FULL
from kvilt.strategies.kv_packet import KVPacket
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import digest_of

WRAPPER, CHECKPOINT = "wrapper.safetensors", "checkpoint.safetensors"


def train_packet(
    engine: Engine,
    samples: Sequence[Sample] | Sequence[Source],
    config: PacketConfig,
    out: str | Path,
    held_out: Sequence[Sample] | None = None,
    on_progress: Report = lambda _: None,
) -> Wrapper:
    """Train header, trailer (and link) vectors for a frozen model; OUT/wrapper.safetensors gets the best held-out step.

    Run again with the same arguments, it goes on from its last checkpoint and ends with the same vectors. Raises
    TrainError for bad data or settings before anything is trained, and when the loss is no longer a number."""
    check(config)
    job = prepare(engine, sources_of(samples), config, Path(out), held_out, on_progress)
    with frozen(engine.model, config.checkpointing):
        return _train(job)


def _train(job: Job) -> Wrapper:
    c, wrapper = job.config, initial(job.engine, job.config)
    state = State({n: v.clone() for n in ("header", "trailer", "links") if (v := getattr(wrapper, n)) is not None}, {})
    trained = [v.requires_grad_() for n, v in state.vectors.items() if n == "links" or not c.links_only]
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0)
    strategy, path = student(wrapper, c), job.out / CHECKPOINT
    if path.is_file():
        checkpoints.load(path, state, optimizer, job.tag)
    elif not state.held_out:
        state.keep_best(_evaluate(job, strategy, state))
    while state.step < c.steps and not state.finished:
        try:
            _step(job, strategy, state, optimizer, trained)
        except TrainError:
            checkpoints.save(path, state, optimizer, job.tag)  # the vectors of the last good step
            raise
        last = state.held_out[-1][1]
        if state.step % c.evaluate_every == 0 or state.step == c.steps:
            last = _evaluate(job, strategy, state)
            state.keep_best(last)
            state.finished = state.step - state.best_step >= c.patience * c.evaluate_every or state.step == c.steps
            checkpoints.save(path, state, optimizer, job.tag)
        job.report(Progress("train", state.step, c.steps, state.losses[-1], last, state.best_step))
    return _written(job, wrapper, state)


def _step(
    job: Job, strategy: KVPacket, state: State, optimizer: torch.optim.Optimizer, trained: Sequence[Tensor]
) -> None:
    """One update from one batch, in micro-batches of samples of like length."""
    c = job.config
    optimizer.param_groups[0]["lr"] = job.lr * (1 - state.step / c.steps)
    picks = job.picks[state.step * c.batch : (state.step + 1) * c.batch]
    tokens = sum(len(job.targets[p].answer) for p in picks)
    optimizer.zero_grad()
    total = 0.0
    for group in _micro_batches(job, picks, c.micro_batch):
        loss = _losses(job, strategy, state, group) / tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(trained, c.clip or math.inf)
    if not math.isfinite(total) or not torch.isfinite(norm):
        raise TrainError(
            f"step {state.step + 1}: the loss or its gradient is not a number. {CHECKPOINT} holds step {state.step}."
        )
    optimizer.step()
    state.losses.append(round(total, 6))
    state.step += 1


def _micro_batches(job: Job, picks: Sequence[Pick], size: int) -> Iterator[list[Pick]]:
    ordered = sorted(picks, key=lambda p: sum(map(len, job.prompts[p].documents)) + len(job.targets[p].answer))
    yield from (ordered[i : i + size] for i in range(0, len(ordered), size))


def _student(job: Job, strategy: KVPacket, state: State, group: Sequence[Pick]) -> tuple[Tensor, Tensor]:
    """The student's logits (batch, answer, vocab) and the labels (batch, answer)."""
    rows = [row_of(strategy, job.prompts[p], job.targets[p].answer) for p in group]
    batch = collate(rows)
    table = torch.cat(list(state.vectors.values()))
    return logits_of(job.engine.model, batch, table), batch.labels.to(job.engine.model.shape.device)


@torch.no_grad()
def _teacher(job: Job, group: Sequence[Pick], length: int) -> Tensor | TopK:
    device = job.engine.model.shape.device
    if job.config.top_k:
        top = TopK.pad([job.targets[p].top() for p in group], length)
        return TopK(top.ids.to(device), top.logp.to(device), top.rest.to(device))
    return logits_of(job.engine.model, collate([row_of(FULL, job.prompts[p], job.targets[p].answer) for p in group]))


def _losses(job: Job, strategy: KVPacket, state: State, group: Sequence[Pick]) -> Tensor:
    logits, labels = _student(job, strategy, state, group)
    if job.config.loss == "ce":
        return cross_entropy(logits, labels)
    return divergence(logits, _teacher(job, group, labels.shape[1]), labels != IGNORE)


@torch.no_grad()
def _evaluate(job: Job, strategy: KVPacket, state: State) -> Fidelity:
    tally = Tally()
    for group in _micro_batches(job, job.held_out, job.config.micro_batch):
        logits, labels = _student(job, strategy, state, group)
        tally.add(logits, _teacher(job, group, labels.shape[1]), labels != IGNORE)
    return tally.result()


def _written(job: Job, wrapper: Wrapper, state: State) -> Wrapper:
    """The best step's wrapper, with all that is known of its making."""
    text, best = job.engine.text, state.best_fidelity
    metadata = {
        **wrapper.metadata,
        "template": digest_of(text.system_ids(), text.tail),
        "tokenizer": job.engine.model.tokenizer_digest,
        "vectors": json.dumps({name: len(v) for name, v in state.best.items()}),
        "config": json.dumps(asdict(job.config)),
        "data": json.dumps({s.name or "data": len(s.samples) for s in job.sources}),
        "best": json.dumps({"step": state.best_step, **(asdict(best) if best else {})}),
        "history": json.dumps(state.history),
    }
    made = replace(wrapper, **state.best, metadata=metadata)  # type: ignore[arg-type]
    made.save(job.out / WRAPPER)
    return made
