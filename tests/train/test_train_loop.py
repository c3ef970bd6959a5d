"""The one loop: killed, resumed, extended, stopped early, broken, shared by processes; for vectors and for weights alike."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_kit as kit
from safetensors.torch import load_file

from kvilt.errors import TrainError
from kvilt.lab.train import checkpoint, loop
from kvilt.lab.train.kvlink import train_kvlink
from kvilt.lab.train.loop import Loop, Progress, Settings
from kvilt.lab.train.losses import Fidelity
from kvilt.lab.train.packet import train_packet
from kvilt.lab.train.teacher import Teacher

Work = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(params=["packet", "kvlink"])
def train(request, model_dir) -> Work:
    """Either training: (out, on_progress, **settings) to what was learned."""

    def packet(out: Path, report=lambda _: None, **settings):
        train_packet(kit.engine(), kit.samples(), replace(kit.QUICK, **settings), out, None, report)
        return load_file(out / "wrapper.safetensors")

    def kvlink(out: Path, report=lambda _: None, **settings):
        train_kvlink(str(model_dir), kit.samples(), replace(kit.LINKED, **settings), out, None, report)
        return load_file(out / "model.safetensors")

    return packet if request.param == "packet" else kvlink


def test_killed_resumed_and_extended(train, tmp_path, monkeypatch):
    """Danger: a run that was killed ends elsewhere; one that is continued begins anew, or asks the teacher again."""
    kit.killed(lambda report: train(tmp_path / "killed", report), at=3)
    assert not list((tmp_path / "killed").glob("*.safetensors"))
    seen: list[Progress] = []
    resumed, whole = train(tmp_path / "killed", seen.append), train(tmp_path / "whole")
    assert [p.step for p in seen if p.stage == "train"] == [2, 3, 4]  # where it goes on, and two steps
    assert kit.same(resumed, whole)
    asked = []
    real = Teacher._answer
    monkeypatch.setattr(Teacher, "_answer", lambda teacher, prompts: (asked.extend(prompts), real(teacher, prompts)))
    before = {file.stem for file in (tmp_path / "whole").rglob("teacher/*")}
    longer = train(tmp_path / "whole", seen.append, steps=8)
    assert seen[-1].step == 8
    assert not kit.same(longer, whole)
    assert {file.stem for file in (tmp_path / "whole").rglob("teacher/*")} >= before
    assert len(set(asked)) <= 8 * 2 - 4 * 2  # samples x views at most, less what was known
    monkeypatch.setattr(Loop, "_step", lambda _: pytest.fail("trained again"))
    assert kit.same(train(tmp_path / "whole", steps=8), longer)  # a finished run only hands over its result


def test_progress_and_an_estimate_before_the_work(train, tmp_path):
    """Danger: minutes without a word, and nobody knows whether it takes a minute or a night."""
    seen: list[Progress] = []
    train(tmp_path, seen.append)
    first = next(p for p in seen if p.left == p.left)
    assert (first.stage, first.step) in (("teacher", 0), ("train", 0))
    assert first.left > 0
    assert [p.step for p in seen if p.stage == "train"] == [0, 1, 2, 3, 4]
    assert seen[-1].left == 0
    assert isinstance(seen[-1].held_out, Fidelity)


def test_a_folder_of_another_run_is_refused_and_settings_that_change_nothing_are_not(train, tmp_path):
    """Danger: a checkpoint of other data or settings is continued; or a larger micro-batch costs the whole run."""
    train(tmp_path, steps=2)
    with pytest.raises(TrainError, match=r"belongs to another run: lr was .*, is 0\.1"):
        train(tmp_path, lr=0.1)
    train(tmp_path, steps=2, micro_batch=1, patience=9, checkpointing=True)
    (tmp_path / "training" / "checkpoint.safetensors").write_bytes(b"broken")
    with pytest.raises(TrainError, match="is not readable"):
        train(tmp_path, steps=2)


def test_early_stopping_keeps_the_best(train, tmp_path, monkeypatch):
    """Danger: what is written is the last step, or the best one of another measure."""
    results, kept = iter([5.0, 3.0, 1.0, 2.0, 4.0, 9.0]), {}
    real = loop.checkpoint.save

    def save(folder, state, parameters, optimizers):
        kept[state.step] = {k: v.detach().clone() for k, v in parameters.items()}
        real(folder, state, parameters, optimizers)

    monkeypatch.setattr(loop, "fidelity", lambda sums: Fidelity(next(results), 0.0, 0.0))
    monkeypatch.setattr(loop.checkpoint, "save", save)
    made = train(tmp_path, steps=40, patience=2)
    assert max(kept) == 8
    best = load_file(tmp_path / "training" / "best-4.safetensors")
    assert kit.same(best, kept[4])
    assert all(torch.equal(made[n], best[n]) for n in made)
    assert len(list((tmp_path / "training").glob("best-*"))) == 1


@pytest.mark.parametrize("broken", ["loss", "held-out"])
def test_a_broken_loss_stops_and_keeps_the_last_good_step(train, tmp_path, monkeypatch, broken):
    """Danger: one loss that is no number spoils the weights, and the checkpoint with them."""
    name = "objective" if broken == "loss" else "tally"
    real, calls = getattr(loop, name), []

    def breaking(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) > (4 if broken == "loss" else 2) else 1.0)

    monkeypatch.setattr(loop, name, breaking)
    with pytest.raises(TrainError, match="not a number"):
        train(tmp_path)
    monkeypatch.setattr(loop, name, real)
    assert kit.same(train(tmp_path), train(tmp_path / "whole"))


def test_checkpoints_between_held_out_results(train, tmp_path, monkeypatch):
    """Danger: a night's work is lost because the next held-out result is hours away."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    kit.killed(lambda report: train(tmp_path, report, evaluate_every=100), at=3)
    assert checkpoint.steps_done(tmp_path / "training") == 3


def test_muon_and_adamw_go_on_where_they_stopped(model_dir, tmp_path):
    """Danger: the state of one of two optimisers is lost, or the schedule moves but one of both."""
    settings = replace(kit.LINKED, optimizer="muon", batch=2)

    def train(out, report=lambda _: None, **more):
        train_kvlink(str(model_dir), kit.samples(), replace(settings, **more), out, None, report)
        return load_file(out / "model.safetensors")

    kit.killed(lambda report: train(tmp_path / "killed", report), at=3)
    resumed, seen = train(tmp_path / "killed"), []
    assert kit.same(resumed, train(tmp_path / "whole", seen.append))
    before = load_file(model_dir / "model.safetensors")
    assert all(not torch.equal(before[n], resumed[n]) for n in before)
    assert kit.same(train(tmp_path / "still", steps=2, lr=0.0), before)  # one rate for both


@pytest.mark.parametrize("schedule", loop.SCHEDULES)
def test_rates(schedule):
    """Danger: the rate is still high at the end, or negative, or no number without a warm-up."""
    c = Settings(schedule=schedule, warmup=0.1, steps=100)
    rates = [c.rate(step) for step in range(100)]
    assert rates[0] == 0
    assert rates[5] == 0.5
    assert max(rates) == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[-1] < 0.02) == (schedule != "constant")
    assert replace(c, warmup=0.0, steps=1).rate(0) == 1


def _one_of_two(rank: int, port: int, model: str, out: Path) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    train_kvlink(model, kit.samples(), kit.LINKED, out)


def test_two_processes_train_as_one(model_dir, tmp_path):
    """Danger: gradients are averaged instead of added, a process trains on the other's samples, or both write."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    several = multiprocessing.get_context("fork")
    workers = [several.Process(target=_one_of_two, args=(r, port, str(model_dir), tmp_path / "two")) for r in (0, 1)]
    for worker in workers:
        worker.start()
    one = train_kvlink(str(model_dir), kit.samples(), kit.LINKED, tmp_path / "one")
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0]
    alone, shared = (load_file(out / "model.safetensors") for out in (one, tmp_path / "two"))
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-5)
    losses = [
        json.loads(checkpoint.read(out / "training" / "checkpoint.safetensors")[1]["state"])["losses"]
        for out in (one, tmp_path / "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
