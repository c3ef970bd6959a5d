"""KVLink fine-tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_kit as kit
from safetensors.torch import load_file
from transformers import AutoTokenizer

import zoo
from kvilt.engine.engine import Engine
from kvilt.errors import SpecError, TrainError, UserError
from kvilt.lab.train import checkpoint
from kvilt.lab.train.data import Sample, Source
from kvilt.lab.train.dense import parts_of
from kvilt.lab.train.kinds import sft, text
from kvilt.lab.train.kvlink import train_kvlink
from kvilt.lab.train.tokens import link_tokens
from kvilt.strategies.kvlink import LLAMA3_VOCABULARY, LinkTokens
from kvilt.types import Document


def train(model, out, samples=None, tests=None, on_progress=lambda _: None, **settings) -> Path:
    return train_kvlink(str(model), samples or kit.samples(), replace(kit.LINKED, **settings), out, tests, on_progress)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_whole_model_learns_and_is_served(model_dir, tmp_path):
    """Danger: a checkpoint that cannot be served, or an unchanged one."""
    seen = []
    out = train(model_dir, tmp_path, steps=16, evaluate_every=16, on_progress=seen.append)
    losses = [p.loss for p in seen if p.loss == p.loss]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    before, after = weights(model_dir), weights(out)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[n], after[n]) for n in before)
    tokens = LinkTokens.from_json((out / "kvlink.json").read_text())
    assert (len(tokens.ids), len(tokens.ids[0]), len(tokens.start), len(tokens.end)) == (4, 2, 1, 1)
    engine = Engine.load(str(out), "kvlink:links=2", "memory")
    assert engine.strategy.tokens == tokens
    documents = [Document("oak 1"), Document("elm 2")]
    computed = engine.answer("q?", documents, max_new_tokens=2).usage.computed_tokens
    assert computed == len(engine.text.question_ids("q?")) + 2 * 2 + 2
    assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]  # servers load every such file


def test_without_links_it_is_block_fine_tuning(model_dir, tmp_path):
    """Danger: markers stand in prompts of a model that knows none."""
    out = train(model_dir, tmp_path, links=0, markers=False, steps=2)
    assert json.loads((out / "kvlink.json").read_text()) == {"ids": [], "start": [], "end": []}
    linked = Engine.load(str(out), "kvlink:links=0", "memory").plan("q?", [Document("a")])
    block = Engine.load(str(out), "block", "memory").plan("q?", [Document("a")])
    assert torch.equal(linked.positions, block.positions)


def test_anchors_are_trained_and_served_alike(model_dir, tmp_path):
    """Danger: the mask of training is not the one of serving, or the anchors' embeddings stay as they were drawn."""
    samples = [replace(s, ordered=True) for s in kit.samples(12)]
    settings = {"links": 1, "anchors": 2, "chunk": 4, "steps": 2, "micro_batch": 4}
    out = train(model_dir, tmp_path, samples[:8], samples[8:], **settings)
    _, metadata = checkpoint.read(out / "training" / "checkpoint.safetensors")
    trained = json.loads(metadata["state"])["held_out"][-1][1]["loss"]
    engine = Engine.load(str(out), "anchors:links=1", "memory")
    tokens = engine.strategy.tokens
    assert (len(tokens.ids), len(tokens.anchors), tokens.chunk) == (4, 2, 4)
    losses = []
    for s in samples[8:]:
        answer = parts_of(engine.text, s).answer
        scores = engine.score(s.question, s.documents, answer.tolist())
        losses.append(torch.nn.functional.cross_entropy(scores, answer))
    assert float(torch.stack(losses).mean()) == pytest.approx(trained, rel=1e-4)
    before, after = (weights(f)["model.embed_tokens.weight"][list(tokens.anchors)] for f in (model_dir, out))
    assert (before - after).abs().amax(1).min() > 0
    with pytest.raises(SpecError, match="has chunk=4"):
        Engine.load(str(out), "anchors:chunk=8", "memory")


def test_anchors_are_added_where_none_are_left(model_dir, tmp_path):
    """Danger: an anchor shares its token or its first embedding with a link, or is drawn anew when a run goes on."""
    settings = {"slots": 30, "anchors": 4, "chunk": 4, "steps": 1, "batch": 2}
    made = train(model_dir, tmp_path / "a", **settings)
    tokens = LinkTokens.from_json((made / "kvlink.json").read_text())
    assert AutoTokenizer.from_pretrained(made).convert_ids_to_tokens(tokens.anchors[3]) == "<|anchor_3|>"
    assert len(tokens.every) == 2 + 30 * 2 + 4
    again = weights(train(model_dir, tmp_path / "again", **settings))
    assert kit.same(again, weights(made))
    for anchors, chunk in ((2, 8), (0, 0)):
        fewer = train(made, tmp_path / str(anchors), **{**settings, "anchors": anchors, "chunk": chunk or 100})
        described = LinkTokens.from_json((fewer / "kvlink.json").read_text())
        assert described == replace(tokens, anchors=tokens.anchors[:anchors], chunk=chunk)


def test_lora_trains_additions_and_token_rows_and_is_merged(model_dir, tmp_path):
    """Danger: what LoRA learned is not in the checkpoint, or link tokens stay as they were drawn."""
    out = train(model_dir, tmp_path, lora=2, lr=1e-2, steps=8, evaluate_every=8)
    before, after = weights(model_dir), weights(out)
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    tokens = LinkTokens.from_json((out / "kvlink.json").read_text())
    assert changed == {"model.embed_tokens.weight"} | {n for n in before if "proj" in n}
    rows = (before["model.embed_tokens.weight"] - after["model.embed_tokens.weight"]).abs().amax(1).nonzero()[:, 0]
    assert set(rows.tolist()) <= tokens.every
    _, metadata = checkpoint.read(out / "training" / "checkpoint.safetensors")
    (_, first), *_, (_, last) = json.loads(metadata["state"])["held_out"]
    assert last["loss"] < first["loss"]


def test_what_was_learned_is_saved_beside_the_model(model_dir, tmp_path):
    """Danger: link tokens become words of the vocabulary, weights are copied, or what is saved is not what was trained."""
    settings = {"lora": 2, "lr": 1e-2, "steps": 4, "slots": 40}  # more link tokens than this tokenizer has reserved
    whole = train(model_dir, tmp_path / "whole", **settings)
    beside = train(model_dir, tmp_path / "beside", **settings, save="adapter")
    assert {f.name for f in beside.iterdir() if f.is_file()} == {
        "kvlink.json",
        "links.safetensors",
        "merged.safetensors",
    }
    engines = [Engine.load(str(folder), "kvlink:links=2", "memory") for folder in (whole, beside)]
    assert engines[0].info.vocab_size > engines[1].info.vocab_size
    documents = [Document("The oak is green."), Document("The elm is grey.")]
    one, other = (e.score("Which tree is grey?", documents, [5, 6, 7])[:, :200] for e in engines)
    plain = Engine.load(str(model_dir), "block", "memory").score("Which tree is grey?", documents, [5, 6, 7])[:, :200]
    assert float((one - other).norm()) < 0.1 * float((one - plain).norm())
    with pytest.raises(TrainError, match=r"lie beside it \(links.safetensors\)"):
        train(beside, tmp_path / "on", **settings)


def test_passes_in_bfloat16_train_weights_in_float32(model_dir, tmp_path):
    """Danger: small updates are rounded away, or the checkpoint is half as exact."""
    out = train(model_dir, tmp_path, dtype="bf16", steps=2, lr=1e-5)
    before, after = weights(model_dir), weights(out)
    assert all(value.dtype == torch.float32 for value in after.values())
    moved = (before["lm_head.weight"] - after["lm_head.weight"]).abs().max()
    assert 0 < moved < 1e-4


def test_link_tokens_start_from_words(model_dir, tmp_path):
    """Danger: words go to other tokens than the slots' own, or to the first slot alone."""
    out = train(model_dir, tmp_path, steps=1, lr=0.0, init=("oak", "elm"))
    tokens, weight = LinkTokens.from_json((out / "kvlink.json").read_text()), weights(out)["model.embed_tokens.weight"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    words = [weight[tokenizer.encode(word, add_special_tokens=False)].mean(0) for word in ("oak", "elm")]
    spread = weight.std()
    for slot in tokens.ids:
        for word, i in zip(words, slot, strict=True):
            assert 0 < (weight[i] - word).std() < 0.2 * spread
    assert len({tuple(weight[i].tolist()) for slot in tokens.ids for i in slot}) == 8


def test_the_mixture_trains_reuse_and_standard_tasks(model_dir, tmp_path):
    """Danger: two kinds of samples do not fit into one batch."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    standard = tuple(replace(s, reuse=False, where="s") for s in kit.samples(8, 2))
    talk = tuple(sft({"messages": [*chat, {"role": "user", "content": str(i)}, chat[1]]}, f"c{i}") for i in range(6))
    plain = tuple(text({"text": f"once upon a time {i}"}, f"t{i}") for i in range(6))
    named = {"qa": tuple(kit.samples()), "qa-standard": standard, "sft": talk, "text": plain}
    sources = [Source(s, 1.0, n) for n, s in named.items()]
    assert train(model_dir, tmp_path, sources, systems=("One.", "Two."), batch=8, steps=2).is_dir()


def test_link_tokens_are_added_where_none_are_reserved(model_dir, tmp_path):
    """Danger: links share a token, or a second training adds them again."""
    out = train(model_dir, tmp_path, slots=40, steps=1)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = LinkTokens.from_json((out / "kvlink.json").read_text())
    assert len(tokenizer) == zoo.VOCABULARY + 2 + 40 * 2
    assert tokenizer.convert_ids_to_tokens(tokens.ids[3][1]) == "<|link_3_1|>"
    assert weights(out)["model.embed_tokens.weight"].shape[0] == len(tokenizer)
    again = train(out, tmp_path / "again", slots=40, steps=1)
    assert LinkTokens.from_json((again / "kvlink.json").read_text()) == tokens
    with pytest.raises(TrainError, match="2 link tokens in 40 slots, not 5"):
        train(out, tmp_path / "more", links=5, slots=40)


def test_the_published_layout():
    """Danger: the authors' link tokens are others than ours."""

    class Vocabulary:
        name_or_path = ""
        get_input_embeddings = staticmethod(lambda: torch.nn.Embedding(LLAMA3_VOCABULARY, 1))

    tokens = link_tokens(Vocabulary(), None, (), 5, 40)
    assert (tokens.ids[0][0], tokens.ids[39][4], tokens.start, tokens.end) == (128011, 128210, (128254,), (128255,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": ()}, "made:0: no answer"),
        ({"documents": ()}, "made:0: no documents"),
        ({"documents": (Document("x" * 600),)}, "made:0: .* max_tokens is 512"),
        ({"documents": (Document("x"),) * 9}, "9 documents, but link tokens for 4"),
    ],
)
def test_bad_samples_are_refused_before_training(model_dir, tmp_path, change, message):
    """Danger: a bad sample shows after hours."""
    bad = [replace(s, **change) if i == 0 else s for i, s in enumerate(kit.samples())]
    with pytest.raises(UserError, match=message):
        train(model_dir, tmp_path, bad, tests=kit.samples(12)[8:])
    assert not (tmp_path / "training").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"links": -1},
        {"slots": 0},
        {"steps": 0},
        {"lr": float("inf")},
        {"warmup": 2.0},
        {"dtype": "int8"},
        {"optimizer": "sgd"},
        {"init": ("oak",) * 3},
        {"init": ("oak", "")},
        {"patience": 0},
        {"max_tokens": 9999},
        {"max_tokens": -1},
        {"lora": -1},
        {"save": "adapter"},
        {"save": "adapter", "lora": 2, "anchors": 2},
        {"anchors": -1},
        {"anchors": 2, "chunk": 0},
        {"held_out": 0.0},
    ],
    ids=str,
)
def test_bad_settings(model_dir, tmp_path, settings):
    """Danger: a setting that makes no sense shows after hours."""
    with pytest.raises(TrainError):
        train(model_dir, tmp_path, **settings)


def test_wrong_splits(model_dir, tmp_path):
    """Danger: early stopping sees its own training data."""
    with pytest.raises(TrainError, match="wrong split"):
        train(model_dir, tmp_path, tests=kit.samples(1))
    with pytest.raises(TrainError, match="empty"):
        train(model_dir, tmp_path, tests=[])


def test_samples_are_hashable():
    """Danger: samples cannot stand in a set."""
    assert len({Sample(()), Sample(())}) == 1
