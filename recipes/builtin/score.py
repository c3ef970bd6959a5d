"""Held-out accuracy of the built-in model, with full attention and with every document seeing only itself."""

from __future__ import annotations

import random
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from builtin.data import IGNORE, Encoder, Row, collate, mask
from builtin.world import contexts, stories
from builtin.world.samples import Sample


def samples(seed: int, count: int) -> list[Sample]:
    """Contexts of five to ten pages and stories of the test split."""
    rng = random.Random(seed)
    made = [contexts.build(rng, "test", rng.randint(5, 8)) for _ in range(count)]
    made = [sample for sample in made if 5 <= len(sample.pages) <= 10]
    return made + [stories.build(rng, "test", rng.randint(5, 10)) for _ in range(count // 2)]


def logits(model: LlamaForCausalLM, batch: dict[str, Tensor], seen: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels at the labelled places, [labels, vocabulary] and [labels]."""
    states = model.model(
        input_ids=batch["ids"], attention_mask=seen, position_ids=batch["position"], use_cache=False
    ).last_hidden_state
    chosen = batch["label"] != IGNORE
    return F.linear(states[chosen], model.lm_head.weight), batch["label"][chosen]


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, encoder: Encoder, tests: list[Sample], block: bool, length: int = 768, size: int = 8
) -> dict[str, tuple[int, float, float]]:
    """Per kind: questions, share with the whole answer right (as if decoded greedily), with the value right."""
    model.eval()
    made = []
    for sample in tests:
        row = Row()
        if encoder.fill(row, sample, 0, length, 12):
            made.append(row)
    made.sort(key=lambda row: len(row.ids))
    right: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for first in range(0, len(made), size):
        group = made[first : first + size]
        batch = collate(group, max(len(row.ids) for row in group), encoder.tokenizer.pad_token_id or 0)
        scores, labels = logits(model, batch, mask(batch, block))
        hits = torch.zeros_like(batch["label"], dtype=torch.bool)
        hits[batch["label"] != IGNORE] = scores.argmax(-1) == labels
        for number, row in enumerate(group):
            for index, question in enumerate(row.asked):
                mine = batch["question"][number] == index
                value = mine & (batch["value"][number] == 1)
                right[question.kind].append((bool(hits[number][mine].all()), bool(hits[number][value].all())))
    model.train()
    return {
        kind: (len(found), sum(a for a, _ in found) / len(found), sum(b for _, b in found) / len(found))
        for kind, found in sorted(right.items())
    }


def table(full: dict[str, tuple[int, float, float]], block: dict[str, tuple[int, float, float]]) -> str:
    """One line per kind: whole answer and value, full attention against documents that see only themselves."""
    lines = [f"{'kind':14}{'count':>7}{'full':>8}{'value':>8}{'alone':>8}{'value':>8}"]
    for kind, (count, exact, value) in full.items():
        other = block[kind]
        lines.append(f"{kind:14}{count:7d}{exact:8.1%}{value:8.1%}{other[1]:8.1%}{other[2]:8.1%}")
    return "\n".join(lines)
