"""Which files of the package one `block` answer and one `encode` pass through. Fails where there are more than allowed.

Counted are files in which at least one function runs, with the built-in model, all documents stored and the process warm: what
a reader has to know to follow one request. What the store's timer writes seconds later is no part of it."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import kvilt
from kvilt import Document, Engine

PACKAGE = str(Path(kvilt.__file__).parent)
ALLOWED = {"answer": 12, "encode": 10}
DOCUMENTS = [Document("Ada Lorn was born in Tavik."), Document("Brint Labs is based in Orsa.")]
NEW = [Document("The Sel flows through Orsa.")]
QUESTION = "Where was Ada Lorn born?"


def files_of(work: Callable[[], Any]) -> dict[str, set[str]]:
    """Files of the package in which a function ran, relative to it, and which functions."""
    seen: dict[str, set[str]] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if isinstance(threading.current_thread(), threading.Timer):
            return
        if event == "call" and frame.f_code.co_name != "<module>" and frame.f_code.co_filename.startswith(PACKAGE):
            seen.setdefault(frame.f_code.co_filename[len(PACKAGE) + 1 :], set()).add(frame.f_code.co_qualname)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return dict(sorted(seen.items()))


def main() -> int:
    """Print both lists; 1 if one is too long."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.load("builtin", "block", f"disk:path={folder}")
        for _ in range(2):
            engine.answer(QUESTION, DOCUMENTS, max_new_tokens=4)
        files = {
            "answer": files_of(lambda: engine.answer(QUESTION, DOCUMENTS[::-1], max_new_tokens=4)),
            "encode": files_of(lambda: engine.encoder.encode(NEW)),
        }
        engine.store.close()
    for name, passed in files.items():
        print(f"{name}: {len(passed)} files, {ALLOWED[name]} allowed")
        for file, functions in passed.items():
            print(f"  {file}: {', '.join(sorted(functions))}")
    return int(any(len(passed) > ALLOWED[name] for name, passed in files.items()))


if __name__ == "__main__":
    sys.exit(main())
