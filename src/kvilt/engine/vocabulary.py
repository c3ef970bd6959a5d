"""What a tokenizer reads as control and how it reads all else, and its chat template with a fixed date: made once per model."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from kvilt.errors import ModelError

TODAY = datetime(2024, 7, 26, 12)  # in every template: a fixed date keeps the system part the same every day
DIRECTIVES = [f"%{dash}{c}" for c in "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ" for dash in ("", "-")]
CLOCK = "".join(f"|replace({d!r}, {TODAY.strftime(d)!r})" for d in DIRECTIVES)
PINNED = f"{{%- macro strftime_now(format) -%}}{{{{- format{CLOCK} -}}}}{{%- endmacro %}}\n"  # stands before a template

Encode = Callable[[str], Any]  # gives what has `ids`


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer in two parts: control tokens, and two encodings of ordinary text in which none of them is read.

    These work on a second tokenizer around the same vocabulary that has no added tokens, so no state is ever switched.
    Added tokens that are mere white space (indentation, in some vocabularies) are ordinary text."""

    control: dict[str, int]
    firsts: frozenset[str]  # the first characters of control tokens
    markers: re.Pattern[str]  # matches control tokens as the tokenizer does, the longest first
    spoken: frozenset[int]  # ids that no ordinary text may have
    opened: Encode  # of a text with the space in front that the tokenizer gives it
    inner: Encode  # of a text in the middle of others
    again: dict[int, int]  # ids of white space in the second tokenizer, and in the first
    always: bool  # whether that space also follows control tokens

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Take a tokenizer apart."""
        added, backend = tokenizer.added_tokens_decoder, tokenizer.backend_tokenizer
        control = {t.content: i for i, t in added.items() if t.special or t.content.strip(" \n\r\t\u2581")}
        blank = {i: token for i, token in added.items() if token.content not in control}
        first, second = (_alone(backend, list(blank.values()), change) for change in (dict, _without_prefix))
        again = {int(second.token_to_id(token.content) or 0): i for i, token in blank.items()}
        opened, inner = (functools.partial(t.encode, add_special_tokens=False) for t in (first, second))
        marker = next((content for content, i in control.items() if not added[i].rstrip), "")
        always = tokenizer.encode(f"{marker}\n", add_special_tokens=False)[1:] == opened("\n").ids
        whole = {c: i for c, i in control.items() if len(c) > 1 or added[i].special}  # others are mere characters
        unknown = (tokenizer.unk_token, getattr(backend.model, "unk_token", None))
        spoken = frozenset(i for content, i in whole.items() if content not in unknown)
        firsts = frozenset((content.strip() or content)[0] for content in control)
        longest = sorted((_pattern(added[i]) for i in control.values()), key=len, reverse=True)
        markers = re.compile("|".join(longest) or "(?!)")
        return cls(control, firsts, markers, spoken, opened, inner, again, always)


def template_of(tokenizer: Any) -> str | None:
    """The chat template, in which every day is the same; None for base models. Raises ModelError."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ModelError(f"this tokenizer has several chat templates and no default: {error}") from error
    return PINNED + template if "strftime_now" in template else template


def difference(tokenizer: Any, vocabulary: Vocabulary, whole: list[int], parts: list[int], exact: bool) -> str:
    """How the parts of a prompt differ from the whole, "" if not: in their ids, or at least in letters and control tokens
    (a token may reach over the edge of a part)."""
    reads = ["".join(map(str, tokenizer.convert_ids_to_tokens(ids))) for ids in (whole, parts)]
    marks = [[i for i in ids if i in vocabulary.spoken] for ids in (whole, parts)]
    if reads[0] == reads[1] and marks[0] == marks[1] and (whole == parts or not exact):
        return ""
    at = next((n for n, (a, b) in enumerate(zip(*reads, strict=False)) if a != b), 0)
    one, other = (read[max(0, at - 10) : at + 30] for read in reads)
    return f"its template and tokenizer give {one!r} for an example, its parts alone {other!r}."


def _pattern(token: AddedToken) -> str:
    """Matches an added token, with the white space that it takes in."""
    alone = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    return r"\s*" * token.lstrip + alone[0] + re.escape(token.content) + alone[1] + r"\s*" * token.rstrip


def _alone(
    backend: Tokenizer, added: list[AddedToken], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> Tokenizer:
    """A tokenizer around the same vocabulary with other added tokens, its parts changed."""
    frame = Tokenizer(models.BPE())
    frame.normalizer, frame.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    alone = Tokenizer.from_str(json.dumps(json.loads(frame.to_str(), object_hook=change)))
    alone.model = backend.model
    alone.add_tokens(added)
    return alone


def _without_prefix(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a tokenizer, made to put nothing in front of a text."""
    if part.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {name: never.get(name, value) for name, value in part.items()}
