"""What may go wrong around a request: budgets, seats, damage, foreign documents, forged parameters, other features."""

from __future__ import annotations

import random
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_kit import DOCUMENTS, NEW, QUESTION, Reference, Served, document, receipt, same, tokens

from kvilt.engine.engine import Engine
from kvilt.types import Document


@pytest.fixture
def epic(reference: Reference, served: Served) -> Engine:
    """A strategy with holes, everything encoded."""
    engine = reference.engine("epic:tokens=17")
    engine.encode(DOCUMENTS)
    served.use("epic:tokens=17")
    return engine


@pytest.fixture
def steps(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is scheduled, step by step."""
    seen: list[Any] = []
    whole = type(served.scheduler).schedule

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = whole(self, *args, **kwargs)
        seen.append(dict(out.num_scheduled_tokens))
        return out

    monkeypatch.setattr(type(served.scheduler), "schedule", schedule)
    return seen


def wanted(engine: Engine, orders: list[list[int]]) -> list[Any]:
    """The engine's answers."""
    return [engine.answer(QUESTION, [DOCUMENTS[i] for i in o], max_new_tokens=NEW) for o in orders]


ORDERS = [[0, 1, 2], [3, 1], [2, 0, 3, 1], [1, 3], [2, 1], [3, 0]]


def test_holes_and_tail_take_one_step(reference: Reference, served: Served, epic: Engine, steps: list[Any]) -> None:
    """Danger: every hole costs a step of its own."""
    prompt = reference.prompt(epic, DOCUMENTS)
    assert same(served.ask([prompt])[0], wanted(epic, [[0, 1, 2, 3]])[0])
    first = next(s for s in steps if s)
    assert len(first) == 1 + len(DOCUMENTS)
    assert all(sum(s.values()) == 1 for s in steps[1:] if s)


@pytest.mark.parametrize(("budget", "seats"), [(2048, 64), (96, 64), (40, 64), (7, 64), (2048, 3), (50, 2), (9, 1)])
def test_steps_keep_their_budget(
    reference: Reference,
    served: Served,
    epic: Engine,
    steps: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    budget: int,
    seats: int,
) -> None:
    """Danger: virtual requests overflow vLLM's buffers, starve others, or are dropped where there is no room."""
    monkeypatch.setattr(served.scheduler, "max_num_scheduled_tokens", budget)
    monkeypatch.setattr(served.scheduler, "max_num_running_reqs", seats)
    monkeypatch.setattr(served.scheduler, "max_num_active_reqs", seats)
    prompts = [reference.prompt(epic, [DOCUMENTS[i] for i in o]) for o in ORDERS]
    plain = reference.prompt(epic, [document(70, 200)])
    answers = served.ask([*prompts, plain])
    assert [same(o, a) for o, a in zip(answers, wanted(epic, ORDERS), strict=False)] == [True] * len(ORDERS)
    assert max(sum(s.values()) for s in steps) <= budget
    assert max(len(s) for s in steps) <= seats
    assert not served.scheduler._parts
    assert not served.ends.tickets


def test_a_long_hole_is_computed_in_parts(
    reference: Reference, served: Served, epic: Engine, steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: a missing document that is longer than a step blocks the reuse of all that follow it."""
    monkeypatch.setattr(served.scheduler, "max_num_scheduled_tokens", 128)
    missing = document(71, 700)
    documents = [missing, DOCUMENTS[2], DOCUMENTS[1]]
    answer = served.ask([reference.prompt(epic, documents)])[0]
    alone = [Document(d.text, d.title, store=d is not missing) for d in documents]
    assert same(answer, epic.answer(QUESTION, alone, max_new_tokens=NEW))
    assert receipt(answer)["reused_tokens"] > 400
    assert max(sum(s.values()) for s in steps) <= 128


def test_an_aborted_request_gives_its_blocks_back(
    reference: Reference, served: Served, epic: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: a client that leaves while its holes are computed keeps memory for ever."""
    from vllm import SamplingParams

    monkeypatch.setattr(served.scheduler, "max_num_scheduled_tokens", 32)
    engine, free = served.llm.llm_engine, served.scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    before = free()
    prompt = reference.prompt(epic, [document(72, 300), *DOCUMENTS])
    engine.add_request(
        "leaver", {"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=4, detokenize=False)
    )
    engine.step()
    assert served.scheduler._parts
    engine.abort_request(["leaver"])
    for _ in range(4):
        engine.step()
    assert not served.scheduler._parts
    assert not served.scheduler.requests
    assert free() == before
    assert same(served.ask([reference.prompt(epic, DOCUMENTS)])[0], wanted(epic, [[0, 1, 2, 3]])[0])


def test_preempted_requests_are_planned_again(
    reference: Reference, served: Served, epic: Engine, steps: list[Any]
) -> None:
    """Danger: a request that lost its blocks goes on with rows that are no longer there."""
    prompts = [reference.prompt(epic, [DOCUMENTS[i] for i in o]) for o in ORDERS]
    whole, preempted = type(served.scheduler).update_from_output, []

    def update(self: Any, *args: Any) -> Any:
        result = whole(self, *args)
        if len(steps) % 3 == 2 and self.running:
            request = self.running.pop()
            self._preempt_request(request, 0.0)
            preempted.append(request.request_id)
        return result

    type(served.scheduler).update_from_output = update
    try:
        answers = served.ask(prompts)
    finally:
        type(served.scheduler).update_from_output = whole
    assert preempted
    assert [same(o, a) for o, a in zip(answers, wanted(epic, ORDERS), strict=True)] == [True] * len(ORDERS)


def damage(place: Path, digest: str) -> None:
    """Alter one byte of a stored document's last layer."""
    file = next(f for f in (place / "store").rglob(f"*{digest}*") if f.is_file())
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("strategy", ["epic:tokens=17", "kv_packet:wrapper=PACKET", "random:ratio=0.3"])
def test_damage_found_while_loading(place: Path, reference: Reference, served: Served, strategy: str) -> None:
    """Danger: a request is answered from half a document, or the engine dies of one bad file."""
    strategy = strategy.replace("PACKET", str(place / "packet.safetensors"))
    engine, bad = reference.engine(strategy), document(80, 210)
    engine.encode([*DOCUMENTS, bad])
    damage(place, engine.encoder.items([bad])[0].key.digest)
    served.use(strategy)
    documents = [DOCUMENTS[0], bad, DOCUMENTS[3]]
    hurt, sound = served.ask([reference.prompt(engine, documents), reference.prompt(engine, DOCUMENTS)])
    assert same(sound, wanted(engine, [[0, 1, 2, 3]])[0])
    alone = [Document(d.text, d.title, store=d is not bad) for d in documents]
    assert same(hurt, engine.answer(QUESTION, alone, max_new_tokens=NEW))  # planned again without it
    assert receipt(hurt)["misses"] >= 1
    served.ends._failing.clear()
    again = served.ask([reference.prompt(engine, documents)])[0]  # the bad one is out of service for good
    assert same(again, engine.answer(QUESTION, alone, max_new_tokens=NEW))


def test_vllms_own_policy_is_kept(
    place: Path, reference: Reference, served: Served, epic: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: an operator who wants such requests to fail gets answers."""
    bad = document(81, 210)
    epic.encode([bad])
    damage(place, epic.encoder.items([bad])[0].key.digest)
    served.look()
    monkeypatch.setattr(served.scheduler, "recompute_kv_load_failures", False)
    failed, sound = served.ask([reference.prompt(epic, [DOCUMENTS[0], bad]), reference.prompt(epic, DOCUMENTS)])
    assert failed.outputs[0].finish_reason == "error"
    assert not tokens(failed)
    assert same(sound, wanted(epic, [[0, 1, 2, 3]])[0])


def test_a_store_that_goes_away(
    reference: Reference, served: Served, epic: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: an unreachable store stops requests that could be computed."""
    from kvilt.errors import StoreUnavailable

    def gone(keys: Any) -> Any:
        raise StoreUnavailable("the network is down")

    prompt = reference.prompt(epic, DOCUMENTS)
    with monkeypatch.context() as patch:
        patch.setattr(served.ends.deployment.store, "get_many", gone)
        answer = served.ask([prompt])[0]
    assert "network is down" in receipt(answer)["why"]
    assert same(answer, reference.engine("full").answer(QUESTION, DOCUMENTS, max_new_tokens=NEW))


def test_another_tenants_documents_are_not_found(reference: Reference, served: Served, epic: Engine) -> None:
    """Danger: one tenant's text speeds up, and so reveals itself to, another."""
    mine = Engine(epic.model, epic.text, epic.strategy, epic.store, namespace="tenant-a")
    secret = [document(90, 150), document(91, 120)]
    mine.encode(secret)
    served.look()
    prompt = reference.prompt(epic, secret)
    assert not receipt(served.ask([prompt])[0])
    hint = {"documents": [[len(epic.text.system_ids()), len(prompt) - 40, "x", 0]]}
    assert not receipt(served.ask([prompt], hints=[hint])[0]).get("hits")
    own = served.llm.generate(
        [{"prompt_token_ids": prompt, "cache_salt": "tenant-a"}], served.greedy(), use_tqdm=False
    )[0]
    assert receipt(own)["hits"] == 2
    assert same(own, mine.answer(QUESTION, secret, max_new_tokens=NEW))


FORGED: list[Any] = [
    {"documents": "all"},
    {"documents": [[0, 10]]},
    {"documents": [[0, 10, "a", 0], [5, 20, "b", 0]]},
    {"documents": [[10, 5, "a", 0]]},
    {"documents": [[0, 10**9, "a", 0]]},
    {"documents": [[-5, 20, "a", 0]]},
    {"documents": [[True, 20, "a", 0]]},
    {"documents": [["0", 20, "a", 0]]},
    {"documents": [[0, 20, "a", -1]]},
    {"documents": [[0, 20, None, 0]]},
    {"documents": [{"start": 0}]},
    {"segments": [["ff" * 32, 0, 10]]},
    [1, 2],
    "plan",
    {"documents": [[i, i + 1, "x", 0] for i in range(500)]},
]


def test_forged_parameters_change_nothing(reference: Reference, served: Served, epic: Engine) -> None:
    """Danger: a client that writes our parameter by hand crashes the engine or reads what is not its own."""
    prompt = reference.prompt(epic, DOCUMENTS)
    plain = reference.engine("full").answer(QUESTION, DOCUMENTS, max_new_tokens=NEW)
    for forged in FORGED:
        answer = served.ask([prompt], hints=[forged])[0]
        assert same(answer, plain), forged


def test_random_places_never_crash(reference: Reference, served: Served, epic: Engine) -> None:
    """Danger: some layout of documents that nobody thought of ends the engine."""
    made = random.Random(4)
    prompt = reference.prompt(epic, DOCUMENTS)
    hints = []
    for _ in range(12):
        cuts = sorted(made.sample(range(len(prompt) + 1), 8))
        hints.append({"documents": [[a, b, "", 0] for a, b in zip(cuts[::2], cuts[1::2], strict=True)]})
    assert all(len(tokens(o)) == NEW for o in served.ask([prompt] * 12, hints=hints))


def test_prompt_logprobs_need_every_token(reference: Reference, served: Served, epic: Engine) -> None:
    """Danger: log-probabilities of tokens that were never computed."""
    answer = served.ask([reference.prompt(epic, DOCUMENTS)], prompt_logprobs=1)[0]
    assert "prompt_logprobs" in receipt(answer)["why"]
    assert len(answer.prompt_logprobs) == len(reference.prompt(epic, DOCUMENTS))
    assert same(answer, reference.engine("full").answer(QUESTION, DOCUMENTS, max_new_tokens=NEW))


def test_adapters_have_no_documents(served: Served, epic: Engine) -> None:
    """Danger: rows of the base model answer for an adapter."""
    from kvilt.integrations.vllm.scheduling import _unsuitable

    request = types.SimpleNamespace(prompt_token_ids=[1], lora_request=object(), mm_features=[])
    request.pooling_params = request.prompt_embeds = None
    request.skip_reading_prefix_cache = request.resumable = False
    assert "adapter" in _unsuitable(request)
    request.lora_request = None
    assert not _unsuitable(request)


def test_resetting_the_prefix_cache(reference: Reference, served: Served, epic: Engine) -> None:
    """Danger: after a reset composed requests find half of their rows."""
    prompt, answer = reference.prompt(epic, DOCUMENTS), wanted(epic, [[0, 1, 2, 3]])[0]
    for _ in range(3):
        again = served.ask([prompt])[0]
        assert same(again, answer)
        assert receipt(again)["cached_tokens"] == 0
        assert served.llm.reset_prefix_cache(reset_connector=True)


def test_cached_tokens_are_reused_rows_alone(reference: Reference, served: Served, epic: Engine) -> None:
    """Danger: holes are reported, and billed, as cached."""
    prompt = reference.prompt(epic, DOCUMENTS)
    served.llm.reset_prefix_cache()
    answer = served.ask([prompt])[0]
    report = receipt(answer)
    assert answer.num_cached_tokens == report["reused_tokens"] == len(prompt) - report["computed_tokens"]
    assert report["computed_tokens"] == 17 * len(DOCUMENTS) + len(epic.text.question_ids(QUESTION))
    assert report["bytes"] > 0
    assert 0 < report["seconds"] < 5
    assert 0 < report["charged"] < 1


def test_sampling_features_work_with_holes(reference: Reference, served: Served, epic: Engine) -> None:
    """Danger: logprobs, seeds, penalties or several answers meet virtual requests and break."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": reference.prompt(epic, DOCUMENTS)}
    params = [
        SamplingParams(temperature=0.0, max_tokens=5, logprobs=3),
        SamplingParams(temperature=1.0, seed=7, max_tokens=5, n=3),
        SamplingParams(temperature=1.0, seed=7, max_tokens=5, n=3),
        SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.2, min_tokens=3, max_tokens=5),
    ]
    answers = served.llm.generate([prompt] * 4, params, use_tqdm=False)
    assert len(answers[0].outputs[0].logprobs) == 5
    first, second = ([tuple(o.token_ids) for o in a.outputs] for a in answers[1:3])
    assert first == second


def test_vllms_own_scheduler_serves_what_needs_no_holes(
    reference: Reference, served: Served, epic: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: without --scheduler-cls rows are loaded again and again, or holes stay empty."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    monkeypatch.setattr(type(served.scheduler), "schedule", AsyncScheduler.schedule)
    monkeypatch.setattr(served.ends, "grants", None)
    prompt = reference.prompt(epic, DOCUMENTS)
    assert "scheduler-cls" in receipt(served.ask([prompt])[0])["why"]
    served.use("block:sink=system")
    block = reference.engine("block:sink=system")
    block.encode(DOCUMENTS)
    served.look()
    loads: list[int] = []
    loader = served.scheduler.connector.ends.load
    monkeypatch.setattr(served.ends, "load", lambda *a: (loads.append(1), loader(*a))[1])
    answer = served.ask([reference.prompt(block, DOCUMENTS)])[0]
    assert same(answer, block.answer(QUESTION, DOCUMENTS, max_new_tokens=NEW))
    assert len(loads) == 1


@pytest.fixture(autouse=True)
def _clean(served: Served) -> Iterator[None]:
    """Nothing is left over from a test."""
    served.llm.reset_prefix_cache()
    served.ends._failing.clear()
    yield
    served.llm.reset_prefix_cache()
    assert not served.ends.tickets
    assert not served.scheduler.requests
