"""kvilt train."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import train_kit as kit

from cli_kit import data, error, run
from kvilt.cli import lab, talk
from kvilt.lab.train.kvlink import KVLinkConfig
from kvilt.lab.train.packet import PacketConfig
from kvilt.strategies.wrapper import Wrapper


def settings(config: object, *names: str) -> list[str]:
    return [part for n in names for part in ("--set", f"{n}={getattr(config, n)}")]


QUICK = settings(
    kit.QUICK, "header", "trailer", "steps", "batch", "micro_batch", "answer_tokens", "evaluate_every", "held_out"
)


@pytest.mark.parametrize("verb", ["packet", "linked-packet"])
def test_wrappers(model_dir, tmp_path, verb, monkeypatch):
    """Danger: the verb trains something else than it says, or nothing is heard of it."""
    monkeypatch.setattr(talk, "LINE_SECONDS", 0.0)
    file = kit.write(tmp_path / "a.jsonl", kit.rows())
    out = ("train", verb, "--model", model_dir, "--out", tmp_path / "out", *QUICK)
    said = run(*out, f"{file}@2", f"qa:{file}@1")
    assert f"wrapper: {tmp_path / 'out' / 'wrapper.safetensors'}" in said.stdout
    lines = [line for line in said.stderr.splitlines() if line.startswith("training: ")]
    assert any("left in all" in line for line in lines)
    assert "train 4 of 4" in lines[-1]
    again = data(*out, f"{file}@2", f"qa:{file}@1")
    assert Wrapper.load(again["wrapper"]).links is None or verb == "linked-packet"
    assert again["best"]["loss"] >= 0


@pytest.mark.parametrize("verb", ["writer", "query-lora"])
def test_adapters(model_dir, tmp_path, verb):
    """Danger: what a verb trains is not what its strategy loads."""
    file, out = kit.write(tmp_path / "a.jsonl", kit.rows()), tmp_path / "out"
    vectors = settings(kit.QUICK, "header", "trailer") if verb == "writer" else []
    own = settings(kit.QUICK, "steps", "batch", "micro_batch", "answer_tokens", "evaluate_every", "held_out")
    made = data("train", verb, "--model", model_dir, "--out", out, *vectors, *own, "--set", "rank=2", file)
    spec = f"{verb.replace('-', '_')}:" + ",".join(f"{n}={made[n]}" for n in ("adapter", "wrapper") if n in made)
    assert ("wrapper" in made) == (verb == "writer")
    docs = kit.write(tmp_path / "d.jsonl", [{"text": "oak 1"}, {"text": "elm 2"}])
    asked = ("ask", "Which?", "--model", model_dir, "--docs", docs, "--max-new-tokens", "2", "--store", "memory")
    assert data(*asked, "--strategy", spec)["usage"]["reused_tokens"] > 0


def test_kvlink(model_dir, tmp_path):
    """Danger: held-out data or a setting of the command line does not arrive."""
    file, tests = kit.write(tmp_path / "a.jsonl", kit.rows()), kit.write(tmp_path / "b.jsonl", kit.rows(12)[8:])
    own = settings(kit.LINKED, "links", "slots", "steps", "batch", "micro_batch", "evaluate_every", "max_tokens")
    made = run("train", "kvlink", "--model", model_dir, "--out", tmp_path / "out", "--held-out", tests, *own, file)
    assert f"checkpoint: {tmp_path / 'out'}" in made.stdout
    assert (tmp_path / "out" / "kvlink.json").is_file()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepz=3", "Did you mean 'steps'"),
        ("steps", "key=value"),
        ("steps=many", "wants int"),
        ("checkpointing=maybe", "wants bool"),
        ("optimizer=sgd", "bad setting: optimizer"),
    ],
)
def test_bad_settings(model_dir, tmp_path, setting, message):
    """Danger: a typing mistake is a run of hours with other settings."""
    file = kit.write(tmp_path / "a.jsonl", kit.rows())
    assert message in error("train", "packet", "--model", model_dir, "--out", tmp_path / "out", "--set", setting, file)


def test_values_of_every_type():
    """Danger: words to start from lose their leading space, or the first of two values of a setting counts."""
    given = [
        "checkpointing=yes",
        "lr=1e-2",
        "systems=a|b",
        "steps=9",
        "steps=7",
        "schedule=linear",
        "init= She| lives in",
    ]
    made = lab.configured(KVLinkConfig, given)
    assert (made.checkpointing, made.lr, made.systems) == (True, 0.01, ("a", "b"))
    assert (made.steps, made.schedule, made.init) == (7, "linear", (" She", " lives in"))


@pytest.mark.parametrize("config", [PacketConfig, KVLinkConfig])
def test_every_setting_is_documented(config):
    """Danger: a setting that nobody knows of."""
    told = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    assert [f.name for f in fields(config) if f"`{f.name}`" not in told] == []
