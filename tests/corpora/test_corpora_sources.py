"""Corpora in parts: the same documents with the same ids as one reader gives, and rows that cannot be read cost themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_kit import parquet, texts

from cli_kit import data, error, write_documents
from kvilt.corpora import readers, sources
from kvilt.corpora.sources import Part
from kvilt.errors import DocumentError, UserError
from kvilt.types import Document


def everything(*paths: object, columns: str = "") -> tuple[list[Document], list[str]]:
    """Documents and problems of all parts, each part written as JSON and read again, as workers get them."""
    found: list[Document | DocumentError] = []
    for part in sources.split([str(p) for p in paths], columns):
        if isinstance(part, Part):
            found += sources.read(Part(**json.loads(json.dumps(vars(part)))))
        else:
            found.append(part)
    problems = [str(one) for one in found if isinstance(one, DocumentError)]
    return [one for one in found if isinstance(one, Document)], problems


def test_lines_in_parts_are_those_of_one_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a line is cut in two, lost or read twice where two parts meet, or has another id than with one reader."""
    path = tmp_path / "all.jsonl"
    rows = [json.dumps({"text": text, "title": f"Ünï {i}"}, ensure_ascii=False) for i, text in enumerate(texts(50))]
    for ending in ("", "\n", "\r\n", "\n\n"):
        path.write_bytes(b"\xef\xbb\xbf" + ("\n".join([*rows[:20], "", *rows[20:]]) + ending).encode())
        whole = readers.read([str(path)])
        assert len(whole) == 50
        for size in (1, 7, 300, 1 << 20):
            monkeypatch.setattr(sources, "LINES", size)
            parts = list(sources.split([str(path)]))
            assert len(parts) > 5 or size > 300
            assert everything(path) == (whole, [])


def test_a_bad_line_costs_itself(tmp_path: Path) -> None:
    """Danger: one broken line of a million stops the run, or is not named."""
    path = tmp_path / "all.jsonl"
    path.write_bytes(
        b'{"text": "one"}\n{"text": "caf\xe9"}\n{"text": 3}\nno json\n{"text": "  "}\n{"text": "two", "id": 7}\n'
    )
    documents, problems = everything(path)
    assert [(d.text, d.id) for d in documents] == [("one", f"{path}:1"), ("two", "7")]
    assert [p.partition(" ")[0] for p in problems] == [f"{path}:{n}" for n in (2, 3, 4, 5)]


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    """Danger: row groups lose their place, so ids name other rows; or a title is read as a text."""
    path = parquet(tmp_path / "a.parquet", 40)
    documents, problems = everything(path)
    assert [(d.id, d.title, d.text) for d in documents] == [(f"d{i}", f"T {i}", t) for i, t in enumerate(texts(40))]
    assert not problems
    pq.write_table(pa.table({"body": texts(40), "n": list(range(40))}), tmp_path / "b.parquet", row_group_size=7)
    documents, _ = everything(tmp_path / "b.parquet", columns="text=body")
    assert [d.id for d in documents] == [f"{tmp_path}/b.parquet:{n}" for n in range(1, 41)]
    assert everything(tmp_path / "b.parquet", columns="text=body,id=n")[0][3].id == "3"
    assert "no column 'text', only body, n" in everything(tmp_path / "b.parquet")[1][0]
    with pytest.raises(UserError, match="write text=NAME"):
        everything(path, columns="body=text")


def test_an_unreadable_row_costs_that_row_only(tmp_path: Path) -> None:
    """Danger: a null, a byte that is no UTF-8 or a number among texts takes its neighbours with it."""
    good, bad = ["first", "third", "fifth"], b"caf\xe9"
    data = b"firstthird" + bad + b"fifth"
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 5, 5, 10, 14, 19, 19)))
    valid = pa.py_buffer(bytes([0b011101]))  # the second and the last are null
    column = pa.Array.from_buffers(pa.string(), 6, [valid, offsets, pa.py_buffer(data)])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    documents, problems = everything(tmp_path / "a.parquet")
    assert [d.text for d in documents] == good
    assert [p.partition(" ")[0][-1] for p in problems] == ["2", "4", "6"]
    assert "not UTF-8" in problems[1]


def test_a_damaged_row_group_leaves_the_others(tmp_path: Path) -> None:
    """Danger: a page that a disk has lost costs the file, or the run."""
    path = parquet(tmp_path / "a.parquet", 40, group=10)
    described = pq.ParquetFile(path).metadata.row_group(1).column(2)
    raw = bytearray(path.read_bytes())
    start = described.dictionary_page_offset or described.data_page_offset
    raw[start : start + described.total_compressed_size] = b"\xff" * described.total_compressed_size
    path.write_bytes(raw)
    documents, (problem,) = everything(path)
    assert [d.id for d in documents] == [f"d{i}" for i in (*range(10), *range(20, 40))]
    assert f"rows 11 to 20 of {path}" in problem
    path.write_bytes(bytes(raw[:200]))
    write_documents(tmp_path / "docs", 2)
    documents, (problem,) = everything(path, tmp_path / "docs")
    assert len(documents) == 2
    assert problem.startswith(f"cannot read {path}")


def test_paths_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a folder leaves Parquet files out, a star matches nothing, a URL is read as a file's name."""
    write_documents(tmp_path / "in" / "below", 3)
    parquet(tmp_path / "in" / "a.parquet", 5)
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "x"}\n')
    assert len(everything(tmp_path / "in")[0]) == 9
    assert len(everything(f"{tmp_path}/in/*.parquet")[0]) == 5
    assert len(everything(f"file://{tmp_path}/in")[0]) == 6
    assert len(everything(f"file://{tmp_path}/in/*.jsonl")[0]) == 1
    assert everything(f"file://{tmp_path}/in/b.jsonl")[0][0].id == f"file://{tmp_path}/in/b.jsonl:1"
    for wrong in (tmp_path / "none", f"file://{tmp_path}/none", f"{tmp_path}/*.parquet", "s4://bucket/x"):
        with pytest.raises(DocumentError):
            everything(wrong)
    monkeypatch.setattr(sources, "DOCUMENTS", 2)
    given = [Document(t, id=str(i)) for i, t in enumerate(texts(5))]
    parts = [p for p in sources.split(given) if isinstance(p, Part)]
    assert [d for part in parts for d in sources.read(part)] == given
    assert len(parts) == 3


def test_every_verb_reads_parquet(tmp_path: Path, model_dir: Path, store: str) -> None:
    """Danger: what was encoded from a Parquet file cannot be asked about, or a dry run cannot read it."""
    path = parquet(tmp_path / "a.parquet", 6)
    common = ("--model", model_dir, "--store", store)
    assert data("encode", path, *common, "--dry-run")["encoded"] == 6
    assert data("encode", path, *common)["encoded"] == 6
    assert data("ask", "What?", "--docs", path, *common, "--max-new-tokens", 1)["usage"]["hits"] == 6
    assert "write text=NAME" in error("encode", path, *common, "--columns", "x=y")
