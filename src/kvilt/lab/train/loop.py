"""The one loop of every training: steps, held-out results, checkpoints, early stopping, progress, many processes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from kvilt.errors import TrainError
from kvilt.lab.train import checkpoint
from kvilt.lab.train.checkpoint import CHECKPOINT, State
from kvilt.lab.train.data import Pick, Source, schedule
from kvilt.lab.train.dense import IGNORE, Row, collate
from kvilt.lab.train.losses import Fidelity, TopK, fidelity, objective, tally
from kvilt.lab.train.trained import Trained, optimizers, training
from kvilt.types import cached

SCHEDULES = ("linear", "cosine", "constant")
SAVE_SECONDS = 300.0  # between checkpoints, where held-out results are further apart
MEASURED = 1 / 3  # what a held-out sample costs in units of one that is learned


@dataclass(frozen=True)
class Settings:
    """How a training runs, whatever it trains."""

    optimizer: str = "adamw"  # or muon: Muon for the matrices of the layers, AdamW for the rest
    lr: float = 5e-4
    schedule: str = "linear"  # of the learning rate after the warm-up: falls to zero linearly, as a cosine, or stays
    warmup: float = 0.0  # share of the steps
    steps: int = 240
    batch: int = 64  # samples of one step, over all processes
    micro_batch: int = 8  # samples of one pass
    clip: float = 1.0  # largest gradient norm; 0: none
    checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third more time
    evaluate_every: int = 20  # steps between held-out results
    patience: int = 5  # held-out results without a better one before the training stops
    held_out: float = 0.1  # share of the samples put aside when no held-out samples are given
    held_out_limit: int = 128  # held-out samples at most
    seed: int = 1

    def check(self) -> None:
        """Raise TrainError for settings that make no sense."""
        wrong = [name for name, bad in self.wrong().items() if bad]
        if wrong:
            raise TrainError(f"bad setting: {wrong[0]} in {self}.")

    def wrong(self) -> dict[str, bool]:
        """What may be wrong, and whether it is."""
        counts = (self.steps, self.batch, self.micro_batch, self.evaluate_every, self.patience, self.held_out_limit)
        return {
            "steps, batch, micro_batch, evaluate_every, patience, held_out_limit": min(counts) < 1,
            "lr, clip, warmup": not (0 <= self.lr < math.inf and self.clip >= 0 and 0 <= self.warmup <= 1),
            "optimizer": self.optimizer not in ("adamw", "muon"),
            "schedule": self.schedule not in SCHEDULES,
        }

    def rate(self, step: int) -> float:
        """Factor on the learning rate."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return step / warm
        done = (step - warm) / max(1, self.steps - warm)
        return {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "constant": 1.0}[self.schedule]


@dataclass(frozen=True)
class Progress:
    """Where a training stands: `step` of `steps`, the last loss, the best held-out result, and about how long it will take."""

    stage: str  # "questions", "teacher" or "train"
    step: int
    steps: int
    left: float = math.nan  # seconds to the end of the training
    loss: float = math.nan
    held_out: Fidelity | None = None
    best_step: int = 0


Report = Callable[[Progress], None]


@dataclass(frozen=True, eq=False)
class Example:
    """A masked pass and what is learned at its labels: the teacher's distribution, or without one the labels."""

    row: Row
    teacher: TopK | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """One training: what is trained, on what, and where it is kept."""

    settings: Settings
    trained: Trained
    sources: Sequence[Source]  # the last one is held out
    views: int  # draws of every sample
    example: Callable[[Pick], Example]
    size: Callable[[Pick], int]  # passes are made of samples of like size
    folder: Path
    report: Report

    @cached
    def picks(self) -> list[Pick]:
        """Which sample is used when, batch after batch."""
        return schedule(self.sources[:-1], self.settings.steps * self.settings.batch, self.views, self.settings.seed)

    @cached
    def tests(self) -> list[Pick]:
        """The held-out samples, by size."""
        return sorted((Pick(len(self.sources) - 1, i, 0) for i in range(len(self.sources[-1].samples))), key=self.size)

    def forward(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor, TopK | None]:
        """Logits (batch, answer, vocab), labels (batch, answer), and the teacher's distributions there."""
        batch = collate([e.row for e in examples])
        logits = self.trained.logits(batch)
        tops = [e.teacher for e in examples if e.teacher is not None]
        teacher = TopK.pad(tops, batch.keep).to(logits.device) if tops else None
        return logits, batch.labels.to(logits.device), teacher

    def left(self, step: int, trial: Example | None = None) -> float:
        """About the seconds that the steps from `step` on will take, measured on one sample; nothing is learned."""
        c, typical = self.settings, self.tests[len(self.tests) // 2]
        began = time.perf_counter()
        with training(self.trained):
            loss = objective(*self.forward([trial or self.example(typical)]))
            loss.backward()  # type: ignore[no-untyped-call]
        pace = (time.perf_counter() - began) / max(1, self.size(typical))
        measured = ((c.steps - step) / c.evaluate_every + 1) * MEASURED * sum(map(self.size, self.tests))
        return pace * (sum(map(self.size, self.picks[step * c.batch :])) + measured)


class Loop:
    """A training in progress. Run again with the same folder, it goes on from its last checkpoint, also with more steps.

    Under torchrun every process takes its share of each step; gradients are added up, so that all stay alike."""

    def __init__(self, run: Run) -> None:
        self.run, self.c, self.state = run, run.settings, State()
        self.rank, self.count = joined()
        self.parameters = list(run.trained.parameters.values())
        self.optimizers = optimizers(self.c.optimizer, run.trained, self.c.lr)
        self.saved = time.monotonic()

    def train(self) -> State:
        """Train to the last step, or until nothing gets better; the best step's values stay in the parameters.

        Raises TrainError when the loss is no longer a number; the checkpoint then holds the last good step."""
        with training(self.run.trained, self.c.checkpointing):
            if (self.run.folder / CHECKPOINT).is_file():
                self.state = checkpoint.load(self.run.folder, self.run.trained.parameters, self.optimizers)
            self._report(self.run.left(self.state.step))
            if not self.state.held_out:
                self._judge()
            first, began = self.state.step, time.monotonic()
            while not self._over():
                self._step()
                if self.state.step % self.c.evaluate_every == 0 or self.state.step == self.c.steps:
                    self._judge()
                elif time.monotonic() - self.saved > SAVE_SECONDS:
                    self._save()
                spent = (time.monotonic() - began) / (self.state.step - first)
                self._report(0.0 if self._over() else spent * (self.c.steps - self.state.step))
        if self.rank == 0:
            values, _ = checkpoint.read(checkpoint.best(self.run.folder, self.state.best[0]))
            checkpoint.fill(self.run.trained.parameters, values)
        return self.state

    def _over(self) -> bool:
        state, c = self.state, self.c
        return state.step >= c.steps or state.step - state.best[0] >= c.patience * c.evaluate_every

    def _step(self) -> None:
        """One update from one batch."""
        c, state = self.c, self.state
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        sums = torch.zeros(2, dtype=torch.float64)  # loss, tokens
        for examples in self._passes(self.run.picks[state.step * c.batch : (state.step + 1) * c.batch]):
            logits, labels, teacher = self.run.forward(examples)
            loss = objective(logits, labels, teacher)
            (loss / c.batch).backward()  # type: ignore[no-untyped-call]
            sums += torch.tensor([float(loss.detach()), int((labels != IGNORE).sum())])
        grads = [p.grad for p in self.parameters if p.grad is not None]
        added(sums, *grads)
        torch._foreach_mul_(grads, c.batch / max(1.0, float(sums[1])))  # the mean over the step's tokens
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, c.clip or math.inf)
        mean = float(sums[0] / sums[1])
        if not math.isfinite(mean) or not torch.isfinite(norm):
            self._save()
            kept = f"{CHECKPOINT} holds step {state.step}"
            raise TrainError(f"step {state.step + 1}: the loss or its gradient is not a number. {kept}.")
        for optimizer in self.optimizers:
            for options in optimizer.param_groups:
                options["lr"] = c.lr * c.rate(state.step)
            optimizer.step()
        state.losses.append(round(mean, 6))
        state.step += 1

    def _passes(self, picks: Sequence[Pick]) -> Iterator[list[Example]]:
        """This process's share, in passes over samples of like size."""
        ordered, size = sorted(picks, key=self.run.size), self.c.micro_batch
        for first in range(self.rank * size, len(ordered), self.count * size):
            yield [self.run.example(pick) for pick in ordered[first : first + size]]

    @torch.no_grad()
    def _judge(self) -> None:
        """Measure on the held-out samples, keep the best, and write a checkpoint."""
        sums = torch.zeros(5, dtype=torch.float64)
        for examples in self._passes(self.run.tests):
            sums += tally(*self.run.forward(examples))
        added(sums)
        if not torch.isfinite(sums).all():
            before = f"{CHECKPOINT} holds an earlier step" if self.state.step else "check the model's weights and dtype"
            raise TrainError(f"step {self.state.step}: the held-out loss is not a number: {before}.")
        self.state.held_out.append((self.state.step, fidelity(sums)))
        if self.state.best[0] == self.state.step and self.rank == 0:
            checkpoint.write(checkpoint.best(self.run.folder, self.state.step), self.run.trained.parameters)
        self._save()

    def _save(self) -> None:
        self.saved = time.monotonic()
        if self.rank == 0:
            checkpoint.save(self.run.folder, self.state, self.run.trained.parameters, self.optimizers)

    def _report(self, left: float) -> None:
        s, loss = self.state, self.state.losses[-1] if self.state.losses else math.nan
        step, held_out = s.best if s.held_out else (0, None)
        if self.rank == 0:
            self.run.report(Progress("train", s.step, self.c.steps, left, loss, held_out, step))


def joined() -> tuple[int, int]:
    """This process's rank, and how many there are (torchrun, accelerate launch)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def added(*sums: Any) -> None:
    """Add tensors up over all processes, in place."""
    if dist.is_available() and dist.is_initialized():
        for tensor in sums:
            dist.all_reduce(tensor)
