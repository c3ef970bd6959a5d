"""The QA datasets in their published layouts, and what goes wrong with files."""

import gzip
import json
import sys
from types import ModuleType

import evaluate_data as data
import pytest

from kvilt import registry
from kvilt.errors import DocumentError, MissingExtra, SpecError, UserError


def samples(spec, split=None):
    return list(registry.build("task", spec).samples(split))


def titles(sample):
    return [d.title for d in sample.documents]


@pytest.mark.parametrize("name", ["qa", "hotpotqa", "2wiki", "musique", "triviaqa"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_own_layout(tmp_path, name, suffix):
    """Danger: a field of one's own rows is lost."""
    found = samples(f"{name}:path={data.jsonl(tmp_path / f'own{suffix}', data.OWN)}")
    assert len(found) == 8
    assert found[3].answers == ("Person3",)
    assert found[3].metadata["gold"] == [1]
    assert found[3].documents[1].content == "Keys\nPerson3 keeps key 3.\n"


@pytest.mark.parametrize("row", [data.HOTPOT, data.HOTPOT_HUB])
def test_hotpotqa_layouts(tmp_path, row):
    """Danger: the hub's copy and the original give other questions."""
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps([row]))
    (found,) = samples(f"hotpotqa:path={tmp_path}")
    assert titles(found) == ["Cid", "Ann", "Bob"]  # the blank paragraph is left out
    assert found.metadata["gold_titles"] == ["Ann", "Bob"]
    assert found.metadata["hops"] == 2
    assert found.question == row["question"]


def test_sentences_are_joined_with_one_space(tmp_path):
    """Danger: another spelling of a passage is another cache."""
    (found,) = samples(f"hotpotqa:path={data.jsonl(tmp_path / 'x.jsonl', [data.HOTPOT])}")
    assert found.documents[0].text == "Cid is 3. He sings."


def test_two_wiki_with_json_strings(tmp_path):
    """Danger: a JSON string is taken for a text."""
    (found,) = samples(f"2wiki:path={data.jsonl(tmp_path / 'dev.jsonl', [data.TWO_WIKI_HUB])}")
    assert found.id == "w1"
    assert found.metadata["gold"] == [0, 1]


def test_musique(tmp_path):
    """Danger: unanswerable questions count as wrong answers."""
    unanswerable = {**data.MUSIQUE, "id": "2hop__9", "answerable": False}
    file = data.jsonl(tmp_path / "musique_full_v1.0_dev.jsonl", [data.MUSIQUE, unanswerable])
    (found,) = samples(f"musique:path={file}")
    assert found.answers == ("Gil", "Gilbert")
    assert found.metadata["hops"] == 3
    assert registry.build("task", "musique:prompt=kv_packet").max_new_tokens == 256


def test_triviaqa_keeps_the_first_passages(tmp_path):
    """Danger: passages are taken in another order than they were retrieved."""
    (tmp_path / "test.json").write_text(json.dumps([data.TRIVIA]))
    (found,) = samples(f"triviaqa:path={tmp_path}")
    assert len(found.documents) == 10
    assert found.answers == ("Rhine", "The Rhine")
    assert found.metadata["gold"] == []


def test_documents_keeps_gold(tmp_path):
    """Danger: the passage that answers is left out to save room."""
    (found,) = samples(f"hotpotqa:path={data.jsonl(tmp_path / 'x.jsonl', [data.HOTPOT])},documents=2")
    assert titles(found) == ["Ann", "Bob"]


def test_nq_puts_gold_at_every_position(tmp_path):
    """Danger: the gold passage is there twice, or never at the end."""
    file = data.jsonl(tmp_path / "nq-open-10_total_documents_gold_at_0.jsonl.gz", [data.NQ])
    found = samples(f"nq:path={file}")
    assert [titles(s).index("Gold") for s in found] == list(range(10))
    assert [s.metadata["gold"] for s in found] == [[i] for i in range(10)]
    assert {s.group for s in found} == {"nq-1"}
    assert len({s.id for s in found}) == 10
    assert titles(found[3]) == ["D0", "D1", "D2", "Gold", "D3", "D4", "D5", "D6", "D7", "D8"]
    (one,) = samples(f"nq:path={file},documents=5,gold=4")
    assert titles(one) == ["D0", "D1", "D2", "D3", "Gold"]
    with pytest.raises(DocumentError, match="needs one gold passage and 19 others, has 1 and 9"):
        samples(f"nq:path={file},documents=20")


@pytest.mark.parametrize("options", ["gold=10", "gold=first", "documents=5,gold=5"])
def test_nq_gold_out_of_range(options):
    """Danger: a place beyond the documents is silently the last."""
    with pytest.raises(UserError, match="gold must be 'all' or a place"):
        registry.build("task", f"nq:{options}")


def test_the_authors_prompt_numbers_documents(tmp_path):
    """Danger: the authors' checkpoints are measured in words that they never saw."""
    (found,) = samples(f"qa:path={data.jsonl(tmp_path / 'own.jsonl', data.OWN[:1])},prompt=kvlink_authors")
    title, text = data.OWN[0]["docs"][1]["title"], data.OWN[0]["docs"][1]["text"]
    assert found.documents[1].content == f"Document [2](Title: {title}) {text}\n"
    assert found.question == data.OWN[0]["question"]
    assert registry.build("task", "hotpotqa:prompt=kvlink_authors").undated
    assert not registry.build("task", "hotpotqa").undated


def test_kv_packet_prompt_drops_titles_and_reads_the_short_answer(tmp_path):
    """Danger: the reasoning is scored instead of the answer."""
    task = registry.build("task", f"hotpotqa:path={data.jsonl(tmp_path / 'x.jsonl', [data.HOTPOT])},prompt=kv_packet")
    (found,) = task.samples()
    assert titles(found) == [None] * 3
    assert "Short Answer:" in found.question
    assert task.max_new_tokens == 512
    assert task.metrics[0] == "micro_f1"
    assert task.extract("Ann is 9. Answer: Bob. Short Answer: <Ann>") == "Ann"
    assert task.extract("Ann is 9, and then the text was cut") == ""


def test_options_and_label():
    """Danger: records of other options share a file."""
    task = registry.build("task", "nq:path=somewhere,documents=20,gold=3")
    assert task.label == "nq documents=20 gold=3"
    assert task.system.startswith("You are a intelligent")
    assert registry.build("task", "hotpotqa:prompt=kv_packet,answer_tokens=64").max_new_tokens == 64
    with pytest.raises(SpecError, match=r"no option 'gol'\. Did you mean 'gold'"):
        registry.build("task", "nq:gol=3")
    with pytest.raises(UserError, match="unknown prompt 'other'"):
        registry.build("task", "hotpotqa:prompt=other")
    with pytest.raises(UserError, match="unknown split 'tset'"):
        registry.build("task", "hotpotqa:split=tset")


def test_rows_of_another_split(tmp_path):
    """Danger: training rows are evaluated."""
    rows = [{**data.OWN[0], "split": "dev(open)"}, {**data.OWN[1], "split": "train"}]
    file = data.jsonl(tmp_path / "x.jsonl", rows)
    assert [s.id for s in samples(f"qa:path={file}", "validation")] == ["q0"]
    assert [s.id for s in samples(f"qa:path={file}", "train")] == ["q1"]
    with pytest.raises(UserError, match=r"holds the split dev\(open\), train, not test"):
        samples(f"qa:path={file}")


def test_a_file_named_for_another_split(tmp_path):
    """Danger: the training file is evaluated because it lies nearer."""
    file = data.jsonl(tmp_path / "hotpot_train_v1.1.jsonl", [data.HOTPOT])
    with pytest.raises(UserError, match="named for the split train, not dev"):
        samples(f"hotpotqa:path={file}")


def test_folder_without_or_with_too_many_files(tmp_path):
    """Danger: one of several files is taken by chance."""
    with pytest.raises(UserError, match="no file for hotpot…, split dev"):
        samples(f"hotpotqa:path={tmp_path}")
    for name in ("hotpot_dev_a.jsonl", "hotpot_dev_b.jsonl"):
        data.jsonl(tmp_path / name, [data.HOTPOT])
    with pytest.raises(UserError, match=r"more than one file .*hotpot_dev_a.jsonl, hotpot_dev_b.jsonl"):
        samples(f"hotpotqa:path={tmp_path}")


def test_missing_path():
    """Danger: a traceback where a file is missing."""
    with pytest.raises(UserError, match=r"no_such_file\.jsonl does not exist"):
        samples("hotpotqa:path=no_such_file.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": ', r":2 is not JSON"),
        ("[1, 2]", r":2 is list, not a JSON object"),
        ('{"question": "q", "docs": []}', r":2: not in the layout of qa: field 'answers' is missing"),
        ('{"question": "q", "docs": 3, "answers": []}', r":2: not in the layout of qa"),
        ('{"question": "q", "answers": [], "docs": [{"text": "x"}]}', r":2: no answer to score"),
        ('{"question": " ", "answers": ["a"], "docs": [{"text": "x"}]}', r":2: the question is empty"),
        ('{"question": "q", "answers": ["a"], "docs": [{"text": " "}]}', r":2: all documents are empty"),
        ('{"question": "q", "answers": ["a"], "docs": []}', r":2: all documents are empty"),
        ('{"question": "q", "answers": ["a"]}', r":2: not in the layout of qa: field 'docs' is missing"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    """Danger: one bad line of thousands has to be searched for."""
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(data.OWN[0]) + "\n" + line + "\n")
    with pytest.raises(DocumentError, match=message):
        samples(f"qa:path={file}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.json", b'{"rows": []}', "expected a list of samples"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', "must be named .jsonl"),
        ("a.jsonl.gz", b"not gzip", "cannot be read after line 0"),
        ("a.jsonl.gz", gzip.compress(json.dumps(data.OWN[0]).encode() + b"\n")[:-9], "cannot be read after line"),
        ("a.jsonl", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    """Danger: a half-fetched file is a smaller data set."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        samples(f"qa:path={tmp_path / name}")


def test_hub(monkeypatch):
    """Danger: the hub's validation split is not its dev split."""
    asked = []
    package = ModuleType("datasets")

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if split == "train":
            raise ValueError("Unknown split train")
        return [data.HOTPOT_HUB]

    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    assert [s.id for s in samples("hotpotqa")] == ["h1"]
    assert asked == [("hotpotqa/hotpot_qa", "distractor", "validation")]
    with pytest.raises(UserError, match="cannot load hotpotqa/hotpot_qa"):
        samples("hotpotqa:split=train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"kvilt\[data\]"):
        samples("musique")
    with pytest.raises(UserError, match="path="):
        samples("nq")
