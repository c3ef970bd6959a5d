"""Reading documents: every format, and every way in which it can go wrong."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

from kvilt.corpora.files import read_documents
from kvilt.errors import DocumentError
from kvilt.types import Document


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def wrong(path: Path, content: str | bytes) -> str:
    """The message for a file."""
    with pytest.raises(DocumentError) as caught:
        read_documents([write(path, content)])
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_text_and_markdown(tmp_path: Path) -> None:
    """Danger: a heading is read twice, or a byte order mark becomes part of a document."""
    text = write(tmp_path / "a.txt", "\ufeffline one\r\nline two\n")
    marked = write(tmp_path / "b.MD", "\n## The Title ##\n\nThe body.\n")
    only = write(tmp_path / "c.md", "# Just a heading\n")
    plain = write(tmp_path / "d.md", "#hashtag is no heading\nText.")
    assert read_documents([text, marked, only, plain]) == [
        Document("line one\nline two\n", None, text),
        Document("The body.\n", "The Title", marked),
        Document("# Just a heading\n", None, only),
        Document("#hashtag is no heading\nText.", None, plain),
    ]


def test_json_lines(tmp_path: Path) -> None:
    """Danger: fields are mixed up, or a line separator inside a text cuts it in two."""
    lines = [
        {"text": "one", "title": "First", "id": "x", "more": 1},
        {"text": "two\u2028line", "id": 7},
        {"text": "three"},
    ]
    path = write(tmp_path / "d.jsonl", "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    assert read_documents([path]) == [
        Document("one", "First", "x"),
        Document("two\u2028line", None, "7"),
        Document("three", None, f"{path}:3"),
    ]


def test_folders_are_read_in_order_and_say_what_they_skip(tmp_path: Path) -> None:
    """Danger: a folder gives another order on every machine, or files vanish without a word."""
    for name in ("b.txt", "a/z.txt", "a/y.md", ".hidden.txt", ".git/c.txt"):
        write(tmp_path / name, "text")
    write(tmp_path / "image.png", b"\x89PNG")
    skipped: list[str] = []
    found = [d.id for d in read_documents([str(tmp_path)], skipped.append)]
    assert found == [str(tmp_path / name) for name in ("b.txt", "a/y.md", "a/z.txt")]
    assert skipped == [str(tmp_path / "image.png")]


def test_all_that_is_wrong_is_heard_of_and_the_rest_is_read(tmp_path: Path) -> None:
    """Danger: of a thousand files one is empty, and nothing is encoded; or only the first of ten mistakes is named."""
    for name, text in (
        ("a.txt", "one"),
        ("b.txt", " "),
        ("c.txt", b"\xff"),
        ("d.jsonl", '{"text": "x"}\n{}\n{"text": 3}'),
    ):
        write(tmp_path / name, text)
    bad: list[DocumentError] = []
    read = read_documents([str(tmp_path)], on_bad=bad.append)
    assert [d.text for d in read] == ["one", "x"]
    assert [re.sub(r".*/", "", str(e))[:9] for e in bad] == ["b.txt is ", "c.txt is ", "d.jsonl:2", "d.jsonl:3"]


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """Danger: a file from an old archive stops a whole folder, with a traceback when its name is stored or shown."""
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(path)).write_text("text")
    (document,) = read_documents([str(tmp_path)])
    assert document.id == f"{tmp_path}/caf\\xe9.txt"
    assert read_documents([os.fsdecode(path)]) == [document]


def test_line_ends_make_no_difference(tmp_path: Path) -> None:
    """Danger: one document, written on two systems or once as text and once as JSON, is encoded twice."""
    text = write(tmp_path / "a.txt", "one\r\ntwo")
    lines = write(tmp_path / "b.jsonl", json.dumps({"text": "one\r\ntwo"}))
    assert [d.text for d in read_documents([text, lines])] == ["one\ntwo"] * 2


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Danger: a named pipe among the files stops the run for ever."""
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DocumentError, match="is no regular file"):
        read_documents([str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[" * 100_000, [Document("[" * 100_000, None, "stdin")]),
        (b"just some\ntext {", [Document("just some\ntext {", None, "stdin")]),
        (b'{"no": "text"}', [Document('{"no": "text"}', None, "stdin")]),
        (
            b'\n{"text": "one"}\n{"text": "two", "id": "b"}',
            [Document("one", None, "stdin:2"), Document("two", None, "b")],
        ),
    ],
)
def test_standard_input(content: bytes, expected: list[Document], monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: JSON lines are read as one text, or a text as JSON."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert read_documents(["-"]) == expected


def test_a_bad_line_on_standard_input_is_not_taken_for_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a torn line becomes a document."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "one"}\n{"text": ')))
    with pytest.raises(DocumentError, match="stdin:2 is not JSON"):
        read_documents(["-"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.md", " \n\t\n", "is empty"),
        ("a.txt", b"fine until \xff here", r"is not UTF-8 \(byte 0xff at offset 11\)"),
        ("a.txt", b"\xef\xbb\xbfab\xff", r"is not UTF-8 \(byte 0xff at offset 5\)"),
        ("a.txt", "utf-16".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("a.txt", b"MZ\x00\x01", "is a binary file .* offset 2"),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"', ":2 is not JSON"),
        ("a.jsonl", '{"text": "one"}\n\n["two"]', ":3 is list, not a JSON object"),
        ("a.jsonl", '{"title": "one"}', ":1 has no text"),
        ("a.jsonl", '{"text": 3}', ":1 has no text"),
        ("a.jsonl", '{"text": " "}', ":1 is empty"),
        ("a.jsonl", '{"text": "a", "title": 3}', ":1: the title must be"),
        ("a.jsonl", '{"text": "a", "id": []}', ":1: the id must be"),
        ("a.jsonl", '{"text": "\\ud800"}', ":1 holds half a character"),
        ("a.jsonl", "[" * 100_000, ":1 is nested too deeply"),
        ("a.jsonl", json.dumps({"text": "a", "id": "x" * 5000}), ":1: a title and an id may have 4,096 characters"),
        ("a.jsonl", '{"text": "a", "title": "\\udcff"}', ":1 holds half a character"),
        ("a.jsonl", "\n", "no documents in"),
        ("a.pdf", "%PDF", r"is none of \.txt, \.md, \.jsonl"),
    ],
)
def test_what_is_wrong_and_where(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    """Danger: a mistake without file and line, or a binary file encoded as text."""
    assert re.search(message, wrong(tmp_path / name, content))


def test_missing_paths_and_empty_folders(tmp_path: Path) -> None:
    """Danger: a typing error in a path gives an answer from no documents."""
    with pytest.raises(DocumentError, match=r"no such file or folder: .*nowhere"):
        read_documents([str(tmp_path / "nowhere")])
    with pytest.raises(DocumentError, match="no documents in"):
        read_documents([str(tmp_path)])
