"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_kit import Processes, write_documents


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Starts real processes."""
    made = Processes(tmp_path_factory.mktemp("processes"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub library reads its environment when it is imported, which may have been earlier."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def docs(tmp_path: Path) -> list[Path]:
    """Five text files in a folder `docs`."""
    return write_documents(tmp_path / "docs", 5)


@pytest.fixture
def store(tmp_path: Path) -> str:
    """The specification of a fresh store on disk."""
    return f"disk:path={tmp_path / 'store'}"
