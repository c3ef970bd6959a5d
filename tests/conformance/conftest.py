"""The doors: `kvilt serve` always, stock vLLM with Kvilt's plugin where vLLM is installed. Both serve one checkpoint and store."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from conformance_kit import OTHER_SYSTEM, STRATEGY, Door, vllm_kit
from kvilt.engine.engine import Engine
from serve_kit import environment, serving

DOORS = ["kvilt", *(["vllm"] if importlib.util.find_spec("vllm.version") else [])]  # tests/vllm is a "vllm", too
SECONDS = 240


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and what it imports warn of many things that are none of ours."""
    for item in items:
        if "vllm" in DOORS and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint and the store, with everything encoded that answers are compared for."""
    place = tmp_path_factory.mktemp("doors")
    made = vllm_kit.Reference(vllm_kit.save(place / "model"), f"disk:path={place / 'store'}")
    engine = made.engine(STRATEGY)
    for one in (engine, engine.with_system(OTHER_SYSTEM)):
        one.encode(vllm_kit.DOCUMENTS)
    return made


@pytest.fixture(scope="session")
def engine(reference: Any) -> Engine:
    """Kvilt's engine in this process."""
    return Engine.load(reference.model, STRATEGY, reference.store, system=reference.system, dtype="float32")


@pytest.fixture(scope="session", params=DOORS)
def door(request: pytest.FixtureRequest, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A server."""
    log = tmp_path_factory.mktemp(request.param) / "log"
    shared = ["--store", reference.store, "--strategy", STRATEGY, "--system", reference.system, "--dtype", "float32"]
    with contextlib.ExitStack() as stack:
        if request.param == "kvilt":
            server = stack.enter_context(serving(reference.model, *shared, "--name", "tiny", log=log))
            yield Door("kvilt", server.url, client(server.url))
        else:
            url = stack.enter_context(_vllm(reference.model, shared, log))
            yield Door("vllm", url, client(url))


def client(url: str) -> openai.OpenAI:
    """The client as it comes."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS)


@contextlib.contextmanager
def _vllm(model: str, shared: list[str], log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [
        sys.executable,
        "-m",
        "kvilt",
        "vllm",
        model,
        *shared,
        "--encode",
        "--enforce-eager",
        "--max-model-len",
        "2048",
    ]
    line += ["--port", str(port), "--served-model-name", "tiny", "--block-size", "32"]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    env = {k: v for k, v in environment(own).items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("wb") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out, env=env, start_new_session=True)
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and process.poll() is None and not _is_up(port):
                time.sleep(1)
            assert _is_up(port), log.read_text()[-6000:]
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_up(port: int) -> bool:
    return Door("vllm", f"http://127.0.0.1:{port}", None).is_up()
