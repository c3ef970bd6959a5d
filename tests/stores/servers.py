"""Real servers for the stores' tests, each started by itself, and a proxy that makes trouble.

moto       python -m moto.server -p PORT                                       S3 with ranges and conditional put
rclone     rclone serve s3 --auth-key ACCESS,SECRET --addr 127.0.0.1:PORT DIR  S3 without either, silently
redis      redis-server --port PORT --save "" --appendonly no
"""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ACCESS, SECRET, BUCKET = "kvilt-access", "kvilt-secret", "kvilt"
REMOTE = ("object", "moto", "rclone", "redis", "remote tiers")  # kinds of stores
FAULTS = ("delay", "cut", "flip", "slow", "5xx")
REFUSED = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], port: int) -> Iterator[None]:
    """A process that listens, until the block ends."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, f"{command} ended by itself"
                assert time.monotonic() < until, f"{command} does not listen"
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


def program(name: str) -> str:
    """A program beside Python or on the path; the test is skipped where there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """A sound S3 server with an empty bucket."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    port = free_port()
    with running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        make_bucket(f"http://127.0.0.1:{port}/{BUCKET}")
        yield f"http://127.0.0.1:{port}"


def make_bucket(url: str) -> None:
    """moto takes a request for one of S3's when it is signed like one."""
    signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host"}
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=signed)).close()


@contextlib.contextmanager
def rclone(path: Path) -> Iterator[str]:
    """A poor S3 server with an empty bucket: it answers a part with the whole, and overwrites what it was told not to."""
    port = free_port()
    (path / BUCKET).mkdir(parents=True)
    command = [program("rclone"), "serve", "s3", "--auth-key", f"{ACCESS},{SECRET}", "--addr", f"127.0.0.1:{port}"]
    with running([*command, str(path)], port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def redis(*options: str) -> Iterator[str]:
    """An empty Redis that keeps nothing on the disk."""
    port = free_port()
    command = [program("redis-server"), "--port", str(port), "--save", "", "--appendonly", "no", *options]
    with running(command, port):
        yield f"redis://127.0.0.1:{port}/0"


def needed(kind: str, request: pytest.FixtureRequest) -> dict[str, str] | None:
    """The servers that a kind of store needs, running; None for a store without any."""
    if kind not in REMOTE:
        return None
    names = {"object": [], "remote tiers": ["redis", "moto"]}.get(kind, [kind])
    return {"object": "", **{name: request.getfixturevalue(name) for name in names}}


class Proxy:
    """Passes bytes on to a server, and spoils some: a fault for every `every`th request on average, none for 0.

    delay: a request waits. cut: both ends are closed. flip: one byte of the answer changes. slow: the answer drips.
    5xx: the server is said to be overloaded (HTTP only)."""

    def __init__(self, port: int, faults: Sequence[str] = FAULTS, seed: int = 0) -> None:
        self.every, self.injected, self._faults, self._target = 0, dict.fromkeys(faults, 0), list(faults), port
        self._chance = random.Random(seed)
        self._open: set[socket.socket] = set()
        self.away = False  # connections are refused
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def count(self) -> int:
        return sum(self.injected.values())

    def close(self) -> None:
        self._server.close()
        for each in list(self._open):
            _end(each)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                if self.away:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open |= {client, server}
                marks: set[str] = set()
                threading.Thread(target=self._requests, args=(client, server, marks), daemon=True).start()
                threading.Thread(target=self._answers, args=(server, client, marks), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket, marks: set[str]) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                fault = (
                    self._chance.choice(self._faults) if self.every and self._chance.random() < 1 / self.every else ""
                )
                if fault:
                    self.injected[fault] += 1
                if fault == "delay":
                    time.sleep(0.05)
                elif fault == "5xx":
                    client.sendall(REFUSED)
                if self.away or fault in ("cut", "5xx"):
                    break
                marks |= {fault} & {"flip", "slow"}
                server.sendall(data)
        self._end(client, server)

    def _answers(self, server: socket.socket, client: socket.socket, marks: set[str]) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(server.recv(1 << 18)):
                if self.away:
                    break
                if "flip" in marks:
                    data[self._chance.randrange(len(data))] ^= 1 << self._chance.randrange(8)
                step = max(1, len(data) // 8) if "slow" in marks else len(data)
                for start in range(0, len(data), step):
                    client.sendall(data[start : start + step])
                    time.sleep(0.002 if "slow" in marks else 0)
                marks.clear()
        self._end(client, server)

    def _end(self, *ends: socket.socket) -> None:
        for each in ends:
            self._open.discard(each)
            _end(each)


def _end(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
