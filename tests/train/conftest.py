"""Tiny models train fastest on one thread."""

from __future__ import annotations

import pytest
import torch
import train_kit as kit

from kvilt.engine.engine import Engine


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """A tiny random model."""
    return kit.shared()
