"""Workers in processes of their own: a line of JSON in for every part, a line out for what became of it.

A worker that dies is started again and gets its part once more; what it had stored is skipped. A part that kills its worker
twice is given up, and told. When the process that gives out the work dies, the workers end with the part they are at."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from kvilt.corpora.sources import Part
from kvilt.corpora.worker import Clerk, Job, Outcome, outcome_of
from kvilt.errors import UserError

TRIES = 2
COMMAND = (sys.executable, "-m", "kvilt.corpora.processes")


class Child:
    """One worker process, with its model loaded. Raises UserError where it ends before that."""

    def __init__(self, job: Job, threads: int) -> None:
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        pipe = subprocess.PIPE
        for _ in range(TRIES):
            self.process = subprocess.Popen(  # Ctrl-C reaches the one that gives out the work alone
                COMMAND, stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True
            )
            if self.ask(json.dumps(asdict(job))):
                return
            self.end()
        raise UserError("a worker ended before its model was loaded: out of memory? Try fewer workers.")

    def ask(self, line: str) -> str:
        """The answer to a line; empty if the process died over it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            return answer if answer.endswith("\n") else ""
        return ""

    def end(self) -> None:
        """Let it write down what is pending, and go."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def in_processes(job: Job, parts: Sequence[Part], workers: int) -> Iterator[Outcome]:
    """The outcomes of all parts, in the order in which they are done. Raises UserError, StoreUnavailable."""
    todo: queue.SimpleQueue[Part] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()
    for part in parts:
        todo.put(part)
    running: list[Child] = []
    stopped, threads = threading.Event(), max(1, (os.cpu_count() or 1) // workers)
    given = (job, threads, todo, done, stopped, running)
    feeders = [threading.Thread(target=_feed, args=given) for _ in range(min(workers, len(parts)))]
    for feeder in feeders:
        feeder.start()
    try:
        for _ in parts:
            outcome = done.get()
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome
    except (Exception, GeneratorExit, KeyboardInterrupt):
        stopped.set()
        for child in running:
            child.process.terminate()
        raise
    finally:
        for feeder in feeders:
            feeder.join()


def _feed(
    job: Job,
    threads: int,
    todo: queue.SimpleQueue[Part],
    done: queue.SimpleQueue[Outcome | Exception],
    stopped: threading.Event,
    running: list[Child],
) -> None:
    """Give one worker after another its parts, until none are left."""
    child: Child | None = None
    try:
        while not stopped.is_set():
            part, answer = todo.get_nowait(), ""
            for _ in range(TRIES):
                if child is None:
                    running.append(child := Child(job, threads))
                if answer := child.ask(json.dumps(asdict(part))):
                    break
                child.end()
                child = None
                if stopped.is_set():
                    return
            where = ", ".join(part.paths[:2]) or "given documents"
            lost = f"a worker ended {TRIES} times over {where} from {part.first:,} on: out of memory?"
            done.put(outcome_of(answer) if answer else Outcome(failed=[lost]))
    except queue.Empty:
        pass
    except Exception as error:  # raised where the outcomes are read
        done.put(error)
    finally:
        if child is not None:
            child.end()


def main() -> None:
    """Run in a worker; what libraries print goes to stderr, the answers alone to stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    clerk: Clerk | None = None
    for line in sys.stdin:
        if clerk is None:
            clerk, answer = Clerk(Job(**json.loads(line))), "ready"
        else:
            answer = clerk(line)
        answers.write(answer + "\n")
        answers.flush()
    if clerk is not None and not clerk.problem:
        clerk.worker.engine.store.close()


if __name__ == "__main__":
    main()
