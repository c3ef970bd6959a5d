"""What is trained is what is run; batches, losses, and memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import train_kit as kit

import zoo
from kvilt.engine.engine import Engine
from kvilt.errors import TrainError
from kvilt.lab.train.data import Further, Sample
from kvilt.lab.train.dense import ASKED, ENCODED, IGNORE, additive, collate, logits_of, merged, parts_of, row_of
from kvilt.lab.train.losses import TopK, cross_entropy, divergence, fidelity, objective, tally
from kvilt.lab.train.teacher import FULL, Teacher, generate
from kvilt.lab.train.trained import LowRank, Vectors, Weights, optimizers, projections, training
from kvilt.rows.adapter import save
from kvilt.strategies.anchors import Anchors
from kvilt.strategies.kv_packet import KVPacket
from kvilt.strategies.kvlink import KVLink, LinkTokens
from kvilt.strategies.linked_packet import LinkedPacket
from kvilt.strategies.wrapper import Wrapper
from kvilt.strategies.writer import QueryLoRA, Writer

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
    """Danger: what is trained is not what is run."""
    made, strategy = kit.shared(family), strategies()[name]
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
    """Danger: a layout for other engines has computed tokens between reused ones."""
    parts = parts_of(engine.text, kit.samples(1)[0])
    assert parts.plan(strategies()["tail"]).is_suffix
    assert not parts.plan(strategies()["slots"]).is_suffix


def test_plain_text_is_ordinary_language_modelling(engine):
    """Danger: the first token of a text is learned from nothing, or twice."""
    from kvilt.lab.train.kinds import text

    parts = parts_of(engine.text, text({"text": "Once upon a time"}, "here"))
    rows = [row_of(strategies()["kvlink"], parts, parts.answer[:n]) for n in (None, 6)]
    batch = collate(rows)
    with torch.no_grad():
        loss = objective(Weights(engine.model).logits(batch), batch.labels, None)
        logits = engine.model.hf(input_ids=rows[0].tokens[None]).logits[0]
    first = torch.nn.functional.cross_entropy(logits, rows[0].labels, reduction="sum")
    second = torch.nn.functional.cross_entropy(logits[:6], rows[1].labels, reduction="sum")
    torch.testing.assert_close(loss, first + second, rtol=1e-4, atol=1e-4)


def test_markers_of_control_in_an_answer_are_ordinary_text(engine):
    """Danger: a model learns to end its turn, or to speak as somebody else, because an answer quotes a marker."""
    (sample,) = kit.samples(1)
    ids = parts_of(engine.text, replace(sample, answers=("say <|user|>",))).answer.tolist()
    assert ids[-1] == zoo.SPECIAL.index("</s>")
    assert all(i >= len(zoo.SPECIAL) for i in ids[:-1])


def test_roles_tell_documents_from_what_is_computed(engine):
    """Danger: a writer's adapter acts on the system part or the question, or a query's on the documents."""
    strategy, parts = strategies()["slots"], parts_of(engine.text, kit.samples(1)[0])
    row = row_of(strategy, parts, torch.arange(100, 103))
    assert row.roles[: len(parts.system)].eq(0).all()
    encoded = row.tokens[row.roles == ENCODED]
    own = encoded[encoded >= 0]  # without header and trailer
    assert torch.equal(own, torch.cat(parts.documents))
    asked = row.tokens[row.roles == ASKED]  # link vectors are computed, too, but nobody asks them
    assert torch.equal(asked, torch.cat([parts.question, torch.arange(100, 102)]))
    together = merged([row, row_of(strategy, parts, torch.arange(100, 105))])
    assert together.roles.tolist().count(ENCODED) == row.roles.tolist().count(ENCODED)
    assert collate([row, together]).roles[0, -len(row.roles) :].equal(row.roles)


def test_padding_sees_itself_and_changes_nothing(engine):
    """Danger: padding reaches an answer, or gives rows that are no numbers."""
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
    """Danger: a hidden place is only unlikely."""
    assert additive(torch.tensor([True, False]), torch.float32).tolist() == [0.0, float("-inf")]


def test_probing_strategies_cannot_be_trained(engine):
    """Danger: a plan that depends on the weights is trained as if it did not."""

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
    weights = {p.untyped_storage().data_ptr() for p in engine.model.hf.parameters()}
    trained = Vectors(engine.model, {"vectors": strategy.encoding.learned})
    with training(trained, checkpointing), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        trained.logits(collate(rows)).sum()
    return sum(size for pointer, size in seen.items() if pointer not in weights)


def test_activation_checkpointing_saves_memory_and_changes_no_gradient(engine):
    """Danger: less memory at the price of other gradients."""
    assert saved_bytes(engine, True) < 0.5 * saved_bytes(engine, False)
    gradients = []
    for checkpointing in (False, True):
        strategy = strategies()["slots"]
        row = row_of(strategy, parts_of(engine.text, kit.samples(1)[0]), torch.arange(100, 103))
        trained = Vectors(engine.model, {"vectors": strategy.encoding.learned})
        with training(trained, checkpointing):
            trained.logits(collate([row])).square().mean().backward()
            gradients.append(trained.parameters["vectors"].grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(p.requires_grad and p.grad is None for p in engine.model.hf.parameters())
    assert not engine.model.hf.training


@pytest.mark.parametrize("where", ["all", "encoded", "asked"])
def test_low_rank_additions_act_where_they_should_and_nowhere_else(where):
    """Danger: a frozen reader is adapted, too, or stored documents depend on an adapter of queries."""
    made = kit.engine()
    strategy, parts = KVLink(0), parts_of(made.text, kit.samples(1)[0])
    row = row_of(strategy, parts, torch.arange(100, 103))
    seen = {}
    adapted = LowRank(made.model, 2, only=("q_proj", "v_proj") if where != "asked" else ("q_proj",), where=where)
    projection = made.model.hf.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda module, inputs, output: seen.update(q=output))
    assert {n.rpartition(".")[2] for n in adapted.parameters} == {"A", "B"}
    with torch.no_grad():
        before = adapted.logits(collate([row]))
        plain = seen["q"].clone()
        for name, value in adapted.parameters.items():
            if name.endswith("B"):
                value.normal_()
        after = adapted.logits(collate([row]))
    assert not torch.allclose(before, after)
    wanted = {"all": row.roles >= 0, "encoded": row.roles == ENCODED, "asked": row.roles == ASKED}[where]
    changed = (seen["q"] - plain).abs().amax(-1)[0] > 0
    assert seen["q"].shape == plain.shape
    assert torch.equal(changed, wanted)


@pytest.mark.parametrize("where", ["encoded", "asked"])
def test_low_rank_additions_are_served_as_they_were_trained(where, tmp_path):
    """Danger: an adapter acts on other tokens, layers or sides when it is served; or with another scale."""
    made = kit.engine()
    served = Writer() if where == "encoded" else QueryLoRA()
    sample = kit.samples(1)[0]
    row = row_of(served, parts_of(made.text, sample), torch.arange(100, 103))
    adapted = LowRank(made.model, 2, only=("q_proj", "down_proj"), where=where)
    with torch.no_grad():
        for value in adapted.parameters.values():
            value.normal_(std=0.2)
        trained = adapted.logits(collate([row]))[0]
    file = tmp_path / "adapter.safetensors"
    save(adapted.adapter(), file)
    adapted.release()
    engine = made.with_strategy(type(served)(adapter=str(file)))
    scored = engine.score(sample.question, sample.documents, [100, 101, 102])
    torch.testing.assert_close(trained, scored, rtol=0.02, atol=0.02 * float(scored.abs().max()))  # int8
    plain = made.with_strategy("block").score(sample.question, sample.documents, [100, 101, 102])
    assert (trained - plain).abs().max() > 10 * (trained - scored).abs().max()


def test_low_rank_additions_and_token_rows_merge_into_what_was_trained():
    """Danger: the merged model is another one than the one that was trained; or learned rows of tokens are lost."""
    made = kit.engine()
    strategy, parts = strategies()["kvlink"], parts_of(made.text, kit.samples(1)[0])
    batch = collate([row_of(strategy, parts, torch.arange(100, 103))])
    untouched = made.model.hf.get_input_embeddings().weight.clone()
    adapted = LowRank(made.model, 3, ids=sorted(TOKENS.every))
    with training(adapted), torch.no_grad():
        for value in adapted.parameters.values():
            value.normal_(std=0.05)
        trained = adapted.logits(batch)
    adapted.merge()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(made.model, batch), trained, rtol=1e-3, atol=1e-3)
    still = [i for i in range(len(untouched)) if i not in TOKENS.every]
    assert torch.equal(made.model.hf.get_input_embeddings().weight[still], untouched[still])


def test_muon_divides_the_parameters(monkeypatch):
    """Danger: embeddings or rows of them are made orthogonal, or a parameter has no optimiser or two."""
    made = kit.engine()
    for trained in (Weights(made.model), LowRank(made.model, 2, ids=[5, 6])):
        adamw, muon = optimizers("muon", trained, 1e-3)
        held = [{id(p) for group in part.param_groups for p in group["params"]} for part in (adamw, muon)]
        assert held[0] | held[1] == {id(p) for p in trained.parameters.values()}
        assert not held[0] & held[1]
    assert held[0] == {id(trained.parameters["rows"])}
    inside = projections(made.model.hf)
    assert len(inside) == 4 * 7
    assert "lm_head" not in inside
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(TrainError, match=r"torch 2\.9"):
        optimizers("muon", trained, 1e-3)


def test_top_k_approaches_the_full_divergence_from_below():
    """Danger: what is outside the top k counts twice."""
    teacher, student = 4 * torch.randn(2, 5, 300), 4 * torch.randn(2, 5, 300)
    valid = torch.ones(2, 5, dtype=torch.bool)
    full = float((teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum())
    close = [float(divergence(student, TopK.of(teacher, k), valid)) for k in (1, 8, 64, 300)]
    assert close == sorted(close)
    assert close[-1] == pytest.approx(full, rel=1e-5)
    assert close[2] == pytest.approx(full, rel=0.02)
    assert float(divergence(teacher, TopK.of(teacher, 8), valid)) == pytest.approx(0, abs=1e-5)


def test_losses_ignore_what_is_padded():
    """Danger: a short answer is learned from padding."""
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


def test_fidelity():
    """Danger: a student that is its teacher does not look like it, or padding counts."""
    logits, labels = torch.randn(2, 3, 9), torch.tensor([[IGNORE, 1, 2], [3, 4, 5]])
    same = fidelity(tally(logits, labels, TopK.of(logits, 9)))
    assert same.loss == pytest.approx(0, abs=1e-6)
    assert (same.agreement, same.same_answers) == (1, 1)
    sure = 50.0 * torch.nn.functional.one_hot(labels.clamp(min=0), 9).float()
    sure[1, 2] = sure[1, 2].roll(1)
    told = fidelity(tally(sure, labels, None))
    assert told.loss == pytest.approx(50 / 5, rel=1e-3)
    assert (told.agreement, told.same_answers) == (0.8, 0.5)


@pytest.mark.parametrize("family", ["llama", "glm-interleaved"])
def test_teacher_decodes_as_the_engine_does(family):
    """Danger: the student learns other answers than its model gives."""
    made = kit.shared(family)
    samples = kit.samples(3)
    prompts = [row_of(FULL, parts_of(made.text, s), torch.empty(0, dtype=torch.long)) for s in samples]
    full = made.with_strategy("full")
    expected = [full.answer(s.question, s.documents, max_new_tokens=7).tokens for s in samples]
    assert [tuple(a.tolist()) for a in generate(made.model, prompts, 7)] == expected


def test_teacher_stops_at_the_end_of_text():
    """Danger: what a model says after its end is learned, too."""
    made = kit.engine()
    prompts = [row_of(FULL, parts_of(made.text, s), torch.empty(0, dtype=torch.long)) for s in kit.samples(2)]
    free = generate(made.model, prompts, 6)
    made.model.hf.generation_config.eos_token_id = [int(free[0][2])]
    stopped = generate(made.model, prompts, 6)
    assert stopped[0].tolist() == free[0].tolist()[: free[0].tolist().index(int(free[0][2])) + 1]


@pytest.mark.parametrize("own", [True, False])
def test_targets_are_kept_on_disk_whatever_they_were_asked_with(engine, tmp_path, monkeypatch, own):
    """Danger: prompts that were answered are asked again in a longer run, or get another prompt's answer."""
    prompts = [parts_of(engine.text, s) for s in kit.samples(5)]
    heard = []
    first = Teacher(engine.model, tmp_path, 4, 8, own).targets(prompts[:3], lambda *p: heard.append(p))
    assert heard[0][0] == 0
    assert heard[-1][0] == heard[-1][1] == sum(p.size for p in prompts[:3])
    asked, real = [], Teacher._answer
    monkeypatch.setattr(Teacher, "_answer", lambda self, some: (asked.extend(some), real(self, some)))
    again = Teacher(engine.model, tmp_path, 4, 8, own).targets(prompts[::-1], lambda *_: None)[::-1]
    assert {p.digest for p in asked} == {p.digest for p in prompts[3:]}
    assert all(torch.equal(a.answer, b.answer) for a, b in zip(first, again, strict=False))
    for target, parts in zip(again, prompts, strict=True):
        top = target.top()
        if own:
            assert top.ids[:, 0].tolist() == target.answer.tolist()
        else:
            assert torch.equal(target.answer, parts.answer[:4])
        logits = logits_of(engine.model, collate([row_of(FULL, parts, target.answer)]))[0]
        torch.testing.assert_close(top.logp, TopK.of(logits, 8).logp, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(top.logp.exp().sum(-1) + top.rest.exp(), torch.ones(len(top.ids)))
