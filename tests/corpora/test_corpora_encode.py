"""A corpus encoded by several processes: nothing twice, nothing lost, the same bytes as with one, whoever dies."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from corpus_kit import MOMENT, children, command_of, files, kill, parquet, texts

import kvilt
from cli_kit import error, run, stored, wait_for
from kvilt.corpora import processes
from kvilt.corpora.encode import encode_corpus
from kvilt.corpora.worker import Clerk, Job, outcome_of
from kvilt.engine.encoder import Encoder, Item
from kvilt.errors import DocumentError, StoreUnavailable, UserError
from kvilt.types import Document, DocumentCache

COUNT = 96


@pytest.fixture(autouse=True)
def _alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", MOMENT)
    monkeypatch.setenv("PYTHONPATH", str(Path(kvilt.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file in row groups of 8 documents."""
    return parquet(tmp_path_factory.mktemp("corpus") / "all.parquet", COUNT, group=8)


@pytest.fixture(scope="module")
def single(corpus: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process makes of the corpus."""
    folder = tmp_path_factory.mktemp("single")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", MOMENT)
        report = encode_corpus(str(corpus), str(model_dir), store=f"disk:path={folder}")
    assert (report.documents, report.encoded, report.failed) == (COUNT, COUNT, ())
    return files(folder)


def test_what_is_there_does_not_change_what_is_made(
    corpus: Path, model_dir: Path, single: dict[str, bytes], tmp_path: Path
) -> None:
    """Danger: a document encoded beside other neighbours, after a stop, has other bytes than in one run."""
    store = tmp_path / "store"
    for position, (name, content) in enumerate(sorted(single.items())):
        if position % 3 == 0:
            (store / name[:2]).mkdir(parents=True, exist_ok=True)
            (store / name[:2] / name).write_bytes(content)
    report = encode_corpus(str(corpus), str(model_dir), store=f"disk:path={store}", tables=tmp_path / "tables")
    assert (report.encoded, report.present) == (COUNT - COUNT // 3, COUNT // 3)
    assert files(store) == single
    rows = [json.loads(line) for line in (tmp_path / "tables" / "documents.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"d{i}" for i in range(COUNT)]
    assert {row["key"] for row in rows} == {name.removesuffix(".safetensors") for name in single}
    assert sum(row["bytes"] is not None for row in rows) == report.encoded
    assert (tmp_path / "tables" / "failed.jsonl").read_text() == ""


def test_a_worker_that_is_killed_costs_nothing(
    corpus: Path, model_dir: Path, single: dict[str, bytes], tmp_path: Path
) -> None:
    """Danger: with a dead worker the run ends, waits for ever, or loses the documents that it was at."""
    store, killed = tmp_path / "store", list[int]()

    def strike(done: int, parts: int, note: str) -> None:
        if done == 2:
            (pid, *_) = [p for p in children() if "kvilt.corpora.processes" in command_of(p)]
            kill(pid)
            killed.append(pid)

    report = encode_corpus(str(corpus), str(model_dir), store=f"disk:path={store}", workers=2, on_progress=strike)
    assert killed
    assert report.failed == ()
    assert report.documents == COUNT
    assert files(store) == single
    assert not [p for p in children() if "kvilt.corpora.processes" in command_of(p)]


def test_a_killed_run_is_continued(corpus: Path, model_dir: Path, single: dict[str, bytes], tmp_path: Path) -> None:
    """Danger: workers go on without anybody who gave them work, or the next run does all of it again."""
    store = tmp_path / "store"
    given = (str(corpus), str(model_dir), "block:sink=system", f"disk:path={store}")
    driver = multiprocessing.get_context("fork").Process(target=encode_corpus, args=given, kwargs={"workers": 2})
    driver.start()
    wait_for(lambda: len(stored(store)) > 8)
    workers = children(driver.pid)
    kill(driver.pid or 0)
    driver.join()
    wait_for(lambda: not any("kvilt.corpora.processes" in command_of(pid) for pid in workers))
    first = len(files(store))
    assert 8 < first < COUNT
    done = encode_corpus(*given)  # by one process
    assert (done.documents, done.present) == (COUNT, first)
    assert files(store) == single


def test_a_part_that_kills_its_workers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path
) -> None:
    """Danger: a document that no worker survives is tried for ever, or takes the others with it."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        "sys.stdin.readline()\nprint('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    if 'Document 300:' in line: os._exit(9)\n"
        "    rows = [dict(id=d['id'], key=d['text'], tokens=1, bytes=1) for d in json.loads(line)['documents']]\n"
        "    print(json.dumps(dict(rows=rows, failed=[])), flush=True)\n"
    )
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, str(script)))
    given = [Document(text, id=str(i)) for i, text in enumerate(texts(1024))]
    report = encode_corpus(given, str(model_dir), store=f"disk:path={tmp_path}", workers=2)
    assert report.documents == 1024 - 256
    assert len(report.failed) == 1
    assert "out of memory?" in report.failed[0]
    script.write_text("")
    with pytest.raises(UserError, match="before its model was loaded"):
        encode_corpus(given, str(model_dir), store=f"disk:path={tmp_path}", workers=2)


def test_failed_documents_stand_in_a_table(tmp_path: Path, model_dir: Path, store: str) -> None:
    """Danger: one bad document of a million ends the run, or is nowhere to be found afterwards."""
    (tmp_path / "a.jsonl").write_text(
        '{"text": "good"}\n{"text": ""}\nno\n' + json.dumps({"text": "long " * 9999}) + "\n"
    )
    common = ("encode", tmp_path / "a.jsonl", "--model", model_dir, "--store", store, "--tables", tmp_path / "t")
    result = run(*common, "--json", code=2)
    told = json.loads(result.stdout)
    assert (told["documents"], told["encoded"], len(told["failed"])) == (1, 1, 3)
    rows = [json.loads(line)["error"] for line in (tmp_path / "t" / "failed.jsonl").read_text().splitlines()]
    assert rows == told["failed"]
    assert result.stderr.count("error: ") == 3


def test_mistakes_are_told_before_anything_starts(tmp_path: Path, model_dir: Path, store: str) -> None:
    """Danger: a wrong name is found by four workers at once, each with a traceback, after the model was loaded."""
    given, model = [Document("a text")], str(model_dir)
    for wrong, message in (
        ({"store": "memory"}, "ends with the worker"),
        ({"workers": 0}, "a whole number from 1"),
        ({"strategy": "blok"}, "Did you mean 'block'"),
        ({"compress": "int9"}, "unknown compress"),
        ({"ttl": -1.0}, "time to live"),
    ):
        with pytest.raises(UserError, match=message):
            encode_corpus(given, model, **{"store": store, "workers": 2, **wrong})
    with pytest.raises(DocumentError, match="no documents to encode"):
        encode_corpus([], model, store=store)
    with pytest.raises(UserError, match=r"nowhere|no such|not a"):
        encode_corpus(given, str(tmp_path / "nowhere"), store=store, workers=2)
    assert "--chunk" in error("encode", tmp_path, "--model", model_dir, "--workers", 2, "--chunk", "tokens=9")


def test_a_store_that_fails_ends_the_run_with_its_reason(model_dir: Path, tmp_path: Path) -> None:
    """Danger: a full disk is reported as ten thousand failed documents, or as a fault of Kvilt's."""
    (tmp_path / "file").write_text("in the way")
    clerk = Clerk(Job(str(model_dir), store=f"disk:path={tmp_path / 'file'}"))
    with pytest.raises((StoreUnavailable, UserError), match="file"):
        outcome_of(clerk(json.dumps({"documents": [{"text": "a"}]})))


def test_documents_that_do_not_fit_together_are_encoded_alone(
    model_dir: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: one batch that is too large for a device's memory ends a run of days, or costs all documents of the batch."""
    real = Encoder.make

    def make(self: Encoder, items: Sequence[Item]) -> list[DocumentCache]:
        if len(items) > 1 or "poison" in items[0].document.text:
            raise RuntimeError("out of memory")
        return real(self, items)

    monkeypatch.setattr(Encoder, "make", make)
    given = [Document(f"text {i} {'poison' if i == 3 else 'honey'}", id=str(i)) for i in range(6)]
    done = encode_corpus(given, str(model_dir), store=store)
    assert (done.documents, done.encoded) == (5, 5)
    assert done.failed == ("document '3' cannot be encoded: out of memory",)
