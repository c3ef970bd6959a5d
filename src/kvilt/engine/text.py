"""From text to token ids through the model's own chat template; parts of a prompt are never tokenised together."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvilt.engine.documents import document_of
from kvilt.engine.vocabulary import TODAY, Vocabulary, difference, template_of
from kvilt.errors import DocumentError, ModelError, PromptError, UserError
from kvilt.types import Document, cached

DEFAULT_SYSTEM = "Answer the question from the documents."
RENDER_OPTIONS: dict[str, Any] = {"enable_thinking": False, "thinking": False, "date_string": f"{TODAY:%d %b %Y}"}
DATES = re.compile(r'\{\{-? *"(?:Cutting Knowledge|Today) Date:.*?\}\}')
ROLES = ("system", "user", "assistant", "tool")
MARK = "\ue000"  # a private character
PROBE = "A  \"b\" & <c>\n\n'd' \\ \tE."  # what a filter or a normaliser would change

Turn = tuple[str, list[Any]]  # a role and what it says: texts and documents


@dataclass(frozen=True, eq=False)
class TextFormat:
    """Turns system text, documents and question into parts, and tokenises each by itself.

    A chat template is rendered with a mark where the documents go, and split there. Base models (no template) read
    "system\\n\\n" documents "Question: ...\\nAnswer:". The template's own markers alone are control: in what users write
    ("<|eot_id|>", "<think>") they are ordinary text, and cannot end a turn or speak as somebody else."""

    tokenizer: Any
    vocabulary: Vocabulary
    template: str | None
    system: str = DEFAULT_SYSTEM
    folded: bool = False  # the template has no place for a system text: it begins the user's message

    @classmethod
    def of(cls, tokenizer: Any, system: str | None = None) -> TextFormat:
        """The format of a tokenizer. Raises ModelError if its prompts would not be what its own template gives."""
        made = cls(tokenizer, Vocabulary.of(tokenizer), template_of(tokenizer))
        everywhere = replace(
            made.vocabulary, inner=made.vocabulary.opened
        )  # some need the space in front of every part
        ways, reasons = (made.vocabulary, everywhere), list[str]()
        for folded, exact, way in itertools.product((False, True), (True, False), ways):
            try:
                made = replace(made, folded=folded, vocabulary=way)
                made._prove(exact)
                made.told("")._prove(exact)
                return made if system is None else made.told(system)
            except UserError as error:
                reasons.append(str(error))
        raise ModelError(f"documents cannot be placed in this model's prompts: {reasons[-2]}")

    def told(self, system: str) -> TextFormat:
        """The same format with another system text. Raises PromptError if that is no text."""
        if not isinstance(system, str):
            raise PromptError(f"the system text must be a text, not {type(system).__name__}.")
        return replace(self, system=system)

    def undated(self) -> TextFormat:
        """The same format without the lines in which Llama 3's chat template tells the date."""
        return replace(self, template=DATES.sub("", self.template or "") or None)

    def _prove(self, exact: bool) -> None:
        """Compare an example's parts with the whole, as the tokenizer itself reads it: the same ids, or at least the same
        letters where a token would reach over the edge of a part. Raises PromptError."""
        example, question = Document(PROBE), "F  g?"
        whole = self._spelled(self._asked(2 * example.content, question))
        if self.system not in whole:
            raise PromptError("its chat template drops the system text.")
        theirs = [*self._bos, *self.tokenizer.encode(whole, add_special_tokens=False)]
        ours = [self.system_ids(), *2 * [self.document_ids(example)], self.question_ids(question)]
        if wrong := difference(self.tokenizer, self.vocabulary, theirs, torch.cat(ours).tolist(), exact):
            raise PromptError(wrong)

    @cached
    def _bos(self) -> list[int]:
        """What stands in front of everything; templates write their own."""
        bos = self.tokenizer.bos_token_id
        return [] if self.template or bos is None else [bos]

    @cached
    def _trims(self) -> bool:
        """Whether the template cuts the white space off that a message begins with."""
        return f"  {MARK}" not in self._spelled(self._asked(f"  {MARK}", "?"))

    @cached
    def tail(self) -> str:
        """What the template writes after the question."""
        return self._spelled(self._asked(MARK)).partition(MARK)[2]

    def _asked(self, *parts: str | Document) -> list[Turn]:
        """The usual prompt: a system text; documents and, last, a question."""
        *documents, question = parts
        asked = question if self.template else f"Question: {question}\nAnswer:"
        turns: list[Turn] = [("system", [self.system])] if self.system else []
        return [*turns, ("user", [*documents, asked])]

    def _spelled(self, turns: list[Turn], spell: Callable[[Any], str] = str) -> str:
        """What the template makes of a chat whose parts are spelled so."""
        if self.folded and [role for role, _ in turns[:2]] == ["system", "user"]:
            turns = [("user", [*turns[0][1], "\n\n", *turns[1][1]]), *turns[2:]]
        chat = [{"role": role, "content": "".join(map(spell, parts))} for role, parts in turns]
        if self.template is None:
            return "\n\n".join(message["content"] for message in chat)
        try:
            options = {"add_generation_prompt": True, "chat_template": self.template, **RENDER_OPTIONS}
            return str(self.tokenizer.apply_chat_template(chat, tokenize=False, **options))
        except Exception as error:  # templates refuse with errors of many types
            raise PromptError(f"its chat template fails: {error}") from error

    def render(self, chat: Sequence[tuple[str, Sequence[str | Document]]]) -> list[Tensor | Document]:
        """A prompt as ids (tokens,) and documents one after another, made of roles and what each says.

        Documents may stand anywhere among the texts. Raises PromptError for chats that the template refuses."""
        if unknown := {role for role, _ in chat}.difference(ROLES):
            raise PromptError(f"unknown role {unknown.pop()!r:.40}. Roles: {', '.join(ROLES)}.")
        ids, documents = self._parts([(role, list(parts)) for role, parts in chat])
        turns = itertools.chain.from_iterable(itertools.zip_longest(ids, documents))
        return [part for part in turns if part is not None and (isinstance(part, Document) or len(part))]

    def _parts(self, turns: list[Turn]) -> tuple[list[Tensor], list[Document]]:
        """The documents in their order, and the ids before, between and behind them."""
        texts, documents = [part for _, parts in turns for part in parts if isinstance(part, str)], list[Document]()
        free = (c for c in map(chr, range(0xE000, 0xF900)) if not any(c in text for text in texts))
        slot, veil = next(free), {ord(first): next(free) for first in self.vocabulary.firsts}

        def spell(part: str | Document) -> str:
            if isinstance(part, str):
                return part.translate(veil)  # nothing in it is a marker now
            documents.append(part)
            return f"{slot}{len(documents) - 1}{slot}"

        pieces = self._spelled(turns, spell).split(slot)
        if sorted(pieces[1::2]) != sorted(map(str, range(len(documents)))):
            raise PromptError("its chat template drops, repeats or changes documents.")
        unveil, last = {ord(private): chr(first) for first, private in veil.items()}, len(documents)
        ids = [self._rendered(p, unveil, n == 0, n < last) for n, p in enumerate(pieces[::2])]
        ids[0] = self._bos + ids[0]
        return [torch.tensor(i, dtype=torch.long) for i in ids], [documents[int(n)] for n in pieces[1::2]]

    def _rendered(self, text: str, unveil: dict[int, str], first: bool, closed: bool) -> list[int]:
        """Ids of what a template has rendered: control tokens where it wrote them itself, all else ordinary.

        `first` at a prompt's beginning; `closed` where a part that is tokenised alone comes next."""
        v, ids, at, opened = self.vocabulary, list[int](), 0, first
        for match in v.markers.finditer(text):
            ids += self._ids(text[at : match.start()].translate(unveil), opened)
            ids.append(v.control[match[0] if match[0] in v.control else match[0].strip()])
            at, opened = match.end(), v.always
        if closed and opened and at == len(text):  # the space that the tokenizer would put in front of that part
            return ids + self._encoded("\n", True)[: -len(self._encoded("\n", False)) or None]
        return ids + self._ids(text[at:].translate(unveil), opened)

    def _ids(self, text: str, opened: bool = False) -> list[int]:
        """Ids of ordinary text; `opened` where the tokenizer would put its own space in front. Raises PromptError."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("half of a surrogate pair: the text was not decoded as what it is.") from error
        ids = self._encoded(text, opened) if text else []
        if not self.vocabulary.spoken.isdisjoint(ids):  # the vocabulary itself holds control tokens: cut them in two
            held = "|".join(re.escape(content) for content in self.vocabulary.control if content in text) or "(?!)"
            cuts = [0, *(match.start() + 1 for match in re.finditer(f"(?={held})", text)), len(text)]
            pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
            ids = [i for n, piece in enumerate(pieces) for i in self._encoded(piece, opened and n == 0)]
            if not self.vocabulary.spoken.isdisjoint(ids):
                raise PromptError(f"this tokenizer reads control tokens in ordinary text: {text[:80]!r}.")
        return ids

    def _encoded(self, text: str, opened: bool) -> list[int]:
        v = self.vocabulary
        ids: list[int] = (v.opened if opened else v.inner)(text).ids
        return [v.again.get(i, i) for i in ids] if v.again else ids

    def system_ids(self) -> Tensor:
        """Everything before the documents, (tokens,)."""
        return self._parts(self._asked(Document(PROBE), "?"))[0][0]

    def question_ids(self, question: str) -> Tensor:
        """The question and everything after it, (tokens,). Raises PromptError when it is empty."""
        if not isinstance(question, str):
            raise PromptError(f"the question must be a text, not {type(question).__name__}.")
        if not question.strip():
            raise PromptError("the question is empty.")
        return self._parts(self._asked(Document(PROBE), question))[0][1]

    def documents(self, values: Any, begins: bool = False) -> list[Document]:
        """Documents, texts or {"text", "title", "id"} as documents. Raises DocumentError.

        Where they begin a prompt, the first loses the white space in front of it if the template cuts that off."""
        if isinstance(values, str | Mapping | Document) or not isinstance(values, Iterable):
            raise DocumentError(f"documents must be a list, not {type(values).__name__}. Write [document].")
        documents = [v if isinstance(v, Document) else document_of(v, f"document {n}") for n, v in enumerate(values, 1)]
        if begins and documents and not documents[0].title and str(documents[0].text)[:1].isspace() and self._trims:
            documents[0] = replace(documents[0], text=documents[0].text.lstrip())
        return documents

    def document_ids(self, document: Document) -> Tensor:
        """One document alone: no BOS, no system text, (tokens,); line ends are \\n, and blank lines around it left out.

        Raises DocumentError when there is nothing to encode."""
        if document.ids:
            return torch.tensor(document.ids, dtype=torch.long)
        name = f"document {document.id or document.title or 'without a name'}"
        if not isinstance(document.text, str) or not document.text.strip():
            raise DocumentError(f"{name} is empty. Leave it out, or give it a text.")
        try:
            ids = self.plain_ids(_clean(document.content))
        except PromptError as error:
            raise DocumentError(f"{name}: {error}") from error
        if not len(ids):
            raise DocumentError(f"{name}: this model's tokenizer has no tokens for its text. Leave it out.")
        return ids

    def plain_ids(self, text: str) -> Tensor:
        """Ids of a text by itself, special tokens in it read as ordinary text, (tokens,)."""
        return torch.tensor(self._ids(text), dtype=torch.long)

    def title_length(self, document: Document) -> int:
        """Tokens that a document's title line takes."""
        return len(self.plain_ids(_clean(document.title))) if document.title else 0

    def sink(self) -> int | None:
        """BOS, or the token that serves as one."""
        t = self.tokenizer
        return next((i for i in (t.bos_token_id, t.eos_token_id, t.pad_token_id) if i is not None), None)

    def reserved(self) -> tuple[int, ...]:
        """Ids of the tokenizer's reserved special tokens, in order."""
        return tuple(sorted(i for token, i in self.tokenizer.get_added_vocab().items() if "reserved" in token))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens; a character that is cut off at the end is left out."""
        written = Written(self.tokenizer)
        return "".join(map(written.put, tokens))


def _clean(content: str) -> str:
    """A document's content as it is tokenised: the same on every system, from files and from strings."""
    return content.replace("\r\n", "\n").strip("\n") + "\n"


class Written:
    """Text of tokens, piece by piece: what later tokens cannot change, without the white space around the whole."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._from = self._read = 0  # text of tokens[:_read] is out, decoded again from _from for the spaces between
        self._known = self._space = ""
        self._begun = False

    def put(self, token: int) -> str:
        """The text that a token makes certain, often none."""
        self._tokens.append(token)
        text = self._text(self._from)
        if not text.startswith(self._known):  # byte tokens: half a character spoils what was whole before it
            self._from, self._known = self._read, ""
            text = self._text(self._from)
        if len(text) == len(self._known) or text.endswith("\ufffd"):  # that would be half a character
            return ""
        new = self._space + text[len(self._known) :]
        self._from, self._read = self._read, len(self._tokens)
        self._known = self._text(self._from)
        new = new if self._begun else new.lstrip()
        piece = new.rstrip()
        self._space, self._begun = new[len(piece) :], self._begun or bool(piece)
        return piece

    def _text(self, start: int) -> str:
        tokens = self._tokens[start:]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
