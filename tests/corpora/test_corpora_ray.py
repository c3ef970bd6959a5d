"""The same corpus on a real Ray of two cores: actors and drivers that are killed cost nothing, and every byte is the same.

One Ray serves all tests of this file: `ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000)`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpus_kit import MOMENT, children, command_of, files, kill, parquet

import kvilt
from cli_kit import data, error, stored, wait_for
from kvilt.corpora.encode import encode_corpus
from kvilt.integrations.ray import on_ray

COUNT = 64
PATHS = os.pathsep.join(str(p) for p in (Path(kvilt.__file__).parents[1], Path(__file__).parents[1]))
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`use_push_based_shuffle` is deprecated:DeprecationWarning"
    ),  # Ray's own use of it
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray of two cores on this machine; its address."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("SOURCE_DATE_EPOCH", MOMENT)  # its workers inherit both
        patch.setenv("PYTHONPATH", PATHS)
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        import ray

        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80_000_000,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file in row groups of 4 documents."""
    return parquet(tmp_path_factory.mktemp("corpus") / "all.parquet", COUNT, group=4)


@pytest.fixture(scope="module")
def single(corpus: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process makes of the corpus."""
    folder = tmp_path_factory.mktemp("single")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", MOMENT)
        encode_corpus(str(corpus), str(model_dir), store=f"disk:path={folder}")
    return files(folder)


def actors() -> list[int]:
    """Processes of Kvilt's actors."""
    return [pid for pid in children() if "MapBatches(Actor)" in command_of(pid)]


def test_an_actor_that_is_killed_costs_nothing(
    address: str, corpus: Path, model_dir: Path, single: dict[str, bytes], tmp_path: Path
) -> None:
    """Danger: with a dead actor documents are lost or the run fails; or actors make other bytes than one process."""
    killed = list[int]()

    def strike(done: int, parts: int, note: str) -> None:
        if done == 2:
            killed.append(actors()[0])
            kill(killed[0])

    store = tmp_path / "store"
    given = {"store": f"disk:path={store}", "workers": 2, "run": on_ray(), "on_progress": strike}
    report = encode_corpus(str(corpus), str(model_dir), tables=tmp_path / "tables", **given)
    assert killed
    assert (report.documents, report.failed) == (COUNT, ())
    assert files(store) == single
    assert len((tmp_path / "tables" / "documents.jsonl").read_text().splitlines()) == COUNT


def test_a_driver_that_is_killed_is_continued(
    address: str, corpus: Path, model_dir: Path, single: dict[str, bytes], tmp_path: Path
) -> None:
    """Danger: a run that lost its driver must begin anew, or leaves half a document, or its actors go on for ever."""
    store = tmp_path / "store"
    where = ("--model", model_dir, "--store", f"disk:path={store}")
    command = [sys.executable, "-m", "kvilt", "encode", corpus, *where, "--ray", address, "--workers", 2]
    environment = {**os.environ, "PYTHONPATH": PATHS, "SOURCE_DATE_EPOCH": MOMENT}
    with subprocess.Popen([str(c) for c in command], env=environment, stderr=subprocess.PIPE) as driver:
        wait_for(lambda: len(stored(store)) > 3 or driver.poll() is not None, 60)
        kill(driver.pid)
    wait_for(lambda: not actors())
    first = len(stored(store))
    assert 3 < first < COUNT
    done = data("encode", corpus, *where, "--ray", "--workers", 1)  # this process uses that Ray already
    assert (done["documents"], done["present"], done["failed"]) == (COUNT, first, [])
    assert files(store) == single


def test_a_mistake_is_one_line_from_an_actor_too(address: str, corpus: Path, tmp_path: Path) -> None:
    """Danger: a model that is not there is a page of Ray's tracebacks."""
    told = error("encode", corpus, "--model", tmp_path / "none", "--store", f"disk:path={tmp_path}", "--ray", "local")
    assert "none" in told
    assert "ray" not in told.lower()
