"""An engine of the real one's shape that answers with the last document's first word, unless the strategy is lossy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch

from kvilt.errors import PromptError
from kvilt.types import Answer, Encoding, Usage


@dataclass(frozen=True)
class FakeStrategy:
    name: str = "full"
    encoding: Encoding = field(default_factory=Encoding, repr=False)


@dataclass
class FakeEngine:
    """Answers with the first word of the last document; "lossy" is wrong for every second question."""

    strategy: FakeStrategy = field(default_factory=FakeStrategy)
    calls: list = field(default_factory=list)
    digest: str = "m" * 64
    fail_after: int | None = None
    compression: str = ""

    @property
    def info(self):
        return SimpleNamespace(digest=self.digest, system=(1, 2), linear_cost=100.0)

    @property
    def encoder(self):
        return SimpleNamespace(encoding=Encoding())

    def with_strategy(self, strategy, compress=None):
        made = strategy if isinstance(strategy, FakeStrategy) else FakeStrategy(strategy)
        return replace(self, strategy=made, compression=self.compression if compress is None else compress)

    def encode(self, documents):
        self.calls.append(("encode", self.strategy.name))

    def plan(self, question, documents):
        if "too long" in question:
            raise PromptError("the prompt takes 900 positions, the context holds 100")

    def answer(self, question, documents, *, through, max_new_tokens=64, allow_empty=False):
        self.calls.append(("answer", self.strategy.name, question))
        if self.fail_after is not None and sum(c[0] == "answer" for c in self.calls) > self.fail_after:
            raise KeyboardInterrupt
        if not documents and not allow_empty:
            raise PromptError("no documents")
        right = bool(documents) and not (self.strategy.name == "lossy" and len(question) % 2)
        word = documents[-1].text.split()[0] if right else "nothing"
        tokens = tuple(1 + sum(map(ord, word)) % 7 + i for i in range(2))
        usage = Usage(
            computed_tokens=10 * len(documents) + 5, charged=0.5 if self.strategy.name == "lossy" else 1.0, ttft_s=0.25
        )
        logits = self._logits(tokens)
        run = through(
            SimpleNamespace(
                after=None, placed=SimpleNamespace(capacity=99, length=9), logits=logits[0], peek=self._logits
            )
        )
        run.given, run.seconds = [row[None] for row in logits], 0.0
        return Answer(word, tokens, usage, repr(self.strategy))

    def score(self, question, documents, continuation, *, allow_empty=False):
        self.calls.append(("score", self.strategy.name, question))
        return self._logits(continuation)

    def _logits(self, continuation):
        logits = torch.zeros(len(continuation), 16)
        logits[torch.arange(len(continuation)), torch.tensor(list(continuation))] = (
            0.0 if self.strategy.name == "lossy" else 5.0
        )
        return logits
