"""What goes to stderr: messages, warnings, and the progress of encoding."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from kvilt.engine.encoder import Progress

LINE_SECONDS = 5.0  # between lines of progress where no bar can be drawn

logger = logging.getLogger("kvilt")  # everybody's, for warnings
own = logging.getLogger("kvilt.cli")


class _Handler(logging.Handler):
    """Messages as lines on stderr; a warning that many documents cause is said once."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        message = record.getMessage()
        if record.levelno == logging.INFO:
            print(message, file=sys.stderr)
        elif message not in self._said:
            self._said.add(message)
            print(f"{record.levelname.lower()}: {message}", file=sys.stderr)


@contextlib.contextmanager
def speaking(quiet: bool) -> Iterator[None]:
    """Let Kvilt's messages through to stderr; only errors if quiet."""
    handler, levels = _Handler(logging.NOTSET), (logger.level, own.level)
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.WARNING)
    own.setLevel(logging.ERROR if quiet else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(levels[0])
        own.setLevel(levels[1])


def say(message: str) -> None:
    """One line on stderr, unless quiet."""
    own.info("%s", message)


def warn(message: str) -> None:
    """A warning on stderr, unless quiet."""
    own.warning("%s", message)


def fail(message: str) -> None:
    """An error on stderr, quiet or not."""
    print(f"error: {message}", file=sys.stderr)


def _draws() -> bool:
    return sys.stderr.isatty() and own.isEnabledFor(logging.INFO)


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """A line with a spinner on a terminal while something takes time."""
    if not _draws():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield


def silence_libraries(verbose: bool, quiet: bool) -> None:
    """Keep transformers' warnings and bars off the terminal; a download still shows its progress."""
    if verbose:
        return
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not quiet:
        enable_progress_bars()


class Meter:
    """Shows how far encoding is: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, bar: Bar | None = None) -> None:
        self.last: Progress | None = None
        self._bar = bar
        self._task = bar.add_task("encoding", total=None, documents="", rate="") if bar else None
        self._spoke = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Hear of a finished batch."""
        self.last, p = progress, progress
        rate = p.tokens / max(p.seconds, 1e-9)
        documents, speed = f"{p.done:,}/{p.total:,} documents", f"{rate:,.0f} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=p.total_tokens, completed=p.tokens, documents=documents, rate=speed)
        elif time.monotonic() - self._spoke > LINE_SECONDS:
            self._spoke = time.monotonic()
            left = (p.total_tokens - p.tokens) / max(rate, 1e-9)
            say(f"encoding: {documents}, {speed}, {left:,.0f} s left")

    def stopped(self) -> str:
        """What to tell a user who stopped it."""
        done = f"{self.last.done:,} of {self.last.total:,} documents are" if self.last else "Every finished document is"
        return f"{done} encoded and stored. Run the same command again to encode the rest."


@contextlib.contextmanager
def encoding() -> Iterator[Meter]:
    """A meter for one encoding run; Ctrl-C inside is passed on, saying how to resume."""
    if not _draws():
        with _resumable(Meter()) as meter:
            yield meter
        return
    from rich import progress
    from rich.console import Console

    texts = [progress.TextColumn(f"{{task.fields[{name}]}}") for name in ("documents", "rate")]
    columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), *texts, progress.TimeRemainingColumn()]
    with progress.Progress(*columns, console=Console(stderr=True)) as bar, _resumable(Meter(bar)) as meter:
        yield meter


@contextlib.contextmanager
def _resumable(meter: Meter) -> Iterator[Meter]:
    try:
        yield meter
    except KeyboardInterrupt:
        raise KeyboardInterrupt(meter.stopped()) from None
