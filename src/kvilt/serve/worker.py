"""One thread owns the model. Jobs wait for it in a bounded queue, and give up between two layers when nobody wants them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from kvilt.engine.streaming import Cancelled
from kvilt.errors import KviltError
from kvilt.model.attention import using
from kvilt.model.cores import release_cores

log = logging.getLogger("kvilt")


class QueueFull(KviltError):
    """More requests wait than the server was told to hold; try again in `seconds`."""

    def __init__(self, waiting: int, seconds: float) -> None:
        super().__init__(f"{waiting} requests wait already: try again in {seconds:.0f} seconds.")
        self.seconds = seconds


class Late(KviltError):
    """A request's time is over."""

    def __init__(self) -> None:
        super().__init__("the request's deadline is over: ask for fewer tokens, or give it more time.")


class Stopping(KviltError):
    """The server ends."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down: ask again in a moment.")


class Job:
    """One thing that the worker does for somebody. `emit` hears what comes of it: anything the work hands on, then its
    result or its error. Set `cancelled` when nobody listens any more."""

    def __init__(
        self, work: Callable[[Job], Any], emit: Callable[[Any], object], deadline: float | None = None
    ) -> None:
        self.work, self.emit = work, emit
        self.queued, self.waited, self.cancelled = time.monotonic(), 0.0, False
        self.ends = None if deadline is None else self.queued + deadline

    def check(self) -> None:
        """Raise Cancelled or Late where the job is to be given up."""
        if self.cancelled:
            raise Cancelled
        if self.ends is not None and time.monotonic() > self.ends:
            raise Late

    def run(self) -> None:
        """Do it, telling what comes of it."""
        self.waited = time.monotonic() - self.queued
        try:
            self.check()
            self.emit(self.work(self))
        except Exception as error:
            self.emit(error)


class Worker:
    """Runs jobs one after the other, the next slice of background work where none waits.

    `limit` jobs may wait. Background work is an iterator that does a little with every step."""

    def __init__(self, limit: int = 128) -> None:
        self.limit, self.seconds = limit, 1.0  # what a job took lately
        self._jobs, self._slices = deque[Job](), deque[Iterator[object]]()
        self.current: Job | None = None
        self._ready, self._closing, self._abandon = threading.Condition(), False, False
        self._thread = threading.Thread(target=self._loop, name="kvilt-worker", daemon=True)
        release_cores()  # of the thread that has loaded the model
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises QueueFull, Stopping."""
        with self._ready:
            if self._closing:
                raise Stopping
            if len(self._jobs) >= self.limit:
                raise QueueFull(len(self._jobs), max(1.0, len(self._jobs) * self.seconds))
            self._jobs.append(job)
            self._ready.notify()

    def background(self, slices: Iterator[object]) -> None:
        """Queue work that is done while no job waits. Raises Stopping."""
        with self._ready:
            if self._closing:
                raise Stopping
            self._slices.append(slices)
            self._ready.notify()

    def withdraw(self, job: Job) -> None:
        """Nobody wants this job any more: it leaves the queue, or gives up before its next layer."""
        job.cancelled = True
        with self._ready:
            if job in self._jobs:
                self._jobs.remove(job)

    def close(self, seconds: float) -> bool:
        """Take nothing more, and finish what is there within so many seconds; whether all of it was finished."""
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._thread.join(seconds)
        finished = not self._thread.is_alive()
        self._abandon = True
        self._thread.join(10.0)
        return finished

    def _loop(self) -> None:
        with using(self._between_layers):
            while (work := self._next()) is not None:
                if isinstance(work, Job):
                    began = time.monotonic()
                    self.current = work
                    work.run()
                    self.current = None
                    self.seconds += 0.2 * (time.monotonic() - began - self.seconds)
                elif self._step(work):
                    self._slices.append(work)

    def _next(self) -> Job | Iterator[object] | None:
        """What is to be done now: jobs first; None when the worker is to end."""
        with self._ready:
            while not (self._jobs or self._slices or self._closing):
                self._ready.wait()
            if self._jobs:
                return self._jobs.popleft()
            return self._slices.popleft() if self._slices and not self._abandon else None

    def _step(self, slices: Iterator[object]) -> bool:
        """Do one slice of background work; whether more is to come."""
        try:
            next(slices)
            return True
        except (StopIteration, Cancelled):
            return False
        except Exception:
            log.error("background work failed", exc_info=True)
            return False

    def _between_layers(self, *_: Any) -> None:
        """Attention's hook: called in every layer of every pass of this thread."""
        if self._abandon:
            raise Cancelled
        if self.current is not None:
            self.current.check()
