"""One vLLM engine for all tests of this folder; they are left out where vLLM is not installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import vllm_kit

from kvilt.rows import adapter
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import Adapter

collect_ignore_glob = [] if importlib.util.find_spec("vllm.version") else ["test_*.py"]  # this folder is a "vllm", too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and what it imports warn of many things that are none of ours."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, learned vectors and an empty store."""
    folder = tmp_path_factory.mktemp("vllm")
    vllm_kit.save(folder / "model")
    (folder / "store").mkdir()
    made = torch.Generator().manual_seed(5)
    header, trailer, links = (torch.randn(n, vllm_kit.SHAPE["hidden_size"], generator=made) * 0.4 for n in (8, 8, 3))
    Wrapper(header, trailer).save(folder / "packet.safetensors")
    Wrapper(header, trailer, links=links).save(folder / "linked.safetensors")
    a, b = torch.randn(3, vllm_kit.SHAPE["hidden_size"], 4, generator=made), torch.randn(3, 4, 64, generator=made) * 0.1
    adapter.save(Adapter("", {"self_attn.k_proj": (a, b), "self_attn.v_proj": (a, b)}), folder / "writer.safetensors")
    return folder


@pytest.fixture(scope="session")
def reference(place: Path) -> vllm_kit.Reference:
    """Kvilt's own engine over the same files."""
    return vllm_kit.Reference(str(place / "model"), f"disk:path={place / 'store'}")


@pytest.fixture(scope="session")
def served(place: Path, reference: vllm_kit.Reference) -> Iterator[vllm_kit.Served]:
    """vLLM with Kvilt's connector and scheduler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = vllm_kit.Served(reference.model, reference.store)
    yield made
    made.llm.llm_engine.engine_core.shutdown()
