"""Greedy answers to thousands of held-out questions at once: rows are read once, then every question goes on by itself."""

from __future__ import annotations

import gzip
import json
import re
import string
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lean import Model, Seen
from torch import Tensor

import rows
from rows import Context, Method

EOS = 2
_DROP = str.maketrans("", "", string.punctuation)


def answers(model: Model, batch: Any, table: Tensor | None, adapter: Any, room: int) -> Tensor:
    """Greedy tokens behind each question, (questions, room), filled with EOS."""
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        cache[layer] = (keys.contiguous(), values.contiguous())
        return keys, values

    row, place = (torch.tensor(x, device=batch.ids.device) for x in zip(*batch.ends, strict=True))
    seen = model.seen(batch.context, batch.group, batch.branch, batch.positions)
    hidden = model.hidden(model.embedded(batch.ids, table), batch.positions, seen, batch.gates, adapter, keep)
    token = model.logits(hidden[row, place]).argmax(-1)
    at, slot, count = _slots(row, place)
    made = [token]
    plain = Model(model.base)
    for step in range(1, room):
        if bool((torch.stack(made) == EOS).any(0).all()):
            break
        token = _step(plain, batch, table, adapter, cache, (row, slot, at + step, count), token)
        made.append(token)
    found = torch.full((len(row), room), EOS, device=row.device)
    found[:, : len(made)] = torch.stack(made, 1)
    ended = (found == EOS).cumsum(1) > 0
    return found.masked_fill(ended, EOS)


def _slots(row: Tensor, place: Tensor) -> tuple[Tensor, Tensor, int]:
    """Places of the questions' ends as a rectangle (rows, most questions of a row); spare ones repeat a row's first."""
    total = int(row.max()) + 1
    slot = torch.zeros_like(row)
    for r in range(total):
        mine = row == r
        slot[mine] = torch.arange(int(mine.sum()), device=row.device)
    count = int(slot.max()) + 1
    at = torch.zeros(total, count, dtype=torch.long, device=row.device)
    for r in range(total):
        mine = place[row == r]
        at[r, : len(mine)] = mine
        at[r, len(mine) :] = mine[0] if len(mine) else 0
    return at, slot, count


def _step(model: Model, batch: Any, table: Any, adapter: Any, cache: Any, where: Any, token: Tensor) -> Tensor:
    """One more token behind every question."""
    row, slot, at, _ = where  # at: (rows, slots) places to fill
    total = at.shape[0]
    tokens = torch.zeros_like(at)
    tokens[row, slot] = token
    counts = torch.bincount(row, minlength=total)
    spare = torch.arange(at.shape[1], device=row.device)[None] >= counts[:, None]
    tokens = torch.where(spare, tokens[:, :1], tokens)
    take = lambda t: t[:total].gather(1, at)  # noqa: E731
    position, context, branch = (take(t.long()) for t in (batch.positions, batch.context, batch.branch))
    gates = torch.stack([batch.gates[:total, :, i].gather(1, at) for i in (0, 1)], -1)
    keys_at = [t[:total].long()[:, None] for t in (batch.positions, batch.context, batch.branch)]
    mask = (keys_at[1] == context[..., None]) & (keys_at[0] <= position[..., None])
    mask &= (keys_at[2] == 0) | (keys_at[2] == branch[..., None])  # (rows, slots, length)
    index = at[:, None, :, None]

    def keep(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        whole = tuple(t[:total] for t in cache[layer])
        for held, new in zip(whole, (keys, values), strict=True):
            held.scatter_(2, index.expand(-1, new.shape[1], -1, new.shape[3]), new)
        return whole[0], whole[1]

    x = model.embedded(tokens, table)
    hidden = model.hidden(x, position, Seen(mask[:, None]), gates, adapter, keep)
    return model.logits(hidden[row, slot]).argmax(-1)


def normal(text: str) -> str:
    """SQuAD's normal form."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_DROP)).split())


def right(text: str, wanted: Sequence[str]) -> bool:
    """Sub-string accuracy."""
    whole = normal(text)
    return any((normal(a) in whole) if normal(a) else not whole for a in wanted)


SETS = {  # name: (dataset, documents, kind)
    "squad5": ("squad_dev", 5, "tests"),
    "shifts5": ("squadshifts_wiki_test", 5, "tests"),
    "nq5": ("nq_oracle_dev", 5, "tests"),
    "chunked": ("squad_dev", 2, "chunked"),
    "squad10": ("squad_dev", 10, "tests"),
    "hotpot10": ("hotpotqa_dev", 10, "tests"),
    "2wiki10": ("2wiki_dev_extra", 10, "tests"),
    "nq10": ("nq_20docs", 10, "tests"),
}
CHEAP = {"squad5": 1000, "shifts5": 1000, "nq5": 1000, "chunked": 600, "squad10": 500}  # many questions share a context
DEAR = {"nq10": 221, "hotpot10": 215, "2wiki10": 247}


def contexts(run: Any, name: str, limit: int) -> list[Context]:
    """The contexts of a test set."""
    dataset, documents, kind = SETS[name]
    if (name, limit) in run.drawn:
        return list(run.drawn[name, limit])
    system = run.arrays["system/1"].astype(np.int64)
    made = (rows.tests if kind == "tests" else rows.chunked)(dataset, run.arrays, system, documents, limit)
    run.drawn[name, limit] = [c for c in made if c.asks]
    return contexts(run, name, limit)


@torch.no_grad()
def score(
    run: Any, model: Model, method: Method, learned: Any, sets: dict[str, int]
) -> dict[str, dict[int, list[int]]]:
    """Answers' tokens for each question of each set."""
    from train import fed

    s, vocabulary = run.settings, run.base.shape.vocabulary
    found: dict[str, dict[int, list[int]]] = {}
    for name, limit in sets.items():
        todo = [c for c in contexts(run, name, limit) if rows.size(c, method, s.room) <= s.length]
        found[name] = {}
        while todo:
            filled = rows.fill(iter(todo), s.rows, s.length, method, s.room)
            used = {id(c) for row in filled for c in row}
            todo = [c for c in todo if id(c) not in used]
            batch = fed(rows.pack(filled, method, vocabulary, s.length, s.room), s)
            got = answers(model, batch, learned.table(), learned.adapter, s.room).tolist()
            found[name] |= {q: tokens for (_, q), tokens in zip(batch.asked, got, strict=True)}
    return found


class Texts:
    """Decodes answers, where a tokenizer is at hand."""

    def __init__(self, folder: Any) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(gzip.decompress((folder / "tokenizer.json.gz").read_bytes()).decode())

    def text(self, tokens: Sequence[int]) -> str:
        """Up to EOS."""
        kept = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
        return str(self.tokenizer.decode(list(kept)))


def table(
    run: Any, found: dict[str, dict[int, list[int]]], full: dict[str, dict[int, list[int]]] | None
) -> dict[str, Any]:
    """Accuracy, retention and agreement in percent."""
    made = {}
    for name, got in found.items():
        wanted = rows.texts(SETS[name][0], run.arrays)
        hits = {q: right(run.texts.text(t), wanted[q]) for q, t in got.items()}
        line: dict[str, Any] = {"n": len(hits), "right": round(100 * sum(hits.values()) / max(1, len(hits)), 2)}
        if full and name in full:
            both = [q for q in hits if q in full[name]]
            good = [q for q in both if right(run.texts.text(full[name][q]), wanted[q])]
            line["full"] = round(100 * len(good) / max(1, len(both)), 2)
            line["kept"] = round(100 * sum(hits[q] for q in good) / max(1, len(good)), 2)
            line["agree"] = round(100 * sum(got[q] == full[name][q] for q in both) / max(1, len(both)), 2)
        made[name] = line
    return made


def report(run: Any, label: str, model: Model, method: Method, learned: Any, sets: dict[str, int]) -> None:
    """Answer the sets, keep the tokens, print the table; what is kept counts against the same weights' full recompute."""
    began = time.time()
    found = score(run, model, method, learned, sets)
    kind, _, name = label.rpartition("/")
    run.tokens.setdefault(label, {}).update(found)
    full = run.tokens.get(f"{kind}/full" if kind else "full") if name != "full" else None
    made = table(run, found, full)
    run.results.setdefault(f"table/{label}", {}).update(made)
    run.say(f"{label} ({time.time() - began:.1f}s): {json.dumps(made)}")
    write(run)


def everything(run: Any, stages: Sequence[Any]) -> None:
    """All sets: the untaught and taught model in full and naively, then every stage, while time allows."""
    from train import Learned, Stage, begin, is_done

    fresh = begin(run, Stage("none", Method(), 0))
    system = tuple(int(i) for i in run.arrays["system/1"])
    untrained = {
        "full": Method(reuse=False),
        "naive": Method(),
        "block:sink=system": Method(before=system),
        "block:sink=4": Method(before=(1,) * 4),
        "epic:tokens=16": Method(fresh=16),
    }
    jobs = []
    if run.taught is not None:
        jobs += [(name, run.taught, m, None) for name, m in untrained.items() if name in ("full", "naive")]
    order = (
        "writer_more",
        "teach_more",
        "writer_packet_query",
        "writer_packet",
        "writer",
        "packet",
        "linked",
        "query",
        "kvlink5",
        "kvlink1",
        "kvlink0",
    )
    by = {s.name: s for s in stages if is_done(run.out, s.name)}
    jobs += [(n, run.taught if by[n].distilled else run.base, by[n].method, n) for n in order if n in by]
    jobs += [
        (n, run.taught, m, None) for n, m in untrained.items() if n not in ("full", "naive") and run.taught is not None
    ]
    jobs += [
        (f"instruct/{n}", run.base, untrained[n], None)
        for n in ("full", "naive", "block:sink=system", "epic:tokens=16")
    ]
    for sets in ({"squad5": 60},) if run.smoke else (CHEAP, DEAR):
        for label, base, method, name in jobs:
            if run.left < 8:
                run.say(f"no time for {label} {list(sets)}")
                continue
            try:
                learned = Learned(fresh.adapter, {}) if name is None else trained(run, name, fresh.adapter)
                model = Model(base, run.settings.flex, run.settings.compiled, kernels=run.kernels)
                report(run, label, model, method, learned, sets)
            except Exception as error:
                run.say(f"{label} FAILED {error!r}"[:500])


def trained(run: Any, name: str, fresh: Any) -> Any:
    """What a stage and those that it starts from have trained."""
    from train import STAGES, Learned, load

    stage = next(s for s in STAGES if s.name == name)
    adapter, vectors = dict(fresh), {}
    for part in (*stage.start, name):
        got = load(run.out, part, run.settings.device)
        adapter |= got.adapter
        vectors |= got.vectors
    return Learned(adapter, vectors)


def write(run: Any) -> None:
    """All results so far in one file."""
    arrays: dict[str, Any] = {}
    for label, sets in run.tokens.items():
        for name, got in sets.items():
            arrays[f"{label}/{name}/questions"] = np.asarray(list(got), np.int32)
            arrays[f"{label}/{name}/tokens"] = np.asarray(list(got.values()), np.uint16)
    arrays["results.json"] = np.frombuffer(json.dumps({"log": run.log, **run.results}).encode(), np.uint8)
    np.savez_compressed(run.out / "results.npz", **arrays)
