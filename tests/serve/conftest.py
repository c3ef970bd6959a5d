"""One server for the tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import zoo
from kvilt.engine.engine import Engine
from serve_kit import Server, serving

STRATEGY = "block:sink=system"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's folder."""
    return zoo.save(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def server(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`kvilt serve` with a store on disk and an audit log."""
    place = tmp_path_factory.mktemp("server")
    options = ["--strategy", STRATEGY, "--store", f"disk:path={place / 'store'}", "--dtype", "float32"]
    with serving(checkpoint, *options, "--also", "naive", "--audit", str(place / "audit"), log=place / "log") as made:
        yield made


@pytest.fixture(scope="session")
def engine(checkpoint: str) -> Engine:
    """The same in this process."""
    return Engine.load(checkpoint, STRATEGY, "memory", dtype="float32")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where a server writes what it says."""
    return tmp_path / "log"
