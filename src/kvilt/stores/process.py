"""Which process owns a claim or a temporary file, and whether it still lives."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3


@dataclass(frozen=True)
class Owner:
    """A process, told from a later one with the same number by its start time."""

    host: str
    pid: int
    start: str

    @classmethod
    def current(cls) -> Owner:
        """The running process (asked anew after every fork)."""
        return cls(_host(), os.getpid(), _start(os.getpid()))

    @property
    def tag(self) -> str:
        """The owner as part of a file name."""
        return f"{blake3(self.host.encode()).hexdigest()[:12]}-{self.pid}-{self.start}"

    def alive(self) -> bool:
        """Whether the process runs; a process on another host is taken to."""
        if self.host != _host():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return _start(self.pid) == self.start

    @classmethod
    def tag_alive(cls, tag: str) -> bool:
        """Whether the process behind a tag runs; a tag we cannot read belongs to somebody else."""
        parts = tag.split("-")
        if len(parts) != 3 or not parts[1].isdigit() or not tag.startswith(cls.current().tag.split("-")[0]):
            return True
        return cls(_host(), int(parts[1]), parts[2]).alive()


def _host() -> str:
    namespace = ""
    with contextlib.suppress(OSError):  # containers can share a folder and a host name, but number processes apart
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace}".strip()


def _start(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "0"  # no /proc here: the process number alone must do
    return stat.rpartition(")")[2].split()[19]
