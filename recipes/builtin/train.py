"""Train the built-in model: `python -m builtin.train --out DIR [--babi FOLDER]` (in recipes/); a killed run goes on if repeated."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from builtin.data import Encoder, Mix, collate, mask, rows
from builtin.init import build_in
from builtin.optim import optimizers
from builtin.score import accuracy, logits, samples, table
from builtin.tokenizer import SPECIALS, obtain
from builtin.world import babi
from builtin.world.contexts import Shape
from builtin.world.samples import Sample

SEED = 1
LENGTH = 512


@dataclass(frozen=True)
class Plan:
    """How long every part of the training takes, in steps."""

    rows: int = 8
    few: int = 500  # steps with few people in whole biographies, until names are bound to values
    grow: int = 700  # steps in which contexts grow to nine pages, cut biographies and similar names
    total: int = 6000
    decay: float = 0.6  # share of the steps in which the learning rate falls to zero
    layers: int = 5
    width: int = 128
    heads: int = 4
    inner: int = 384

    def rate(self, step: int) -> float:
        """Factor on the learning rates."""
        left = (self.total - step) / (self.total * self.decay)
        return min(1.0, (step + 1) / 100, max(left, 0.0))

    def mix(self, step: int) -> Mix:
        """What the rows of a step contain."""
        if step < self.few:
            return Mix(3, 5, Shape(chunked=0.0, similar=0.0), 0.1, 0.1)
        grown = min(1.0, (step - self.few) / self.grow)
        return Mix(3, 5 + round(4 * grown), Shape(0.6 * grown, 3, 0.35 * grown), 0.25, 0.3)


def make(plan: Plan, vocabulary: int, marks: tuple[list[int], list[int]]) -> LlamaForCausalLM:
    """The untrained model; `marks` are the tokens of first names and of the last words of companies and colleges."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=plan.width,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        intermediate_size=plan.inner,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    build_in(model, *marks)
    return model


@dataclass
class Source:
    """Makes the batch of any step from the step alone, so that a resumed run sees what it would have seen."""

    encoder: Encoder
    plan: Plan
    stories: list[Sample]

    def batch(self, step: int) -> dict[str, Tensor]:
        """Token tensors of one step."""
        rng = random.Random(SEED * 1_000_003 + step)
        made = rows(self.encoder, rng, self.plan.mix(step), self.stories, self.plan.rows, LENGTH)
        return collate(made, LENGTH, 0)


_source: Source | None = None


def _start(source: Source) -> None:
    global _source
    torch.set_num_threads(1)
    _source = source


def _batch(step: int) -> dict[str, Tensor]:
    assert _source is not None
    return _source.batch(step)


def batches(source: Source, first: int, last: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Batches made one ahead in a process of their own."""
    with ProcessPoolExecutor(1, initializer=_start, initargs=(source,)) as pool:
        waiting: list[Future[dict[str, Tensor]]] = [pool.submit(_batch, first), pool.submit(_batch, first + 1)]
        for step in range(first, last):
            batch = waiting.pop(0).result()
            waiting.append(pool.submit(_batch, min(step + 2, last)))
            yield step, batch


class Trainer:
    """Model, optimizers and their checkpoint."""

    def __init__(self, out: Path, plan: Plan, encoder: Encoder, compiled: bool) -> None:
        self.out, self.plan, self.encoder = out, plan, encoder
        self.model = make(plan, len(encoder.tokenizer), encoder.marks())
        self.optimizers = optimizers(self.model)
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.first = 0
        self.checkpoint = out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.resume()
        self.inner = self.model.model
        self.compiled = torch.compile(self.inner) if compiled else self.inner

    def resume(self) -> None:
        """Take up the state of an earlier run."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.first = int(state["step"])

    def save(self, step: int) -> None:
        """Write the checkpoint whole or not at all."""
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def step(self, step: int, batch: dict[str, Tensor]) -> tuple[float, float]:
        """One update; returns loss and how often the first token of a value is right."""
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * self.plan.rate(step)
            optimizer.zero_grad()
        self.model.model = self.compiled
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores, labels = logits(self.model, batch, mask(batch))
        self.model.model = self.inner
        loss = F.cross_entropy(scores.float(), labels)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}; the last checkpoint is unharmed")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        first = (batch["value"] == 1) & (batch["value"].roll(1, 1) == 0)
        values = first[batch["label"] != -100]
        return loss.item(), (scores.argmax(-1) == labels)[values].float().mean().item()

    def evaluate(self, tests: list[Sample]) -> str:
        """The table of held-out accuracies."""
        full = accuracy(self.model, self.encoder, tests, block=False)
        return table(full, accuracy(self.model, self.encoder, tests, block=True))

    def run(self, source: Source, tests: list[Sample], every: int) -> None:
        """Train to the end, with a checkpoint and a small evaluation now and then."""
        began, spent = time.time(), []
        for step, batch in batches(source, self.first, self.plan.total):
            spent.append(self.step(step, batch))
            if (step + 1) % 50 == 0:
                loss, right = (sum(column) / len(spent) for column in zip(*spent, strict=True))
                speed = (time.time() - began) / len(spent)
                print(f"step {step + 1} loss {loss:.3f} right {right:.3f} {speed:.2f} s/step", flush=True)
                began, spent = time.time(), []
            if (step + 1) % 250 == 0:
                self.save(step + 1)
            if (step + 1) % every == 0:
                print(self.evaluate(tests), flush=True)
                began = time.time()


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and finished model")
    parser.add_argument("--babi", type=Path, help="folder with bAbI en-10k; without it the model does not learn bAbI")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile the model first (needs a C++ compiler)")
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations")
    for name in ("rows", "few", "grow", "total", "layers", "width", "heads", "inner"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan, name))
    return parser.parse_args()


def main() -> None:
    """Tokenizer, training, final evaluation, saved model."""
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    learnt = babi.load(args.babi, "train") if args.babi else []
    asked = babi.load(args.babi, "test") if args.babi else []
    encoder = Encoder(obtain(args.out, SEED, learnt[:2000]))
    names = ("rows", "few", "grow", "total", "layers", "width", "heads", "inner")
    plan = Plan(**{name: getattr(args, name) for name in names})
    trainer = Trainer(args.out, plan, encoder, args.compile)
    print(f"{trainer.model.num_parameters():,} parameters, {len(encoder.tokenizer)} tokens", flush=True)
    few = samples(SEED + 1, 60) + random.Random(SEED).sample(asked, min(len(asked), 60))
    trainer.run(Source(encoder, plan, learnt), few, args.every)
    print(trainer.evaluate(samples(SEED + 2, 400) + asked), flush=True)
    trainer.model.generation_config.update(do_sample=False, max_new_tokens=48)
    trainer.model.save_pretrained(args.out / "model")
    encoder.tokenizer.save_pretrained(args.out / "model")


if __name__ == "__main__":
    assert SPECIALS[:3] == ["<|pad|>", "<|bos|>", "<|end|>"]
    main()
