"""LLMLingua-2 from end to end, with small classifiers whose weights say which words they want."""

from __future__ import annotations

import importlib.util
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as decode
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
)

from core_kit import QUESTION, engine_of
from kvilt.compress.base import Compression
from kvilt.compress.text import LLMLingua2
from kvilt.engine.engine import Engine
from kvilt.errors import DocumentError, MissingExtra, ModelError, SpecError
from kvilt.types import Document

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llmlingua") is None, reason="the extra llmlingua is not installed"
)
WANTED = ["Ada", "born", "Tavik", "Brint", "Orsa"]
FILLER = ["Lorn", "was", "in", "She", "left", "it", "young", "and", "Labs", "is", "the", "of", ".", "?", "7"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TEXT = "Ada Lorn was born in Tavik and She left it young ? Brint Labs is in the Orsa of it 7"
DOCUMENTS = [Document(TEXT, "was it", "ada"), Document("Labs is in Orsa. It was 7 of the", id="brint")]


def bert(folder: Path, wanted: list[str] = WANTED) -> str:
    """A BERT classifier over whole words; the first channel of a wanted word's embedding says so."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WANTED + FILLER)}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decode.WordPiece()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(vocabulary), **shape, num_labels=2, pad_token_id=0)
    _save(BertForTokenClassification(config), "bert", [vocabulary[w] for w in wanted], folder)
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    return str(folder)


def xlm_roberta(folder: Path) -> str:
    """The same as an XLM-RoBERTa classifier over sentence pieces."""
    pieces = [(t, 0.0) for t in PIECES] + [(f"▁{w}", -2.0) for w in WANTED + FILLER] + [("▁", -9.0)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=3))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decode.Metaspace()
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), PIECES, strict=True))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = XLMRobertaConfig(
        vocab_size=len(pieces), **shape, num_labels=2, pad_token_id=1, max_position_embeddings=514
    )
    _save(XLMRobertaForTokenClassification(config), "roberta", range(5, 5 + len(WANTED)), folder)
    PreTrainedTokenizerFast(tokenizer_object=raw, cls_token="<s>", sep_token="</s>", **names).save_pretrained(folder)
    return str(folder)


def _save(model, base: str, wanted, folder: Path) -> None:
    for parameter in model.parameters():
        parameter.data.zero_()
    embeddings = getattr(model, base).embeddings
    embeddings.LayerNorm.weight.data.fill_(1.0)
    getattr(model, base).encoder.layer[0].attention.output.LayerNorm.weight.data.fill_(1.0)
    getattr(model, base).encoder.layer[0].output.LayerNorm.weight.data.fill_(1.0)
    embeddings.word_embeddings.weight.data[:, 1] = 1.0
    embeddings.word_embeddings.weight.data[torch.tensor(list(wanted)), 0] = 2.0 + 0.1 * torch.arange(len(wanted))
    model.classifier.weight.data[1, 0] = 1.0
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert(tmp_path_factory.mktemp("bert"))


@needs_package
@pytest.mark.parametrize("family", [bert, xlm_roberta])
def test_the_classifiers_words_stay(family, tmp_path: Path) -> None:
    """Danger: labels are read the wrong way round, or special tokens count as words."""
    made = LLMLingua2(rate=0.3, model=family(tmp_path), force="")
    short = made.shorten(TEXT)
    assert short.split() == WANTED
    assert made.shorten(short * 1) == made.shorten(short)
    assert LLMLingua2(rate=1.0, model=made.model).shorten("It  stays,\n as it is.") == "It  stays,\n as it is."


@needs_package
def test_forced_words_and_numbers_stay(classifier: str) -> None:
    """Danger: what a user asked to keep is dropped, or asked for one word and got all."""
    assert "?" not in LLMLingua2(0.3, classifier, force="").shorten(TEXT)
    assert LLMLingua2(0.4, classifier, force="?|left").shorten(TEXT) == "Ada born Tavik left? Brint Orsa"
    assert LLMLingua2(0.4, classifier, force="", digits=True).shorten(TEXT).split() == [*WANTED, "7"]
    lines = LLMLingua2(0.3, classifier).shorten("Ada was born\nLorn was in it\nin Tavik of the")
    assert lines.count("\n") == 2


@needs_package
def test_long_and_empty_texts(classifier: str) -> None:
    """Danger: a text beyond the classifier's 512 tokens is cut off; one without known words becomes empty."""
    made = LLMLingua2(0.3, classifier, force="")
    assert made.shorten(f"{TEXT} " * 60).replace(" ", "") == "".join(WANTED) * 60
    assert made.shorten("\u200b") == "\u200b"
    engine = engine_of(compress=f"llmlingua2:rate=0.3,model={classifier}")
    for wrong in (" ", "\ud800"):
        with pytest.raises(DocumentError):
            engine.encode([Document(wrong)])


@needs_package
@pytest.mark.parametrize("spec", ["block", "kvlink:links=2", "epic:tokens=3"])
def test_documents_are_encoded_from_their_short_text(spec: str, classifier: str) -> None:
    """Danger: the title is shortened, the long text is stored, or a second answer misses."""
    plain = engine_of(spec)
    engine = plain.with_strategy(spec, f"llmlingua2:rate=0.3,model={classifier}+keydiff:keep=0.7+int8")
    first, again = (engine.answer(QUESTION, DOCUMENTS, max_new_tokens=2).usage for _ in range(2))
    assert (first.misses, again.misses, again.hits) == (2, 0, 2)
    item = engine.encoder.items(DOCUMENTS)[0]
    assert engine.text.decode(tuple(item.ids.tolist())) == "was it\nAda born Tavik? Brint Orsa"
    assert item.title == "was it"
    ordinary = plain.answer(QUESTION, DOCUMENTS, max_new_tokens=2).usage
    assert again.reused_tokens < 0.7 * ordinary.reused_tokens
    assert again.charged < ordinary.charged  # in units of full recompute of the whole text


@needs_package
def test_full_recompute_of_the_short_text_is_charged_less(classifier: str) -> None:
    """Danger: the ordinary use of LLMLingua seems to cost as much as no compression at all."""
    engine = engine_of("full").with_strategy("full", f"llmlingua2:rate=0.3,model={classifier}")
    usage = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=1).usage
    full = engine_of("full").answer(QUESTION, DOCUMENTS, max_new_tokens=1).usage
    assert usage.charged == pytest.approx(usage.computed_tokens / full.computed_tokens, rel=0.2)
    assert full.charged == pytest.approx(1.0)


@needs_package
def test_the_key_holds_the_classifier_and_not_its_path(classifier: str, tmp_path: Path) -> None:
    """Danger: a retrained classifier is served the other one's documents; a moved one encodes everything again."""
    moved = tmp_path / "moved"
    shutil.copytree(classifier, moved)
    other = bert(tmp_path / "other", WANTED[1:])
    one, same, another = (Compression.of(f"llmlingua2:model={m}").identity(0) for m in (classifier, moved, other))
    assert one == same != another
    assert "rate=0.5" in one
    engine = engine_of()
    keys = [
        engine.with_strategy("block", c).encoder.items([Document("xyz xyz")])[0].key.digest
        for c in ("", f"llmlingua2:rate=1,model={classifier}", f"llmlingua2:rate=1,model={other}")
    ]
    assert len(set(keys)) == 3


@needs_package
def test_nobodys_random_numbers_change(tmp_path: Path) -> None:
    """Danger: sampled answers are the same after every start, because the package seeds everything."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    wanted = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    path = bert(tmp_path, WANTED[:2])
    torch.manual_seed(7)
    assert LLMLingua2(model=path).shorten("Ada was born")
    assert (torch.rand(1), random.random(), np.random.rand()) == wanted
    assert not torch.backends.cudnn.deterministic


@needs_package
def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    """Danger: a traceback of the package, which knows two published names and downloads what it likes."""
    with pytest.raises(ModelError, match="cannot be loaded"):
        LLMLingua2(model=str(tmp_path / "nothing")).shorten("text")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)).save_pretrained(tmp_path / "gpt")
    with pytest.raises(ModelError, match="of type gpt2, the package reads bert"):
        LLMLingua2(model=str(tmp_path / "gpt")).shorten("text")
    with pytest.raises(SpecError, match="option rate"):
        Compression.of("llmlingua2:rate=2")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a model is loaded for a minute, then comes an ImportError."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'kvilt\[llmlingua\]'"):
        Engine.load("none", compress="llmlingua2:rate=0.5")
