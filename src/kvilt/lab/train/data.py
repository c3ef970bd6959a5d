"""Training samples: JSON lines of many kinds, held-out splits, weighted mixtures, varied document order and count."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvilt.errors import TrainError
from kvilt.rows.files import json_lines, text_lines
from kvilt.types import Document, digest_of

TRAIN_SPLITS, HELD_OUT_SPLITS = ("train", "training"), ("train", "training", "dev", "validation", "valid", "eval")


@dataclass(frozen=True)
class Further:
    """One more question about the first `documents` documents of a sample."""

    question: str
    answer: str
    documents: int


@dataclass(frozen=True)
class Sample:
    """Documents and what is asked about them; `where` names the origin in messages."""

    documents: tuple[Document, ...]
    question: str = ""
    answers: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()  # documents that the answer needs, where the data says so
    ordered: bool = False  # the documents' order carries meaning
    reuse: bool = True  # False: trained as an ordinary prompt with full attention (KVLink's "standard" tasks)
    plain: bool = False  # answers[0] is a text without any prompt, every token of which is learned
    where: str = "sample"
    further: tuple[Further, ...] = ()  # learned in the same pass; questions do not see each other

    @property
    def digest(self) -> str:
        """What the sample asks about what, whatever the order of its documents."""
        asked = (part for f in self.further for part in (f.question, str(f.documents)))
        told = (*sorted(d.content for d in self.documents), *(self.answers if self.plain else ()))
        return digest_of(self.question, *told, *asked)

    @property
    def each(self) -> Iterator[Sample]:
        """The sample's questions, one sample each."""
        yield replace(self, further=())
        for f in self.further:
            told = self.documents[: f.documents]
            yield replace(self, question=f.question, answers=(f.answer,), documents=told, further=())


@dataclass(frozen=True)
class Source:
    """Samples with a weight in a mixture; weight 0 stands for the number of samples."""

    samples: tuple[Sample, ...]
    weight: float = 0.0
    name: str = ""


@dataclass(frozen=True)
class Pick:
    """One use of a sample: which one, and which draw of its documents' order and count."""

    source: int
    index: int
    view: int


Loader = Callable[[dict[str, Any], str], Sample]


def qa_sample(row: dict[str, Any], where: str) -> Sample:
    """{"documents": [...], "question": ..., "answers": [...]}: the rows of wrappers and of reuse QA.

    A document is a text, [title, text] or {"text", "title", "gold"}; "gold" may also be a list of indices beside the
    documents. Without a question the model will ask one itself; "ordered": true keeps the documents' order."""
    raw = row.get("documents", row.get("docs"))
    if raw is None and "text" in row:
        raw = [row]
    if not isinstance(raw, list) or not raw:
        raise TrainError(f'{where}: no documents: each row needs "documents": [...].')
    documents = tuple(_document(d, f"{where}, document {i + 1}") for i, d in enumerate(raw))
    gold = row.get("gold")
    if not isinstance(gold, list):
        gold = [i for i, d in enumerate(raw) if isinstance(d, dict) and d.get("gold")]
    if not all(isinstance(i, int) and 0 <= i < len(documents) for i in gold):
        raise TrainError(f'{where}: "gold" must hold indices of its {len(documents)} documents, not {gold}.')
    asked, ordered = str(row.get("question") or ""), bool(row.get("ordered"))
    further = tuple(_further(q, len(documents), ordered, where) for q in row.get("further") or ())
    return Sample(documents, asked, answers_of(row), tuple(gold), ordered, where=where, further=further)


def _further(raw: Any, count: int, ordered: bool, where: str) -> Further:
    """One of a row's further questions; it may be asked earlier only where documents keep their order."""
    number = raw.get("documents", count) if isinstance(raw, dict) else 0
    answers = answers_of(raw) if isinstance(raw, dict) else ()
    fits = isinstance(number, int) and 0 < number <= count and (ordered or number == count)
    if not isinstance(number, int) or not fits or not answers or not str(raw.get("question") or "").strip():
        needs = "a question, answers and, if the row is ordered, the number of documents"
        raise TrainError(f'{where}: each of "further" needs {needs}.')
    return Further(str(raw["question"]), answers[0], number)


def answers_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The row's answers that are not empty, best first."""
    raw = row.get("answers", row.get("answer"))
    listed = raw if isinstance(raw, list) else [] if raw is None else [raw]
    return tuple(str(a) for a in listed if str(a).strip())


def _document(raw: object, where: str) -> Document:
    if isinstance(raw, str):
        raw = {"text": raw}
    elif isinstance(raw, list) and len(raw) == 2:
        title, text = raw
        raw = {"title": title, "text": " ".join(text) if isinstance(text, list) else text}
    text = raw.get("text") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(text, str) or not text.strip():
        raise TrainError(f"{where} is empty or not a text.")
    return Document(text, str(raw["title"]) if raw.get("title") else None)


def read(path: str | Path, loader: Loader = qa_sample, allowed: Sequence[str] = TRAIN_SPLITS) -> tuple[Sample, ...]:
    """All samples of a JSONL file, gzipped or not. Raises UserError for an empty file or a row that cannot be used."""
    samples = []
    for where, row in json_lines(text_lines(Path(path)), str(path)):
        split = str(row.get("split", "train")).lower()
        if split not in allowed:
            raise TrainError(f"{where}: a row of the split {split!r}; here only {', '.join(allowed)} may be used.")
        samples.append(loader(row, where))
    if not samples:
        raise TrainError(f"{path} holds no samples.")
    return tuple(samples)


def sources_of(samples: Sequence[Sample] | Sequence[Source]) -> tuple[Source, ...]:
    """Samples as one source. Raises TrainError when there is nothing to train on."""
    plain = tuple(s for s in samples if isinstance(s, Sample))
    every = (*(s for s in samples if isinstance(s, Source)), *([Source(plain)] if plain else []))
    if not every or not all(s.samples for s in every):
        raise TrainError("no samples to train on: give at least one.")
    if any(s.weight < 0 for s in every):
        raise TrainError("the weight of a source must not be negative.")
    return every


def check_samples(samples: Iterable[Sample], answers: bool, standard: bool = False) -> None:
    """Raise TrainError for samples without answers where they are needed, or without documents to reuse.

    With `standard`, samples that are read with full attention may be among them."""
    for s in samples:
        if not (standard and not s.reuse) and (not s.documents or s.plain or not s.reuse):
            raise TrainError(f"{s.where}: no documents to reuse.")
        if answers and not s.answers:
            raise TrainError(f'{s.where}: no answer to learn from: add "answers": [...].')


def held_apart(
    sources: Sequence[Source], held_out: Sequence[Sample] | None, share: float, most: int, seed: int
) -> tuple[tuple[Source, ...], Source]:
    """What is trained on, and what is measured on: `held_out`, or else a `share` of every source; at most so many.

    Raises TrainError where there is too little, or where a sample would be both: early stopping would see its own training
    data."""
    if held_out is None:
        sources, held_out = split_held_out(sources, share, seed)
    trained = {s.digest: s.where for source in sources for s in source.samples}
    for sample in held_out:
        if sample.digest in trained:
            raise TrainError(f"wrong split: held-out {sample.where} is also trained on ({trained[sample.digest]}).")
    if not held_out:
        raise TrainError("the held-out split is empty: early stopping needs some samples that are not trained on.")
    return tuple(sources), Source(tuple(held_out[:: max(1, -(-len(held_out) // most))]), name="held-out")


def split_held_out(sources: Sequence[Source], share: float, seed: int) -> tuple[tuple[Source, ...], tuple[Sample, ...]]:
    """Put `share` of every source's samples aside; copies of one sample stay on one side."""
    if not 0 < share < 1:
        raise TrainError(f"held_out must be a share between 0 and 1, not {share}.")
    kept, held = [], []
    for source in sources:
        digests = sorted({s.digest for s in source.samples})
        count, name = max(1, round(share * len(digests))), source.name or "the data"
        if count >= len(digests):
            raise TrainError(f"{name}: {len(digests)} samples cannot be split; give more, or a held-out file.")
        aside = set(random.Random(f"split/{seed}").sample(digests, count))
        held += [s for s in source.samples if s.digest in aside]
        kept.append(replace(source, samples=tuple(s for s in source.samples if s.digest not in aside)))
    return tuple(kept), tuple(held)


def draw(sample: Sample, view: int, seed: int, fewest: int = 0, free: bool = False) -> Sample:
    """One prompt of a sample: documents in random order, and with `fewest` > 0 a random number of them.

    Gold documents always stay. Samples that name none keep all, unless `free` says that no document is needed (a
    teacher answers from whatever is there). Ordered samples stay as they are."""
    if sample.ordered:
        return sample
    rng = random.Random(f"draw/{seed}/{view}/{sample.digest}")
    chosen = list(range(len(sample.documents)))
    rest = [i for i in chosen if i not in sample.gold]
    if fewest and rest and (sample.gold or free) and not sample.further:
        least = max(fewest, len(sample.gold))
        count = rng.randint(min(least, len(chosen)), len(chosen))
        chosen = [*sample.gold, *rng.sample(rest, count - len(sample.gold))]
    rng.shuffle(chosen)
    gold = tuple(i for i, j in enumerate(chosen) if j in sample.gold)
    return replace(sample, documents=tuple(sample.documents[i] for i in chosen), gold=gold)


def schedule(sources: Sequence[Source], total: int, views: int, seed: int) -> list[Pick]:
    """Which sample is used when: a function of the arguments alone, so a resumed run goes on where it stopped.

    A longer schedule begins like a shorter one, so that a run can be extended."""
    cycles = [_cycle(i, len(s.samples), views, seed) for i, s in enumerate(sources)]
    shares = [s.weight or float(len(s.samples)) for s in sources]
    order = random.Random(f"mixture/{seed}").choices(range(len(sources)), shares, k=total)
    return [next(cycles[i]) for i in order]


def _cycle(source: int, size: int, views: int, seed: int) -> Iterator[Pick]:
    """A source's samples in one random order after another."""
    for turn in itertools.count():
        order = list(range(size))
        random.Random(f"cycle/{seed}/{source}/{turn}").shuffle(order)
        yield from (Pick(source, i, turn % views) for i in reversed(order))
