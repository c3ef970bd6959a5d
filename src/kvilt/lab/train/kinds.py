"""Kinds of training data, and KVLink's task mixture: "qa:train.jsonl@10" is a kind, a file and a weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvilt.errors import TrainError
from kvilt.lab.train.data import TRAIN_SPLITS, Loader, Sample, Source, qa_sample, read
from kvilt.types import Document

CHUNK_TOKENS = 100
LONG_CHUNK_TOKENS, LONG_ARTICLE = 220, 1900  # long articles in larger pieces, to stay within the slots
WORDS_PER_TOKEN = 0.75  # of English text; only the size of the pieces depends on it
SUMMARY_QUESTION = "Summarize the text above."


def standard(row: dict[str, Any], where: str) -> Sample:
    """A qa row read with full attention: keeps the model able to answer ordinary prompts."""
    return replace(qa_sample(row, where), reuse=False)


def chat(row: dict[str, Any], where: str) -> Sample:
    """{"messages": [{"role", "content"}, ...]}: each earlier exchange becomes a document, the last reply is learned."""
    turns = [(str(m.get("role")), str(m.get("content") or "")) for m in row.get("messages") or []]
    system = [text for role, text in turns if role == "system"]
    turns = [t for t in turns if t[0] != "system"]
    alternating = [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
    if not turns or not alternating or not turns[-1][1].strip():
        raise TrainError(f'{where}: "messages" must alternate between user and assistant and end with an answer.')
    pairs = list(zip(turns[:-2:2], turns[1:-2:2], strict=True))
    documents = [*system, *(f"User: {asked}\nAssistant: {said}" for (_, asked), (_, said) in pairs)]
    return Sample(tuple(map(Document, documents)), turns[-2][1], (turns[-1][1],), ordered=True, where=where)


def multi_turn(row: dict[str, Any], where: str) -> Sample:
    """A conversation of several exchanges, the earlier ones reused."""
    sample = chat(row, where)
    if not sample.documents:
        raise TrainError(f"{where}: a single exchange has no earlier ones to reuse; use the kind sft.")
    return sample


def sft(row: dict[str, Any], where: str) -> Sample:
    """A conversation read with full attention."""
    return replace(chat(row, where), reuse=False)


def summary(row: dict[str, Any], where: str) -> Sample:
    """{"document": article, "summary": ...}: consecutive pieces of the article are the documents."""
    article, wanted = str(row.get("document") or ""), str(row.get("summary") or "")
    words = article.split()
    if not words or not wanted.strip():
        raise TrainError(f'{where}: a summary row needs "document" and "summary".')
    is_long = len(words) > LONG_ARTICLE * WORDS_PER_TOKEN
    size = round((LONG_CHUNK_TOKENS if is_long else CHUNK_TOKENS) * WORDS_PER_TOKEN)
    pieces = tuple(Document(" ".join(words[i : i + size])) for i in range(0, len(words), size))
    return Sample(pieces, SUMMARY_QUESTION, (wanted,), ordered=True, where=where)


def text(row: dict[str, Any], where: str) -> Sample:
    """{"text": ...}: plain text, every token of which is learned."""
    if not str(row.get("text") or "").strip():
        raise TrainError(f'{where}: a text row needs "text".')
    return Sample((), answers=(str(row["text"]),), reuse=False, plain=True, where=where)


KINDS: dict[str, Loader] = {
    "qa": qa_sample,
    "multi-turn": multi_turn,
    "summary": summary,
    "qa-standard": standard,
    "sft": sft,
    "text": text,
}
MIXTURE = dict(zip(KINDS, (10.0, 25.0, 5.0, 10.0, 30.0, 20.0), strict=True))  # KVLink, Table 4


def source(spec: str, allowed: Sequence[str] = TRAIN_SPLITS) -> Source:
    """Read "[kind:]file[@weight]"; the kind is qa unless given."""
    kind, path, weight = re.findall(rf"^(?:({'|'.join(KINDS)}):)?(.*?)(?:@([0-9.]+))?$", spec, re.DOTALL)[0]
    return Source(read(path, KINDS[kind or "qa"], allowed), float(weight or 0), kind or "qa")


def weighted(sources: Sequence[Source], weights: dict[str, float]) -> tuple[Source, ...]:
    """Sources without a weight of their own get their kind's; several files of one kind share it by their sizes."""
    sizes = {s.name: sum(len(o.samples) for o in sources if o.name == s.name and not o.weight) for s in sources}
    free = {s.name: weights.get(s.name, 0.0) / max(1, sizes[s.name]) for s in sources}
    return tuple(s if s.weight else replace(s, weight=free[s.name] * len(s.samples)) for s in sources)
