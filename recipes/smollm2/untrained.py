"""Which strategy needs no training: what the gold answers cost under each, and how far it is from full recompute, on a CPU.

Run: python recipes/smollm2/untrained.py DATA TRAINED OUT.json [QUESTIONS] (500 of each set unless given). Of each question
the gold answer is read under every strategy, by the instruct model and by the taught one: its negative log-likelihood in nats,
and the mean divergence of the next-token distributions from full recompute's. A cheaper and sharper measure than answers, of
which most stay the same."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import data
import evaluation
import lean
import torch
import weights
from torch import Tensor
from torch.nn import functional as F

import rows
import train
from rows import IGNORE, Method

SETS = ("squad5", "shifts5")
BOS = 1


def strategies(system: tuple[int, ...]) -> dict[str, Method]:
    """The candidates; full recompute first."""
    return {
        "full": Method(reuse=False),
        "block:sink=system": Method(before=system),
        "naive": Method(),
        "epic:tokens=16,sink=system": Method(fresh=16, before=system),
        "epic:tokens=16": Method(fresh=16),
        "epic:tokens=16,sink=4": Method(fresh=16, before=(BOS,) * 4),
        "block:sink=1": Method(before=(BOS,)),
        "block:sink=4": Method(before=(BOS,) * 4),
        "block:sink=16": Method(before=(BOS,) * 16),
    }


@torch.no_grad()
def read(run: train.Run, base: lean.Base, method: Method, contexts: list[rows.Context]) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities (tokens, vocabulary) at the answers' tokens, and those tokens, context by context."""
    found = []
    for context in contexts:
        packed = rows.pack([[context]], method, base.shape.vocabulary, rows.size(context, method))
        batch = train.fed(packed, run.settings)
        none = lean.adapters(base.shape, 1, 1, "cpu")
        logits = train.at_labels(lean.Model(base), batch, None, none).log_softmax(-1)
        found.append((logits.half(), batch.labels[batch.labels != IGNORE]))
    return found


def measured(
    run: train.Run, base: lean.Base, contexts: list[rows.Context], methods: dict[str, Method]
) -> dict[str, Any]:
    """Per question: nats of the gold answer, and the mean divergence over its tokens."""
    lengths = [len(answer) for context in contexts for answer in context.answers]
    groups = [number for number, context in enumerate(contexts) for _ in context.answers]
    made: dict[str, Any] = {}
    full: list[tuple[Tensor, Tensor]] = []
    for name, method in methods.items():
        began, mine = time.time(), read(run, base, method, contexts)
        full = full or mine
        nats = torch.cat([F.nll_loss(p.float(), gold, reduction="none") for p, gold in mine])
        apart = [
            F.kl_div(p.float(), q.float(), log_target=True, reduction="none").sum(-1)
            for (p, _), (q, _) in zip(mine, full, strict=True)
        ]
        nll = [float(part.sum()) for part in nats.split(lengths)]
        made[name] = {"nll": nll, "kl": [float(part.mean()) for part in torch.cat(apart).split(lengths)]}
        made[name]["context"] = groups
        print(
            f"{name}: {sum(nll) / len(nll):.3f} nats a question, {len(nll)} questions, {time.time() - began:.0f} s",
            flush=True,
        )
    return made


def main() -> None:
    """Both models on both sets."""
    folder, trained, out = map(Path, sys.argv[1:4])
    limit = int(sys.argv[4]) if len(sys.argv) > 4 else 500
    settings = train.Settings(rows=1, device="cpu", flex=False, compiled=False)
    arrays = data.load(folder / "data-test.npz.xz") | data.load(folder / "data-train.npz.xz")
    base = lean.Base.of(weights.load(folder, "cpu"), lean.Shape(), settings.dtype)
    run = train.Run(settings, arrays, base, trained, time.time(), 1e9)
    taught = lean.merged(base, train.load(trained, "teach", "cpu").adapter)
    system = tuple(int(i) for i in arrays["system/1"])
    found: dict[str, Any] = {}
    for model, used in (("instruct", base), ("taught", taught)):
        for name in SETS:
            made = measured(run, used, evaluation.contexts(run, name, limit), strategies(system))
            found |= {f"{name}/{model}/{strategy}": values for strategy, values in made.items()}
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
