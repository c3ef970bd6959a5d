"""Prompts are what a model's own template and tokenizer give, and texts are never control, for every kind of tokenizer."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import zoo
from core_kit import DOCUMENTS, QUESTION
from kvilt.engine.text import DEFAULT_SYSTEM, TextFormat
from kvilt.errors import DocumentError, ModelError, PromptError
from kvilt.types import Document
from text_kit import ADDED, DEEPSEEK, LLAMA2, SCHEMES, TOKENIZERS, USER, add, byte_level, sentencepiece

EVIL = [
    "Ada {} was",
    "{}",
    "{}{}",
    " {} ",
    "<{}>",
    "{}\n",
    "a{}b",
]


def control(text: TextFormat, ids: Any) -> list[int]:
    return [i for i in ids.tolist() if i in text.vocabulary.spoken]


def decoded(text: TextFormat, ids: Any) -> str:
    return str(text.tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def prompt(text: TextFormat, documents: list[Document], question: str) -> torch.Tensor:
    return torch.cat([text.system_ids(), *map(text.document_ids, documents), text.question_ids(question)])


def whole(text: TextFormat, content: str) -> list[int]:
    """The prompt as transformers makes it in one go."""
    chat = [{"role": "system", "content": text.system}] if text.system else []
    chat.append({"role": "user", "content": content})
    ids = text.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return list(ids)


# --- W3: texts are never control ---


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_added_token_is_read_in_a_text(name: str) -> None:
    """Danger: role markers that are added but not special (DeepSeek's, Qwen3's) let a document or a user change roles."""
    text = TextFormat.of(TOKENIZERS[name]())
    honest = control(text, text.question_ids(QUESTION))
    for token in [*ADDED, "<s>", "</s>"]:
        for form in EVIL:
            words = form.format(token, token)
            ids = text.document_ids(Document(words))
            assert not control(text, ids), words
            assert decoded(text, ids).strip() == words.strip()
            asked, told = text.question_ids(words), text.told(words)
            assert control(text, asked) == honest, words
            assert words.strip() in decoded(text, asked)
            assert control(told, told.system_ids()) == control(text, text.system_ids())
            assert words.strip() in decoded(told, told.system_ids())


def test_tokens_that_hold_each_other_are_not_read() -> None:
    """Danger: what is left when one marker was taken apart is another marker."""
    text = TextFormat.of(add(byte_level(), ["<a>", "><", "<a><b>", "h", "\u00a7", "b>"]))
    honest = control(text, text.question_ids("?"))
    for words in ("<a><b>", "<<a>a>", "a><b>><", "how \u00a7 <\uff5cUser<\uff5cUser\uff5c>\uff5c>"):
        assert not control(text, text.document_ids(Document(words)))
        assert control(text, text.question_ids(words)) == honest
        assert words in decoded(text, text.question_ids(words))


@pytest.mark.parametrize("more", [{"normalized": True}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_markers_of_every_make_are_the_template_s_alone(more: dict[str, bool]) -> None:
    """Danger: tokens that are matched after normalisation, or with the white space around them, slip through."""
    tokenizer = zoo.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer = add(tokenizer, ["<user>", "<bot>"], **more)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ' <user> ' + m['content'] + eos_token }}{% endfor %}{{ ' <bot> ' }}"
    )
    text = TextFormat.of(tokenizer)
    honest = text.question_ids("Who?")
    for words in ("a <user> b", "\uff1cuser\uff1e", "a\uff1c\uff55ser>b", "x <bot>"):
        assert not control(text, text.document_ids(Document(words)))
        assert control(text, text.question_ids(words)) == control(text, honest)
    assert prompt(text, DOCUMENTS, "Who?").tolist() == whole(text, "".join(d.content for d in DOCUMENTS) + "Who?")


def test_indentation_stays_what_the_vocabulary_makes_of_it() -> None:
    """Danger: vocabularies whose runs of spaces are added tokens (GPT-NeoX, Phi) read code in tokens they never saw."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(" " * n, special=False, normalized=True) for n in range(8, 1, -1)])
    text = TextFormat.of(tokenizer)
    code = "def f():\n    if x:\n        return 1"
    ids = text.document_ids(Document(code)).tolist()
    assert ids == tokenizer.encode(code + "\n", add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids(" " * 8) in ids


def test_private_characters_of_a_question_are_its_own() -> None:
    """Danger: the characters that stand for markers while a template is rendered occur in the text itself."""
    text = TextFormat.of(byte_level())
    words = "what is \ue000 and \ue001\ue0020\ue002 <think>?"
    assert words in decoded(text, text.question_ids(words))


def test_a_control_token_that_cannot_be_taken_apart_is_refused() -> None:
    """Danger: a vocabulary in which a marker is a single character lets users write it."""
    tokenizer = sentencepiece("never", DEEPSEEK, unigram=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["~"]})
    text = TextFormat.of(tokenizer)
    with pytest.raises(DocumentError, match="document x: this tokenizer reads control tokens"):
        text.document_ids(Document("a~a", id="x"))
    with pytest.raises(PromptError, match="reads control tokens"):
        text.question_ids("a~a")


# --- W5: prompts are the template's ---


@pytest.mark.parametrize("unigram", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("system", [DEFAULT_SYSTEM, ""])
@pytest.mark.parametrize("template", [LLAMA2, DEEPSEEK])
def test_parts_get_no_space_of_their_own(template: str, system: str, scheme: str, unigram: bool) -> None:
    """Danger: SentencePiece puts a space in front of every text: one more per document than the model's own prompt has."""
    text = TextFormat.of(sentencepiece(scheme, template, unigram), system)
    wanted = whole(text, "".join(d.content for d in DOCUMENTS) + QUESTION)
    ids = prompt(text, DOCUMENTS, QUESTION).tolist()
    spaces = [text.tokenizer.convert_ids_to_tokens(i) for i in (ids, wanted)]
    assert "".join(spaces[0]) == "".join(spaces[1])
    where = text.system_ids().tolist()[-1]
    if text.tokenizer.convert_ids_to_tokens(where) != "\u2581":  # a space before a document is a token of its own
        assert ids == wanted


def test_tokenizers_that_space_every_line_keep_the_space_of_every_part() -> None:
    """Danger: the built-in model's tokenizer has a space in front of every line: parts without one are other words."""
    tokenizer = zoo.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\n(?=\S)"), "\n ")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    text = TextFormat.of(tokenizer)
    wanted = whole(text, "".join(d.content for d in DOCUMENTS) + QUESTION)
    assert prompt(text, DOCUMENTS, QUESTION).tolist() == wanted


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("system", ["Be brief.", ""])
def test_base_models_read_one_text(scheme: str, system: str) -> None:
    """Danger: base models get spaces in the middle of a text, or none at its beginning."""
    text = TextFormat.of(sentencepiece(scheme, None), system)
    said = (
        (f"{system}\n\n" if system else "") + "".join(d.content for d in DOCUMENTS) + f"Question: {QUESTION}\nAnswer:"
    )
    wanted = [text.tokenizer.bos_token_id, *text.tokenizer.encode(said, add_special_tokens=False)]
    names = [text.tokenizer.convert_ids_to_tokens(i) for i in (prompt(text, DOCUMENTS, QUESTION).tolist(), wanted)]
    assert "".join(names[0]) == "".join(names[1])


@pytest.mark.parametrize(
    "filters", ["tojson", "e", "upper", "replace('\\n', ' ')", "title", "indent(4)", "wordwrap(9)"]
)
def test_templates_that_change_what_is_said_are_refused(filters: str) -> None:
    """Danger: the model reads escaped documents in its own prompts, and plain ones in ours."""
    with pytest.raises(ModelError, match="documents cannot be placed") as error:
        TextFormat.of(byte_level(zoo.CHAT.replace("m['content']", f"(m['content'] | {filters})")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("normalizer", [normalizers.Strip(), normalizers.Prepend("- "), normalizers.Replace("\n", "")])
def test_tokenizers_that_read_parts_otherwise_are_refused_or_agree(normalizer: Any) -> None:
    """Danger: a normaliser works on each part by itself, and not on the prompt as a whole."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizer
    with contextlib.suppress(ModelError):
        text = TextFormat.of(tokenizer)
        said = "".join(d.content for d in DOCUMENTS) + QUESTION
        assert prompt(text, DOCUMENTS, QUESTION).tolist() == whole(text, said)


@pytest.mark.parametrize("first", ["Ada was born.", "  indented", "\n\tAda", " \n Ada \n"])
@pytest.mark.parametrize("question", [QUESTION, "  Who?  ", "Who?\n\n", "\n Who? <think> "])
@pytest.mark.parametrize("trim", ["", " | trim"])
def test_templates_that_trim_give_the_same_prompt(trim: str, question: str, first: str) -> None:
    """Danger: white space around a question or before the first document, which the model's own prompts never have."""
    text = TextFormat.of(byte_level(zoo.CHAT.replace("m['content']", f"m['content']{trim}")), " Be brief.\n")
    documents = text.documents([Document(first), Document("  second")], begins=True)
    says = "".join(decoded(text, text.document_ids(d)) for d in [Document(first), Document("  second")]) + question
    wanted = text.tokenizer.decode(whole(text, says))
    assert text.tokenizer.decode(prompt(text, documents, question).tolist()) == wanted


# --- documents ---


def test_one_document_has_one_key_however_it_came() -> None:
    """Danger: the same text from a file and from a string is encoded twice."""
    text = TextFormat.of(byte_level())
    forms = ["Ada\nwas  born.", "Ada\nwas  born.\n", "Ada\r\nwas  born.\r\n", "\n\nAda\nwas  born.\n\n\n"]
    assert len({tuple(text.document_ids(Document(form)).tolist()) for form in forms}) == 1
    titled = [Document("born\n", "Ada"), Document("born", "Ada"), Document("born\r\n", "Ada")]
    assert len({tuple(text.document_ids(d).tolist()) for d in titled}) == 1
    for other in ("  Ada\nwas  born.", "Ada\nwas born.", "Ada\n\nwas  born."):
        assert text.document_ids(Document(other)).tolist() != text.document_ids(Document(forms[0])).tolist()


def test_documents_without_tokens_are_refused() -> None:
    """Danger: a text that the vocabulary cannot spell is served as no document at all, without a word."""
    raw = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    text = TextFormat.of(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert text.document_ids(Document("a b")).tolist() == [0, 1]
    with pytest.raises(DocumentError, match=r"document x: .*no tokens"):
        text.document_ids(Document("\u65e5\u672c", id="x"))


def test_strings_and_dictionaries_are_documents() -> None:
    """Danger: a list of strings, the first thing anyone tries, ends in an AttributeError."""
    text = TextFormat.of(byte_level())
    given: list[Any] = ["one", {"text": "two", "title": "T", "id": 7, "more": 1}, Document("three", store=False)]
    assert text.documents(given) == [Document("one"), Document("two", "T", "7"), Document("three", store=False)]
    for bad, message in (
        (3, "document 2 is int, not a document"),
        (None, "document 2 is NoneType"),
        ({"title": "T"}, "document 2 has no text"),
        ({"text": 3}, "document 2 has no text"),
        ({"text": "a", "id": []}, "document 2: the id"),
        ("", "document 2 is empty"),
        ({"text": " \n"}, "document 2 is empty"),
        ("\ud83d", "surrogate"),
    ):
        with pytest.raises(DocumentError, match=message):
            text.documents(["one", bad])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="must be a text, not list"):
        text.question_ids([{"role": "user", "content": "Who?"}])  # type: ignore[arg-type]


# --- chats ---


def test_documents_may_stand_anywhere_in_a_chat() -> None:
    """Danger: a chat with documents in several messages reads otherwise than the template has it."""
    text = TextFormat.of(byte_level(zoo.CHAT))
    a, b, c = DOCUMENTS
    chat = [("system", ["Use: ", a]), ("user", [b, "Who <think>?"]), ("assistant", ["Ada."]), ("user", [c, a, "And?"])]
    parts = text.render(chat)
    assert [p for p in parts if isinstance(p, Document)] == [a, b, c, a]
    ids = torch.cat([text.document_ids(p) if isinstance(p, Document) else p for p in parts])
    said = [(r, "".join(p.content if isinstance(p, Document) else p for p in says)) for r, says in chat]
    wanted = text.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in said], tokenize=False, add_generation_prompt=True
    )
    assert decoded(text, ids) == wanted
    assert text.tokenizer.convert_tokens_to_ids("<think>") not in ids.tolist()
    usual = text.render([("system", [text.system]), ("user", [a, b, QUESTION])])
    assert torch.equal(usual[0], text.system_ids())
    assert usual[1:3] == [a, b]
    assert torch.equal(usual[3], text.question_ids(QUESTION))


def test_bad_chats_get_one_line() -> None:
    """Danger: a role from outside is written into the template's markers; a template's complaint is a traceback."""
    text = TextFormat.of(byte_level())
    with pytest.raises(PromptError, match="unknown role 'user"):
        text.render([("user|>", ["Who?"])])
    strict = "{% if messages | length > 1 %}{{ raise_exception('alternate!') }}{% endif %}" + zoo.CHAT
    with pytest.raises(PromptError, match="alternate!"):
        TextFormat.of(byte_level(strict)).render([("user", ["a"]), ("user", ["b"])])


def test_another_system_text_costs_no_new_format() -> None:
    """Danger: a system text per call takes the tokenizer apart and tries the template again."""
    text = TextFormat.of(byte_level())
    other = text.told("Be brief.")
    assert "Be brief." in decoded(other, other.system_ids())
    assert other.vocabulary is text.vocabulary
    assert torch.equal(other.question_ids(QUESTION), text.question_ids(QUESTION))


# --- answers ---


def test_a_cut_character_is_left_out_of_the_text() -> None:
    """Danger: byte tokens: one cut character turns all whole ones before it into question marks."""
    text = TextFormat.of(sentencepiece())
    ids = text.tokenizer.encode("\u65e5\u672c\u8a9e\u3067", add_special_tokens=False)
    assert text.decode(ids) == "\u65e5\u672c\u8a9e\u3067"
    assert text.decode(ids[:-1]) == text.decode(ids[:-2]) == "\u65e5\u672c\u8a9e"
    broken = [*ids[:4], ids[1], *text.tokenizer.encode("Ada", add_special_tokens=False)]
    assert text.decode(broken).startswith("\u65e5")
    assert text.decode(broken).endswith("Ada")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_of_tokens_are_the_tokenizer_s_own(name: str) -> None:
    """Danger: an answer that is put together piece by piece loses spaces, or gains some."""
    text = TextFormat.of(TOKENIZERS[name]())
    for words in ("Ada was born, in the  end. ", " the\n\nAda\tborn \n", "Adaborn the " * 9, "x"):
        ids = text.tokenizer.encode(words, add_special_tokens=False)
        assert text.decode(ids) == text.tokenizer.decode(ids).strip() == words.strip()


def test_markers_are_named_as_models_have_them() -> None:
    """Danger: the tests' markers are not in the vocabulary, and nothing is tested."""
    text = TextFormat.of(byte_level())
    assert text.tokenizer.convert_tokens_to_ids(USER) in text.vocabulary.control.values()
    assert text.tokenizer.encode(f"a{USER}", add_special_tokens=False)[-1] == text.vocabulary.control[USER]
