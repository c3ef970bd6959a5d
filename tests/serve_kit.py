"""Real servers: a process of `kvilt serve`, and what asks it without any client library."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 60.0
LONG: dict[str, Any] = {"max_tokens": 3000, "ignore_eos": True}
SOURCE = Path(__file__).parent.parent / "src"


@dataclass
class Reply:
    """A response, read completely."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


@dataclass
class Server:
    """A server that runs."""

    url: str
    process: Any  # None where it runs in a thread of this process
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request on a connection of its own; `body` is JSON, or bytes as they are."""
        connection = http.client.HTTPConnection(*self.address, timeout=SECONDS)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"content-type": "application/json"} if body is not None else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def chat(self, question: str, documents: Any = None, **more: Any) -> Reply:
        """A greedy chat."""
        headers = more.pop("headers", {})
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 12, "temperature": 0, **more}
        return self.ask(
            "POST", "/v1/chat/completions", body | ({"documents": documents} if documents else {}), **headers
        )

    def metric(self, name: str, **headers: str) -> float:
        """The value of one counter, all its labels together; its name may hold one label: name{how="hit"}."""
        text = self.ask("GET", "/metrics", **headers).body.decode()
        pattern = re.escape(name) + (r"" if "{" in name else r"(?:\{[^}]*\})?")
        return sum(float(m[1]) for m in re.finditer(rf"^{pattern} (\S+)$", text, re.MULTILINE))


@contextlib.contextmanager
def serving(model: str, *options: str, log: Path, env: dict[str, str] | None = None) -> Iterator[Server]:
    """`kvilt serve MODEL --port 0`, until the block ends."""
    with log.open("wb") as out:
        line = [sys.executable, "-m", "kvilt", "serve", model, "--port", "0", *options]
        process = subprocess.Popen(line, stdout=out, stderr=out, env=environment(env), start_new_session=True)
        try:
            yield Server(_address(process, log), process, log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def in_thread(engine: Any, tmp_path: Path, **settings: Any) -> Iterator[Server]:
    """The same server in a thread of this process, so that what happens inside can be watched."""
    import asyncio
    import threading

    from kvilt.serve import launch
    from kvilt.serve.settings import Settings
    from kvilt.serve.tenants import Tenants

    wanted = Settings(**{"port": 0, "name": "tiny", "keep": "100MB", **settings})
    tenants = Tenants.of("KVILT_NO_KEY", wanted.keys)
    with launch._listen(wanted) as listening:
        server, _ = launch._server("tiny", lambda: engine, wanted, tenants)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", None, tmp_path)
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a server: this source tree, one thread, no network."""
    own = {k: v for k, v in os.environ.items() if k not in ("KVILT_API_KEY", "KVILT_STORE", "KVILT_MODEL")}
    paths = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**own, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(more or {})}


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r" at (http://\S+)", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(log.read_text()[-4000:])


def events(body: bytes) -> list[Any]:
    """The objects of a stream."""
    lines = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def said(chunks: Sequence[Any]) -> str:
    """The text of a streamed chat."""
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


def begin(server: Server, **body: Any) -> http.client.HTTPConnection:
    """A request whose answer nobody has read yet."""
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    whole = {"messages": [{"role": "user", "content": "Who?"}], **LONG, **body}
    connection.request("POST", "/v1/chat/completions", json.dumps(whole), {"content-type": "application/json"})
    return connection


def cut(connection: http.client.HTTPConnection) -> None:
    """Go away without a word."""
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def until(true: Any, seconds: float = 20.0) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
