"""Training of wrappers: what moves, what is kept, what is refused, and going on after a kill."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch
import train_kit as kit

from kvilt.errors import TrainError, WrapperError
from kvilt.lab.train.data import Sample, Source
from kvilt.lab.train.loop import Loop
from kvilt.lab.train.packet import train_packet
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import Document


def vectors(wrapper: Wrapper) -> dict[str, torch.Tensor]:
    return {n: v for n in ("header", "trailer", "links") if (v := getattr(wrapper, n)) is not None}


def train(engine, out, samples=None, tests=None, on_progress=lambda _: None, **settings) -> Wrapper:
    return train_packet(engine, samples or kit.samples(), replace(kit.QUICK, **settings), out, tests, on_progress)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"links": 2},
        {"links": 2, "layout": "tail"},
        {"loss": "ce", "answers": "data", "checkpointing": True},
    ],
    ids=str,
)
def test_only_vectors_are_trained(engine, tmp_path, settings):
    """Danger: the frozen model learns, too."""
    before = {n: p.clone() for n, p in engine.model.hf.named_parameters()}
    made = train(engine, tmp_path, steps=2, **settings)
    assert kit.same(before, dict(engine.model.hf.named_parameters()))
    assert all(p.grad is None and p.requires_grad for p in engine.model.hf.parameters())
    assert len(vectors(made)) == (3 if settings.get("links") else 2)
    assert kit.same(vectors(made), vectors(Wrapper.load(tmp_path / "wrapper.safetensors")))


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        ({"adapter": "writer"}, "writer:adapter={0}/adapter.safetensors,wrapper={0}/wrapper.safetensors"),
        ({"adapter": "writer", "header": 0, "trailer": 0}, "writer:adapter={0}/adapter.safetensors"),
        ({"adapter": "query", "header": 0, "trailer": 0}, "query_lora:adapter={0}/adapter.safetensors"),
    ],
    ids=str,
)
def test_adapters_are_trained_beside_a_frozen_model(engine, tmp_path, settings, spec):
    """Danger: an adapter changes the model, is served on other rows than it was trained on, or learns nothing."""
    before = {n: p.clone() for n, p in engine.model.hf.named_parameters()}
    made = train(engine, tmp_path, steps=20, evaluate_every=10, rank=2, lr=0.01, **settings)
    assert kit.same(before, dict(engine.model.hf.named_parameters()))
    hooks = [h for m in engine.model.hf.modules() for h in m._forward_hooks.values()]
    assert not any(isinstance(h, functools.partial) for h in hooks)  # those of serving stay
    history = json.loads(made.metadata["history"])
    assert sum(history["losses"][-4:]) < 0.9 * sum(history["losses"][:4])
    sample = kit.samples()[0]
    served, plain = engine.with_strategy(spec.format(tmp_path)), engine.with_strategy("naive")
    answer = [5, 6, 7]
    scores = [e.score(sample.question, sample.documents, answer) for e in (served, plain)]
    assert (scores[0] - scores[1]).abs().max() > 1e-3


def test_loss_falls_and_the_best_step_is_written(engine, tmp_path):
    """Danger: nothing is learned, or the last step is written."""
    seen = []
    made = train(engine, tmp_path, steps=20, evaluate_every=10, on_progress=seen.append)
    history = json.loads(made.metadata["history"])
    assert sum(history["losses"][-4:]) < 0.7 * sum(history["losses"][:4])
    best = min(history["held_out"], key=lambda entry: entry[1]["loss"])
    assert json.loads(made.metadata["best"])["step"] == best[0] > 0
    assert [*dict.fromkeys(p.stage for p in seen)] == ["questions", "teacher", "train"]


def test_the_wrapper_says_where_it_comes_from(engine, tmp_path):
    """Danger: a file of vectors of which nobody knows what made it."""
    train(engine, tmp_path, links=2, steps=2)
    made = Wrapper.load(tmp_path / "wrapper.safetensors")
    assert made.model == engine.model.digest
    assert json.loads(made.metadata["vectors"]) == {"header": 2, "trailer": 2, "links": 2}
    assert json.loads(made.metadata["config"])["links"] == 2
    assert {"template", "tokenizer", "data", "best", "history", "layout"} <= set(made.metadata)


def test_a_trained_wrapper_is_served(engine, tmp_path):
    """Danger: a wrapper is served in another layout than it was trained in."""
    train(engine, tmp_path, links=2, layout="tail", steps=1)
    file = tmp_path / "wrapper.safetensors"
    served = engine.with_strategy(f"linked_packet:wrapper={file}")
    assert served.strategy.layout == "tail"
    documents = [Document("a"), Document("b")]
    plan = served.plan("q?", documents)
    assert plan.is_suffix
    assert served.answer("q?", documents, max_new_tokens=2).tokens
    assert engine.with_strategy(f"kv_packet:wrapper={file}").plan("q?", documents).end == plan.end - 2
    with pytest.raises(WrapperError, match="layout=tail"):
        engine.with_strategy(f"linked_packet:wrapper={file},layout=slots")


def test_links_alone_can_be_trained_onto_a_wrapper(engine, tmp_path):
    """Danger: stored documents become useless because links were trained."""
    first = train(engine, tmp_path / "a", steps=2)
    start = str(tmp_path / "a" / "wrapper.safetensors")
    made = train(engine, tmp_path / "b", links=2, start=start, links_only=True, steps=2)
    assert torch.equal(made.header, first.header)
    assert torch.equal(made.trailer, first.trailer)
    assert made.encoding().digest == first.encoding().digest  # stored documents stay valid
    both = train(engine, tmp_path / "c", links=2, start=start, steps=2)
    assert not torch.equal(both.header, first.header)


def test_a_model_with_broken_weights_is_refused(tmp_path):
    """Danger: a student learns from numbers that are none."""
    engine = kit.engine()
    with torch.no_grad():
        engine.model.hf.lm_head.weight[5] = float("nan")
    with pytest.raises(TrainError, match="not finite"):
        train(engine, tmp_path)


def test_questions_are_asked_by_the_model_and_kept(engine, tmp_path, monkeypatch):
    """Danger: a second run asks other questions, and trains on other data."""
    bare = [replace(s, question="", gold=()) for s in kit.samples()] + [
        Sample((Document(f"single {i}"),)) for i in range(6)
    ]
    train(engine, tmp_path, bare, steps=1)
    memo = tmp_path / "training" / "questions-0.jsonl"
    assert 12 <= len(memo.read_text().splitlines()) <= 14  # equal sets of documents are asked about once
    monkeypatch.setattr("kvilt.lab.train.questions._ask", lambda *_: pytest.fail("asked again"))
    train(engine, tmp_path, bare, steps=1)


def test_a_silent_model_is_an_error(engine, tmp_path, monkeypatch):
    """Danger: a wrapper is trained on empty questions."""
    monkeypatch.setattr("kvilt.lab.train.questions._ask", lambda engine, samples, *_: [""] * len(samples))
    with pytest.raises(TrainError, match="asked no question"):
        train(engine, tmp_path, [replace(s, question="") for s in kit.samples()])


def test_mixtures(engine, tmp_path):
    """Danger: sources of a mixture lose their names."""
    several = [Source(tuple(kit.samples(8)), 3.0, "a"), Source(tuple(kit.samples(12, 2)), 1.0, "b")]
    assert json.loads(train(engine, tmp_path, several, steps=1).metadata["data"]).keys() == {"a", "b", "held-out"}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"documents": ()}, {}, "made:0: no documents"),
        ({"plain": True}, {}, "made:0: no documents"),
        ({"answers": ()}, {"answers": "data"}, "made:0: no answer"),
        ({"documents": (Document("x" * 5000),)}, {}, "made:0: .* the context holds 4096"),
    ],
)
def test_bad_samples_are_refused_before_training(engine, tmp_path, monkeypatch, change, settings, message):
    """Danger: a bad sample shows after hours."""
    monkeypatch.setattr(Loop, "train", lambda loop: pytest.fail("trained"))
    bad = [replace(s, **change) if i == 0 else s for i, s in enumerate(kit.samples())]
    with pytest.raises(TrainError, match=message):
        train(engine, tmp_path, bad, tests=kit.samples(12)[8:], **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"header": -1},
        {"header": 0, "trailer": 0},
        {"layout": "head"},
        {"loss": "mse"},
        {"answers": "mine"},
        {"links_only": True},
        {"steps": 0},
        {"patience": 0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"top_k": 0},
        {"schedule": "step"},
        {"held_out": 1.5},
    ],
    ids=str,
)
def test_bad_settings(engine, tmp_path, settings):
    """Danger: a setting that makes no sense shows after hours."""
    with pytest.raises(TrainError):
        train(engine, tmp_path, **settings)


def test_wrong_splits(engine, tmp_path):
    """Danger: early stopping sees its own training data."""
    with pytest.raises(TrainError, match="wrong split"):
        train(engine, tmp_path, tests=kit.samples(2))
    with pytest.raises(TrainError, match="held-out split is empty"):
        train(engine, tmp_path, tests=[])
    with pytest.raises(TrainError, match="no samples"):
        train_packet(engine, [], kit.QUICK, tmp_path)


def test_wrappers_of_another_size_or_model_are_refused(engine, tmp_path):
    """Danger: vectors of another model are trained on."""
    train(engine, tmp_path / "a", links=2, steps=1)
    start = str(tmp_path / "a" / "wrapper.safetensors")
    with pytest.raises(WrapperError, match="header=2 and trailer=2, not 3"):
        train(engine, tmp_path / "b", start=start, header=3)
    with pytest.raises(WrapperError, match="links=2, not 3"):
        train(engine, tmp_path / "b", start=start, links=3)
    other = kit.engine(seed=2)
    with pytest.raises(WrapperError, match="trained for weights"):
        other.with_strategy(f"kv_packet:wrapper={start}")
    with pytest.raises(WrapperError, match="trained for weights"):
        train(other, tmp_path / "b", start=start)
    narrow = tmp_path / "narrow.safetensors"
    Wrapper(torch.zeros(2, 32), torch.zeros(2, 32)).save(narrow)
    with pytest.raises(WrapperError, match="32 channels, the model has 64"):
        train(engine, tmp_path / "b", start=str(narrow))


def test_linked_packet_needs_link_vectors(engine, tmp_path):
    """Danger: a wrapper without links is served as one with them."""
    train(engine, tmp_path, steps=1)
    with pytest.raises(WrapperError, match="no link vectors"):
        engine.with_strategy(f"linked_packet:wrapper={tmp_path / 'wrapper.safetensors'}")


def test_published_wrappers(tmp_path):
    """Danger: a foreign file runs code, or is read as other vectors."""
    header, trailer = torch.randn(1, 8, 64).bfloat16(), torch.randn(1, 8, 64)
    shipped = {"header": header, "trailer": trailer, "header_len": 8, "dim": 64, "train_config": {"lr": 1e-3}}
    torch.save(shipped, tmp_path / "8_8.pt")
    loaded = Wrapper.load(tmp_path / "8_8.pt")
    assert torch.equal(loaded.header, header[0].float())
    assert torch.equal(loaded.trailer, trailer[0])
    for bad in ({"header": header}, [header], {"header": header, "trailer": trailer[..., :32]}):
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(WrapperError):
            Wrapper.load(tmp_path / "bad.pt")
