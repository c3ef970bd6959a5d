"""KVLink fine-tuning through transformers' Trainer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_kit as kit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from kvilt.engine.engine import Engine
from kvilt.errors import MissingExtra, SpecError, TrainError, UserError
from kvilt.lab.train import hf as glue
from kvilt.lab.train.data import Sample, Source
from kvilt.lab.train.dense import parts_of
from kvilt.lab.train.kinds import sft, text
from kvilt.lab.train.kvlink import KVLinkConfig, train_kvlink
from kvilt.lab.train.muon import MuonAdamW
from kvilt.lab.train.tokens import link_tokens
from kvilt.strategies.kvlink import LLAMA3_VOCABULARY, LinkTokens
from kvilt.types import Document


def train(model, out, samples=None, tests=None, on_progress=lambda _: None, **settings) -> Path:
    return train_kvlink(str(model), samples or kit.samples(), replace(kit.LINKED, **settings), out, tests, on_progress)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_whole_model_learns_and_is_served(model_dir, tmp_path):
    seen = []
    out = train(model_dir, tmp_path, steps=20, evaluate_every=10, on_progress=seen.append)
    losses = [p.loss for p in seen]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert isinstance(seen[-1].held_out, float)
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
    assert not list(out.glob("*.bin"))


def test_without_links_it_is_block_fine_tuning(model_dir, tmp_path):
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
    trained = json.loads((out / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())["best_metric"]
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


def test_anchors_are_added_where_none_are_left_and_survive_an_interruption(model_dir, tmp_path):
    """Danger: an anchor shares its token or its first embedding with a link, or is drawn anew when a run goes on."""

    def stopping(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    settings = {"slots": 30, "anchors": 4, "chunk": 4}
    with pytest.raises(KeyboardInterrupt):
        train(model_dir, tmp_path / "stopped", on_progress=stopping, **settings)
    resumed = train(model_dir, tmp_path / "stopped", **settings)
    assert kit.same(weights(resumed), weights(train(model_dir, tmp_path / "whole", **settings)))
    tokens = LinkTokens.from_json((resumed / "kvlink.json").read_text())
    assert AutoTokenizer.from_pretrained(resumed).convert_ids_to_tokens(tokens.anchors[3]) == "<|anchor_3|>"
    assert len(tokens.every) == 2 + 30 * 2 + 4
    shorter = train(resumed, tmp_path / "shorter", slots=30, anchors=2, chunk=8, steps=2)
    assert LinkTokens.from_json((shorter / "kvlink.json").read_text()) == replace(
        tokens, anchors=tokens.anchors[:2], chunk=8
    )
    plain = train(resumed, tmp_path / "plain", slots=30, steps=2)
    assert LinkTokens.from_json((plain / "kvlink.json").read_text()) == replace(tokens, anchors=(), chunk=0)


def test_killed_and_resumed_equals_uninterrupted(model_dir, tmp_path):
    script = str(Path(__file__).with_name("killed.py"))
    died = subprocess.run(
        [sys.executable, script, "kvlink", str(tmp_path / "killed"), str(model_dir)], capture_output=True, timeout=100
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    broken = tmp_path / "killed" / "checkpoints" / "checkpoint-99"
    broken.mkdir()  # killed while it was written: no state in it
    steps = []
    resumed = train(model_dir, tmp_path / "killed", on_progress=lambda p: steps.append(p.step))
    assert steps == [5, 6]
    assert kit.same(weights(resumed), weights(train(model_dir, tmp_path / "whole")))


def test_muon_learns_and_goes_on_where_it_stopped(model_dir, tmp_path):
    """Danger: matrices or embeddings get no optimizer, the schedule moves but one of both, or a state is lost."""

    def stopping(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    settings = {"optimizer": "muon", "lr": 1e-3}
    with pytest.raises(KeyboardInterrupt):
        train(model_dir, tmp_path / "stopped", on_progress=stopping, **settings)
    resumed = weights(train(model_dir, tmp_path / "stopped", **settings))
    seen = []
    whole = weights(train(model_dir, tmp_path / "whole", on_progress=seen.append, **settings))
    assert kit.same(resumed, whole)
    before = weights(model_dir)
    assert all(not torch.equal(before[n], whole[n]) for n in before)
    assert seen[-1].loss < seen[0].loss
    still = weights(train(model_dir, tmp_path / "still", steps=2, optimizer="muon", lr=0.0))
    assert kit.same(still, before)  # one rate for both


def test_muon_divides_the_parameters(model_dir):
    hf = AutoModelForCausalLM.from_pretrained(model_dir)
    adamw, muon = MuonAdamW(hf, 1e-3).parts
    held = [{id(p) for group in part.param_groups for p in group["params"]} for part in (adamw, muon)]
    assert held[0] | held[1] == {id(p) for p in hf.parameters()}
    assert not held[0] & held[1]
    inside = {id(p) for layer in hf.model.layers for p in layer.parameters() if p.ndim == 2}
    assert held[1] == inside


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_muon_leaves_the_link_tokens_of_lora_to_adamw(model_dir):
    """Danger: learned rows of the embedding matrix are a matrix, too, and would be made orthogonal."""
    import peft

    settings = peft.LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[5, 6], task_type="CAUSAL_LM")
    lora = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), settings)
    learned = {id(p) for name, p in lora.named_parameters() if p.requires_grad and "token" in name}
    adamw, muon = MuonAdamW(lora, 1e-3).parts
    assert learned == {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not learned & {id(p) for group in muon.param_groups for p in group["params"]}


def test_muon_needs_a_torch_that_has_it(model_dir, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(TrainError, match=r"torch 2\.9"):
        MuonAdamW(AutoModelForCausalLM.from_pretrained(model_dir), 1e-3)


def test_link_tokens_start_from_words(model_dir, tmp_path):
    """Danger: words go to other tokens than the slots' own, or to the first slot alone."""
    out = train(model_dir, tmp_path, steps=2, lr=0.0, init=("oak", "elm"))
    tokens, weight = LinkTokens.from_json((out / "kvlink.json").read_text()), weights(out)["model.embed_tokens.weight"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    words = [weight[tokenizer.encode(word, add_special_tokens=False)].mean(0) for word in ("oak", "elm")]
    spread = weight.std()
    for slot in tokens.ids:
        for word, i in zip(words, slot, strict=True):
            assert 0 < (weight[i] - word).std() < 0.2 * spread
    assert len({tuple(weight[i].tolist()) for slot in tokens.ids for i in slot}) == 8


def test_early_stopping_writes_the_best_step(model_dir, tmp_path):
    seen = []
    out = train(model_dir, tmp_path, steps=40, lr=0.5, warmup=0.0, patience=1, on_progress=seen.append)
    assert seen[-1].step < 40
    best = tmp_path / "checkpoints" / f"checkpoint-{max(seen[-1].best_step, 2)}"
    assert kit.same(weights(out), weights(best))
    assert (best / "kvlink.json").is_file()


def test_the_mixture_trains_reuse_and_standard_tasks(model_dir, tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    standard = tuple(replace(s, reuse=False, where="s") for s in kit.samples(8, 2))
    talk = tuple(sft({"messages": [*chat, {"role": "user", "content": str(i)}, chat[1]]}, f"c{i}") for i in range(6))
    plain = tuple(text({"text": f"once upon a time {i}"}, f"t{i}") for i in range(6))
    named = {"qa": tuple(kit.samples()), "qa-standard": standard, "sft": talk, "text": plain}
    sources = [Source(s, 1.0, n) for n, s in named.items()]
    assert train(model_dir, tmp_path, sources, systems=("One.", "Two."), batch=8).is_dir()


def test_link_tokens_are_added_where_none_are_reserved(model_dir, tmp_path):
    out = train(model_dir, tmp_path, slots=40, steps=2)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = LinkTokens.from_json((out / "kvlink.json").read_text())
    assert len(tokenizer) == zoo.VOCABULARY + 2 + 40 * 2
    assert tokenizer.convert_ids_to_tokens(tokens.ids[3][1]) == "<|link_3_1|>"
    assert weights(out)["model.embed_tokens.weight"].shape[0] == len(tokenizer)
    again = train(out, tmp_path / "again", slots=40, steps=2)
    assert LinkTokens.from_json((again / "kvlink.json").read_text()) == tokens
    with pytest.raises(TrainError, match="2 link tokens in 40 slots, not 5"):
        train(out, tmp_path / "more", links=5, slots=40)


def test_the_published_layout():
    class Vocabulary:
        name_or_path = ""
        get_input_embeddings = staticmethod(lambda: torch.nn.Embedding(LLAMA3_VOCABULARY, 1))

    tokens = link_tokens(Vocabulary(), None, (), 5, 40)
    assert (tokens.ids[0][0], tokens.ids[39][4], tokens.start, tokens.end) == (128011, 128210, (128254,), (128255,))


def test_a_broken_loss_keeps_the_last_good_step(model_dir, tmp_path, monkeypatch):
    real, calls = glue.cross_entropy, []

    def breaking(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) > 7 else 1.0)

    monkeypatch.setattr(glue, "cross_entropy", breaking)
    with pytest.raises(TrainError, match="not a number"):
        train(model_dir, tmp_path)
    kept = weights(tmp_path / "last-good")
    assert all(torch.isfinite(w).all() for w in kept.values())
    assert not kit.same(kept, weights(model_dir))


def test_a_broken_gradient_stops_before_the_step(tmp_path):
    watch, parameter = glue._Watch(LinkTokens(()), lambda _: None), torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, float("inf")])
    holder = torch.nn.Module()
    holder.weight = parameter
    with pytest.raises(TrainError, match="step 3"):
        watch.on_pre_optimizer_step(None, type("State", (), {"global_step": 2}), None, model=holder)


def test_lora_needs_its_package(model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match="kvilt\\[train\\]"):
        train(model_dir, tmp_path, lora=4)


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
    bad = [replace(s, **change) if i == 0 else s for i, s in enumerate(kit.samples())]
    with pytest.raises(UserError, match=message):
        train(model_dir, tmp_path, bad, tests=kit.samples(12)[8:])
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"links": -1},
        {"slots": 0},
        {"steps": 0},
        {"batch": 3},
        {"lr": float("inf")},
        {"warmup": 2.0},
        {"dtype": "int8"},
        {"optimizer": "sgd"},
        {"optimizer": "muon", "fsdp": True},
        {"init": ("oak",) * 3},
        {"init": ("oak", "")},
        {"patience": 0},
        {"max_tokens": 9999},
        {"lora": -1},
        {"anchors": -1},
        {"anchors": 2, "chunk": 0},
        {"held_out": 0.0},
    ],
    ids=str,
)
def test_bad_settings(model_dir, tmp_path, settings):
    with pytest.raises(TrainError):
        train(model_dir, tmp_path, **settings)


def test_wrong_splits_and_other_runs(model_dir, tmp_path):
    with pytest.raises(TrainError, match="wrong split"):
        train(model_dir, tmp_path, tests=kit.samples(1))
    with pytest.raises(TrainError, match="empty"):
        train(model_dir, tmp_path, tests=[])
    train(model_dir, tmp_path, steps=2)
    with pytest.raises(TrainError, match="another model, data or settings"):
        train(model_dir, tmp_path, steps=4)


def test_batches_are_divided_among_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert KVLinkConfig().accumulation == 2
    with pytest.raises(TrainError, match="batch=8"):
        _ = KVLinkConfig(batch=8).accumulation


def test_samples_are_hashable():
    assert len({Sample(()), Sample(())}) == 1
