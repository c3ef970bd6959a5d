"""Real questions as token ids in one file: tokenised once, exactly as the engine tokenises prompts.

Run: python recipes/smollm2/data.py QA_FOLDER TOKENIZER_FOLDER OUT [--babi FOLDER] [--text PASSAGES] [--small], which writes
OUT/data-train.npz.xz and OUT/data-test.npz.xz. Training never sees a file named dev or test. PASSAGES are gzip-compressed JSON
lines {"title", "text"}: questions are made of their own sentences."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import lzma
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRAIN_ONE = ("squad_train", "fairytaleqa_train")  # one gold passage; others of its article stand beside it
TRAIN_MANY = ("hotpotqa_train", "hotpotqa_train_extra", "musique_train", "2wiki_train")
TEST_ONE = ("squad_dev", "squadshifts_wiki_test", "nq_oracle_dev")
TEST_MANY = ("nq_20docs", "hotpotqa_dev", "hotpotqa_dev_extra", "2wiki_dev", "2wiki_dev_extra", "musique_dev")
TEST = (*TEST_ONE, *TEST_MANY)
BABI = ("qa1_", "qa2_", "qa15_")
SYSTEMS = (
    "Answer the question from the documents.",  # kvilt.engine.text.DEFAULT_SYSTEM
    "You are a intelligent AI assistant. Please answer questions based on the user's instruction. "
    "Below are some reference documents that may help you in answering the user's question.",  # of KVLink's evaluation
    "",
    "You are a helpful assistant. Answer with a short phrase from the documents.",
    "Read the passages and answer the question.",
)
Ids = NDArray[np.uint16]


@dataclass
class Questions:
    """One dataset: documents, questions, and which belongs to which."""

    documents: list[Ids] = field(default_factory=list)
    article: list[int] = field(default_factory=list)  # of each document; those of one article stand in its order
    pieces: list[list[int]] = field(default_factory=list)  # documents that this one was cut into, itself not among them
    asks: list[Ids] = field(default_factory=list)
    answers: list[Ids] = field(default_factory=list)  # EOS included
    about: list[list[int]] = field(
        default_factory=list
    )  # documents of a question: the gold one alone, or all given ones
    gold: list[list[int]] = field(default_factory=list)  # places in `about`
    texts: list[list[str]] = field(default_factory=list)  # accepted answers
    names: list[str] = field(default_factory=list)

    def save(self, name: str, into: dict[str, Any]) -> None:
        """Add the arrays to a file's."""
        for part in ("documents", "pieces", "asks", "answers", "about", "gold"):
            lists = getattr(self, part)
            kind = np.uint16 if part in ("documents", "asks", "answers") else np.int32
            flat = [np.asarray(x, kind) for x in lists]
            into[f"{name}/{part}"] = np.concatenate(flat) if flat else np.zeros(0, kind)
            into[f"{name}/{part}.at"] = np.cumsum([0, *map(len, lists)]).astype(np.int32)
        into[f"{name}/article"] = np.asarray(self.article, np.int32)
        if name in TEST:
            into[f"{name}/texts"] = np.frombuffer(json.dumps([self.names, self.texts]).encode(), np.uint8)


class Builder:
    """Tokenises with the engine's own text format."""

    def __init__(self, tokenizer: Any) -> None:
        from kvilt.engine.text import TextFormat

        self.tokenizer = tokenizer
        self.format = TextFormat.of(tokenizer)
        self.eos = int(tokenizer.eos_token_id)

    def document(self, title: str, text: str) -> Ids:
        from kvilt import Document

        return np.asarray(self.format.document_ids(Document(text, title or None)), np.uint16)

    def ask(self, question: str) -> Ids:
        return np.asarray(self.format.question_ids(question), np.uint16)

    def answer(self, text: str) -> Ids:
        return np.asarray([*self.tokenizer.encode(text, add_special_tokens=False), self.eos], np.uint16)

    def add_question(self, q: Questions, row: dict[str, Any], about: list[int], gold: list[int], name: str) -> None:
        """One question about documents that are there already."""
        q.asks.append(self.ask(row["question"]))
        q.answers.append(self.answer(row["answers"][0]))
        q.about.append(about)
        q.gold.append(gold)
        q.texts.append(list(row["answers"]))
        q.names.append(name)

    def add_document(self, q: Questions, title: str, text: str, article: int, cut: bool) -> int:
        """A document, and the pieces that it can be cut into."""
        q.documents.append(self.document(title, text))
        q.article.append(article)
        q.pieces.append([])
        at = len(q.documents) - 1
        pieces = thirds(text) if cut else []
        q.pieces[at] = [self.add_document(q, title, piece, -2, cut=False) for piece in pieces]
        return at

    def one_passage(self, rows: Iterable[dict[str, Any]]) -> Questions:
        """Datasets that give the gold passage alone."""
        q, seen, articles = Questions(), dict[str, int](), dict[str, int]()
        for row in rows:
            passage = row["docs"][0]
            if row["passage_id"] not in seen:
                title = passage["title"]
                article = articles.setdefault(title, len(articles)) if title else -1
                seen[row["passage_id"]] = self.add_document(q, title, passage["text"], article, cut=True)
            self.add_question(q, row, [seen[row["passage_id"]]], [0], row["id"])
        return q

    def many_passages(self, rows: Iterable[dict[str, Any]]) -> Questions:
        """Datasets that give every question documents of its own."""
        q = Questions()
        for row in rows:
            places = [
                self.add_document(q, d["title"], d["text"], -1, cut=False) for d in row["docs"] if d["text"].strip()
            ]
            gold = [i for i, d in enumerate(d for d in row["docs"] if d["text"].strip()) if d["gold"]]
            self.add_question(q, row, places, gold, row["id"])
        return q


def thirds(text: str, most: int = 3, least: int = 120) -> list[str]:
    """A text cut at sentence ends into up to three pieces of like length; none for a short one."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    count = min(most, len(text) // least, len(sentences))
    if count < 2:
        return []
    pieces, at = [""] * count, 0
    for sentence in sentences:
        number = min(count - 1, at * count // max(1, len(text)))
        pieces[number] = f"{pieces[number]} {sentence}".strip()
        at += len(sentence) + 1
    return [piece for piece in pieces if piece]


def read(file: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a gzip-compressed JSON-lines file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return rows[:limit]


def stories(file: Path, limit: int) -> Iterator[dict[str, Any]]:
    """bAbI training stories: two statements a document, the story's last question."""
    story: list[str] = []
    question = answer = ""
    made = 0
    for line in gzip.decompress(file.read_bytes()).decode().splitlines():
        number, _, text = line.strip().partition(" ")
        if number == "1" and question and made < limit:
            made += 1
            documents = [
                {"title": "", "text": " ".join(story[i : i + 2]), "gold": False} for i in range(0, len(story), 2)
            ]
            yield {"id": f"{file.name}-{made}", "question": question, "answers": [answer], "docs": documents}
        story, question = ([], "") if number == "1" else (story, question)
        if "\t" in text:
            question, answer = (part.strip() for part in text.split("\t")[:2])
        else:
            story.append(text)


def needles(rows: Sequence[dict[str, Any]], count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Made-up facts hidden in training passages: what is copied from a text cannot be guessed."""
    colours, things = (
        ["red", "blue", "green", "black", "white", "grey", "brown", "yellow"],
        ["kettle", "drawer", "suitcase", "bicycle", "tower", "boat", "lamp", "gate"],
    )
    for number in range(count):
        passages = [{**rng.choice(rows)["docs"][0], "gold": False} for _ in range(rng.randint(2, 8))]
        names = rng.sample([f"{c} {t}" for c in colours for t in things], rng.randint(1, 4))
        codes = {name: str(rng.randrange(10 ** rng.randint(3, 7))) for name in names}
        for name, code in codes.items():
            place = rng.randrange(len(passages))
            sentences = re.split(r"(?<=[.!?])\s+", passages[place]["text"])
            sentences.insert(rng.randint(0, len(sentences)), f"The number of the {name} is {code}.")
            passages[place] = {**passages[place], "text": " ".join(sentences), "gold": name == names[0]}
        yield {
            "id": f"needle-{number}",
            "question": f"What is the number of the {names[0]}?",
            "answers": [codes[names[0]]],
            "docs": passages,
        }


SPAN = re.compile(  # a name inside a sentence, a year, or a number
    r"(?<=[a-z,;] )(?P<name>[A-Z][\w'-]+(?: (?:of |the |de )?[A-Z][\w'-]+){0,3})"
    r"|(?<=\bin )(?P<year>1\d{3}|20\d{2})\b|(?<= )(?P<number>\d[\d,.]*\d)(?= [a-z])"
)
ASKED = {"name": "who or what", "year": "what year", "number": "how many"}


def blanks(passages: Iterable[dict[str, Any]], rng: random.Random, most: int = 4) -> Iterator[dict[str, Any]]:
    """Questions about passages that have none: one of their sentences, a name, a year or a number in it asked for."""
    for number, passage in enumerate(passages):
        sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", passage["text"]) if 40 < len(s) < 220]
        found = [(s, m) for s in sentences for m in SPAN.finditer(s)]
        for sentence, m in rng.sample(found, min(most, len(found))):
            asked = ASKED[m.lastgroup or "name"]
            question = f"{sentence[: m.start()]}{asked}{sentence[m.end() :]}".rstrip(".!?") + "?"
            docs = [{"title": passage["title"], "text": passage["text"]}]
            about = {"question": question, "answers": [m.group()], "docs": docs}
            yield {**about, "id": f"blank-{number}-{m.start()}", "passage_id": f"passage-{number}"}


def build(
    folder: Path, babi: Path | None, tokenizer: Any, small: bool = False, text: Path | None = None
) -> dict[str, Any]:
    """All arrays of the file."""
    from kvilt.engine.text import TextFormat

    builder, limit = Builder(tokenizer), 60 if small else None
    out: dict[str, Any] = {}
    for name in (*TRAIN_ONE, *TEST_ONE):
        builder.one_passage(read(folder / f"{name}.jsonl.gz", limit)).save(name, out)
    for name in (*TRAIN_MANY, *TEST_MANY):
        builder.many_passages(read(folder / f"{name}.jsonl.gz", limit)).save(name, out)
    rows = read(folder / "squad_train.jsonl.gz", limit)
    builder.many_passages(needles(rows, 20 if small else 400, random.Random(0))).save("needles_train", out)
    files = sorted(babi.glob("*_train.txt.gz")) if babi else []
    made = [row for f in files if f.name.startswith(BABI) for row in stories(f, 20 if small else 700)]
    builder.many_passages(made).save("babi_train", out)
    if text:
        passages = [row for row in read(text, 200 if small else None) if 300 < len(row["text"]) < 1200][:12_000]
        builder.one_passage(blanks(passages, random.Random(0))).save("blanks_train", out)
    for number, system in enumerate(SYSTEMS):
        out[f"system/{number}"] = np.asarray(TextFormat.of(tokenizer, system).system_ids(), np.uint16)
    return out


def main() -> None:
    """Build the file."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("out", type=Path)
    parser.add_argument("--babi", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    made = build(args.folder, args.babi, tokenizer, args.small, args.text)
    for part in ("train", "test"):
        held = {name: array for name, array in made.items() if (part == "test") == name.startswith(TEST)}
        buffer = io.BytesIO()
        np.savez(buffer, **held)
        (args.out / f"data-{part}.npz.xz").write_bytes(lzma.compress(buffer.getvalue(), preset=9))


def load(file: Path) -> dict[str, Any]:
    """The arrays of a file."""
    return dict(np.load(io.BytesIO(lzma.decompress(file.read_bytes()))))


if __name__ == "__main__":
    main()
