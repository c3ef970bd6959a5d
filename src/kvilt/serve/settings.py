"""What a server is told. Imports nothing heavy: the command line takes its options from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer import Option


def _option(default: Any, name: str, help_: str, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(name, help=help_, **more)})


@dataclass(frozen=True)
class Settings:
    """What a server is told; the command line takes its options from here."""

    host: str = _option("127.0.0.1", "--host", "Address to listen on; others than this machine's own want keys.")
    port: int = _option(8000, "--port", "Port to listen on; 0 for any free one.", min=0, max=65535)
    name: str | None = _option(None, "--name", "What the model is called; the last part of its own name if left out.")
    keys: Path | None = _option(None, "--keys", "File with a key a line; each is a tenant with documents of its own.")  # noqa: RUF009
    also: list[str] | None = _option(None, "--also", "Another strategy that requests may name.", metavar="SPEC")  # noqa: RUF009
    queue: int = _option(128, "--queue", "Requests that may wait; more are told to come back.", min=1)
    deadline: float = _option(600.0, "--deadline", "Seconds of a request that names none.", min=0.001)
    grace: float = _option(30.0, "--grace", "Seconds for what runs when the server is told to end.", min=0)
    tokens: int = _option(512, "--max-tokens", "Longest answer of a request that names no limit.", min=1)
    body: str = _option("8MB", "--max-body", "Longest request.")
    keep: str = _option(
        "1GB", "--keep", "Memory for rows of the last prompts, from which the next may go on; 0 keeps none."
    )
    audit: Path | None = _option(None, "--audit", "File that gets one JSON line for every answer.")  # noqa: RUF009
