"""The training recipe: prompts as the engine builds them, masks, Muon, copying heads, and resuming."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from builtin import data
from builtin import tokenizer as tokenizers
from builtin import train as recipe
from builtin.optim import orthogonal
from builtin.world import contexts

TINY = recipe.Plan(rows=2, few=1, grow=4, total=8, layers=4, width=64, heads=4, inner=64)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer trained on a little of the world."""
    return tokenizers.train(tokenizers.corpus(1, 200, []))


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> data.Encoder:
    """Its row encoder."""
    return data.Encoder(tokenizer)


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Danger: letters, digits or spaces are lost on the way through the tokenizer."""
    for text in ("Ada Lorn\nAda Lorn works for Brint Labs.\n", "Ünseen wörds 漢字, 1984!", "two  spaces"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_reserved_tokens_are_single(tokenizer: PreTrainedTokenizerFast) -> None:
    """Danger: a link token falls into pieces."""
    assert tokenizer.encode("<|reserved_0|><|reserved_95|>", add_special_tokens=False) == sorted(
        tokenizer.convert_tokens_to_ids(["<|reserved_0|>", "<|reserved_95|>"])
    )


def test_a_row_is_the_chat_template_cut_at_the_documents(encoder: data.Encoder) -> None:
    """Danger: the model is trained on other prompts than it is served."""
    sample = contexts.build(random.Random(1), "train", 4)
    row = data.Row()
    assert encoder.fill(row, sample, 0, 512, 1)
    pages = "".join(page.render() for page in sample.pages)
    question = sample.questions[0]
    messages = [
        {"role": "system", "content": tokenizers.SYSTEM},
        {"role": "user", "content": pages + question.text},
    ]
    rendered = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = rendered + question.answer + "<|end|>"
    assert encoder.tokenizer.decode(row.ids).replace(" ", "").replace("\n", "") == expected.replace(" ", "").replace(
        "\n", ""
    )
    assert row.position == list(range(len(row.ids)))


def test_labels_are_the_answer_and_values_are_marked(encoder: data.Encoder) -> None:
    """Danger: labels are off by one, and the value that is counted is another word."""
    sample = contexts.build(random.Random(2), "train", 4)
    row = data.Row()
    encoder.fill(row, sample, 0, 512, 1)
    labels = [label for label in row.label if label != data.IGNORE]
    assert encoder.tokenizer.decode(labels, skip_special_tokens=True) == sample.questions[0].answer
    value = [label for label, mark in zip(row.label, row.value, strict=True) if mark]
    assert encoder.tokenizer.decode(value) == sample.questions[0].value


def test_mask_hides_questions_from_each_other_and_pages_when_blocked(encoder: data.Encoder) -> None:
    """Danger: a question reads the answer of the one before it."""
    row = data.Row()
    encoder.fill(row, contexts.build(random.Random(3), "train", 4), 0, 512, 4)
    batch = data.collate([row], 512, 0)
    full, block = data.mask(batch)[0, 0], data.mask(batch, block=True)[0, 0]
    segment, page = batch["segment"][0], batch["page"][0]
    first, second = (segment == 1).nonzero()[0], (segment == 2).nonzero()[0]
    last = (page == 1).nonzero()[-1]
    assert not full[second, first].any()
    assert full[last, (page == 0) & (segment == 0)][0]
    assert not block[last, page == 0].any()
    assert torch.equal(full[second], block[second])
    length = len(row.ids)
    assert not full[:length, :length].triu(1).any()


def test_orthogonal_has_unit_singular_values() -> None:
    """Danger: Muon's updates grow or vanish."""
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 24, 64)))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_built_in_heads_find_what_followed(encoder: data.Encoder) -> None:
    """Danger: the hand-set heads copy nothing, and training takes days."""
    plan = recipe.Plan(layers=4, inner=64)
    model = recipe.make(plan, len(encoder.tokenizer), encoder.marks())
    torch.manual_seed(0)
    piece = torch.randint(500, len(encoder.tokenizer), (16, 12))
    ids = torch.cat([piece, piece], 1)
    with torch.no_grad():
        scores = model(input_ids=ids).logits[:, 14:-1]
    assert (scores.argmax(-1) == ids[:, 15:]).float().mean() > 0.05  # by chance: 0.0005


def test_killed_and_resumed_equals_uninterrupted(encoder: data.Encoder, tmp_path: Path) -> None:
    """Danger: a killed training of an hour begins anew, or ends elsewhere."""
    source = recipe.Source(encoder, TINY, [])
    whole = recipe.Trainer(tmp_path / "whole", TINY, encoder, compiled=False)
    for step in range(3):
        whole.step(step, source.batch(step))
    (tmp_path / "cut").mkdir()
    cut = recipe.Trainer(tmp_path / "cut", TINY, encoder, compiled=False)
    for step in range(1):
        cut.step(step, source.batch(step))
    cut.save(1)
    again = recipe.Trainer(tmp_path / "cut", TINY, encoder, compiled=False)
    assert again.first == 1
    for step in range(1, 3):
        again.step(step, source.batch(step))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loss_that_is_no_number_stops(encoder: data.Encoder, tmp_path: Path) -> None:
    """Danger: a broken loss is carried into the weights and the checkpoint."""
    trainer = recipe.Trainer(tmp_path, TINY, encoder, compiled=False)
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.step(0, recipe.Source(encoder, TINY, []).batch(0))
