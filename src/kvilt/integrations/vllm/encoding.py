"""Documents that are missing, encoded in the background: one child process with a transformers engine, started when needed.

The server hands over what is missing and goes on; every document is in flight once, and no more than QUEUED wait."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import IO, Any

from kvilt.errors import KviltError
from kvilt.integrations.vllm.deployment import Settings
from kvilt.integrations.vllm.prompts import Wanted

QUEUED = 1000  # documents
NICE = 10  # answers come first
BATCH = 64  # documents that are taken from the queue together

logger = logging.getLogger("kvilt")


class QueueFull(Exception):
    """Too many documents wait to be encoded."""


class Background:
    """The server's end: a queue, and the thread that feeds the child."""

    def __init__(self, source: str, settings: Settings) -> None:
        self.source, self.settings = source, settings
        self._jobs: dict[str, dict[str, Any]] = {}  # by digest, in order; they stay until they are done
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, wanted: Sequence[Wanted], system: str | None, *, some: bool = False) -> None:
        """Take all of them, or with `some` those for which there is room. Raises QueueFull."""
        with self._changed:
            new = {
                w.key.digest: w for w in wanted if w.key.digest not in self._jobs and w.document.text != w.document.id
            }
            room = QUEUED - len(self._jobs)
            if len(new) > room and not some:
                raise QueueFull(f"{len(self._jobs)} documents wait to be encoded already: try again later.")
            for digest, w in itertools.islice(new.items(), room):
                document = {"text": w.document.text, "title": w.document.title, "id": w.document.id}
                self._jobs[digest] = {"document": document, "system": system, "namespace": w.key.namespace}
            if new and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvilt-encoding", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs))
            try:
                with self._child() as child:
                    self._feed(child)
            except OSError as error:
                logger.warning("documents are not encoded: %s", error)
            with self._changed:
                self._jobs.clear()  # the child has died; what is asked for again comes again

    def _child(self) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "kvilt.integrations.vllm.encoding",
            self.source,
            json.dumps(asdict(self.settings)),
        ]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _feed(self, child: subprocess.Popen[str]) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        while child.poll() is None:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs))
                batch = dict(list(self._jobs.items())[:BATCH])
            child.stdin.write(json.dumps(list(batch.values())) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
            if not answer:
                return
            for problem in json.loads(answer):
                logger.warning("not encoded: %s", problem)
            with self._changed:
                for digest in batch:
                    self._jobs.pop(digest, None)


def work(source: str, settings: Settings, lines: Iterable[str], answers: IO[str]) -> None:
    """The child's end: a line of jobs in, a line of problems out, until the input ends."""
    from kvilt.engine.engine import Engine

    s, compress = settings, settings.compress
    base = Engine.load(source, s.strategy, s.store, system=s.system or None, namespace=s.namespace, compress=compress)

    @functools.lru_cache(maxsize=16)
    def engine(system: str | None, namespace: str) -> Engine:
        text = base.text if system is None else base.text.told(system)
        return Engine(base.model, text, base.strategy, base.store, namespace, base.compression)

    for line in lines:
        groups: dict[tuple[str | None, str], list[Any]] = defaultdict(list)
        for job in json.loads(line):
            groups[job["system"], job["namespace"]].append(job["document"])
        problems: list[str] = []
        for place, documents in groups.items():
            try:
                problems += engine(*place).encode(documents, keep_going=True).failed
            except KviltError as error:
                problems.append(str(error))
        answers.write(json.dumps(problems) + "\n")
        answers.flush()


def main() -> None:
    """Run in the child; what libraries print goes to stderr, the answers alone to stdout."""
    os.nice(NICE)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work(sys.argv[1], Settings.of(json.loads(sys.argv[2])), sys.stdin, answers)


if __name__ == "__main__":
    main()
