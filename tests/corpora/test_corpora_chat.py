"""`kvilt chat`: several turns over a collection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli_kit import run, write_documents
from kvilt.corpora.chat import Chat
from kvilt.engine.engine import Engine
from kvilt.types import Document


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder of five texts."""
    write_documents(tmp_path / "docs", 5)
    return tmp_path / "docs"


def test_turns_answers_and_commands(docs: Path, model_dir: Path, store: str) -> None:
    """Danger: a pipe waits for a terminal, answers and talk are mixed, or the second turn encodes everything again."""
    typed = "what stands in the harbour?\n/docs\n/usage\nand what in the cellar?\n/strategy kvlink:links=2\nwhere?\n/quit\nno"
    common = ("--model", model_dir, "--store", store, "--max-new-tokens", 3)
    told = run("chat", "--docs", docs, "--retrieve", "bm25:top=3", *common, input=typed)
    assert len(told.stdout.splitlines()) == 3
    said = told.stderr
    assert "3 of 5 documents stood in the last prompt." in said
    assert "1 answers: 0 hits, 3 misses;" in said
    assert "kvlink:links=2: " in said
    assert "error" not in said


def test_a_second_conversation_reuses_the_first(docs: Path, model_dir: Path, store: str) -> None:
    """Danger: history stands in front of the documents, and they are computed again in every turn."""
    typed = "what stands in the harbour?\nand what in the cellar?\n"
    common = ("chat", "--docs", docs, "--model", model_dir, "--store", store, "--max-new-tokens", 3, "--json")
    first, second = (json.loads(line) for line in run(*common, input=typed).stdout.splitlines())
    assert (first["usage"]["misses"], second["usage"]["misses"]) == (5, 0)
    assert second["usage"]["reused_tokens"] == first["usage"]["reused_tokens"]
    assert second["usage"]["computed_tokens"] > first["usage"]["computed_tokens"]  # it saw what was said before
    (again,) = (json.loads(line) for line in run(*common, input=typed.split("\n")[0]).stdout.splitlines())
    assert again["usage"]["hits"] == 5
    forgotten = run(*common, input=f"{typed}/new\n{typed}").stdout.splitlines()
    assert json.loads(forgotten[0])["text"] == json.loads(forgotten[2])["text"]


def test_a_mistake_does_not_end_the_conversation(docs: Path, model_dir: Path) -> None:
    """Danger: one typing error, and everything said so far is lost; or a script never hears that a line failed."""
    typed = "/strategy nonsense\n/what\nzebra\nharbour\n/help\n/usage\n"
    common = ("--model", model_dir, "--store", "memory", "--max-new-tokens", 2)
    told = run("chat", "--docs", docs, "--retrieve", "bm25", *common, input=typed, code=2)
    errors = [line for line in told.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "unknown strategy" in errors[0]
    assert "/help lists them" in errors[1]
    assert "no document shares a word" in errors[2]
    assert "1 answers:" in told.stderr
    assert "/quit" in told.stderr


def test_ctrl_c_stops_the_answer_and_not_the_conversation(model_dir: Path) -> None:
    """Danger: an answer that goes astray can only be ended together with everything said so far."""
    engine, documents = Engine.load(str(model_dir), "block", "memory"), [Document("The harbour keeps the key.")]
    shown: list[str] = []

    def out(text: str) -> None:
        shown.append(text)
        if len(shown) == 1:
            raise KeyboardInterrupt

    def chat(interactive: bool) -> Chat:
        shown.clear()
        settings = {"max_new_tokens": 8}
        return Chat(engine, documents, lambda _: documents, out, print, print, settings, interactive=interactive)

    made = chat(True)
    assert made.run(["which key?", "whose?"]) == 0
    assert [asked for asked, _ in made.turns] == ["whose?"]  # what was stopped is not part of the conversation
    with pytest.raises(KeyboardInterrupt):
        chat(False).run(["which key?"])
