"""Summaries, needles, biographies and bAbI."""

import gzip
import json
import re
from pathlib import Path

import evaluate_data as data
import pytest

from kvilt import registry
from kvilt.errors import DocumentError, UserError
from kvilt.lab.evaluate import metrics


def samples(spec, split=None):
    return list(registry.build("task", spec).samples(split))


def test_every_task_is_in_the_table_and_documented():
    """Danger: a task that nobody finds."""
    for name in registry.TABLE["task"]:
        cls = registry.load("task", name)
        assert name == cls.NAME
        assert cls.VERSION >= 1
        assert cls.__doc__


def test_samsum_examples_are_documents(tmp_path):
    """Danger: the examples are asked, too, or the dialogue to summarise is cached."""
    (tmp_path / "test.json").write_text(json.dumps(data.CHATS))
    found = samples(f"samsum:path={tmp_path}")
    assert [s.id for s in found] == ["20", "21", "22"]  # the first twenty rows are the examples
    assert len(found[0].documents) == 20
    assert found[0].documents[0].text == "Dialogue:\nAnn: Hi 0\nBob: Bye\nSummary: Ann greets Bob, time 0."
    assert found[0].question.endswith("Dialogue:\nAnn: Hi 20\nBob: Bye\nSummary:")
    assert found[0].answers == ("Ann greets Bob, time 20.",)


def test_samsum_examples_from_another_file(tmp_path):
    """Danger: training rows are asked, or test rows serve as examples."""
    test, train = data.jsonl(tmp_path / "test.jsonl", data.CHATS[:2]), data.jsonl(tmp_path / "train.jsonl", data.CHATS)
    task = registry.build("task", f"samsum:path={test},examples={train},shots=3")
    assert [s.id for s in task.samples()] == ["0", "1"]
    assert task.label == "samsum shots=3"


def test_multinews_modes(tmp_path):
    """Danger: articles run together, or empty ones become documents."""
    file = data.jsonl(tmp_path / "dev.jsonl", data.NEWS)
    found = samples(f"multinews:path={file}")
    assert len(found) == 2
    assert found[0].documents[1].text == (
        "Articles:\nFirst article 1. It is long.\n\nSecond article 1.\nSummary: Summary 1."
    )
    assert found[0].answers == ("Summary 2.",)
    articles = samples(f"multinews:path={file},mode=articles")
    assert [d.text for d in articles[0].documents] == ["First article 0. It is long.", "Second article 0."]
    with pytest.raises(UserError, match="unknown mode 'both'"):
        registry.build("task", "multinews:mode=both")


def test_summaries_need_rows_and_texts(tmp_path):
    """Danger: a row without a text is summarised."""
    with pytest.raises(UserError, match="found 4 rows for 20 examples"):
        samples(f"multinews:path={data.jsonl(tmp_path / 'dev.jsonl', data.NEWS)},shots=20")
    with pytest.raises(DocumentError, match=r":1: samsum needs a text in the field 'dialogue', found None"):
        samples(f"samsum:path={data.jsonl(tmp_path / 'test.jsonl', [{'summary': 'x'}])}")


@pytest.mark.parametrize(
    ("kind", "codes", "asked"), [("single", 1, 1), ("multikey", 4, 1), ("multivalue", 4, 4), ("multiquery", 4, 4)]
)
def test_niah(kind, codes, asked):
    """Danger: a needle is cut in two, missing, or there twice."""
    found = samples(f"niah:kind={kind},characters=6000,chunk=1000,count=3")
    assert found == samples(f"niah:kind={kind},characters=6000,chunk=1000,count=3")
    for sample in found:
        text = " ".join(d.text for d in sample.documents)
        assert max(len(d.text) for d in sample.documents) <= 1000
        assert len(re.findall(r"\d{7}", text)) == codes
        assert len(sample.answers) == asked
        for answer in sample.answers:
            key = re.search(rf"The code of (the \w+ \w+) is {answer}\.", text)
            assert key is not None
            assert key[1] in sample.question
        needed = {i for i, d in enumerate(sample.documents) if any(a in d.text for a in sample.answers)}
        assert sample.metadata["gold"] == sorted(needed)
    train = samples(f"niah:kind={kind},characters=6000,chunk=1000,count=3,split=train")
    assert train[0].answers != found[0].answers


@pytest.mark.parametrize("options", ["kind=double", "count=0", "chunk=0", "needles=900", "characters=100"])
def test_niah_refuses(options):
    """Danger: needles that do not fit are tried for ever."""
    with pytest.raises(UserError, match="niah:"):
        registry.build("task", f"niah:{options}")


def test_biography():
    """Danger: people of the test are trained on, or the asked sentence is not there."""
    found = samples("biography:count=40")
    assert found == samples("biography:count=40")
    assert {s.metadata["kind"] for s in found} == {"birthday", "birth city", "college", "field", "company", "work"}
    for sample in found:
        assert len(sample.documents) == 5
        place = sample.metadata["position"]
        assert sample.answers[0] in sample.documents[place].text
        assert all(len(re.findall(r"\.(?: |$)", d.text)) == 6 for d in sample.documents)
        assert sample.question.endswith("Respond with the answer only. Answer:")
    people, others = (
        {d.text.split()[1] for s in samples("biography:count=40", split) for d in s.documents}
        for split in ("test", "train")
    )
    assert not people & others  # no family name of the test is trained on
    with pytest.raises(UserError, match="people must be"):
        registry.build("task", "biography:people=0")


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_babi(tmp_path, suffix):
    """Danger: statements after the question are read, or facts point to other documents."""
    raw = data.BABI.encode()
    (tmp_path / f"qa8_lists-sets_test{suffix}").write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    found = samples(f"babi:path={tmp_path},task=8,sentences=2")
    assert [s.question for s in found] == ["Where is Mary?", "What is Mary carrying?", "Where is Sandra?"]
    assert [len(s.documents) for s in found] == [1, 2, 1]
    assert found[1].documents[0].text == "Mary moved to the hall. John went to the garden."
    assert found[1].answers == ("milk,apple", "milk, apple", "milk and apple")
    assert found[1].metadata == {"kind": 8, "group": "8-test-story-1", "hops": 2, "gold": [1]}
    assert found[2].documents[0].text == "Sandra went home."


def test_babi_refuses(tmp_path):
    """Danger: a traceback where a path or a number is wrong."""
    with pytest.raises(UserError, match="give path=FOLDER"):
        samples("babi")
    with pytest.raises(UserError, match="no file for qa3_…, split test"):
        samples(f"babi:path={tmp_path},task=3")
    with pytest.raises(UserError, match="task must be 1 to 20"):
        registry.build("task", "babi:task=21")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Mary moved.\n", "line 1: every line of bAbI begins with its number"),
        ("1 Where is Mary?\thall\t1\n", "line 1: a question with no statement before it"),
        ("1 Mary moved.\n2 Where is Mary?\t\t1\n", "line 2: expected question, tab, answer"),
        ("1 Mary moved.\n", "holds no question"),
    ],
)
def test_babi_bad_lines(tmp_path, text, message):
    """Danger: a damaged file is read as another story."""
    (tmp_path / "qa1_x_test.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        samples(f"babi:path={tmp_path}")


def test_the_documentation_names_every_task_and_its_example_runs():
    """Danger: the page's example of a task does not run."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name in registry.TABLE["task"]:
        assert f"| `{name}` |" in text
    for name in metrics.METRICS:
        assert name in text
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1].replace(
        "from kvilt import", "from kvilt.types import"
    )
    scope: dict = {"__name__": __name__}
    exec(example, scope)
    assert len(list(scope["Echo"](count=3).samples())) == 3
