"""`kvilt serve`: uvicorn around the application."""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvilt.errors import MissingExtra, UserError
from kvilt.serve.settings import Settings
from kvilt.stores.sizes import parse_size

if TYPE_CHECKING:
    from kvilt.engine.engine import Engine

NEEDED = ("starlette", "uvicorn", "msgspec", "prometheus_client")
KEY = "KVILT_API_KEY"
HEADER_SECONDS = 15.0  # a connection without a whole request for so long, or twice that, is closed


def run(model: str, load: Callable[[], Engine], settings: Settings, say: Callable[[str], object]) -> None:
    """Serve until SIGTERM or Ctrl-C; what runs then is finished within its grace.

    Raises UserError for what can be seen to be wrong before a model is loaded."""
    try:
        for package in NEEDED:
            importlib.import_module(package)
    except ImportError as error:
        raise MissingExtra(error.name or package, "serve") from error
    from kvilt.serve.tenants import Tenants

    tenants = Tenants.of(KEY, settings.keys)
    if not tenants.asked_for and not _is_loopback(settings.host):
        told = f"give keys (--keys FILE, or the variable {KEY}), or serve 127.0.0.1 alone."
        raise UserError(f"--host {settings.host} lets others than this machine in, and no key is set: {told}")
    with _listen(settings) as listening:
        server, label = _server(model, load, settings, tenants)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        say(f"serving {model} ({label}) at http://{host}:{listening.getsockname()[1]}")
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when it is done
        asyncio.run(server.serve([listening]))
    say("stopped.")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        made = socket.create_server((settings.host, settings.port), family=family, backlog=1024)
        made.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )  # else headers and body wait for each other, for 40 ms
        return made
    except OSError as error:
        raise UserError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}.") from error


def _server(model: str, load: Callable[[], Engine], settings: Settings, tenants: Any) -> tuple[Any, str]:
    import uvicorn

    from kvilt.serve.app import build
    from kvilt.serve.asking import Engines
    from kvilt.serve.routes import Routes
    from kvilt.serve.worker import Worker

    keep = 0 if settings.keep == "0" else parse_size(settings.keep, "--keep") or 0
    settings = replace(settings, name=settings.name or Path(model).name)
    engine = load()
    tenants.namespace = engine.namespace
    worker = Worker(settings.queue)
    routes = Routes(Engines(engine, settings.also or (), keep), worker, tenants, settings)

    def closing() -> None:
        worker.close(settings.grace)
        routes.audit.close()

    quiet = {"log_level": "error", "access_log": False, "server_header": False}
    more = {"http": _protocol(), "ws": "none", "lifespan": "on", "timeout_keep_alive": 30}
    grace = max(1, round(settings.grace))
    config = uvicorn.Config(build(routes, closing), timeout_graceful_shutdown=grace, **quiet, **more)
    return uvicorn.Server(config), engine.label


def _protocol() -> Any:
    """HTTP by h11, for clients that send something: whoever sends no whole request for a while is cut off."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):  # type: ignore[misc]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._seen: Any = self  # the last request at the last look
            self._timer = self.loop.call_later(HEADER_SECONDS, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _look(self) -> None:
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self._seen is self.cycle:
                self.transport.close()
                return
            self._seen = self.cycle
            self._timer = self.loop.call_later(HEADER_SECONDS, self._look)

    return Patient
