"""kvilt calibrate: settings chosen without labels, by closeness to full recompute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import zoo
from cli_kit import data, error, run
from kvilt.engine.engine import Engine
from kvilt.engine.text import TextFormat
from kvilt.errors import DocumentError, PromptError
from kvilt.lab.evaluate import calibrate as module
from kvilt.lab.evaluate.calibrate import asked, calibrate, descend, made_up
from kvilt.plan import ContextScaling, Segment
from kvilt.registry import build
from kvilt.strategies.ape import Ape, ApeProfile
from kvilt.strategies.full import FullRecompute
from kvilt.types import Document

TEXTS = {
    "ada": "Ada Lorn was born in Tavik and left it young, for the harbour of Orsa.",
    "brint": "Brint Labs is in Orsa, where the river Sel meets the sea, slowly as it does.",
    "sel": "The river Sel runs from the hills of Tavik to the sea; nobody hurries it on.",
    "mill": "An old mill stands by the water, and its wheel has not turned for years now.",
}
DOCUMENTS = [Document(text, title=name, id=name) for name, text in TEXTS.items()]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(zoo.model_of("llama"), TextFormat.of(zoo.tokenizer()), FullRecompute(), build("store", "memory"))


def test_the_search_finds_the_valley_and_stays_when_nothing_is_better() -> None:
    """Danger: a slanted valley stops a search along the axes, a flat surface makes it run for ever."""
    grid = tuple(i / 10 for i in range(5, 16))
    slanted = descend(lambda t, s: (t - 0.7) ** 2 + (s - 1.3) ** 2 + 1.2 * (t - 0.7) * (s - 1.3), grid, grid)
    assert slanted == (0.7, 1.3)
    assert descend(lambda *_: 0.0, grid, grid) == (1.0, 1.0)


def test_what_is_chosen_is_closest_to_full_recompute(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the figure is of other prompts, other tokens, or the distance turned round."""
    monkeypatch.setattr(module, "TEMPERATURES", (0.7, 1.0))
    monkeypatch.setattr(module, "SCALES", (1.0, 1.3))
    prompts = made_up(engine, DOCUMENTS, 4, 3)
    said: list[str] = []
    profile = calibrate(engine, prompts, 5, lambda number, line: said.append(f"{number} {line}"))
    assert profile.model == engine.info.digest

    def distance(setting: tuple[float, float], part: list[module.Ask]) -> float:
        total = 0.0
        for question, documents in part:
            answer = torch.tensor(engine.answer(question, documents, max_new_tokens=5).tokens)
            rows = []
            for one, context in ((engine, None), (engine.with_strategy(Ape()), ContextScaling(*setting))):
                plan = one.plan(question, documents)
                forced = Segment(answer[:-1], plan.end, name="answer")
                plan = replace(plan, segments=(*plan.segments, forced), context=context)
                rows.append(one.model.dense(plan.dense())[-len(answer) :].double().log_softmax(-1))
            total += float((rows[0].exp() * (rows[0] - rows[1])).sum(-1).mean())
        return total / len(part)

    grid = [(t, s) for t in (0.7, 1.0) for s in (1.0, 1.3)]
    table = {pair: distance(pair, prompts[::2]) for pair in grid}
    best, chosen = min(grid, key=lambda pair: table[pair]), (profile.temperature, profile.scale)
    confirmed = distance(best, prompts[1::2]) < distance((1.0, 1.0), prompts[1::2])
    assert chosen == (best if confirmed else (1.0, 1.0))
    assert profile.kl == pytest.approx(distance(chosen, prompts[1::2]), rel=1e-3, abs=1e-5)
    assert profile.plain == pytest.approx(distance((1.0, 1.0), prompts[1::2]), rel=1e-3, abs=1e-5)
    assert said[0].startswith("1 temperature 1.0, scale 1.0: KL ")


@pytest.mark.parametrize(("others", "chosen"), [(0.3, (0.7, 1.2)), (0.6, (1.0, 1.0))])
def test_what_the_other_prompts_do_not_confirm_is_not_chosen(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, others: float, chosen: tuple[float, float]
) -> None:
    """Danger: a few prompts are fitted by chance, and every answer after that is worse than without calibration."""
    prompts = made_up(engine, DOCUMENTS, 4, 2)

    def distance(_: Engine, targets: list[module.Target], temperature: float, scale: float) -> float:
        if [t.question for t in targets] == [q for q, _ in prompts[::2]]:
            return abs(temperature - 0.7) + abs(scale - 1.2)
        return 0.5 if (temperature, scale) == (1.0, 1.0) else others

    monkeypatch.setattr(module, "_distance", distance)
    profile = calibrate(engine, prompts, 1)
    assert (profile.temperature, profile.scale) == chosen
    assert (profile.kl, profile.plain) == (min(others, 0.5), 0.5)


def test_made_up_questions_quote_documents_that_are_there(engine: Engine) -> None:
    """Danger: the question is about a document that is not in the prompt, or always about the same."""
    made = made_up(engine, DOCUMENTS, 12, 2)
    quoted = set()
    for question, documents in made:
        quote = question.split('"')[1]
        (source,) = [d for d in DOCUMENTS if quote in " ".join(d.text.split())]
        assert source in documents
        assert len(documents) == 2
        assert not source.text.endswith(quote)  # something follows
        quoted.add(source.id)
    assert len(quoted) == 4
    assert made == made_up(engine, DOCUMENTS, 12, 2)
    with pytest.raises(DocumentError, match="--questions"):
        made_up(engine, [Document("Too short to quote.")], 3, 2)


def test_given_questions_get_the_documents_they_are_about(engine: Engine) -> None:
    """Danger: every question is asked about the first documents."""
    ((question, documents),) = asked(engine, DOCUMENTS, ["does the old mill by the water turn"], 2)
    assert question == "does the old mill by the water turn"
    assert DOCUMENTS[3] in documents
    assert [d.id for d in documents] == sorted((d.id or "" for d in documents), key=list(TEXTS).index)


def test_prompts_leave_room_in_the_context(engine: Engine) -> None:
    """Danger: a calibration over long documents stops at its first prompt."""
    long = [Document(f"{i} " + "river " * 250, id=str(i)) for i in range(6)]  # 1,500 tokens each, a context of 4,096
    assert {len(documents) for _, documents in made_up(engine, long, 5, 5)} == {1}
    calibrate(engine, made_up(engine, long, 1, 5), 1)
    with pytest.raises(PromptError, match="no questions"):
        calibrate(engine, [])


def test_the_printed_strategy_works(model_dir: Path, tmp_path: Path) -> None:
    """Danger: the last line cannot be pasted behind --strategy."""
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text)
    questions = tmp_path / "questions"
    questions.write_text("Where was Ada born?\n\nWhere is the mill?\n")
    paths = [tmp_path / f"{name}.txt" for name in TEXTS]
    common = ("calibrate", "ape", *paths, "--model", model_dir, "--group", 2)
    spec = run(*common, "--out", tmp_path / "ape.json", "--prompts", 2).stdout.strip()
    assert spec == f"ape:profile={tmp_path / 'ape.json'}"
    engine = Engine.load(str(model_dir), spec, "memory")
    profile = ApeProfile.load(tmp_path / "ape.json", engine.info)
    assert engine.plan("Where?", DOCUMENTS).context == ContextScaling(profile.temperature, profile.scale)
    said = data(*common, "--out", tmp_path / "ape.json", "--questions", questions)
    assert (said["prompts"], said["strategy"]) == (2, spec)
    error(*common, "--out", tmp_path, "--prompts", 1)  # a folder


def test_mistakes_are_seen_before_the_model_is_loaded(tmp_path: Path) -> None:
    """Danger: an hour of work, and then there is no folder to write to."""
    document, empty = tmp_path / "a.txt", tmp_path / "empty"
    document.write_text("Something to read.")
    empty.write_text("\n \n")
    common = ("calibrate", "ape", document, "--model", "none")
    assert "no such folder" in error(*common, "--out", tmp_path / "nowhere" / "ape.json")
    assert "holds no question" in error(*common, "--questions", empty)
    assert "cannot be read" in error(*common, "--questions", tmp_path / "none")
    assert "no such file" in error("calibrate", "ape", tmp_path / "missing.txt", "--model", "none")
