"""From text to token ids through the model's own chat template; parts of a prompt are never tokenised together."""

from __future__ import annotations

import functools
import threading
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
_encoding = threading.Lock()  # a fast tokenizer is switched between reading and not reading special tokens


@dataclass(frozen=True, eq=False)
class TextFormat:
    """Splits a prompt into a system part, documents and a question part, and tokenises each by itself.

    Chat models: their template is rendered once with sentinels where documents and question go, and split there.
    Base models (no template): "system\\n\\n" documents "Question: ...\\nAnswer:".

    Special tokens are read in the template and in the system text alone: a document or a question that holds the text
    of one ("<|eot_id|>") is ordinary text, and cannot end its turn or speak as somebody else."""

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
        head, _, rest = _render(tokenizer, system).partition(DOCUMENTS)
        middle, _, tail = rest.partition(QUESTION)
        return cls(tokenizer, head, middle, tail, bos=False)

    def _ids(self, text: str, plain: bool = False) -> Tensor:
        """Ids of one part; with `plain`, special tokens in it are ordinary text."""
        with _encoding:
            ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)
        return torch.tensor(ids, dtype=torch.long)

    @functools.cached_property
    def _special(self) -> Tensor:
        added = self.tokenizer.added_tokens_decoder.items()
        return torch.tensor([i for i, token in added if token.special], dtype=torch.long)

    def _count_special(self, ids: Tensor) -> int:
        return int(torch.isin(ids, self._special).sum())

    def system_ids(self) -> Tensor:
        """Everything before the documents, (tokens,)."""
        ids = self._ids(self.head)
        return torch.cat([torch.tensor([self.tokenizer.bos_token_id]), ids]) if self.bos else ids

    def plain_ids(self, text: str) -> Tensor:
        """Ids of a text by itself, special tokens in it read as ordinary text, (tokens,)."""
        return self._ids(text, plain=True)

    def title_length(self, document: Document) -> int:
        """Tokens that a document's title line takes."""
        return len(self.plain_ids(f"{document.title}\n")) if document.title else 0

    def document_ids(self, document: Document) -> Tensor:
        """One document alone: no BOS, no system text, (tokens,). Raises DocumentError when there is nothing to encode."""
        name = document.id or document.title or "without a name"
        if not isinstance(document.text, str) or not document.text.strip():
            raise DocumentError(f"document {name} is empty. Leave it out, or give it a text.")
        if not _is_unicode(document.content):
            raise DocumentError(f"document {name} holds half of a surrogate pair: it was not decoded as what it is.")
        return self._ids(document.content, plain=True)

    def question_ids(self, question: str) -> Tensor:
        """The question and everything after it, (tokens,). Raises PromptError when it is empty."""
        if not question.strip():
            raise PromptError("the question is empty.")
        if not _is_unicode(question):
            raise PromptError("the question holds half of a surrogate pair: it was not decoded as what it is.")
        middle, tail = self._ids(self.middle), self._ids(self.tail)
        whole = self._ids(f"{self.middle}{question}{self.tail}")
        if self._count_special(whole) == self._count_special(middle) + self._count_special(tail):
            return whole
        return torch.cat([middle, self._ids(question, plain=True), tail])

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


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _render(tokenizer: Any, system: str) -> str:
    """The prompt with sentinels; the system text goes into the user's message where a template has no place for it."""

    def render(*messages: tuple[str, str]) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **RENDER_OPTIONS))

    user = DOCUMENTS + QUESTION
    if system:
        try:
            rendered = render(("system", system), ("user", user))
        except Exception:  # templates refuse system messages with errors of many types
            rendered = ""
        if system.strip() in rendered and _is_split(rendered):
            return rendered
        user = f"{system}\n\n{user}"
    try:
        rendered = render(("user", user))
    except Exception as error:
        raise ModelError(f"this tokenizer's chat template fails: {error}") from error
    if not _is_split(rendered):
        raise ModelError(
            "this tokenizer's chat template drops, repeats or reorders the user's message: documents cannot be placed in it."
        )
    return rendered


def _is_split(rendered: str) -> bool:
    once = rendered.count(DOCUMENTS) == rendered.count(QUESTION) == 1
    return once and rendered.index(DOCUMENTS) < rendered.index(QUESTION)
