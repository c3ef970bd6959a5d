"""Every kind of store, and a clock that can be moved."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_kit import KINDS, POLICIES, make_store

from kvilt.stores.disk import DiskStore
from kvilt.stores.store import Store

Maker = Callable[..., Store]


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk shows nothing here; the crash tests do wait."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Maker]:
    made: list[Store] = []

    def maker(name: str = "store", **options: object) -> Store:
        made.append(make_store(request.param, tmp_path / name, **options))
        return made[-1]

    yield maker
    for store in made:
        store.close()


@pytest.fixture
def store(make: Maker) -> Store:
    return make()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskStore]:
    made = DiskStore(str(tmp_path / "disk"))
    yield made
    made.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves time forward by some seconds."""
    real, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])

    def forward(seconds: float) -> None:
        ahead[0] += seconds

    return forward
