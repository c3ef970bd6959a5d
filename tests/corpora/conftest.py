"""Fixtures of the corpora's tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def store(tmp_path: Path) -> str:
    """The specification of a fresh store on disk."""
    return f"disk:path={tmp_path / 'store'}"
