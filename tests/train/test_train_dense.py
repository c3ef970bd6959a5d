"""What is trained is what is run; batches, losses, and memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import train_kit as kit

from kvilt.engine.engine import Engine
from kvilt.errors import TrainError
from kvilt.lab.train.data import Further, Sample
from kvilt.lab.train.dense import IGNORE, additive, collate, frozen, logits_of, merged, parts_of, row_of
from kvilt.lab.train.hf import inputs_of, loss_of
from kvilt.lab.train.losses import Tally, TopK, cross_entropy, divergence
from kvilt.lab.train.teacher import FULL, Teacher, generate
from kvilt.strategies.anchors import Anchors
from kvilt.strategies.kv_packet import KVPacket
from kvilt.strategies.kvlink import KVLink, LinkTokens
from kvilt.strategies.linked_packet import LinkedPacket
from kvilt.strategies.wrapper import Wrapper

FAMILIES = ["llama", "qwen3", "llama-yarn-tied-mha", "glm-interleaved"]
TOKENS = LinkTokens(((8, 9), (10, 11), (12, 13), (14, 15)), (6,), (7,))


class Linked(KVLink):
    """KVLink with given tokens, which serving would read from the checkpoint."""

    def bind(self, info):
        return self


def wrapper(links: int = 3) -> Wrapper:
    made = torch.Generator().manual_seed(0)
    return Wrapper(*(torch.randn(n, 64, generator=made) for n in (3, 2)), links=torch.randn(links, 64, generator=made))


def strategies() -> dict:
    return {
        "kv_packet": KVPacket().holding(wrapper()),
        "slots": LinkedPacket().holding(wrapper()),
        "tail": LinkedPacket(layout="tail").holding(wrapper()),
        "kvlink": Linked(links=2, tokens=TOKENS),
        "kvlink-0": Linked(links=0, tokens=LinkTokens((), (6,), (7,))),
        "anchors": Anchors(links=2).holding(replace(TOKENS, anchors=(20, 21, 22), chunk=4)),
        "anchors-0": Anchors().holding(LinkTokens((), (), (), (20,), 3)),
    }


def serving(made: Engine, strategy) -> Engine:
    strategy = type(strategy)(**strategy.__dict__)
    object.__setattr__(strategy, "bind", lambda info: strategy)
    return Engine(made.model, made.text, strategy, made.store)


@pytest.mark.parametrize("name", ["slots", "tail", "kvlink", "kvlink-0"])
def test_questions_about_the_same_documents_share_one_pass_and_do_not_see_each_other(engine, name):
    """Danger: a question reads another one's answer, or documents that came after it was asked."""
    (first,) = kit.samples(1, documents=3)
    further = tuple(Further(f"Who is {n}?", f"Somebody {n}.", n) for n in (3, 1, 2))
    sample = Sample(first.documents, "Who is 0?", ("Nobody.",), ordered=True, further=further)
    each = [parts_of(engine.text, one) for one in sample.each]
    assert [len(parts.documents) for parts in each] == [3, 3, 1, 2]
    strategy = strategies()[name]
    rows = [row_of(strategy, parts, parts.answer) for parts in each]
    together = merged(rows)
    assert len(together.tokens) < sum(len(r.tokens) for r in rows) / 1.5
    learned = strategy.encoding.learned
    with torch.no_grad():
        logits = logits_of(engine.model, collate([together]), learned)[0]
        alone = [logits_of(engine.model, collate([r]), learned)[0] for r in rows]
    found = {tuple(r.labels.tolist()): a for r, a in zip(rows, alone, strict=True)}
    at = (together.labels != IGNORE).nonzero()[:, 0]
    runs = [run for run in torch.tensor_split(at, (at.diff() > 1).nonzero()[:, 0] + 1) if len(run)]
    assert len(runs) == 4
    for run in runs:
        expected = found[tuple(together.labels[run].tolist())]
        torch.testing.assert_close(logits[run], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", list(strategies()))
def test_training_pass_equals_serving(family, name):
    made, strategy = kit.engine(family=family), strategies()[name]
    samples = kit.samples(3)
    answers = [torch.arange(100, 100 + n) for n in (5, 1, 3)]
    served = serving(made, strategy)
    rows = [row_of(strategy, parts_of(made.text, s), a) for s, a in zip(samples, answers, strict=True)]
    learned = strategy.encoding.learned
    with torch.no_grad():
        trained = logits_of(made.model, collate(rows), learned)
    for i, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        expected = served.score(sample.question, sample.documents, answer.tolist())
        torch.testing.assert_close(
            trained[i, -len(answer) :], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )


def test_tail_plans_are_suffixes(engine):
    parts = parts_of(engine.text, kit.samples(1)[0])
    assert parts.plan(strategies()["tail"]).is_suffix
    assert not parts.plan(strategies()["slots"]).is_suffix


def test_what_the_trainer_of_kvlink_feeds_equals_serving(engine):
    strategy, samples = strategies()["kvlink"], kit.samples(2)
    answers = [torch.arange(100, 104), torch.arange(100, 102)]
    rows = [row_of(strategy, parts_of(engine.text, s), a) for s, a in zip(samples, answers, strict=True)]
    batch = inputs_of(rows, numbers=True)
    labels = batch.pop("labels")
    with torch.no_grad():
        loss = loss_of(engine.model.hf(**batch), labels)
    served = serving(engine, strategy)
    scores = [served.score(s.question, s.documents, a.tolist()) for s, a in zip(samples, answers, strict=True)]
    expected = torch.cat(
        [torch.nn.functional.cross_entropy(x, a, reduction="none") for x, a in zip(scores, answers, strict=True)]
    )
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-4, atol=1e-4)


def test_plain_text_is_ordinary_language_modelling(engine):
    from kvilt.lab.train.kinds import text

    parts = parts_of(engine.text, text({"text": "Once upon a time"}, "here"))
    rows = [
        row_of(strategies()["kvlink"], parts, parts.answer),
        row_of(strategies()["kvlink"], parts, parts.answer[:6]),
    ]
    batch = inputs_of(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        loss = loss_of(engine.model.hf(**batch), labels)
        logits = engine.model.hf(input_ids=rows[0].tokens[None]).logits[0]
    first = torch.nn.functional.cross_entropy(logits, rows[0].labels, reduction="sum")
    second = torch.nn.functional.cross_entropy(logits[:6], rows[1].labels, reduction="sum")
    torch.testing.assert_close(loss, (first + second) / int((labels != IGNORE).sum()), rtol=1e-4, atol=1e-4)


def test_padding_sees_itself_and_changes_nothing(engine):
    rows = [row_of(FULL, parts_of(engine.text, s), torch.arange(100, 103)) for s in kit.samples(2, documents=1)]
    long = row_of(FULL, parts_of(engine.text, kit.samples(1, documents=5)[0]), torch.arange(100, 107))
    batch = collate([*rows, long])
    assert batch.mask.any(-1).all()
    assert (batch.labels[0, :4] == IGNORE).all()
    with torch.no_grad():
        together, alone = logits_of(engine.model, batch), logits_of(engine.model, collate(rows[:1]))
    torch.testing.assert_close(together[0, -3:], alone[0], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(together).all()


def test_additive_mask():
    assert additive(torch.tensor([True, False]), torch.float32).tolist() == [0.0, float("-inf")]


def test_probing_strategies_cannot_be_trained(engine):
    class Probing(KVPacket):
        def plan(self, prompt, probe):
            probe.layers(FULL.plan(prompt, probe), 1)

    with pytest.raises(TrainError, match="probes"):
        parts_of(engine.text, kit.samples(1)[0]).plan(Probing().holding(wrapper()))


def saved_bytes(engine, checkpointing: bool) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    seen: dict[int, int] = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    strategy = strategies()["kv_packet"]
    rows = [row_of(strategy, parts_of(engine.text, s), torch.arange(100, 103)) for s in kit.samples(4)]
    table = strategy.encoding.learned.clone().requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in engine.model.hf.parameters()}
    with frozen(engine.model, checkpointing), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits_of(engine.model, collate(rows), table).sum()
    return sum(size for pointer, size in seen.items() if pointer not in weights)


def test_activation_checkpointing_saves_memory_and_changes_no_gradient(engine):
    assert saved_bytes(engine, True) < 0.5 * saved_bytes(engine, False)
    gradients = []
    for checkpointing in (False, True):
        strategy = strategies()["slots"]
        row = row_of(strategy, parts_of(engine.text, kit.samples(1)[0]), torch.arange(100, 103))
        table = strategy.encoding.learned.clone().requires_grad_()
        with frozen(engine.model, checkpointing):
            logits_of(engine.model, collate([row]), table).square().mean().backward()
        gradients.append(table.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(p.requires_grad for p in engine.model.hf.parameters())
    assert not engine.model.hf.training


def test_top_k_approaches_the_full_divergence_from_below():
    teacher, student = 4 * torch.randn(2, 5, 300), 4 * torch.randn(2, 5, 300)
    valid = torch.ones(2, 5, dtype=torch.bool)
    full = float(divergence(student, teacher, valid))
    close = [float(divergence(student, TopK.of(teacher, k), valid)) for k in (1, 8, 64, 300)]
    assert close == sorted(close)
    assert close[-1] == pytest.approx(full, rel=1e-5)
    assert close[2] == pytest.approx(full, rel=0.02)
    assert float(divergence(teacher, TopK.of(teacher, 8), valid)) == pytest.approx(0, abs=1e-5)


def test_losses_ignore_what_is_padded():
    teacher, student = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    valid = torch.tensor([[False, True, True], [True, True, True]])
    labels = torch.where(valid, torch.full((2, 3), 4), IGNORE)
    parts = [TopK.of(teacher[0, 1:], 4), TopK.of(teacher[1], 4)]
    padded = TopK.pad(parts, 3)
    expected = divergence(
        student[:1, 1:], TopK(*(getattr(parts[0], n)[None] for n in ("ids", "logp", "rest"))), valid[:1, 1:]
    )
    expected = expected + divergence(
        student[1:], TopK(*(getattr(parts[1], n)[None] for n in ("ids", "logp", "rest"))), valid[1:]
    )
    torch.testing.assert_close(divergence(student, padded, valid), expected)
    assert cross_entropy(student, labels) == pytest.approx(
        float(-student.log_softmax(-1)[..., 4][valid].sum()), rel=1e-5
    )


def test_fidelity_of_the_teacher_itself_is_perfect():
    logits, tally = torch.randn(2, 3, 9), Tally()
    tally.add(logits, logits, torch.ones(2, 3, dtype=torch.bool))
    assert tally.result().kl == pytest.approx(0, abs=1e-6)
    assert (tally.result().agreement, tally.result().same_answers) == (1, 1)


@pytest.mark.parametrize("family", ["llama", "glm-interleaved"])
def test_teacher_decodes_as_the_engine_does(family):
    made = kit.engine(family=family)
    samples = kit.samples(3)
    prompts = [row_of(FULL, parts_of(made.text, s), torch.empty(0, dtype=torch.long)) for s in samples]
    full = made.with_strategy("full")
    expected = [full.answer(s.question, s.documents, max_new_tokens=7).tokens for s in samples]
    assert [tuple(a.tolist()) for a in generate(made.model, prompts, 7)] == expected


def test_teacher_stops_at_the_end_of_text():
    made = kit.engine()
    prompts = [row_of(FULL, parts_of(made.text, s), torch.empty(0, dtype=torch.long)) for s in kit.samples(2)]
    free = generate(made.model, prompts, 6)
    made.model.hf.generation_config.eos_token_id = [int(free[0][2])]
    stopped = generate(made.model, prompts, 6)
    assert stopped[0].tolist() == free[0].tolist()[: free[0].tolist().index(int(free[0][2])) + 1]


def test_targets_are_kept_on_disk(engine, tmp_path, monkeypatch):
    prompts = [parts_of(engine.text, s) for s in kit.samples(3)]
    first = Teacher(engine.model, tmp_path, 4, 8).targets(prompts)
    monkeypatch.setattr(Teacher, "_answer", lambda *_: pytest.fail("asked again"))
    again = Teacher(engine.model, tmp_path, 4, 8).targets(prompts)
    assert all(torch.equal(a.answer, b.answer) for a, b in zip(first, again, strict=True))
    top = first[0].top()
    assert top.ids[:, 0].tolist() == first[0].answer.tolist()
    torch.testing.assert_close(top.logp.exp().sum(-1) + top.rest.exp(), torch.ones(len(top.ids)))
