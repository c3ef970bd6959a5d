"""Documents as people have them: PDF, DOCX, HTML and code."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import corpora_files as files
import pytest

from cli_kit import data, error, run
from kvilt.corpora import readers
from kvilt.errors import DocumentError

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")  # of MarkItDown's libraries


def test_every_format_gives_its_text_and_title(tmp_path: Path) -> None:
    """Danger: a document is encoded without its title, with a page's scripts in it, or under another name."""
    files.pdf(tmp_path / "a.pdf", "The harbour master keeps the key.", "He lives in the tower.")
    files.docx(tmp_path / "b.docx", "Cellar rules", "No light after ten.", "Doors stay shut.")
    files.html(tmp_path / "c.html", "Orchard", "<h2>Apples</h2><p>They are picked in <b>October</b>.</p>")
    (tmp_path / "d.py").write_text("def key():\n    return 'violin'\n")
    (tmp_path / "e.md").write_text("# Rivers\n\nThe river is wide.\n")
    a, b, c, d, e = readers.read([str(tmp_path)])
    assert [Path(x.id or "").name for x in (a, b, c, d, e)] == ["a.pdf", "b.docx", "c.html", "d.py", "e.md"]
    assert [x.title for x in (a, b, c, d, e)] == [None, "Cellar rules", "Orchard", "d.py", "Rivers"]
    assert " ".join(a.text.split()) == "The harbour master keeps the key. He lives in the tower."
    assert b.text.split("\n\n")[:2] == ["No light after ten.", "Doors stay shut."]
    assert c.text == "## Apples\n\nThey are picked in **October**."
    assert d.text.startswith("def key():\n    return")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"%PDF-1.4 cut off", r"a\.pdf cannot be converted to text"),
        ("a.docx", b"PK\x03\x04 no zip", r"a\.docx cannot be converted to text"),
        ("a.html", b"<p> </p>", r"a\.html holds no text"),
        ("a.py", b"\xff\xfe\x00", r"a\.py is UTF-16"),
        ("a.rs", b"  \n", r"a\.rs is empty"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Danger: a broken file ends a run with a traceback of somebody's library, or is encoded as nothing."""
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.txt").write_text("sound")
    bad: list[DocumentError] = []
    assert [d.text for d in readers.read([str(tmp_path)], on_bad=bad.append)] == ["sound"]
    assert re.search(message, str(bad[0]))
    assert len(bad) == 1


def test_a_scan_says_what_it_lacks(tmp_path: Path) -> None:
    """Danger: pages without text become an empty document, and nobody knows why nothing is found in them."""
    with pytest.raises(DocumentError, match=r"holds no text\. If it is a scan"):
        readers.read([str(files.pdf(tmp_path / "scan.pdf"))])


def test_without_the_extra_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    """Danger: one PDF in a folder stops everybody who did not install what reads it, or vanishes without a word."""
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "markitdown" else there(name, *a))
    paper = files.pdf(tmp_path / "a.pdf", "text")
    (tmp_path / "b.txt").write_text("text")
    told = run("encode", tmp_path, "--model", model_dir, "--store", "memory")
    assert "1 documents: 1 encoded" in told.stdout
    assert "a.pdf: markitdown is not installed. Install it with: pip install 'kvilt[files]'" in told.stderr
    assert "pip install 'kvilt[files]'" in error("encode", paper, "--model", model_dir, "--store", "memory")


def test_a_folder_of_files_is_asked_in_two_commands(tmp_path: Path, model_dir: Path, store: str) -> None:
    """Danger: what was encoded in chunks is not what is asked about, and every question encodes it again."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, word in enumerate(("harbour", "cellar", "orchard", "violin", "lantern", "meadow")):
        told = [f"The {word} was built by mason number {n}." for n in range(12)]
        files.docx(folder / f"{number}.docx", word, *told)
    common = ("--model", model_dir, "--store", store)
    lines = tmp_path / "collection.jsonl"
    report = data("encode", folder, "--chunk", "tokens=200", "--save", lines, *common)
    saved = [json.loads(line) for line in lines.read_text().splitlines()]
    assert report["encoded"] == len(saved) > 12
    asked = ("ask", "which mason built the orchard?", "--docs", lines, "--retrieve", "bm25:top=2", *common)
    answer = data(*asked, "--max-new-tokens", 2)
    assert (answer["usage"]["hits"], answer["usage"]["misses"]) == (2, 0)
    assert all(f"{folder}/2.docx#" in name for name in answer["documents"])
    index = tmp_path / "collection.jsonl.bm25"
    made = [(p, p.stat().st_mtime_ns) for p in sorted(index.rglob("*"))]
    assert data(*asked, "--max-new-tokens", 2)["documents"] == answer["documents"]
    assert [(p, p.stat().st_mtime_ns) for p in sorted(index.rglob("*"))] == made
