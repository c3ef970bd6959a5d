"""Every kind of store, and a clock that can be moved."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import servers
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


@pytest.fixture(scope="session")
def credentials() -> Iterator[None]:
    """As they are found in the usual place."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "REDIS"))]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", servers.ACCESS)
        patch.setenv("AWS_SECRET_ACCESS_KEY", servers.SECRET)
        yield


@pytest.fixture(scope="session")
def moto(credentials: None) -> Iterator[str]:
    """The URL of a sound S3 server."""
    with servers.moto() as url:
        yield url


@pytest.fixture(scope="session")
def rclone(credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a poor S3 server."""
    with servers.rclone(tmp_path_factory.mktemp("rclone")) as url:
        yield url


@pytest.fixture(scope="session")
def redis(credentials: None) -> Iterator[str]:
    """The URL of a Redis."""
    with servers.redis("--maxmemory", "512mb", "--maxmemory-policy", "allkeys-lfu") as url:
        yield url


@pytest.fixture(params=[*KINDS, *servers.REMOTE])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Maker]:
    made: list[Store] = []
    needed = servers.needed(request.param, request)

    def maker(name: str = "store", **options: object) -> Store:
        made.append(make_store(request.param, tmp_path / name, servers=needed, **options))
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
