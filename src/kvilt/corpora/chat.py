"""Several turns over a collection, in any terminal or pipe: questions in, answers out as they are generated."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvilt.corpora.retrieval import Find
from kvilt.errors import StoreError, UserError
from kvilt.types import Answer, Document, Usage

if TYPE_CHECKING:
    from kvilt.engine.engine import Engine

REMEMBERED = 6  # earlier turns that the model is shown
HELP = """\
/docs             the documents of the last answer, and how many there are
/strategy [SPEC]  which strategy answers, or another one from here on: /strategy kvlink:links=5
/usage            what all answers took
/new              forget the conversation
/help             this
/quit             the end (or Ctrl-D)"""


@dataclass
class Chat:
    """A conversation. `out` gets text as it is generated, `tell` lines about it, `fail` what could not be done.

    `interactive` where somebody sits at a terminal: Ctrl-C then stops the answer and not the conversation."""

    engine: Engine
    documents: list[Document]
    find: Find
    out: Callable[[str], None]
    tell: Callable[[str], None]
    fail: Callable[[object], None]
    settings: dict[str, Any] = field(default_factory=dict)
    as_json: bool = False
    interactive: bool = False
    turns: list[tuple[str, str]] = field(default_factory=list)
    used: list[Document] = field(default_factory=list)
    answers: list[Usage] = field(default_factory=list)
    failed: int = 0

    def run(self, lines: Iterable[str]) -> int:
        """Answer line after line until /quit or the end; how many could not be answered."""
        for line in map(str.strip, lines):
            if line in ("/quit", "/exit"):
                break
            try:
                if line.startswith("/"):
                    self._command(*line.partition(" ")[::2])
                elif line:
                    self._answer(line)
            except (UserError, StoreError) as error:  # the next line may do better
                self.failed += 1
                self.fail(error)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.out("\n")
        return self.failed

    def _answer(self, question: str) -> None:
        asked = [*(q for q, _ in self.turns[-1:]), question]  # "and when?" is about what was asked before
        self.used = self.find(" ".join(asked))
        given: Any = self.engine.stream(self._messages(question), self.used, **self.settings)
        with contextlib.closing(given) as pieces:
            while isinstance(piece := next(pieces), str):
                if not self.as_json:
                    self.out(piece)
        self.turns.append((question, piece.text))
        self.answers.append(piece.usage)
        named = {"question": question, "documents": [d.id for d in self.used]}
        self.out(f"{json.dumps(named | piece.as_dict())}\n" if self.as_json else "\n")
        self.tell(_line(piece))

    def _messages(self, question: str) -> list[dict[str, str]]:
        said = [
            part for asked, answered in self.turns[-REMEMBERED:] for part in (("user", asked), ("assistant", answered))
        ]
        return [{"role": role, "content": text} for role, text in (*said, ("user", question))]

    def _command(self, name: str, rest: str) -> None:
        commands = {"/docs": self._docs, "/strategy": self._strategy, "/usage": self._usage, "/new": self._new}
        if name == "/help":
            for line in HELP.split("\n"):
                self.tell(line)
        elif name not in commands:
            raise UserError(f"unknown command {name}: /help lists them.")
        else:
            commands[name](rest.strip())

    def _docs(self, _: str) -> None:
        for document in self.used:
            self.tell(f"{document.id or ''}  {document.title or ''}".rstrip())
        self.tell(f"{len(self.used):,} of {len(self.documents):,} documents stood in the last prompt.")

    def _strategy(self, spec: str) -> None:
        self.engine = self.engine.with_strategy(spec) if spec else self.engine
        self.tell(self.engine.label)

    def _usage(self, _: str) -> None:
        reused, computed = (sum(getattr(u, f"{n}_tokens") for u in self.answers) for n in ("reused", "computed"))
        hits, misses = (sum(getattr(u, name) for u in self.answers) for name in ("hits", "misses"))
        share = f"{reused / max(reused + computed, 1):.0%} reused"
        self.tell(f"{len(self.answers)} answers: {hits} hits, {misses} misses; {reused:,} of {reused + computed:,} "
                  f"prompt tokens were stored ones ({share})")  # fmt: skip

    def _new(self, _: str) -> None:
        self.turns.clear()
        self.tell("a new conversation.")


def typed() -> Iterator[str]:
    """Lines as somebody types them, with history and editing where the system has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - `input` uses it
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def _line(answer: Answer) -> str:
    u = answer.usage
    caches = f"{u.hits} hits, {u.misses} misses, {u.reused_tokens:,} tokens reused, {u.computed_tokens:,} computed"
    return f"{answer.strategy}: {caches}, first token after {u.ttft_s:.3f} s"
