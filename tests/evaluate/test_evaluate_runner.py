"""Runs: records, resuming, interruption, mismatches, fidelity, and the report made of them."""

import json

import evaluate_data as data
import pytest
import torch
from evaluate_fakes import FakeEngine, FakeStrategy

from kvilt.errors import MissingExtra, UserError
from kvilt.lab.evaluate.records import read
from kvilt.lab.evaluate.report import load, plot, report
from kvilt.lab.evaluate.runner import choose, run


@pytest.fixture
def spec(tmp_path):
    return f"qa:path={data.jsonl(tmp_path / 'questions.jsonl', data.OWN)}"


def ids(path):
    return [r["id"] for r in read(path)[1]]


def test_records(tmp_path, spec):
    """Danger: a record lacks what the report is made of."""
    seen = []
    paths = run(FakeEngine(), ["lossy"], spec, tmp_path / "out", seed=3, on_progress=lambda *step: seen.append(step))
    assert [p.name for p in paths] == ["qa--full.jsonl", "qa--no_documents.jsonl", "qa--lossy.jsonl"]
    assert seen == [(i, 24) for i in range(1, 25)]
    header, records = read(paths[2])
    assert header["strategy"] == "FakeStrategy(name='lossy')"
    assert (header["task"], header["version"], header["seed"]) == ("qa", 1, 3)
    assert header["options"]["answer_tokens"] == 200
    assert len(records) == 8
    right = next(r for r in records if r["id"] == "q0")
    wrong = next(r for r in records if r["id"] == "q1")
    assert (right["metrics"]["accuracy"], right["agreement"], right["first_token"]) == ([1.0, 1.0], True, True)
    assert (wrong["metrics"]["accuracy"], wrong["agreement"], wrong["text"]) == ([0.0, 1.0], False, "nothing")
    assert right["kl"] > 0.1
    assert right["usage"]["charged"] == 0.5
    assert right["metadata"]["needed"] == 1
    assert read(paths[0])[1][0]["kl"] == 0.0


def test_the_floor_sees_no_documents_and_is_charged_in_units_of_full(tmp_path, spec):
    """Danger: the floor reads the documents, or costs nothing."""
    _, floor, *_ = run(FakeEngine(), [], spec, tmp_path / "out", limit=1)
    (record,) = read(floor)[1]
    assert record["text"] == "nothing"
    assert record["usage"]["charged"] == pytest.approx(5 * 103 / (25 * 113))


def test_full_recompute_and_repeated_strategies_run_once(tmp_path, spec):
    """Danger: the most expensive row is computed twice."""
    paths = run(FakeEngine(), ["full", "lossy", FakeStrategy("lossy")], spec, tmp_path / "out", limit=1)
    assert len(paths) == 3


def test_documents_are_encoded_before_the_clock_starts(tmp_path, spec):
    """Danger: encoding counts as time to the first token."""
    engine = FakeEngine()
    run(engine, ["lossy"], spec, tmp_path / "out", limit=1)
    steps = [call[:2] for call in engine.calls]
    assert steps.index(("encode", "lossy")) < steps.index(("answer", "lossy"))
    assert ("encode", "full") not in steps
    assert ("score", "full") not in steps  # its own answer told


def test_a_larger_limit_goes_on(tmp_path, spec):
    """Danger: a larger run begins anew, or draws other samples."""
    run(FakeEngine(), ["lossy"], spec, tmp_path / "out", limit=3)
    engine = FakeEngine()
    paths = run(engine, ["lossy"], spec, tmp_path / "out", limit=5)
    assert sum(call[0] == "answer" for call in engine.calls) == 2 * 3
    assert [len(ids(p)) for p in paths] == [5, 5, 5]
    engine = FakeEngine()
    run(engine, ["lossy"], spec, tmp_path / "out", limit=5)
    assert engine.calls == []


def test_a_new_strategy_reuses_the_reference(tmp_path, spec):
    """Danger: full recompute is run again for every new strategy."""
    run(FakeEngine(), [], spec, tmp_path / "out", limit=2)
    engine = FakeEngine()
    run(engine, ["lossy"], spec, tmp_path / "out", limit=2)
    assert {call[1] for call in engine.calls if call[0] == "answer"} == {"lossy"}
    assert ("score", "full") in {call[:2] for call in engine.calls}


def test_interruption_leaves_valid_files(tmp_path, spec):
    """Danger: Ctrl-C costs an hour of records."""
    with pytest.raises(KeyboardInterrupt):
        run(FakeEngine(fail_after=7), ["lossy"], spec, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.jsonl"))
    assert sum(len(ids(file)) for file in files) == 7
    whole = run(FakeEngine(), ["lossy"], spec, tmp_path / "out")
    straight = run(FakeEngine(), ["lossy"], spec, tmp_path / "straight")
    assert [read(p) for p in whole] == [read(p) for p in straight]


def test_a_torn_last_line_is_run_again(tmp_path, spec):
    """Danger: a killed process leaves a file that nobody can read."""
    full, *_ = run(FakeEngine(), [], spec, tmp_path / "out", limit=3)
    whole = full.read_text()
    full.write_text(whole[:-40])
    assert len(ids(full)) == 2
    run(FakeEngine(), [], spec, tmp_path / "out", limit=3)
    assert full.read_text() == whole


def test_other_settings_are_refused(tmp_path, spec):
    """Danger: records of two settings stand in one table."""
    run(FakeEngine(), ["lossy"], spec, tmp_path / "out", limit=2)
    with pytest.raises(UserError, match=r"other settings: seed was 0, is 1.*Use another output folder"):
        run(FakeEngine(), ["lossy"], spec, tmp_path / "out", limit=2, seed=1)
    with pytest.raises(UserError, match="model was"):
        run(FakeEngine(digest="n" * 64), ["lossy"], spec, tmp_path / "out", limit=2)


def test_changed_data_is_refused(tmp_path, spec):
    """Danger: answers to other questions stand under the same ids."""
    run(FakeEngine(), [], spec, tmp_path / "out")
    data.jsonl(tmp_path / "questions.jsonl", [{**row, "question": row["question"] + " Please?"} for row in data.OWN])
    with pytest.raises(UserError, match=r"sample q\d was another prompt"):
        run(FakeEngine(), [], spec, tmp_path / "out")


def test_foreign_and_damaged_record_files(tmp_path, spec):
    """Danger: garbage is continued."""
    full, *_ = run(FakeEngine(), [], spec, tmp_path / "out", limit=2)
    lines = full.read_text().splitlines(keepends=True)
    full.write_text(lines[0] + "garbage\n" + lines[2])
    with pytest.raises(UserError, match="jsonl:2 is not JSON"):
        run(FakeEngine(), [], spec, tmp_path / "out", limit=2)
    full.write_text('{"hello": 1}\n')
    with pytest.raises(UserError, match="no record file of this version"):
        run(FakeEngine(), [], spec, tmp_path / "out", limit=2)


def test_a_bad_sample_is_named(tmp_path):
    """Danger: a run stops, and nobody knows at which sample."""
    rows = [*data.OWN[:2], {**data.OWN[2], "question": "too long"}]
    spec = f"qa:path={data.jsonl(tmp_path / 'x.jsonl', rows)}"
    with pytest.raises(UserError, match=r"qa, sample q2, full: the prompt takes 900 positions"):
        run(FakeEngine(), [], spec, tmp_path / "out", first=True)
    assert ids(tmp_path / "out" / "qa--full.jsonl") == []  # told before anything was computed


def test_choice_of_samples(tmp_path, spec):
    """Danger: a smaller limit is no part of a larger one, or two samples share an id."""
    from kvilt import registry

    task = registry.build("task", spec)
    drawn = [s.id for s in choose(task, 5, seed=0)]
    assert [s.id for s in choose(task, 3, seed=0)] == drawn[:3]
    assert drawn != [s.id for s in choose(task, 5, seed=1)]
    assert [s.id for s in choose(task, 3, seed=0, first=True)] == ["q0", "q1", "q2"]
    with pytest.raises(UserError, match="limit must be at least 1"):
        choose(task, 0, seed=0)
    data.jsonl(tmp_path / "questions.jsonl", [data.OWN[0], data.OWN[0]])
    with pytest.raises(UserError, match="more than one sample has the id 'q0'"):
        choose(task, None, seed=0)


def test_shuffling_moves_gold_along(tmp_path, spec):
    """Danger: the gold passages are others after shuffling."""
    from kvilt import registry

    shuffled = choose(registry.build("task", spec), None, seed=0, shuffle=True)
    assert {s.metadata["gold"][0] for s in shuffled} == {0, 1}
    assert all(s.documents[s.metadata["gold"][0]].title == "Keys" for s in shuffled)
    with pytest.raises(UserError, match="order of the documents is part of the task niah"):
        run(FakeEngine(), [], "niah", tmp_path / "out", shuffle=True)


def test_report(tmp_path, spec):
    """Danger: the table shows other figures than the records hold."""
    run(FakeEngine(), ["lossy"], spec, tmp_path / "out")
    run(FakeEngine(), ["lossy"], "biography:count=4", tmp_path / "out", limit=3)
    text = report(tmp_path / "out", by="needed")
    assert (tmp_path / "out" / "report.md").read_text() == text
    table = [line for line in text.partition("## qa (v1)")[2].splitlines() if line.startswith("| lossy")]
    assert table[0].startswith("| lossy | 50.0 [12.5, 87.5] | -50.0 [-87.5, -12.5] | 50.0 | 50.0 |")
    assert table[0].endswith("| 0.500 | 250.0 | 0 | 8 |")
    assert "| full | 100.0 [67.6, 100.0] |  |  | 100.0 | 100.0 | 0.0000 | 1.000 | 250.0 | 0 | 8 |" in text
    assert "## biography count=4 (v1)" in text
    assert "| accuracy by needed | 1 |" in text
    order = [rows.header["name"] for rows in load(tmp_path / "out")["qa (v1)"]]
    assert order == ["full", "lossy", "no documents"]
    assert "| accuracy by position" not in report(tmp_path / "out", by="position")  # only the biographies tell
    with pytest.raises(UserError, match=r"tells its 'colour'\. Known: gold"):
        report(tmp_path / "out", by="colour")


def test_report_of_half_a_run_compares_common_samples(tmp_path, spec):
    """Danger: two rows are compared on different samples."""
    full, floor, lossy = run(FakeEngine(), ["lossy"], spec, tmp_path / "out", first=True)
    lines = full.read_text().splitlines(keepends=True)
    full.write_text("".join(lines[:3]))  # q0 and q1 only
    text = report(tmp_path / "out")
    assert "| lossy | 50.0" in text
    assert next(line for line in text.splitlines() if line.startswith("| lossy")).split("|")[3].startswith(" -50.0")
    assert "| full | 100.0 [34.2, 100.0] |" in text
    assert floor != lossy


def test_report_needs_records(tmp_path):
    """Danger: an empty folder gives an empty table."""
    with pytest.raises(UserError, match="is no folder"):
        report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no records"):
        report(tmp_path)


def test_plot(tmp_path, spec, monkeypatch):
    """Danger: a picture needs a screen."""
    pytest.importorskip("matplotlib")
    run(FakeEngine(), ["lossy"], spec, tmp_path / "out", limit=4)
    (picture,) = plot(tmp_path / "out")
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"kvilt\[plot\]"):
        plot(tmp_path / "out")


def test_with_a_real_engine(tmp_path, model_dir, spec):
    """Danger: what holds for the fake engine does not for the real one."""
    from kvilt.engine.engine import Engine

    torch.set_num_threads(1)  # tiny matrices: threads only wait for each other
    engine = Engine.load(str(model_dir), "full", "memory")
    paths = run(engine, ["naive", "epic:tokens=2"], spec + ",answer_tokens=3", tmp_path / "out", limit=2)
    full, floor, naive, epic = (read(p)[1] for p in paths)
    assert all(r["usage"]["charged"] == pytest.approx(1) for r in full)
    assert all(r["usage"]["charged"] < 0.6 for r in floor)
    assert all(r["usage"]["hits"] == 2 and r["usage"]["misses"] == 0 for r in naive)
    assert all(n["usage"]["charged"] < e["usage"]["charged"] < 1 for n, e in zip(naive, epic, strict=True))
    assert all(r["kl"] > 0 for r in naive)
    assert json.loads(paths[2].read_text().splitlines()[0])["model"] == engine.info.digest
    assert "naive" in report(tmp_path / "out")


def test_every_strategy_runs_with_every_compression_against_an_uncompressed_reference(tmp_path, model_dir, spec):
    """Danger: full recompute or the floor is compressed, too, or a row reads the plain copy."""
    from kvilt.engine.engine import Engine

    engine = Engine.load(str(model_dir), "full", "memory", compress="int4")
    task, chosen = spec + ",answer_tokens=3", ["naive", "epic:tokens=2"]
    paths = run(engine, chosen, task, tmp_path / "out", limit=1, compressions=["", "int8", "keydiff+int8"])
    names = [json.loads(p.read_text().splitlines()[0])["name"] for p in paths]
    assert names[:3] == ["full", "no documents", "naive"]
    assert names[3:] == [
        "naive + int8",
        "naive + keydiff+int8",
        *(f"epic:tokens=2{c}" for c in ("", " + int8", " + keydiff+int8")),
    ]
    bytes_ = [read(p)[1][0]["usage"]["bytes_loaded"] for p in paths[2:5]]
    assert bytes_[0] > 1.5 * bytes_[1] > 1.5 * bytes_[2] > 0
    assert "int8" in report(tmp_path / "out")
    assert len(run(engine, chosen, task, tmp_path / "own", limit=1)) == 4
    assert '"int4"' in (tmp_path / "own").joinpath(paths[2].name.replace("naive", "naive_int4")).read_text()
