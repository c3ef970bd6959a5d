"""Contexts with many questions as rows of packed tokens, and the mask they are seen under: what is trained is what is run.

Nothing here needs more than NumPy: a GPU machine runs it without Kvilt. The tests hold it equal to `Plan.dense()`."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]
IGNORE = -100
PAD = -1  # context number of padding
RESERVED_SHARE = 0.4  # of the contexts of a distillation: passages that the taught model was not taught on


@dataclass(frozen=True)
class Method:
    """How a prompt is run. Learned vectors are ids from `vocabulary` on: header, trailer, start, end, then link slots."""

    reuse: bool = True  # documents are encoded alone
    header: int = 0
    trailer: int = 0
    links: int = 0
    slots: int = 0  # 0: the same link vectors behind every document
    markers: bool = False  # one vector opens and one closes the documents
    before: tuple[int, ...] = ()  # stands before a document while it is encoded; its rows are dropped
    fresh: int = 0  # first tokens of every document that are computed again
    writer: bool = False  # an adapter acts while documents are encoded
    reader: bool = False  # an adapter acts on the question and the answer
    everywhere: bool = False  # an adapter acts on all tokens

    @property
    def vectors(self) -> int:
        """Learned vectors of the method."""
        return self.header + self.trailer + 2 * self.markers + self.links * max(1, self.slots)

    def link(self, slot: int, vocabulary: int) -> range:
        """Ids of the link vectors behind the document in a slot."""
        first = vocabulary + self.header + self.trailer + 2 * self.markers
        first += self.links * (slot if self.slots else 0)
        return range(first, first + self.links)


@dataclass
class Context:
    """A prompt's parts, each tokenised alone, and the questions asked of it."""

    system: Array
    documents: list[Array]
    asks: list[Array]
    answers: list[Array]  # EOS included
    names: list[tuple[str, int]] = field(default_factory=list)  # dataset and number of each question
    length: int = 0


@dataclass
class Laid:
    """A context under a method: one entry for each token, in the order of the row."""

    ids: Array
    positions: Array
    group: Array  # 0: computed in the prompt; n: encoded with document n, alone
    branch: Array  # 0: seen by all that come later; n: by question n; -1: by its own group alone
    writer: Array  # 1 where the document adapter acts
    reader: Array  # 1 where the question adapter acts
    labels: Array  # the next token where it is learned, else IGNORE
    ends: list[int]  # last token of each question, which predicts the answer's first


class _Writer:
    def __init__(self) -> None:
        self.columns: list[list[Array]] = [[] for _ in range(7)]
        self.size = 0

    def add(self, ids: Any, start: int, group: int, branch: int, writer: int, reader: int, labels: Any = None) -> int:
        """Tokens at consecutive positions from `start`; returns the next position."""
        ids = np.asarray(ids, np.int64)
        n = len(ids)
        for column, value in zip(self.columns[2:6], (group, branch, writer, reader), strict=True):
            column.append(np.full(n, value, np.int64))
        self.columns[0].append(ids)
        self.columns[1].append(np.arange(start, start + n))
        self.columns[6].append(np.full(n, IGNORE, np.int64) if labels is None else np.asarray(labels, np.int64))
        self.size += n
        return start + n


def lay(context: Context, m: Method, vocabulary: int, room: int = 0) -> Laid:
    """One context under a method. With `room`, every question gets so many empty places for an answer instead of its own."""
    w, every = _Writer(), int(m.everywhere)
    at = w.add(context.system, 0, 0, 0, every, 0)
    first = vocabulary + m.header + m.trailer
    if m.markers:
        at = w.add([first], at, 0, 0, every, 0)
    for slot, document in enumerate(context.documents):
        at = _document(w, m, document, slot, at, vocabulary)
        at = w.add(m.link(slot, vocabulary), at, 0, 0, every, 0)
    if m.markers:
        at = w.add([first + 1], at, 0, 0, every, 0)
    ends = []
    for number, (ask, answer) in enumerate(zip(context.asks, context.answers, strict=True), 1):
        ends.append(w.size + len(ask) - 1)
        tail = np.zeros(room, np.int64) if room else answer[:-1]
        labels = np.full(len(ask) + len(tail), IGNORE, np.int64)
        if not room:
            labels[len(ask) - 1 :] = answer
        w.add(np.concatenate([ask, tail]), at, 0, number, every, int(m.reader), labels)
    columns = [np.concatenate(column) for column in w.columns]
    return Laid(*columns, ends=ends)


def _document(w: _Writer, m: Method, document: Array, slot: int, at: int, vocabulary: int) -> int:
    acts = int(m.writer or m.everywhere)
    if not m.reuse:
        return w.add(document, at, 0, 0, acts, 0)
    group, header = slot + 1, range(vocabulary, vocabulary + m.header)
    w.add(m.before, at - len(m.before), group, -1, acts, 0)
    start = at
    at = w.add(header, at, group, 0, acts, 0)
    at = w.add(document[: m.fresh], at, group, -1, acts, 0)
    at = w.add(document[m.fresh :], at, group, 0, acts, 0)
    at = w.add(range(vocabulary + m.header, vocabulary + m.header + m.trailer), at, group, 0, acts, 0)
    w.add(document[: m.fresh], start, 0, 0, int(m.everywhere), 0)
    return at


@dataclass
class Batch:
    """Rows of packed contexts, (rows, length) each; `context` numbers the contexts of a row, PAD where there is none."""

    ids: Array
    positions: Array
    context: Array
    group: Array
    branch: Array
    writer: Array
    reader: Array
    labels: Array
    ends: list[tuple[int, int]]  # (row, place) of each question's last token, in the order of `asked`
    asked: list[tuple[str, int]]


def pack(rows: Sequence[Sequence[Context]], m: Method, vocabulary: int, length: int, room: int = 0) -> Batch:
    """Lay every row's contexts side by side."""
    shape = (len(rows), length)
    fills = {
        "positions": 0,
        "context": PAD,
        "group": 0,
        "branch": 0,
        "ids": 0,
        "writer": 0,
        "reader": 0,
        "labels": IGNORE,
    }
    made = {name: np.full(shape, fill, np.int64) for name, fill in fills.items()}
    made["positions"][:] = np.arange(length)
    ends, asked = [], []
    for r, contexts in enumerate(rows):
        at = 0
        for number, context in enumerate(contexts):
            laid = lay(context, m, vocabulary, room)
            here = slice(at, at + len(laid.ids))
            for name in ("ids", "positions", "group", "branch", "writer", "reader", "labels"):
                made[name][r, here] = getattr(laid, name)
            made["context"][r, here] = number
            ends += [(r, at + end) for end in laid.ends]
            asked += context.names
            at = here.stop
    return Batch(**made, ends=ends, asked=asked)


def size(context: Context, m: Method, room: int = 0) -> int:
    """Tokens of a context under a method."""
    around = m.header + m.trailer + m.links + len(m.before) + m.fresh
    total = len(context.system) + 2 * m.markers + sum(map(len, context.documents)) + around * len(context.documents)
    answers = room * len(context.answers) if room else sum(len(a) - 1 for a in context.answers)
    return total + sum(map(len, context.asks)) + answers


def fill(contexts: Iterator[Context], rows: int, length: int, m: Method, room: int = 0) -> list[list[Context]]:
    """As many contexts as fit into so many rows, first fit; stops when one fits into none. Ends early with the contexts."""
    made: list[list[Context]] = [[] for _ in range(rows)]
    free = [length] * rows
    for context in contexts:
        need = size(context, m, room)
        if need > length:
            continue
        at = next((r for r in range(rows) if free[r] >= need), None)
        if at is None:
            break
        made[at].append(context)
        free[at] -= need
    return made


# --- drawing contexts ---------------------------------------------------------------------------------------------


class Dataset:
    """One dataset of the file that data.py writes."""

    def __init__(self, name: str, arrays: Mapping[str, Any]) -> None:
        self.name = name
        for part in ("documents", "pieces", "asks", "answers", "about", "gold"):
            flat, at = arrays[f"{name}/{part}"].astype(np.int64), arrays[f"{name}/{part}.at"]
            setattr(self, part, [flat[a:b] for a, b in itertools.pairwise(at)])
        self.article: Array = arrays[f"{name}/article"]
        self.of: dict[int, list[int]] = {}  # document -> questions about it
        for number, about in enumerate(self.about):
            if len(about) == 1:
                self.of.setdefault(int(about[0]), []).append(number)
        articles: dict[int, list[int]] = {}
        for d in self.of:
            articles.setdefault(int(self.article[d]), []).append(d)
        self.articles = [ds for a, ds in sorted(articles.items()) if a >= 0 and len(ds) >= 4]
        self.loose = [d for a, ds in sorted(articles.items()) if a < 0 or len(ds) < 4 for d in ds]
        self.article_of = {d: a for a in self.articles for d in a}
        # every eighth article, and loose passage: what the taught model has not seen, so that distillation sees its doubts
        self.reserved = {d for a in self.articles[::8] for d in a} | set(self.loose[::8])

    documents: list[Array]
    pieces: list[Array]
    asks: list[Array]
    answers: list[Array]
    about: list[Array]
    gold: list[Array]

    def context(self, system: Array, documents: Sequence[int], questions: Sequence[int]) -> Context:
        """These documents and questions."""
        return Context(
            system,
            [self.documents[d] for d in documents],
            [self.asks[q] for q in questions],
            [self.answers[q] for q in questions],
            [(self.name, int(q)) for q in questions],
        )


def texts(name: str, arrays: Mapping[str, Any]) -> list[list[str]]:
    """Accepted answers of a held-out dataset's questions."""
    found: list[list[str]] = json.loads(bytes(arrays[f"{name}/texts"]))[1]
    return found


class Sampler:
    """Draws training contexts: articles' passages, passages in pieces, and questions that need several documents."""

    MOST, EACH = 16, 4  # questions of a context, and of a document

    def __init__(self, arrays: Mapping[str, Any], seed: int, length: int = 3000, reserve: str = "without") -> None:
        self.rng, self.length, self.reserve = random.Random(seed), length, reserve
        self.systems = [arrays[f"system/{n}"].astype(np.int64) for n in range(5)]
        self.one = {n: Dataset(n, arrays) for n in ("squad_train", "fairytaleqa_train")}
        many = ("hotpotqa_train", "hotpotqa_train_extra", "musique_train", "2wiki_train", "needles_train", "babi_train")
        self.many = {n: Dataset(n, arrays) for n in many}
        self.blanks = Dataset("blanks_train", arrays) if "blanks_train/asks" in arrays else None
        self.left: dict[str, list[int]] = {}

    def __iter__(self) -> Iterator[Context]:
        kinds = {self._article: 0.62, self._pieces: 0.12, self._several: 0.26}
        kinds |= {self._gaps: 0.25} if self.blanks else {}
        while True:
            draw = self.rng.choices(list(kinds), list(kinds.values()))[0]
            yield draw()

    def _system(self) -> Array:
        return self.systems[self.rng.choices(range(5), [0.38, 0.38, 0.08, 0.08, 0.08])[0]]

    def _next(self, name: str, items: Callable[[], Iterable[int]]) -> int:
        """Items in random order, all of them before any comes again."""
        left = self.left.setdefault(name, [])
        if not left:
            left += items()
            self.rng.shuffle(left)
        return left.pop()

    def _passages(self, few: bool = False) -> tuple[Dataset, list[int]]:
        """Passages of one article around the next one whose turn it is, or loose ones."""
        name = "squad_train" if self.rng.random() < 0.85 else "fairytaleqa_train"
        data = self.one[name]
        count = (
            self.rng.randint(1, 3) if few else self.rng.choices(range(1, 11), [2, 6, 10, 14, 18, 14, 10, 10, 8, 8])[0]
        )
        aside = self.reserve == "with" and self.rng.random() < RESERVED_SHARE
        first = self._next(f"{name}/{aside}", lambda: [d for d in data.of if (d in data.reserved) == aside])
        article = data.article_of.get(first, data.loose)
        if article is data.loose:
            article = self.rng.sample(article, min(100, len(article)))
        pool = [d for d in article if d != first and (d in data.reserved) == aside]
        return data, [first, *self.rng.sample(pool, min(len(pool), count - 1))]

    def _questions(self, data: Dataset, documents: Sequence[int], most: int) -> list[int]:
        asked = [q for d in documents for q in self.rng.sample(data.of[d], min(self.EACH, len(data.of[d])))]
        self.rng.shuffle(asked)
        return asked[:most]

    def _article(self) -> Context:
        data, documents = self._passages()
        self.rng.shuffle(documents)
        documents = self._fitting(data, documents)
        return data.context(self._system(), documents, self._questions(data, documents, self.MOST))

    def _pieces(self) -> Context:
        data, passages = self._passages(few=True)
        documents = [int(p) for d in passages for p in (data.pieces[d] if len(data.pieces[d]) else [d])]
        return data.context(self._system(), documents, self._questions(data, passages, self.MOST))

    def _gaps(self) -> Context:
        """Passages of any text, asked for what was taken out of their own sentences."""
        data = self.blanks
        assert data is not None
        first = self._next(data.name, lambda: data.of)
        documents = [first, *self.rng.sample(list(data.of), self.rng.randint(1, 7))]
        documents = self._fitting(data, list(dict.fromkeys(documents)))
        self.rng.shuffle(documents)
        return data.context(self._system(), documents, self._questions(data, documents, self.MOST))

    def _several(self) -> Context:
        shares = {
            "hotpotqa_train": 3,
            "hotpotqa_train_extra": 1.5,
            "musique_train": 2,
            "2wiki_train": 5,
            "needles_train": 1.5,
            "babi_train": 3,
        }
        name = self.rng.choices(list(shares), list(shares.values()))[0]
        data = self.many[name]
        q = self._next(name, lambda: range(len(data.asks)))
        about, gold = [int(d) for d in data.about[q]], {int(g) for g in data.gold[q]}
        if name == "babi_train":
            return data.context(self._system(), about, [q])
        wanted = [about[g] for g in sorted(gold)]
        others = [d for i, d in enumerate(about) if i not in gold]
        chosen = wanted + self.rng.sample(others, min(len(others), self.rng.randint(0, len(others))))
        chosen = self._fitting(data, chosen)
        self.rng.shuffle(chosen)
        return data.context(self._system(), chosen, [q])

    def _fitting(self, data: Dataset, documents: list[int]) -> list[int]:
        """The first documents that fit; always one."""
        kept, total = [], 0
        for d in documents:
            total += len(data.documents[d])
            if kept and total > self.length:
                break
            kept.append(d)
        return kept


def tests(
    name: str,
    arrays: Mapping[str, Any],
    system: Array,
    documents: int,
    limit: int,
    seed: int = 0,  # noqa: PT028 - no test
) -> list[Context]:
    """Held-out contexts: every question's own passage among `documents` of its article, or the documents it comes with.

    Questions about the same documents share a context; at most `limit` questions."""
    data, rng = Dataset(name, arrays), random.Random(f"{name}/{documents}/{seed}")
    if not data.of:
        return [_given(data, system, q, documents, rng) for q in range(min(limit, len(data.asks)))]
    made, count = [], 0
    order = [*(list(a) for a in data.articles), data.loose]
    for article in order:
        rng.shuffle(article)
    groups = [a[i : i + documents] for a in order for i in range(0, len(a) - documents + 1, documents)]
    rng.shuffle(groups)
    for group in groups:
        questions = [q for d in group for q in data.of[d]]
        made.append(data.context(system, group, questions[: max(0, limit - count)]))
        count += len(questions)
        if count >= limit:
            break
    return made


def chunked(
    name: str, arrays: Mapping[str, Any], system: Array, passages: int, limit: int, seed: int = 0
) -> list[Context]:
    """Held-out articles: consecutive passages, each cut into pieces, in their order."""
    data, rng = Dataset(name, arrays), random.Random(f"chunked/{name}/{seed}")
    groups = [sorted(a)[i : i + passages] for a in data.articles for i in range(0, len(a) - passages + 1, passages)]
    rng.shuffle(groups)
    made, count = [], 0
    for group in groups:
        documents = [int(p) for d in group for p in (data.pieces[d] if len(data.pieces[d]) else [d])]
        questions = [q for d in group for q in data.of[d]]
        made.append(data.context(system, documents, questions[: max(0, limit - count)]))
        count += len(questions)
        if count >= limit:
            break
    return made


def _given(data: Dataset, system: Array, q: int, documents: int, rng: random.Random) -> Context:
    about, gold = [int(d) for d in data.about[q]], {int(g) for g in data.gold[q]}
    wanted = [about[g] for g in sorted(gold)]
    others = [d for i, d in enumerate(about) if i not in gold]
    chosen = wanted + others[: max(0, documents - len(wanted))]
    rng.shuffle(chosen)
    return data.context(system, chosen, [q])
