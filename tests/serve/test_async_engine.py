"""The engine for asyncio."""

from __future__ import annotations

import asyncio

import pytest

from core_kit import DOCUMENTS, QUESTION, engine_of
from kvilt import AsyncEngine
from kvilt.errors import DocumentError
from kvilt.types import Answer


def test_many_at_once_in_one_loop() -> None:
    """Danger: answers of several tasks are mixed, an error reaches another task, or the loop waits for the model."""

    async def main() -> None:
        engine = AsyncEngine(engine_of("block"))
        report = await engine.encode(DOCUMENTS)
        assert report.encoded + report.present == len(DOCUMENTS)
        orders = [DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS[1:]] * 3
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        ticking = asyncio.create_task(tick())
        asked = [engine.answer(QUESTION, order, max_new_tokens=6) for order in orders]
        *answers, failed = await asyncio.gather(*asked, engine.answer("?", [""]), return_exceptions=True)
        ticking.cancel()
        plain = engine.engine
        wanted = [plain.answer(QUESTION, order, max_new_tokens=6).tokens for order in orders]
        assert [a.tokens for a in answers if isinstance(a, Answer)] == wanted
        assert isinstance(failed, DocumentError)
        assert ticks > 3
        *pieces, last = [item async for item in engine.stream(QUESTION, DOCUMENTS, max_new_tokens=6)]
        assert isinstance(last, Answer)
        assert "".join(map(str, pieces)) == last.text
        await engine.close()

    asyncio.run(main())


def test_a_cancelled_task_stops_the_model() -> None:
    """Danger: a task that was given up keeps the model busy, and the next one waits for minutes."""

    async def main() -> None:
        engine = AsyncEngine(engine_of("block"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await engine.answer(QUESTION, DOCUMENTS, max_new_tokens=3900, eos_token_id=[])
        async with asyncio.timeout(10):
            assert (await engine.answer(QUESTION, DOCUMENTS, max_new_tokens=2)).text is not None
        await engine.close()

    asyncio.run(main())
