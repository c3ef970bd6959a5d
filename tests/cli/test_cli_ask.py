"""`kvilt encode` and `kvilt ask`: what they print, and that answers are those of the dense reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli_kit import data, run, write_documents
from kvilt.corpora.files import read_documents
from kvilt.engine.engine import Engine
from kvilt.strategies.wrapper import Wrapper

QUESTION = "what stands in the harbour?"
STRATEGIES = [
    "block",
    "block:sink=2",
    "naive",
    "kvlink:links=2",
    "kv_packet:wrapper=WRAPPER",
    "prompt_cache:slot=256",
    "epic:tokens=0",
]


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Engine:
    """An engine that shares nothing with the command line's."""
    return Engine.load(str(model_dir), "full", "memory")


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory, reference: Engine) -> str:
    """Random learned vectors for the tiny model."""
    path = tmp_path_factory.mktemp("wrapper") / "wrapper.safetensors"
    torch.manual_seed(5)
    Wrapper(torch.randn(8, 64) * 0.4, torch.randn(8, 64) * 0.4, reference.model.digest).save(path)
    return str(path)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_answers_equal_the_dense_reference_in_any_order(
    strategy: str, reference: Engine, wrapper: str, model_dir: Path, docs: list[Path], store: str, tmp_path: Path
) -> None:
    """Danger: a file between encoding and asking changes what is answered, or the order of documents does."""
    spec = strategy.replace("WRAPPER", wrapper)
    common = ("--model", model_dir, "--store", store, "--strategy", spec)
    assert data("encode", tmp_path / "docs", *common)["encoded"] == 5
    for order in (docs, docs[::-1]):
        usage = data("ask", QUESTION, "--docs", *order, *common, "--logits", tmp_path / "l", "--max-new-tokens", 2)[
            "usage"
        ]
        assert (usage["hits"], usage["misses"]) == (5, 0)
        engine = reference.with_strategy(spec)
        plan = engine.plan(QUESTION, read_documents([str(p) for p in order]))
        wanted = engine.model.dense(plan.dense(), plan.learned)[-1]
        found = load_file(tmp_path / "l")["logits"]
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert data("encode", tmp_path / "docs", *common)["encoded"] == 0


def test_json_has_the_promised_keys(model_dir: Path, docs: list[Path], store: str) -> None:
    """Danger: a script that reads the output breaks."""
    answer = data("ask", QUESTION, "--docs", docs[0], "--model", model_dir, "--store", store, "--max-new-tokens", 3)
    assert set(answer) == {"question", "text", "strategy", "usage"}
    promised = {"reused_tokens", "computed_tokens", "charged", "hits", "misses", "bytes_loaded", "ttft_s", "steps_s"}
    assert promised <= set(answer["usage"])
    assert answer["usage"]["misses"] == 1
    assert answer["usage"]["steps_s"]["run"] > 0
    assert answer["usage"]["note"] == ""


def test_what_auto_has_chosen_is_said(model_dir: Path, docs: list[Path], store: str) -> None:
    """Danger: nobody can tell why an answer was computed from scratch."""
    common = ("ask", QUESTION, "--docs", *docs, "--model", model_dir, "--store", store, "--strategy", "auto")
    note = data(*common)["usage"]["note"]
    assert note.startswith("block")
    assert f"({note})" in run(*common).stderr


def test_a_model_that_was_trained_for_a_method_says_so(docs: list[Path], store: str) -> None:
    """Danger: the default, which needs no training, is used where something better lies beside the weights, unsaid."""
    asked = ("ask", "Q?", "--docs", docs[0], "--store", store)
    assert "kvlink" in (said := run(*asked, "--model", "builtin-kvlink5").stderr)
    assert "--strategy auto" in said
    for more in (("--model", "builtin"), ("--model", "builtin-kvlink5", "--strategy", "auto")):
        assert "trained for" not in run(*asked, *more).stderr


def test_text_on_stdout_talk_on_stderr(model_dir: Path, docs: list[Path], store: str) -> None:
    """Danger: a pipe gets progress lines, or a streamed answer is another than a plain one."""
    common = ("ask", QUESTION, "--docs", *docs, "--model", model_dir, "--store", store, "--max-new-tokens", 6)
    plain = run(*common, "--explain")
    assert "hits" in plain.stderr
    assert "question" in plain.stderr
    assert str(docs[2]) in plain.stderr
    streamed = run(*common, "--stream", "--quiet")
    assert streamed.stderr == ""
    assert streamed.stdout.strip() == plain.stdout.strip() == data(*common)["text"]


def test_picking_documents(model_dir: Path, docs: list[Path], store: str, tmp_path: Path) -> None:
    """Danger: another document than the one that was picked is answered from."""
    common = (
        "ask",
        QUESTION,
        "--docs",
        tmp_path / "docs",
        "--model",
        model_dir,
        "--store",
        store,
        "--max-new-tokens",
        1,
    )
    by_pick = data(*common, "--pick", "03.txt", docs[1], "--logits", tmp_path / "a")
    by_path = data("ask", QUESTION, "--docs", docs[3], docs[1], *common[4:], "--logits", tmp_path / "b")
    assert by_pick["usage"]["misses"] == 2
    assert by_path["usage"]["hits"] == 2
    assert torch.equal(load_file(tmp_path / "a")["logits"], load_file(tmp_path / "b")["logits"])


def test_sampling(model_dir: Path, docs: list[Path], store: str) -> None:
    """Danger: a seed gives another answer each time, or a temperature of 0 is not greedy."""
    common = ("ask", QUESTION, "--docs", docs[0], "--model", model_dir, "--store", store, "--max-new-tokens", 12)
    hot = [data(*common, "--temperature", 5, "--top-p", 0.99, "--seed", seed)["text"] for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert data(*common, "--temperature", 0)["text"] == data(*common)["text"]


def test_a_model_by_a_relative_path(model_dir: Path, docs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: what was trained in this folder cannot be used from this folder."""
    monkeypatch.chdir(model_dir.parent)
    common = ("ask", "what?", "--docs", docs[0], "--store", "memory", "--max-new-tokens", 1)
    assert data(*common, "--model", model_dir.name)["text"] == data(*common, "--model", model_dir)["text"]


def test_documents_from_standard_input(model_dir: Path, store: str) -> None:
    """Danger: documents from a pipe get other keys in each verb."""
    lines = "\n".join(json.dumps({"text": f"Document number {i}."}) for i in range(3))
    common = ("--model", model_dir, "--store", store)
    assert data("encode", "-", *common, input=lines)["encoded"] == 3
    assert data("ask", QUESTION, "--docs", "-", *common, "--max-new-tokens", 1, input=lines)["usage"]["hits"] == 3


def test_dry_run(model_dir: Path, store: str, tmp_path: Path) -> None:
    """Danger: a dry run writes, or foresees something else than what happens."""
    write_documents(tmp_path / "docs", 6)
    common = ("encode", tmp_path / "docs", "--store", store)
    guess = data(*common, "--dry-run", KVILT_MODEL=str(model_dir))
    assert not list((tmp_path / "store").glob("??/*.safetensors"))
    done = data(*common, KVILT_MODEL=str(model_dir))
    assert guess["dry_run"] is True
    assert {k: guess[k] for k in ("documents", "encoded", "tokens", "bytes")} == {
        k: done[k] for k in ("documents", "encoded", "tokens", "bytes")
    }
    text = run(*common, "--dry-run", "--model", model_dir).stdout
    assert text.startswith("6 documents: 0 to encode, 6 already stored")


def test_system_and_dtype_reach_the_model(model_dir: Path, docs: list[Path], store: str) -> None:
    """Danger: an option is read and then forgotten; or a dtype of the computation makes other keys."""
    common = (
        "ask",
        QUESTION,
        "--docs",
        docs[0],
        "--model",
        model_dir,
        "--store",
        store,
        "--max-new-tokens",
        1,
        "-s",
        "naive",
    )
    plain, other, short = (
        data(*common, *more)["usage"] for more in ((), ("--system", "Be brief."), ("--dtype", "bf16"))
    )
    assert other["hits"] == 1
    assert other["reused_tokens"] < plain["reused_tokens"]
    assert (short["hits"], short["misses"]) == (1, 0)


def test_many_questions_one_model(model_dir: Path, docs: list[Path], store: str) -> None:
    """Danger: a thousand questions load the model a thousand times, or an answer stands beside another question."""
    common = ("ask", "--docs", docs[0], "--model", model_dir, "--store", store, "--max-new-tokens", 4)
    asked = ["what stands here?", "where?", "why?"]
    alone = [data(common[0], question, *common[1:])["text"] for question in asked]
    lines = run(*common, "--json", input="\n".join([asked[0], "", *asked[1:]]) + "\n").stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [a["question"] for a in answers] == asked
    assert [a["text"] for a in answers] == alone
    assert run(*common, input=f"{asked[2]}\n").stdout == " ".join(alone[2].split()) + "\n"
    assert [a["usage"]["hits"] for a in answers] == [1, 1, 1]


def test_one_bad_question_among_many(model_dir: Path, docs: list[Path], store: str) -> None:
    """Danger: a question that cannot be answered ends the run, or shifts all answers after it by one."""
    common = ("ask", "-", "--docs", docs[0], "--model", model_dir, "--store", store, "--max-new-tokens", 1)
    result = run(*common, "--json", input="what?\n" + "x" * 5000 + "\nwhere?\n", code=2)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["error" in a for a in answers] == [False, True, False]
    assert "the model's context holds 4096" in result.stderr
    assert "line 2 of standard input is not UTF-8" in run(*common, input=b"what?\n\xff\n", code=2).stderr
