"""Long documents in chunks, and the documents that a question is answered from."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from kvilt import builtin, registry
from kvilt.corpora.chunks import Chunks, cutter
from kvilt.corpora.retrieval import BM25
from kvilt.engine.engine import Engine
from kvilt.engine.text import TextFormat
from kvilt.errors import PromptError, SpecError
from kvilt.types import Document

WORDS = ("the", "old", "harbour", "master", "keeps", "a", "brass", "key", "under", "his", "pillow")


def prose(sentences: int, first: int = 0) -> str:
    """Sentences that all differ, six to a paragraph."""
    told = [f"{' '.join(WORDS[n % 7 :])} and counts {n} boats." for n in range(first, first + sentences)]
    return "\n\n".join(" ".join(told[n : n + 6]) for n in range(0, sentences, 6))


@pytest.fixture(scope="module")
def text(model_dir: Path) -> TextFormat:
    """How the tiny model reads texts: a token a byte."""
    return Engine.load(str(model_dir), "full", "memory").text


def test_chunks_fit_end_at_sentences_and_lose_nothing(text: TextFormat) -> None:
    """Danger: a chunk is longer than was asked for, breaks in a word, or a sentence is in none of them."""
    document = Document(prose(40), "Boats", "boats.txt")
    chunks = Chunks(tokens=400).cut([document], text)
    assert len(chunks) > 5
    assert max(len(text.document_ids(c)) for c in chunks) <= 400
    assert all(c.text.endswith("boats.") for c in chunks)
    assert " ".join(" ".join(c.text for c in chunks).split()) == " ".join(document.text.split())
    assert {c.title for c in chunks} == {"Boats"}


def test_ids_stay_when_other_parts_change(text: TextFormat) -> None:
    """Danger: one sentence is added at the front, and all that was cited, encoded and picked by id is lost."""
    before = Chunks(tokens=400).cut([Document(f"# One\n{prose(12)}\n# Two\n{prose(12, 50)}", None, "a.md")], text)
    after = Chunks(tokens=400).cut([Document(f"# One\n{prose(14)}\n# Two\n{prose(12, 50)}", None, "a.md")], text)
    last = [c for c in before if "Two" in (c.title or "")]
    assert len(last) > 1
    assert set(last) <= set(after)


def test_ids_differ_where_texts_are_the_same(text: TextFormat) -> None:
    """Danger: two chunks are called alike, and an id picks either."""
    chunks = Chunks(tokens=200).cut([Document("\n\n".join([prose(2)] * 20), None, "a.txt")], text)
    assert len({c.id for c in chunks}) == len(chunks) > 10


def test_headings_are_carried(text: TextFormat) -> None:
    """Danger: a passage about opening hours does not say whose."""
    body = f"# Tower\n{prose(6)}\n## Hours\n{prose(12)}\n```\n# no heading\n```\n# Cellar\n{prose(6)}"
    chunks = Chunks(tokens=600).cut([Document(body, "Guide", "guide.md")], text)
    titles = list(dict.fromkeys(c.title for c in chunks))
    assert titles == ["Guide > Tower", "Guide > Tower > Hours", "Guide > Cellar"]
    assert max(len(text.document_ids(c)) for c in chunks) <= 600


def test_what_fits_stays_as_it_is(text: TextFormat) -> None:
    """Danger: `--chunk` changes the ids and so the caches of documents that needed no cutting."""
    documents = [Document("short.", "Title", "a.md"), Document(prose(1), None, "b")]
    assert Chunks(tokens=512).cut(documents, text) == documents
    assert cutter("")(documents, text) is documents


def test_chunks_overlap_as_asked(text: TextFormat) -> None:
    """Danger: what stands across two chunks is in neither."""
    paragraph = prose(40).replace("\n\n", " ")
    first, second, *_ = Chunks.of("tokens=400,overlap=120").cut([Document(paragraph, None, "a.txt")], text)
    shared = next(n for n in range(len(first.text)) if second.text.startswith(first.text[n:]))
    assert 0 < len(first.text) - shared <= 120


@pytest.mark.parametrize("spec", ["tokens=3", "tokens=100,overlap=60", "token=100", "tokens=many", "overlap=-1"])
def test_wrong_specifications(spec: str) -> None:
    """Danger: a typing error cuts everything into crumbs."""
    with pytest.raises(SpecError):
        Chunks.of(spec)


def test_questions_find_the_documents_about_them() -> None:
    """Danger: the answer is looked for in documents about something else."""
    documents = list(builtin.wikipedia().values())
    find, good = BM25(top=6).over(documents), 0
    questions = builtin.wikipedia_questions()
    for asked in questions:
        good += bool({d.id for d in find(asked["question"])} & set(asked["documents"]))
    assert good >= 0.9 * len(questions)
    assert len(find("the cities of Europe")) <= 6


def test_scripts_without_spaces_are_searched_by_characters() -> None:
    """Danger: a Chinese sentence is one word that no question has."""
    find = BM25(top=1).over([Document("老港口的钥匙在塔里。", id="key"), Document("果园里有苹果。", id="apples")])
    assert [d.id for d in find("苹果在哪里?")] == ["apples"]


def test_nothing_is_found(tmp_path: Path) -> None:
    """Danger: documents that have nothing to do with the question are given as if they were the best."""
    find = BM25().over([Document("harbour"), Document("cellar")])
    for question in ("zebra", "the", "?!"):
        with pytest.raises(PromptError, match="no document shares a word"):
            find(question)
    for spec in ("bm25:top=0", "bm25:tops=3", "bm52"):
        with pytest.raises(SpecError):
            registry.build("retrieve", spec)
    with pytest.raises(SpecError, match="stopwords"):
        BM25(stopwords="xx").over([Document("harbour")])


def test_the_index_is_kept_and_follows_the_file(tmp_path: Path) -> None:
    """Danger: the documents change and the old index answers with the wrong ones; or it is made again every time."""
    file = tmp_path / "c.jsonl"
    one, two = [Document("harbour key", id="a"), Document("cellar", id="b")], [Document("cellar", id="c")]
    for _ in range(2):
        assert [d.id for d in BM25().over(one, file)("where is the key?")] == ["a"]
        (kept,) = (tmp_path / "c.jsonl.bm25").iterdir()
    assert [d.id for d in BM25().over([*two, *one], file)("the cellar key")] == ["a", "c", "b"]
    assert kept not in (renewed := list((tmp_path / "c.jsonl.bm25").iterdir()))
    assert len(renewed) == 1


def test_an_index_that_cannot_be_kept_is_made_again(tmp_path: Path) -> None:
    """Danger: a collection on a read-only disk cannot be asked."""
    file = tmp_path / "c.jsonl"
    (tmp_path / "c.jsonl.bm25").write_text("in the way")
    assert [d.id for d in BM25().over([Document("key", id="a")], file)("key")] == ["a"]
    assert stat.S_ISREG((tmp_path / "c.jsonl.bm25").stat().st_mode)
