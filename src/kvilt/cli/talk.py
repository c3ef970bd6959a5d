"""What goes to stderr: messages, warnings, and how far something is. And how a text of others may be shown."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator

LINE_SECONDS = 5.0  # between lines of progress where none can be redrawn
DRAW_SECONDS = 0.1
CLEAR = "\r\x1b[2K"

logger = logging.getLogger("kvilt")  # everybody's, for warnings
own = logging.getLogger("kvilt.cli")

# What moves the cursor, rings, turns the writing direction, or is half a character.
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def shown(text: object, keep: str = "") -> str:
    """A text of others as a terminal may get it: control characters are written out, but for those to keep."""
    return _CONTROL.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), str(text))


class _Handler(logging.Handler):
    """Tells messages as lines; a warning that many documents cause is told once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.NOTSET)
        self._tell, self._told = tell, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        """Tell one message."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = level + shown(record.getMessage())
        if not level or line not in self._told:
            self._told.add(line)
            self._tell(line)


@contextlib.contextmanager
def speaking(quiet: bool) -> Iterator[None]:
    """Let Kvilt's messages through to stderr; only errors if quiet."""
    handler, levels = _Handler(_print), (logger.level, own.level)
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.WARNING)
    own.setLevel(logging.ERROR if quiet else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(levels[0])
        own.setLevel(levels[1])


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Warnings inside are kept instead of said."""
    kept, before = list[str](), logger.handlers[:]
    logger.handlers[:] = [_Handler(kept.append)]
    try:
        yield kept
    finally:
        logger.handlers[:] = before


say = own.info  # one line on stderr, unless quiet
warn = own.warning


def fail(message: object) -> None:
    """An error on stderr, quiet or not."""
    _print(f"error: {shown(message)}")


def _print(line: str, end: str = "\n") -> None:
    print(f"{CLEAR if sys.stderr.isatty() else ''}{line}", end=end, file=sys.stderr, flush=True)


class Meter:
    """How far something is: one line that is redrawn on a terminal, a line now and then elsewhere."""

    def __init__(self, label: str) -> None:
        self.label, self.line = label, ""
        self.draws = sys.stderr.isatty() and own.isEnabledFor(logging.INFO)
        self._began = self._spoke = time.monotonic()
        self._first: float | None = None

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Hear that so much of the work is done. The first word comes at once."""
        now, first = time.monotonic(), self._first is None
        self._first = done if self._first is None else self._first
        speed = (done - self._first) / max(now - self._began, 1e-9)
        more = f", {span((total - done) / speed)} left" if speed and done < total else ""
        self.line = f"{self.label}: {note or f'{done:,.0f}/{total:,.0f}'}{more}"
        pause = DRAW_SECONDS if self.draws else 0.0 if first else LINE_SECONDS
        if now - self._spoke < pause:
            return
        self._spoke = now
        if self.draws:
            _print(shown(self.line), end="")
        else:
            say(self.line)


def span(seconds: float) -> str:
    """A time for people."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"


@contextlib.contextmanager
def meter(label: str) -> Iterator[Meter]:
    """A meter for one piece of work; Ctrl-C inside is passed on, saying how far it came and how to go on."""
    made = Meter(label)
    if made.draws:
        _print(f"{label} ...", end="")
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)  # work can be stopped in an orderly way from here on
    try:
        yield made
    except KeyboardInterrupt:
        stopped = f"{made.line.partition(', ')[0]}. " if made.line else ""
        raise KeyboardInterrupt(f"{stopped}Run the same command again to go on.") from None
    finally:
        if made.draws:
            _print("", end="")


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
