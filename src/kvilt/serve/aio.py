"""The worker for asyncio: what comes of a job, event by event; and an engine that is awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from kvilt.engine.encoder import EncodeReport
from kvilt.engine.engine import Engine
from kvilt.engine.streaming import Pieces
from kvilt.serve.kept import Kept, Placing
from kvilt.serve.worker import Job, Worker
from kvilt.types import Answer


class Events:
    """What comes of one job, in order."""

    def __init__(self, worker: Worker, work: Callable[[Job], Any], deadline: float | None = None) -> None:
        loop, self.worker = asyncio.get_running_loop(), worker
        self._items = asyncio.Queue[Any]()

        def emit(item: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self._items.put_nowait, item)

        self.job = Job(work, emit, deadline)
        worker.submit(self.job)

    async def next(self) -> Any:
        """The next one. Raises what went wrong."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item

    def waiting(self) -> list[Any]:
        """Those that are there already."""
        return [self._items.get_nowait() for _ in range(self._items.qsize())]

    def withdraw(self) -> None:
        """Nobody wants this job any more."""
        self.worker.withdraw(self.job)


class AsyncEngine:
    """An engine for asyncio. Calls wait for each other; one that is cancelled stops before the model's next layer.

    Rows of the last prompts are kept, in `keep` bytes: the next turn of a conversation goes on from them."""

    def __init__(self, engine: Engine, keep: int = 1 << 30, waiting: int = 1024) -> None:
        self.engine, self._worker, self._kept = engine, Worker(waiting), Kept(engine.model, keep)

    @classmethod
    async def load(cls, *given: Any, **options: Any) -> AsyncEngine:
        """As `Engine.load`."""

        def made() -> AsyncEngine:
            return cls(Engine.load(*given, **options))

        return await asyncio.to_thread(made)

    async def answer(self, question: Any, documents: Any = (), **options: Any) -> Answer:
        """As `Engine.answer`. Raises QueueFull where too many wait."""
        *_, answer = [item async for item in self.stream(question, documents, **options)]
        assert isinstance(answer, Answer)
        return answer

    async def stream(self, question: Any, documents: Any = (), **options: Any) -> AsyncIterator[str | Answer]:
        """Pieces of the answer's text as they are written; the last item is the Answer."""

        def work(job: Job) -> Answer:
            given = {
                "streamer": Pieces(self.engine.text.tokenizer, job.emit),
                "placing": Placing(self._kept, None),
                **options,
            }
            return self.engine.answer(question, documents, **given)

        events = Events(self._worker, work)
        try:
            while not isinstance(item := await events.next(), Answer):
                yield item
            yield item
        finally:
            events.withdraw()

    async def encode(self, documents: Any, **options: Any) -> EncodeReport:
        """As `Engine.encode`."""
        report: EncodeReport = await Events(self._worker, lambda _: self.engine.encode(documents, **options)).next()
        return report

    async def close(self) -> None:
        """Finish what runs."""
        await asyncio.to_thread(self._worker.close, 60.0)
