"""What only real processes can show: kill -9, Ctrl-C, two at once, and a restart in between."""

from __future__ import annotations

import itertools
import json
import random
import signal
import time
from pathlib import Path

import pytest

from cli_kit import Processes, data, stored, wait_for, write_documents
from kvilt.stores.disk import DiskStore

COUNT = 24  # documents: enough for a run that can be stopped in the middle


def whole(path: Path) -> None:
    """Every stored document can be read completely, and after a gc the index knows it and no leftovers remain."""
    store = DiskStore(str(path))
    assert store.verify() == []
    store.gc()
    assert not [
        f for f in path.rglob("*.tmp") if f.stat().st_size
    ]  # an empty one may be a writer's that begins: a minute
    assert {e.key for e in store.entries()} == {f.stem for f in stored(path)}
    store.close()


def test_killed_at_random_moments(processes: Processes, model_dir: Path, tmp_path: Path) -> None:
    """Danger: a killed run loses more than what was in flight, or leaves half a document."""
    write_documents(tmp_path / "docs", COUNT, words=60)
    command = (
        "encode",
        tmp_path / "docs",
        "--model",
        model_dir,
        "--store",
        f"disk:path={tmp_path / 'store'}",
        "--json",
    )
    chance, before = random.Random(11), 0
    for _ in range(2):
        process = processes.start(*command)
        wait_for(lambda: len(stored(tmp_path / "store")) > before)  # noqa: B023 - called at once
        time.sleep(chance.random() * 0.02)
        process.kill(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert len(stored(tmp_path / "store")) > before
        before = len(stored(tmp_path / "store"))
    final = processes.start(*command)
    assert final.wait() == 0, final.stderr
    report = json.loads(final.stdout)
    assert (report["present"], report["encoded"]) == (before, COUNT - before)  # only what was in flight is lost
    whole(tmp_path / "store")


def test_ctrl_c_keeps_progress(processes: Processes, model_dir: Path, tmp_path: Path) -> None:
    """Danger: Ctrl-C loses what was encoded, or ends in a traceback."""
    write_documents(tmp_path / "docs", 4 * COUNT, words=60)
    command = ("encode", tmp_path / "docs", "--model", model_dir, "--store", f"disk:path={tmp_path / 'store'}")
    process = processes.start(*command)
    wait_for(lambda: len(stored(tmp_path / "store")) > 3)
    process.kill(signal.SIGINT)
    assert process.wait() == 130
    assert process.stdout == ""
    assert "Run the same command again" in process.stderr
    assert "Traceback" not in process.stderr
    found = len(stored(tmp_path / "store"))
    assert 3 < found < 4 * COUNT
    again = processes.start(*command, "--json")
    assert again.wait() == 0, again.stderr
    assert json.loads(again.stdout)["present"] == found
    whole(tmp_path / "store")


def test_ctrl_c_while_an_answer_is_printed(processes: Processes, model_dir: Path, tmp_path: Path) -> None:
    """Danger: Ctrl-C waits for the end of a long answer."""
    docs = write_documents(tmp_path / "docs", 1)
    common = (
        "--model",
        model_dir,
        "--store",
        "memory",
        "--stream",
        "--max-new-tokens",
        3000,
        "--temperature",
        9,
        "--seed",
        4,
    )
    process = processes.start("ask", "what?", "--docs", *docs, *common)
    wait_for(lambda: process.stdout)
    process.kill(signal.SIGINT)
    assert process.wait() == 130
    assert process.stderr == "error: stopped.\n"


def test_two_at_once_store_every_document_once(processes: Processes, model_dir: Path, tmp_path: Path) -> None:
    """Danger: two runs on one store destroy each other's files."""
    write_documents(tmp_path / "docs", COUNT)
    command = (
        "encode",
        tmp_path / "docs",
        "--model",
        model_dir,
        "--store",
        f"disk:path={tmp_path / 'store'}",
        "--json",
    )
    both = [processes.start(*command) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0], [p.stderr for p in both]
    reports = [json.loads(p.stdout) for p in both]
    assert all(r["documents"] == COUNT for r in reports)
    assert len(stored(tmp_path / "store")) == COUNT
    whole(tmp_path / "store")


@pytest.fixture(scope="module")
def collection(processes: Processes, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, encoded by a process that is gone."""
    folder = tmp_path_factory.mktemp("collection")
    write_documents(folder / "docs", COUNT)
    process = processes.start(
        "encode", folder / "docs", "--model", model_dir, "--store", f"disk:path={folder / 'store'}"
    )
    assert process.wait() == 0, process.stderr
    return folder


@pytest.mark.parametrize("reverse", [False, True])
def test_any_five_in_any_order_after_a_restart(
    collection: Path, processes: Processes, model_dir: Path, reverse: bool
) -> None:
    """Danger: another process finds nothing of what was stored."""
    picked = random.Random(3).sample(sorted((collection / "docs").iterdir()), 5)
    order = picked[::-1] if reverse else picked
    command = (
        "ask",
        "what is it?",
        "--docs",
        *order,
        "--model",
        model_dir,
        "--store",
        f"disk:path={collection / 'store'}",
    )
    process = processes.start(*command, "--json", "--max-new-tokens", 4)
    assert process.wait() == 0, process.stderr
    usage = json.loads(process.stdout)["usage"]
    assert (usage["hits"], usage["misses"]) == (5, 0)


def test_nothing_is_encoded_a_second_time(collection: Path, model_dir: Path) -> None:
    """Danger: a rerun encodes everything again."""
    common = ("--model", model_dir, "--store", f"disk:path={collection / 'store'}")
    report = data("encode", collection / "docs", *common)
    assert (report["documents"], report["encoded"], report["present"]) == (COUNT, 0, COUNT)
    for five in itertools.islice(itertools.combinations(sorted((collection / "docs").iterdir()), 5), 0, 400, 200):
        usage = data("ask", "what?", "--docs", *five, *common, "--max-new-tokens", 1)["usage"]
        assert (usage["hits"], usage["misses"]) == (5, 0)
