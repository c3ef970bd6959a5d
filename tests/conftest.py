"""Shared fixtures: models made once a session, and an environment that the user's own settings cannot reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoo
from kvilt.model.model import Model


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are left out where there is no GPU."""
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("cuda")])
        items[:] = [i for i in items if not i.get_closest_marker("cuda")]


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """User directories and global settings are the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny models: threads only wait for each other


@pytest.fixture(params=list(zoo.FAMILIES), scope="session")
def model(request: pytest.FixtureRequest) -> Model:
    """A tiny random model of each served family, float32."""
    return zoo.model_of(request.param)


@pytest.fixture(scope="session")
def llama() -> Model:
    """A tiny random Llama, float32."""
    return zoo.model_of("llama")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with chat template, saved like a hub checkpoint."""
    return Path(zoo.save(tmp_path_factory.mktemp("model")))
