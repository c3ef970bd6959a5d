"""Running the command line: in this process where that will do, in real ones where signals and restarts matter."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kvilt
import kvilt.cli

WORDS = ("quilt", "patch", "river", "stone", "lantern", "harbour", "cellar", "violin", "orchard", "signal", "meadow")


@dataclass(frozen=True)
class Result:
    """What a verb printed, said, and ended with."""

    stdout: str
    stderr: str
    code: int


def run(*args: object, code: int = 0, **more: Any) -> Result:
    """One verb in this process; it must end with this exit code, never with a traceback."""
    result = run_any(*args, **more)
    assert result.code == code, result
    return result


def run_any(*args: object, input: str | bytes | None = None, **env: str) -> Result:
    """One verb in this process, however it ends."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for name in ("stdout", "stderr")}
    given = input.encode() if isinstance(input, str) else input or b""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("KVILT_MODEL", "KVILT_STORE"):
            patch.delenv(name, raising=False)
        for name, value in env.items():
            patch.setenv(name, value)
        for name, stream in {"stdin": io.TextIOWrapper(io.BytesIO(given), "utf-8"), **streams}.items():
            patch.setattr(sys, name, stream)
        ended = kvilt.cli.run([str(a) for a in args])
    said = {name: (stream.flush(), stream.buffer.getvalue().decode())[1] for name, stream in streams.items()}
    assert "Traceback" not in said["stderr"]
    return Result(said["stdout"], said["stderr"], ended)


def data(*args: object, code: int = 0, **more: Any) -> Any:
    """What a verb prints with --json; stdout holds nothing else."""
    return json.loads(run(*args, "--json", code=code, **more).stdout)


def error(*args: object, code: int = 2, **more: Any) -> str:
    """The one message of a verb that fails."""
    result = run(*args, code=code, **more)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stdout == ""
    assert len(lines) == 1, result.stderr
    return lines[0].removeprefix("error: ")


def write_documents(folder: Path, count: int, words: int = 12, seed: int = 0) -> list[Path]:
    """Text files of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    for i in range(count):
        text = " ".join(chance.choices(WORDS, k=words + 3 * i))
        (folder / f"{i:02}.txt").write_text(f"Document {i}: {text}.\n")
    return sorted(folder.glob("*.txt"))


class Processes:
    """Starts `kvilt` processes from one that has everything imported: real processes, without seconds of start-up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": str(Path(kvilt.__file__).parents[1])}
        script = Path(__file__).parent / "cli" / "cli_server.py"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([sys.executable, str(script)], env=environment, **pipes)
        self._count = 0

    def _call(self, **message: Any) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(message), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, *args: object, **env: str) -> Process:
        """Start one verb."""
        self._count += 1
        out = self.folder / str(self._count)
        pid = self._call(start=[str(a) for a in args], out=str(out), env=env)
        return Process(self, pid, out)

    def close(self) -> None:
        """Stop the server."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait(30)
        self.server.stdout.close()


class Process:
    """One running verb."""

    def __init__(self, processes: Processes, pid: int, out: Path) -> None:
        self.processes, self.pid, self.out = processes, pid, out

    def kill(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, or minus the signal that ended it."""
        return int(self.processes._call(wait=self.pid))

    @property
    def stdout(self) -> str:
        """What it printed."""
        path = self.out.with_suffix(".out")
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def stderr(self) -> str:
        """What it said."""
        return self.out.with_suffix(".err").read_text()


def stored(store: Path) -> list[Path]:
    """Files of stored documents."""
    return sorted(p for p in store.glob("??/*.safetensors") if not p.name.startswith("."))


def wait_for(condition: Any, seconds: float = 30) -> None:
    """Return as soon as a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)
