"""From text to token ids through the model's own chat template; parts of a prompt are never tokenised together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvilt.errors import DocumentError, ModelError, PromptError
from kvilt.types import Document

DEFAULT_SYSTEM = "Answer the question from the documents."
DOCUMENTS, QUESTION = "\ue000documents\ue001", "\ue000question\ue001"  # private-use characters: no document holds them
RENDER_OPTIONS: dict[str, Any] = {  # thinking is switched off; a fixed date keeps the system part the same every day
    "enable_thinking": False,
    "thinking": False,
    "date_string": "26 Jul 2024",
}


@dataclass(frozen=True, eq=False)
class TextFormat:
    """Splits a prompt into a system part, documents and a question part, and tokenises each by itself.

    Chat models: their template is rendered once with sentinels where documents and question go, and split there.
    Base models (no template): "system\\n\\n" documents "Question: ...\\nAnswer:"."""

    tokenizer: Any
    head: str  # text before the documents
    middle: str  # between documents and question
    tail: str  # after the question
    bos: bool  # whether BOS goes in front (templates write their own)

    @classmethod
    def of(cls, tokenizer: Any, system: str | None = None) -> TextFormat:
        """The format of a tokenizer: its chat template if it has one."""
        system = DEFAULT_SYSTEM if system is None else system
        if not getattr(tokenizer, "chat_template", None):
            head = f"{system}\n\n" if system else ""
            return cls(tokenizer, head, "Question: ", "\nAnswer:", bos=tokenizer.bos_token_id is not None)
        rendered = _render(tokenizer, system)
        head, _, rest = rendered.partition(DOCUMENTS)
        middle, _, tail = rest.partition(QUESTION)
        if not rest or not tail:
            raise ModelError(
                "this tokenizer's chat template drops the user's message: documents cannot be placed in it."
            )
        return cls(tokenizer, head, middle, tail, bos=False)

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)

    def system_ids(self) -> Tensor:
        """Everything before the documents, (tokens,)."""
        ids = self._ids(self.head)
        return torch.cat([torch.tensor([self.tokenizer.bos_token_id]), ids]) if self.bos else ids

    def document_ids(self, document: Document) -> Tensor:
        """One document alone: no BOS, no system text, (tokens,). Raises DocumentError when there is nothing to encode."""
        if not isinstance(document.text, str) or not document.text.strip():
            name = document.id or document.title or "without a name"
            raise DocumentError(f"document {name} is empty. Leave it out, or give it a text.")
        return self._ids(document.content)

    def question_ids(self, question: str) -> Tensor:
        """The question and everything after it, (tokens,). Raises PromptError when it is empty."""
        if not question.strip():
            raise PromptError("the question is empty.")
        return self._ids(f"{self.middle}{question}{self.tail}")

    def sink(self) -> int | None:
        """BOS, or the token that serves as one."""
        t = self.tokenizer
        return next((i for i in (t.bos_token_id, t.eos_token_id, t.pad_token_id) if i is not None), None)

    def reserved(self) -> tuple[int, ...]:
        """Ids of the tokenizer's reserved special tokens, in order."""
        added = self.tokenizer.get_added_vocab()
        return tuple(sorted(i for token, i in added.items() if "reserved" in token))

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Text of generated tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def _render(tokenizer: Any, system: str) -> str:
    user = {"role": "user", "content": DOCUMENTS + QUESTION}
    options = {"tokenize": False, "add_generation_prompt": True, **RENDER_OPTIONS}
    if system:
        try:
            return str(tokenizer.apply_chat_template([{"role": "system", "content": system}, user], **options))
        except Exception as error:  # templates refuse system messages with errors of many types
            user["content"] = f"{system}\n\n{DOCUMENTS}{QUESTION}"
            if "system" not in str(error).lower():
                raise ModelError(f"this tokenizer's chat template fails: {error}") from error
    return str(tokenizer.apply_chat_template([user], **options))
