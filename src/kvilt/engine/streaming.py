"""An answer in pieces: text as soon as it is certain, then the answer itself."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from kvilt.types import Answer

CLOSE_SECONDS = 5.0  # how long closing waits for the token that is being computed


class Cancelled(Exception):
    """Raised inside the worker when nobody listens any more."""


class Pieces:
    """A streamer for transformers: turns tokens into text that later tokens cannot change."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.items: queue.Queue[str | Answer | BaseException] = queue.Queue()
        self.cancelled = threading.Event()
        self._tokens: list[int] = []
        self._from = self._read = 0  # text of tokens[_from:_read] is out; it is decoded again for the spaces between

    def put(self, token: Tensor) -> None:
        """Take one token; raises Cancelled when the answer is not wanted any more."""
        if self.cancelled.is_set():
            raise Cancelled
        self._tokens += token.flatten().tolist()
        known, text = self._text(self._from, self._read), self._text(self._from, len(self._tokens))
        if len(text) > len(known) and not text.endswith("\ufffd"):  # that would be half a character
            self.items.put(text[len(known) :])
            self._from, self._read = self._read, len(self._tokens)

    def end(self) -> None:
        """Nothing to do: the answer itself comes last."""

    def _text(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self._tokens[start:end], skip_special_tokens=True))


def stream(answer: Callable[[Pieces], Answer], tokenizer: Any) -> Iterator[str | Answer]:
    """Run `answer` in a thread; its text in pieces that join to `Answer.text`, and the Answer as the last item.

    What goes wrong is raised here. Closing the iterator early stops the thread at its next token."""
    pieces = Pieces(tokenizer)

    def work() -> None:
        try:
            pieces.items.put(answer(pieces))
        except BaseException as error:  # raised again in the consumer's thread
            pieces.items.put(error)

    worker = threading.Thread(target=work, name="kvilt-stream", daemon=True)
    worker.start()
    try:
        yield from _joined(iter(pieces.items.get, None))
    finally:
        pieces.cancelled.set()
        worker.join(CLOSE_SECONDS)


def _joined(items: Iterator[str | Answer | BaseException]) -> Iterator[str | Answer]:
    """Leave out the white space around the whole text, as `Answer.text` does."""
    out = held = ""
    for item in items:
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, Answer):
            if item.text.startswith(out) and item.text != out:
                yield item.text[len(out) :]
            yield item
            return
        text = held + item if out else (held + item).lstrip()
        piece = text.rstrip()
        held = text[len(piece) :]
        if piece:
            out += piece
            yield piece
