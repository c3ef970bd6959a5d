"""Files, kinds, splits, draws and mixtures."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace

import pytest
import train_kit as kit

from kvilt.errors import DocumentError, TrainError, UserError
from kvilt.lab.train import kinds
from kvilt.lab.train.data import (
    HELD_OUT_SPLITS,
    Pick,
    Sample,
    Source,
    draw,
    held_apart,
    qa_sample,
    read,
    schedule,
    sources_of,
    split_held_out,
)
from kvilt.types import Document


def test_rows_in_every_spelling(tmp_path):
    """Danger: a spelling that the page promises is not read."""
    rows = [
        {
            "question": "q",
            "documents": ["one", ["T", ["two ", "three"]], {"title": "T", "text": "four"}],
            "answers": ["a"],
        },
        {"question": "q", "docs": [{"text": "one"}, {"text": "two", "gold": True}], "answer": "a", "split": "train"},
        {"documents": ["one"], "gold": [0], "ordered": True},
        {"text": "alone", "title": "T"},
    ]
    first, second, third, fourth = read(kit.write(tmp_path / "a.jsonl", rows))
    assert first.documents == (Document("one"), Document("two  three", "T"), Document("four", "T"))
    assert first.answers == second.answers == ("a",)
    assert second.gold == (1,)
    assert third.gold == (0,)
    assert third.ordered
    assert third.question == ""
    assert fourth.documents == (Document("alone", "T"),)


def test_gzipped_files(tmp_path):
    """Danger: data has to be unpacked by hand."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(kit.rows(1)[0]).encode()))
    assert len(read(path)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "no documents"),
        ({"question": "q", "documents": []}, "no documents"),
        ({"question": "q", "documents": [" "]}, "document 1 is empty"),
        ({"question": "q", "documents": [{"title": "only"}]}, "document 1 is empty"),
        ({"question": "q", "documents": ["a"], "gold": [3]}, "gold"),
        ({"question": "q", "documents": ["a"], "split": "test"}, "split 'test'"),
        ({"question": "q", "documents": ["a"], "split": "dev"}, "split 'dev'"),
    ],
)
def test_rows_that_cannot_be_used_name_their_line(tmp_path, row, message):
    """Danger: a bad row shows after an hour, without its line."""
    path = kit.write(tmp_path / "a.jsonl", [*kit.rows(1), row])
    with pytest.raises(TrainError, match=r"a\.jsonl:2") as error:
        read(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("", "no samples"), ("{bad", "a.jsonl:1 is not JSON"), ("[1]", "is list, not a JSON object")]
)
def test_files_that_are_no_data(tmp_path, text, message):
    """Danger: a traceback for a file that is no data."""
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl")


def test_missing_and_broken_files(tmp_path):
    """Danger: half a file is trained on."""
    with pytest.raises(DocumentError, match="cannot be read"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(DocumentError, match="cannot be read"):
        read(tmp_path / "b.jsonl.gz")


def test_held_out_data_may_be_dev_but_not_test(tmp_path):
    """Danger: the test set decides when a training stops."""
    row = kit.rows(1)[0]
    assert read(kit.write(tmp_path / "a.jsonl", [row | {"split": "dev"}]), allowed=HELD_OUT_SPLITS)
    with pytest.raises(TrainError, match="split 'test'"):
        read(kit.write(tmp_path / "b.jsonl", [row | {"split": "test"}]), allowed=HELD_OUT_SPLITS)


def messages(*texts: str) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]}


def test_conversations():
    """Danger: a reply is learned as if the user had said it."""
    sample = kinds.multi_turn(messages("a", "b", "c", "d"), "here")
    assert [d.text for d in sample.documents] == ["User: a\nAssistant: b"]
    assert (sample.question, sample.answers, sample.ordered, sample.reuse) == ("c", ("d",), True, True)
    assert not kinds.sft(messages("a", "b"), "here").reuse
    for bad in (messages("a"), messages("a", "b", "c"), messages("a", " "), {"messages": None}):
        with pytest.raises(TrainError, match="here"):
            kinds.sft(bad, "here")
    with pytest.raises(TrainError, match="single exchange"):
        kinds.multi_turn(messages("a", "b"), "here")


def test_summaries_are_cut_into_pieces():
    """Danger: an article is one document, and nothing is reused across pieces."""
    short = kinds.summary({"document": "word " * 300, "summary": "s"}, "here")
    assert [len(d.text.split()) for d in short.documents] == [75] * 4
    long = kinds.summary({"document": "word " * 3000, "summary": "s"}, "here")
    assert len(long.documents[0].text.split()) == 165
    assert short.ordered
    with pytest.raises(TrainError, match="here"):
        kinds.summary({"document": "x"}, "here")


def test_plain_text():
    """Danger: plain text gets a prompt around it."""
    assert kinds.text({"text": "hello"}, "here").plain
    with pytest.raises(TrainError, match="here"):
        kinds.text({}, "here")


def test_source_specs(tmp_path):
    """Danger: a colon or an @ in a path is taken for a kind or a weight."""
    path = kit.write(tmp_path / "a.jsonl", kit.rows(3))
    assert (len(kinds.source(path).samples), kinds.source(path).weight) == (3, 0.0)
    made = kinds.source(f"qa-standard:{path}@2.5")
    assert (made.name, made.weight, made.samples[0].reuse) == ("qa-standard", 2.5, False)


def test_weights_of_kinds_are_shared_by_size():
    """Danger: two files of a kind count twice."""
    samples = tuple(kit.samples(4))
    made = kinds.weighted(
        [Source(samples[:1], name="qa"), Source(samples[1:], name="qa"), Source(samples, 7, "sft")], {"qa": 8}
    )
    assert [s.weight for s in made] == [2, 6, 7]
    assert sum(kinds.MIXTURE.values()) == 100


def test_split_keeps_copies_together_and_is_disjoint():
    """Danger: a held-out sample is trained on in another order."""
    samples = tuple(kit.samples(20))
    copies = tuple(replace(s, documents=s.documents[::-1]) for s in samples)
    (kept,), held = split_held_out([Source(samples + copies)], 0.3, 1)
    assert len(held) == 12
    assert len(kept.samples) == 28
    (trained,), tests = held_apart([kept], held, 0.1, 5, 1)
    assert (trained, len(tests.samples)) == (kept, 4)
    assert {s.digest for s in tests.samples} <= {s.digest for s in held}
    with pytest.raises(TrainError, match="wrong split"):
        held_apart([kept], kept.samples[:1], 0.1, 5, 1)


@pytest.mark.parametrize(("share", "count"), [(0.0, 5), (1.0, 5), (0.5, 1)])
def test_impossible_splits(share, count):
    """Danger: nothing is held out, or nothing is left to train on."""
    with pytest.raises(TrainError):
        split_held_out([Source(tuple(kit.samples(count)))], share, 1)


def test_nothing_to_train_on():
    """Danger: a training of nothing runs to its end."""
    for nothing in ([], [Source(())]):
        with pytest.raises(TrainError, match="no samples"):
            sources_of(nothing)
    with pytest.raises(TrainError, match="negative"):
        sources_of([Source(tuple(kit.samples(1)), -1)])


def test_draws_vary_order_and_count_but_keep_gold():
    """Danger: the place of the answer is learned, or the answer is left out."""
    sample = Sample(tuple(Document(str(i)) for i in range(6)), "q", gold=(2, 4))
    drawn = [draw(sample, view, 1, fewest=3) for view in range(40)]
    assert {len(d.documents) for d in drawn} == {3, 4, 5, 6}
    assert len({d.documents for d in drawn}) > 20
    assert all({d.documents[i].text for i in d.gold} == {"2", "4"} for d in drawn)
    assert draw(sample, 3, 1, 3) == drawn[3]


def test_draws_keep_what_must_stay():
    """Danger: a story is told in another order."""
    documents = tuple(Document(str(i)) for i in range(5))
    ordered = Sample(documents, "q", gold=(0,), ordered=True)
    assert draw(ordered, 1, 1, 1) == ordered
    unknown = [draw(Sample(documents, "q"), v, 1, 1) for v in range(9)]
    assert all(len(d.documents) == 5 for d in unknown)
    free = [draw(Sample(documents, "q"), v, 1, 1, free=True) for v in range(30)]
    assert {len(d.documents) for d in free} == {1, 2, 3, 4, 5}


def test_schedule_follows_weights_and_covers_every_sample():
    """Danger: some samples are never used, or weights are not kept."""
    sources = [Source(tuple(kit.samples(5)), 3.0), Source(tuple(kit.samples(4)), 1.0)]
    picks = schedule(sources, 4000, 2, 1)
    share = Counter(p.source for p in picks)
    assert 0.7 < share[0] / 4000 < 0.8
    assert sorted(p.index for p in [p for p in picks if p.source == 0][:5]) == [0, 1, 2, 3, 4]
    assert {p.view for p in picks} == {0, 1}
    assert picks[:100] == schedule(sources, 100, 2, 1) or picks == schedule(sources, 4000, 2, 1)
    assert schedule(sources, 50, 2, 1) != schedule(sources, 50, 2, 2)
    assert isinstance(picks[0], Pick)


def test_further_questions(tmp_path):
    """Danger: a question asked about three documents is trained on a fourth, or one without an answer on nothing."""
    row = {"documents": ["a", "b"], "question": "q", "answers": ["x"], "ordered": True}
    more = [{"question": "r", "answers": ["y"]}, {"question": "s", "answers": ["z"], "documents": 1}]
    sample = qa_sample({**row, "further": more}, "here")
    assert [(s.question, s.answers, len(s.documents)) for s in sample.each] == [
        ("q", ("x",), 2),
        ("r", ("y",), 2),
        ("s", ("z",), 1),
    ]
    assert sample.digest != qa_sample(row, "here").digest
    free = replace(sample, ordered=False, gold=(0,), further=sample.further[:1])
    assert {len(draw(free, view, 1, 1).documents) for view in range(8)} == {2}
    wrong = [{"question": "r"}, {"answers": ["y"]}, "r", {**more[0], "documents": 3}, {**more[0], "documents": 0}]
    for bad in wrong:
        with pytest.raises(TrainError, match="further"):
            qa_sample({**row, "further": [bad]}, "here")
    with pytest.raises(TrainError, match="further"):
        qa_sample({**row, "ordered": False, "further": more}, "here")
