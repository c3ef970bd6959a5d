"""What people hand to an engine: strings, dictionaries, system texts, chats, files from other systems."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from core_kit import DOCUMENTS, QUESTION, engine_of, store_of
from kvilt.engine.engine import Engine
from kvilt.engine.streaming import Cancelled, Pieces
from kvilt.errors import DocumentError, PromptError
from kvilt.model.model import Model
from kvilt.types import Document


def tokens(engine: Engine, documents: Any, **options: Any) -> tuple[int, ...]:
    return engine.answer(QUESTION, documents, **{"max_new_tokens": 6, **options}).tokens


def test_strings_and_dictionaries_are_served() -> None:
    """Danger: `engine.answer(question, ["a text"])`, the first thing anyone tries, ends in an AttributeError."""
    engine = engine_of("block")
    given = [{"text": d.text, "title": d.title, "id": d.id} if d.title else d.text for d in DOCUMENTS]
    assert tokens(engine, given) == tokens(engine, DOCUMENTS)
    assert engine.answer(QUESTION, given, max_new_tokens=1).usage.hits == len(DOCUMENTS)
    assert engine.encode(given).present == len(DOCUMENTS)
    assert engine.plan(QUESTION, given).end == engine.plan(QUESTION, DOCUMENTS).end
    assert engine.score(QUESTION, given, (90, 91)).shape[0] == 2
    for bad in ([3], [None], [{"title": "a"}], ["a", {"text": 5}], ["", "a"]):
        with pytest.raises(DocumentError, match=r"document \d") as error:
            tokens(engine, bad)
        assert "\n" not in str(error.value)
        with pytest.raises(DocumentError):
            engine.encode(bad)
    for lone in ("a text", Document("a text"), {"text": "a text"}, 3, object()):
        with pytest.raises(DocumentError, match="documents must be a list"):
            tokens(engine, lone)
        with pytest.raises(DocumentError, match="documents must be a list"):
            engine.encode(lone)


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [5],
        [{"role": "user"}],
        [{"role": 3, "content": "?"}],
        [{"role": "user", "content": [{"type": "image"}]}],
        {},
    ],
)
def test_a_chat_that_is_none_gets_one_line(bad: Any) -> None:
    """Danger: a malformed list of messages as question ends in an AttributeError."""
    with pytest.raises(PromptError, match=r"must be"):
        engine_of("block").answer(bad, DOCUMENTS)


@pytest.mark.parametrize("spec", ["block", "block:sink=system", "full"])
def test_a_chat_with_one_question_is_that_question(spec: str) -> None:
    """Danger: the same question as a chat has other tokens, and reuses nothing of what was encoded for it."""
    engine = engine_of(spec)
    asked = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=8)
    chat = [{"role": "system", "content": engine.text.system}, {"role": "user", "content": QUESTION}]
    for messages in (chat, chat[1:]):
        again = engine.answer(messages, DOCUMENTS, max_new_tokens=8)
        assert (again.tokens, again.usage.misses) == (asked.tokens, 0)


def test_a_chat_reads_what_its_template_writes() -> None:
    """Danger: of several turns, or of documents among them, one is lost, doubled or at another place."""
    engine = engine_of("full")
    first, second = DOCUMENTS[:2]
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ada."},
        {"role": "user", "content": ["Look: ", second, {"type": "text", "text": "When?"}]},
    ]
    plan = engine.plan(turns, [first])
    whole = engine.text.decode(torch.cat([s.tokens for s in plan.segments]).tolist())
    said = ["Who?", "Ada.", "Look: ", "When?"]
    at = [whole.index(text) for text in (first.content, *said[:3], second.content, said[3])]
    assert at == sorted(at)
    cached = engine.with_strategy("block").plan(turns, [first])
    assert torch.equal(torch.cat([s.tokens for s in cached.segments]), torch.cat([s.tokens for s in plan.segments]))
    assert cached.reused_count == sum(len(engine.text.document_ids(d)) for d in (first, second)) + len(
        engine.info.system
    )
    with pytest.raises(PromptError, match="the user says nothing"):
        engine.answer([{"role": "assistant", "content": "Ada."}], DOCUMENTS)


@pytest.mark.parametrize("bad", [5, ["a"], {"role": "system"}, "half \ud83d"])
def test_a_system_text_that_is_none_gets_one_line(bad: Any) -> None:
    """Danger: a number as system text is taken for a document."""
    with pytest.raises(PromptError, match=r"must be a text|surrogate"):
        tokens(engine_of("block"), DOCUMENTS, system=bad)


@pytest.mark.parametrize("spec", ["block", "block:sink=system", "full"])
def test_a_system_text_for_one_answer_is_that_of_an_engine_of_its_own(spec: str) -> None:
    """Danger: the system text of one answer stays for the next, or documents encoded behind another are reused."""
    engine, other = engine_of(spec), engine_of(spec, system="Answer in one word.")
    plain = tokens(engine, DOCUMENTS)
    assert tokens(engine, DOCUMENTS, system="Answer in one word.") == tokens(other, DOCUMENTS)
    assert tokens(engine, DOCUMENTS, system="") == tokens(engine_of(spec, system=""), DOCUMENTS)
    assert tokens(engine, DOCUMENTS) == plain
    *pieces, last = engine.stream(QUESTION, DOCUMENTS, system="Answer in one word.", max_new_tokens=6)
    assert last.tokens == tokens(other, DOCUMENTS)  # type: ignore[union-attr]
    assert "".join(pieces) == last.text  # type: ignore[arg-type, union-attr]


def test_line_ends_give_no_second_cache() -> None:
    """Danger: a corpus that was encoded from files is encoded again when its texts come as strings."""
    engine = engine_of("block", store=store_of())
    engine.encode([Document("Ada was born.\r\nIn Tavik.\r\n", title="Ada"), Document("Brint is in Orsa.\n")])
    usage = engine.answer(QUESTION, [{"text": "Ada was born.\nIn Tavik.", "title": "Ada"}, "Brint is in Orsa."]).usage
    assert (usage.hits, usage.misses) == (2, 0)


def test_markers_in_texts_change_nothing_but_the_text() -> None:
    """Danger: a document ends the user's turn: what stands behind it is answered by somebody else."""
    engine = engine_of("block")
    plan = engine.plan(f"Who {zoo.SPECIAL[4]}?", [Document(f"Ada{zoo.SPECIAL[5]}yes{zoo.SPECIAL[1]}")])
    ids = [i for segment in plan.segments for i in segment.tokens.tolist() if i < len(zoo.SPECIAL)]
    honest = engine.plan("Who?", [Document("Ada")])
    assert ids == [i for segment in honest.segments for i in segment.tokens.tolist() if i < len(zoo.SPECIAL)]


def test_closing_a_stream_while_documents_are_encoded_computes_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a reader who went away while documents were encoded is still answered, prompt and all."""
    engine, encode = engine_of("block"), Model.encode
    pieces = Pieces(engine.text.tokenizer, print)

    def closing(*given: Any) -> Any:
        pieces.cancelled.set()
        return encode(*given)

    monkeypatch.setattr(Model, "encode", closing)
    monkeypatch.setattr(Model, "run", lambda *_: pytest.fail("the prompt was computed"))
    with pytest.raises(Cancelled):
        engine.answer(QUESTION, DOCUMENTS, streamer=pieces)


def test_many_questions_in_one_call(capsys: pytest.CaptureFixture[str]) -> None:
    """Danger: answers come in another order than the questions, or a library fills a log with bars."""
    engine = engine_of("block")
    asked = [(QUESTION, DOCUMENTS), ("When?", DOCUMENTS[:1]), ([{"role": "user", "content": QUESTION}], DOCUMENTS)]
    answers = engine.answers(asked, progress=False, max_new_tokens=5)
    assert capsys.readouterr().out == ""
    assert [a.tokens for a in answers] == [engine.answer(*pair, max_new_tokens=5).tokens for pair in asked]
    assert sum(a.usage.misses for a in answers) == 0
    assert engine.answers(asked[:1], max_new_tokens=5)[0].tokens == answers[0].tokens
