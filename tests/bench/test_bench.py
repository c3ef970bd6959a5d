"""`kvilt bench`: what it measures is what is stored, full prefill stands beside, and a model of one's own is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli_kit import data, error, run
from kvilt.lab.bench.subject import DOCUMENT_TOKENS, named_subject, random_subject


def test_bytes_errors_and_times(model_dir: Path, tmp_path: Path) -> None:
    """Danger: errors against the compressed rows themselves, or bytes of something that is not on the disk."""
    (tmp_path / "text.txt").write_text("The river Sel runs from Orsa to the sea, slowly. " * 8)
    arguments = [
        "compression",
        "--model",
        model_dir,
        "--docs",
        tmp_path / "text.txt",
        "--repeats",
        1,
        "--dtype",
        "bf16",
    ]
    chosen = [a for c in ("int8", "int4", "fp8", "keydiff:keep=0.25") for a in ("--compress", c)]
    made = data("bench", *arguments, *chosen, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compression.json").read_text()) == made
    rows = made["rows"]
    assert made["tokens"] == 393
    assert rows["none"]["bytes_per_token"] == 2 * 4 * 2 * 16 * 4  # kept in the checkpoint's own dtype
    assert rows["none"]["keys_error"] == rows["keydiff:keep=0.25"]["values_error"] == 0
    assert 0.24 < rows["keydiff:keep=0.25"]["bytes_per_token"] / rows["none"]["bytes_per_token"] < 0.27
    for name, most in {"int8": 0.01, "fp8": 0.03, "int4": 0.12}.items():
        assert 0 < rows[name]["keys_error"] < most
        assert 0 < rows[name]["values_error"] < most
        assert rows[name]["bytes_per_token"] < 0.65 * rows["none"]["bytes_per_token"]
        assert rows[name]["load_s"]["median"] > 0


def test_documents_have_the_size_they_are_said_to_have() -> None:
    """Danger: 16,000 tokens of context are 12,000, and every figure over them is too good."""
    subject = random_subject("llama-30m")
    for documents in (subject.documents(3), subject.documents(70)):
        assert len({d.text for d in documents}) == len(documents)
        sizes = {len(subject.text.document_ids(d)) for d in documents}
        assert sizes <= {DOCUMENT_TOKENS, DOCUMENT_TOKENS + 1}  # texts that come again are numbered
    named = named_subject("builtin", dtype="float32")
    sizes = [len(named.text.document_ids(d)) for d in named.documents(4)]
    assert all(0.95 * DOCUMENT_TOKENS <= size < 1.5 * DOCUMENT_TOKENS for size in sizes)


def test_ttft_of_a_model_by_name(model_dir: Path, tmp_path: Path) -> None:
    """Danger: a user's own model cannot be measured, full prefill is missing, or what the context cannot hold is tried."""
    (tmp_path / "text.txt").write_text("The river Sel runs from Orsa to the sea, slowly. " * 8)
    common = ("bench", "ttft", "--model", model_dir, "--docs", tmp_path / "text.txt", "--repeats", 1)
    result = data(*common, "--documents", "1,2,40", "--out", tmp_path / "out", "--strategy", "epic:tokens=4")
    assert [p["documents"] for p in result["points"]] == [1, 2]
    for point in result["points"]:
        full, epic = point["rows"]["full"], point["rows"]["epic:tokens=4"]
        assert full["of_full"] == 1
        assert set(full) == {"ttft_s", "of_full", "steps_s"}
        assert epic["computed_tokens"] > 4
        assert 0 < epic["forward_s"] < epic["floor_s"]
        assert epic["bytes"] > 0
    table = run(*common, "--documents", 1).stdout
    tokens = result["points"][0]["context"]
    assert 500 <= tokens < 1000 < result["points"][1]["context"]
    assert f"| {tokens} | block:sink=system |" in table
    assert (tmp_path / "out" / "ttft.png").is_file()
    assert "the context holds" in error(*common, "--documents", 40)
    assert "write numbers with commas" in error(*common, "--documents", "2;4")
    assert "unknown shape" in error("bench", "ttft", "--shape", "llama-9b")


@pytest.mark.parametrize("verb", [("encode", "--batch", 2), ("decode", "--documents", 1, "--tokens", 3)])
def test_rates_beside_transformers(verb: tuple[object, ...], model_dir: Path) -> None:
    """Danger: the verb runs on the command line of nobody but its author."""
    result = data("bench", *verb, "--model", model_dir, "--repeats", 1)
    assert set(result["tokens_per_s"]) == {"kvilt", "transformers", *(["ape"] if verb[0] == "decode" else [])}
    assert result["ratio"] > 0


def test_ttft_of_a_shape_as_a_new_user_types_it(tmp_path: Path) -> None:
    """Danger: the defaults of the options are no device, or rows in memory are rows of the disk under another name."""
    out = tmp_path / "out"
    said = ("--shape", "llama-30m", "--documents", 1, "--repeats", 1, "--strategy", "block", "--memory", "--out", out)
    rows = data("bench", "ttft", *said)["points"][0]["rows"]
    assert set(rows) == {"full", "block", "block (memory)"}
    assert rows["block"]["bytes"] == rows["block (memory)"]["bytes"] > 0
    assert (out / "ttft.png").is_file()
