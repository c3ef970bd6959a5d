"""An answer in pieces: text as soon as it is certain, then the answer itself."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from kvilt.engine.text import Written
from kvilt.model.cores import release_cores
from kvilt.types import Answer

CLOSE_SECONDS = 5.0  # how long closing waits for the token that is being computed


class Cancelled(Exception):
    """Raised inside the worker when nobody listens any more."""


class Pieces:
    """A streamer for transformers: hands on the text of tokens as it becomes certain.

    The pieces join to `Answer.text`. `put` raises Cancelled once `cancelled` is set."""

    def __init__(self, tokenizer: Any, hand_on: Callable[[str], object]) -> None:
        self.cancelled = threading.Event()
        self._written, self._hand_on = Written(tokenizer), hand_on

    def put(self, tokens: Tensor) -> None:
        """Take tokens; raises Cancelled when the answer is not wanted any more."""
        if self.cancelled.is_set():
            raise Cancelled
        for token in tokens.flatten().tolist():
            if piece := self._written.put(token):
                self._hand_on(piece)

    def end(self) -> None:
        """Nothing to do: the answer itself comes last."""


def stream(answer: Callable[[Pieces], Answer], tokenizer: Any) -> Iterator[str | Answer]:
    """Run `answer` in a thread; its text in pieces that join to `Answer.text`, and the Answer as the last item.

    What goes wrong is raised here. Closing the iterator early stops the thread at its next token."""
    items = queue.SimpleQueue[str | Answer | BaseException]()
    pieces = Pieces(tokenizer, items.put)

    def work() -> None:
        try:
            items.put(answer(pieces))
        except BaseException as error:  # raised again in the consumer's thread
            items.put(error)

    worker = threading.Thread(target=work, name="kvilt-stream", daemon=True)
    release_cores()
    worker.start()
    try:
        while not isinstance(item := items.get(), Answer):
            if isinstance(item, BaseException):
                raise item
            yield item
        yield item
    finally:
        pieces.cancelled.set()
        worker.join(CLOSE_SECONDS)
