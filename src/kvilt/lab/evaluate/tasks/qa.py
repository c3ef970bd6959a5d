"""Questions over several documents: what the five QA datasets share, and the task `qa` for a file of one's own.

The library's own layout, accepted by every QA task, is one JSON object a line:
{"id", "question", "answers": [...], "docs": [{"title", "text", "gold"}], "split"?, "dataset"?}."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kvilt.errors import DocumentError, UserError
from kvilt.lab.evaluate.tasks.base import Sample, Task, require
from kvilt.lab.evaluate.tasks.files import Row, hub_rows, rows
from kvilt.types import Document

PROMPTS = ("kvlink", "kvlink_authors", "kv_packet")
SYSTEM = (
    "You are a intelligent AI assistant. Please answer questions based on the user's instruction. "
    "Below are some reference documents that may help you in answering the user's question."
)  # KVLink's evaluation, its slip included
_REASON = (
    "Answer the question from the documents above. Reason step by step first.\nQuestion: {question}\n"
    "Your response should end with: 'Short Answer: <your answer>'"
)


@dataclass(frozen=True)
class Passage:
    """One given document; `gold` marks those that the answer needs."""

    title: str | None
    text: str
    gold: bool = False


@dataclass(frozen=True)
class Item:
    """A question with everything that a dataset gives with it."""

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QATask(Task):
    """A multi-document QA dataset.

    `prompt` is "kvlink" (the question alone; sub-string accuracy), "kvlink_authors" (the same in the words of the authors'
    code, for their checkpoints: documents are numbered, and the template's dates left out) or "kv_packet" (reasoning that
    ends in a short answer, no titles; corpus F1). `documents` keeps the gold ones and the first of the others, in their order."""

    ALIASES: ClassVar[tuple[str, ...]] = ()
    HUB: ClassVar[tuple[str, str | None] | None] = None
    REASONED_TOKENS: ClassVar[int] = 512

    split: str = "dev"
    answer_tokens: int = 200
    path: str | None = None
    documents: int | None = None
    prompt: str = "kvlink"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prompt in PROMPTS, f"{self.NAME}: unknown prompt {self.prompt!r}. Known: {', '.join(PROMPTS)}.")
        require(self.documents is None or self.documents > 0, f"{self.NAME}: documents must be at least 1.")

    @property
    def max_new_tokens(self) -> int:
        """The paper's budget unless `answer_tokens` was given."""
        default = self.answer_tokens == type(self).answer_tokens
        return self.REASONED_TOKENS if default and self.prompt == "kv_packet" else self.answer_tokens

    @property
    def metrics(self) -> tuple[str, ...]:
        """KVLink reports sub-string accuracy, KV Packet corpus F1."""
        if self.prompt == "kv_packet":
            return "micro_f1", "f1", "accuracy", "exact", "not_mentioned"
        return "accuracy", "exact", "f1", "micro_f1", "not_mentioned"

    @property
    def system(self) -> str | None:
        """KVLink's system text; KV Packet gives none of its own."""
        return None if self.prompt == "kv_packet" else SYSTEM

    @property
    def undated(self) -> bool:
        """Whether the prompt is asked without the chat template's dates."""
        return self.prompt == "kvlink_authors"

    def extract(self, text: str) -> str:
        """With reasoning, only what follows the last "Answer:" counts (nothing, if the text was cut short)."""
        if self.prompt != "kv_packet":
            return text.strip()
        return text.rpartition("Answer:")[2].strip().strip("'<>").strip() if "Answer:" in text else ""

    def _samples(self, split: str) -> Iterator[Sample]:
        for item in self.items(split):
            passages = keep(item.passages, self.documents)
            yield self.sample(item, passages, item.id)

    def items(self, split: str) -> Iterator[Item]:
        """The questions of a split with all their passages."""
        source = rows(self.path, self.ALIASES, split) if self.path else self._hub(split)
        for row in source:
            item = self.read(row)
            if item is not None:
                yield item

    def _hub(self, split: str) -> Iterator[Row]:
        if self.HUB is None:
            raise UserError(f"{self.NAME} is on no hub in a ready form: give a local copy with path=….")
        return hub_rows(*self.HUB, split)

    def read(self, row: Row) -> Item | None:
        """One row as a question, or None for a row that is none; raises DocumentError naming the row."""
        try:
            item = own(self.NAME, row) if "docs" in row.data else self.official(row)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            problem = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DocumentError(f"{row.where}: not in the layout of {self.NAME}: {problem}.") from error
        return None if item is None else checked(item, row.where)

    def official(self, row: Row) -> Item | None:
        """A row in the layout that the dataset is published in."""
        raise KeyError("docs")

    def sample(self, item: Item, passages: tuple[Passage, ...], name: str, **metadata: Any) -> Sample:
        """The prompt for a question over these passages."""
        documents = tuple(self._document(number, p) for number, p in enumerate(passages, 1))
        question = _REASON.format(question=item.question) if self.prompt == "kv_packet" else item.question
        gold = [i for i, p in enumerate(passages) if p.gold]
        told = {"gold": gold, "gold_titles": [passages[i].title for i in gold], **item.metadata, **metadata}
        return Sample(name, question, documents, item.answers, told)

    def _document(self, number: int, passage: Passage) -> Document:
        if self.prompt == "kvlink_authors":
            return Document(f"Document [{number}](Title: {passage.title or ''}) {passage.text}")
        return Document(passage.text, passage.title if self.prompt == "kvlink" else None)


@dataclass(frozen=True)
class FileQA(QATask):
    """Questions of one's own in the library's layout; `path` is a file."""

    NAME: ClassVar[str] = "qa"
    ALIASES: ClassVar[tuple[str, ...]] = ("qa",)
    split: str = "test"


def own(name: str, row: Row) -> Item:
    """A row in the library's own layout."""
    data = row.data
    passages = tuple(Passage(d.get("title"), d["text"], bool(d.get("gold"))) for d in data["docs"])
    extra = {key: value for key, value in data.items() if key in ("hops", "kind", "type", "group")}
    return Item(row.name(name), data["question"], tuple(data["answers"]), passages, extra)


def paragraphs(task: QATask, row: Row) -> Item:
    """A row of HotpotQA or 2WikiMultihopQA: paragraphs of sentences and the titles of the supporting ones.

    {_id or id, question, answer, context, supporting_facts, type, level}.

    The original files hold lists of pairs, the hub copies columns or a JSON string."""
    data = row.data
    context, facts = _decoded(data["context"]), _decoded(data["supporting_facts"])
    if isinstance(context, dict):
        context = list(zip(context["title"], context.get("sentences") or context["content"], strict=True))
    titles = set(facts["title"]) if isinstance(facts, dict) else {title for title, _ in facts}
    passages = tuple(Passage(title, " ".join(s.strip() for s in text), title in titles) for title, text in context)
    answer = () if data.get("answer") is None else (data["answer"],)
    extra: dict[str, Any] = {key: data[key] for key in ("type", "level") if key in data}
    return Item(row.name(task.NAME), data["question"], answer, passages, {"hops": len(titles), **extra})


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def checked(item: Item, where: str) -> Item:
    """The question without blank passages; raises DocumentError when nothing is left to ask, read or score."""
    answers = tuple(a for a in item.answers if isinstance(a, str) and a.strip())
    passages = tuple(p for p in item.passages if p.text.strip())
    if not isinstance(item.question, str) or not item.question.strip():
        raise DocumentError(f"{where}: the question is empty.")
    if not answers:
        raise DocumentError(f"{where}: no answer to score against. Test splits are often published without: try dev.")
    if not passages:
        raise DocumentError(f"{where}: all documents are empty; a sample needs at least one with text.")
    return Item(item.id, item.question.strip(), answers, passages, item.metadata)


def keep(passages: tuple[Passage, ...], count: int | None) -> tuple[Passage, ...]:
    """All gold passages and the first of the others up to `count`, in their order."""
    if count is None or len(passages) <= count:
        return passages
    ranked = sorted(range(len(passages)), key=lambda i: (not passages[i].gold, i))
    return tuple(passages[i] for i in sorted(ranked[:count]))
