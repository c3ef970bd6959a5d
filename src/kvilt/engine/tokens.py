"""Between text and token ids: ordinary text, control tokens, and the text of tokens that are generated one by one."""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor

from kvilt.errors import PromptError

Encode = Callable[[str], list[int]]


class Ordinary:
    """Tokenises what users write: added tokens are not read in it, and no space is put in front of it.

    Works on a second tokenizer around the same vocabulary that has no added tokens, so no state is ever switched. Added
    tokens that are mere white space (indentation, in some vocabularies) are kept."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        self.control = {t.content: i for i, t in added.items() if t.special or t.content.strip(" \n\r\t\u2581")}
        self.firsts = {(content.strip() or content)[0] for content in self.control}
        self.markers = re.compile(_any_of(_pattern(t) for t in added.values() if t.content in self.control))
        self._starts = re.compile(f"(?={_any_of(map(re.escape, self.control))})")
        backend, unknown = getattr(tokenizer, "backend_tokenizer", None), {tokenizer.unk_token}
        if isinstance(backend, Tokenizer):
            unknown.add(getattr(backend.model, "unk_token", None))
            blank = {i: t for i, t in added.items() if t.content not in self.control}
            self._opened, self._inner = _alone(backend, blank, dict), _alone(backend, blank, _without_prefix)
        else:
            self._opened = functools.partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
            self._inner = self._behind_newline
        marker = next((content for content, i in self.control.items() if not added[i].rstrip), "")
        self._always = tokenizer.encode(f"{marker}\n", add_special_tokens=False)[1:] == self._opened("\n")
        whole = {c: i for c, i in self.control.items() if len(c) > 1 or added[i].special}  # others are mere characters
        self.spoken = frozenset(i for content, i in whole.items() if content not in unknown)

    def _behind_newline(self, text: str) -> list[int]:
        newline, ids = self._opened("\n"), self._opened(f"\n{text}")
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._opened(text)

    def ids(self, text: str, opened: bool = False) -> list[int]:
        """Ids of ordinary text; `opened` where the tokenizer would put its own space in front. Raises PromptError."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("half of a surrogate pair: the text was not decoded as what it is.") from error
        encode = self._opened if opened else self._inner
        ids = encode(text) if text else []
        if not self.spoken.isdisjoint(ids):  # the vocabulary itself holds control tokens: cut them in two
            cuts = [0, *(match.start() + 1 for match in self._starts.finditer(text)), len(text)]
            pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
            ids = [i for n, piece in enumerate(pieces) for i in (self._inner if n else encode)(piece)]
            if not self.spoken.isdisjoint(ids):
                raise PromptError(f"this tokenizer reads control tokens in ordinary text: {text[:80]!r}.")
        return ids

    def rendered(self, text: str, unveil: dict[int, str], first: bool, closed: bool) -> list[int]:
        """Ids of what a template has rendered: control tokens where it wrote them itself, all else ordinary.

        `first` at a prompt's beginning; `closed` where a part that is tokenised alone comes next."""
        ids, at, opened = list[int](), 0, first
        for match in self.markers.finditer(text):
            ids += self.ids(text[at : match.start()].translate(unveil), opened)
            ids.append(self.control[match[0] if match[0] in self.control else match[0].strip()])
            at, opened = match.end(), self._always
        if closed and opened and at == len(text):  # the space that the tokenizer would put in front of that part
            space, inner = self._opened("\n"), self._inner("\n")
            return ids + space[: len(space) - len(inner)]
        return ids + self.ids(text[at:].translate(unveil), opened)


def _pattern(token: AddedToken) -> str:
    """Matches an added token, with the white space that it takes in."""
    alone = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    return "\\s*" * token.lstrip + alone[0] + re.escape(token.content) + alone[1] + "\\s*" * token.rstrip


def _any_of(patterns: Iterable[str]) -> str:
    return "|".join(sorted(patterns, key=len, reverse=True)) or "(?!)"  # as tokenizers do, the longest first


def _alone(
    backend: Tokenizer, blank: dict[int, AddedToken], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> Encode:
    """The encoding of a tokenizer around the same vocabulary with the added tokens `blank` alone."""
    frame = Tokenizer(models.BPE())
    frame.normalizer, frame.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    alone = Tokenizer.from_str(json.dumps(json.loads(frame.to_str(), object_hook=change)))
    alone.model = backend.model
    alone.add_tokens(list(blank.values()))
    again = {alone.token_to_id(token.content): i for i, token in blank.items()}

    def encode(text: str) -> list[int]:
        ids = alone.encode(text, add_special_tokens=False).ids
        return [again.get(i, i) for i in ids] if again else ids

    return encode


def _without_prefix(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a tokenizer, made to put nothing in front of a text."""
    if part.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {name: never.get(name, value) for name, value in part.items()}


class Memo:
    """Ids of known texts, in at most `limit` bytes. Without a lock: a process may fork while another thread is in here."""

    def __init__(self, limit: int = 64 << 20) -> None:
        self.limit, self.size, self._ids = limit, 0, dict[str, Tensor]()

    def get(self, text: str, make: Callable[[], Tensor]) -> Tensor:
        """The ids of a text, which nobody may change."""
        ids = self._ids.get(text)
        if ids is None:
            ids = make()
            size = sys.getsizeof(text) + ids.nbytes + 512  # the objects themselves
            if self.size + size > self.limit:
                self._ids, self.size = {}, 0
            if size <= self.limit:
                self._ids[text] = ids
                self.size += size
        return ids


class Written:
    """Text of tokens, piece by piece: what later tokens cannot change, without the white space around the whole."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._from = self._read = (
            0  # text of tokens[:_read] is out; it is decoded again from _from for the spaces between
        )
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
        return text_of(self.tokenizer, self._tokens[start:])


def text_of(tokenizer: Any, ids: list[int], everything: bool = False) -> str:
    """What tokens say, as they say it; special tokens are left out, unless `everything` is wanted."""
    return str(tokenizer.decode(ids, skip_special_tokens=not everything, clean_up_tokenization_spaces=False))
