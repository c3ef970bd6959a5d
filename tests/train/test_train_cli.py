"""kvilt train."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest
import train_kit as kit
from typer.testing import CliRunner

from kvilt.errors import TrainError
from kvilt.lab.train import cli
from kvilt.strategies.wrapper import Wrapper


def run(*arguments: object):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def settings(config: object, *names: str) -> list[str]:
    return [part for n in names for part in ("--set", f"{n}={getattr(config, n)}")]


QUICK = settings(
    kit.QUICK, "header", "trailer", "steps", "batch", "micro_batch", "answer_tokens", "evaluate_every", "held_out"
)


@pytest.mark.parametrize("verb", ["packet", "linked-packet"])
def test_wrappers(model_dir, tmp_path, verb):
    data = kit.write(tmp_path / "a.jsonl", kit.rows())
    result = run(verb, "--model", model_dir, "--out", tmp_path / "out", "--json", *QUICK, f"{data}@2", f"qa:{data}@1")
    said = json.loads(result.stdout)
    assert Wrapper.load(said["wrapper"]).links is None or verb == "linked-packet"
    assert said["best"]["loss"] >= 0
    assert "train 4/4" in result.stderr
    assert " left" in next(line for line in result.stderr.splitlines() if line.startswith(("teacher", "train")))


def test_kvlink(model_dir, tmp_path):
    data, tests = kit.write(tmp_path / "a.jsonl", kit.rows()), kit.write(tmp_path / "b.jsonl", kit.rows(12)[8:])
    own = settings(kit.LINKED, "links", "slots", "steps", "batch", "micro_batch", "evaluate_every", "max_tokens")
    result = run("kvlink", "--model", model_dir, "--out", tmp_path / "out", "--held-out", tests, *own, data)
    assert f"checkpoint: {tmp_path / 'out'}" in result.stdout
    assert (tmp_path / "out" / "kvlink.json").is_file()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepz=3", "Did you mean 'steps'"),
        ("steps", "key=value"),
        ("steps=many", "is a int"),
        ("checkpointing=maybe", "is a bool"),
    ],
)
def test_bad_settings(model_dir, tmp_path, setting, message):
    data = kit.write(tmp_path / "a.jsonl", kit.rows())
    with pytest.raises(TrainError, match=message):
        run("packet", "--model", model_dir, "--out", tmp_path / "out", "--set", setting, data)


def test_values_of_every_type():
    made = cli._configured(cli_config(), ["checkpointing=yes", "lr=1e-2", "systems=a|b", "steps=7", "schedule=linear"])
    assert (made.checkpointing, made.lr, made.systems, made.steps, made.schedule) == (
        True,
        0.01,
        ("a", "b"),
        7,
        "linear",
    )


def cli_config():
    from kvilt.lab.train.kvlink import KVLinkConfig

    return KVLinkConfig()


def test_verbs_are_short():
    for command in cli.app.registered_commands:
        assert len(inspect.getsource(command.callback).splitlines()) <= 15


@pytest.mark.parametrize("name", ["PacketConfig", "KVLinkConfig"])
def test_every_setting_is_documented(name):
    from kvilt.lab.train import kvlink, packet

    told = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    config = getattr(packet if name == "PacketConfig" else kvlink, name)
    assert [f.name for f in fields(config) if f"`{f.name}`" not in told] == []
