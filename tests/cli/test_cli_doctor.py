"""`kvilt doctor` names the reason why documents are not reused, and the remedy, for every reason there is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

import zoo
from cli_kit import data, run, stored
from kvilt.stores.disk import DiskStore
from kvilt.strategies.wrapper import Wrapper


@pytest.fixture
def encoded(model_dir: Path, docs: list[Path], store: str) -> tuple[Any, ...]:
    """`doctor` on five stored documents, as arguments."""
    common = (*docs, "--model", model_dir, "--store", store, "--strategy", "block:sink=none")
    run("encode", *common)
    return ("doctor", *common)


def reasons(report: Any) -> set[tuple[str, str]]:
    return {(d["reason"], d["fix"]) for d in report["documents"] if not d["reused"]}


def only_reason(*arguments: Any) -> tuple[str, str]:
    """The one reason that holds for all documents."""
    report = data(*arguments, code=1)
    assert report["healthy"] is False
    assert not any(d["reused"] for d in report["documents"])
    (found,) = reasons(report)
    return found


def test_all_is_well(encoded: tuple[Any, ...], store: str) -> None:
    """Danger: the doctor finds fault with a sound store, or changes it by looking."""
    before = data("cache", "stats", "--store", store)
    report = data(*encoded)
    assert report["healthy"] is True
    assert [d["reused"] for d in report["documents"]] == [True] * 5
    assert "5 of 5 documents will be reused" in run(*encoded).stdout
    assert data("cache", "stats", "--store", store)["misses"] == before["misses"]


def test_another_dtype_of_the_computation_costs_nothing(encoded: tuple[Any, ...]) -> None:
    """Danger: a corpus that was encoded on a CPU is encoded again on a GPU."""
    assert data(*encoded, "--dtype", "bf16")["healthy"]


def test_reasons_are_told_once_with_a_remedy(encoded: tuple[Any, ...]) -> None:
    """Danger: a thousand lines for a thousand documents with the same fault, and none says what to do."""
    text = run(*encoded, "--compress", "int8", code=1).stdout
    assert "0 of 5 documents will be reused" in text
    assert "5 will not: it was compressed otherwise (none stored, int8 now)" in text
    assert "and 2 more" in text
    assert "fix: give the --compress it was encoded with" in text


def test_another_namespace(encoded: tuple[Any, ...]) -> None:
    """Danger: a document that lies there for somebody else seems to be lost."""
    reason, fix = only_reason(*encoded, "--namespace", "mine")
    assert "another namespace (shared stored, mine now)" in reason
    assert "--namespace" in fix


def test_other_weights(encoded: tuple[Any, ...], tmp_path: Path) -> None:
    """Danger: another model's documents are called lost."""
    reason, fix = only_reason(*encoded, "--model", zoo.save(tmp_path / "other", seed=2))
    assert "other weights" in reason
    assert "--model" in fix


def test_other_tokenizer(encoded: tuple[Any, ...], model_dir: Path, tmp_path: Path) -> None:
    """Danger: a changed tokenizer is not named."""
    shutil.copytree(model_dir, tmp_path / "model")
    tokenizer = zoo.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "model")
    reason, fix = only_reason(*encoded, "--model", tmp_path / "model")
    assert "another tokenizer" in reason
    assert "tokenizer's files" in fix


def test_other_rotary_settings(encoded: tuple[Any, ...], model_dir: Path, tmp_path: Path) -> None:
    """Danger: a changed config is not named."""
    shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    reason, fix = only_reason(*encoded, "--model", tmp_path / "model")
    assert "rotary settings changed" in reason
    assert "config.json" in fix


def test_other_encoding(encoded: tuple[Any, ...], tmp_path: Path) -> None:
    """Danger: another strategy's documents are called lost."""
    Wrapper(torch.ones(2, 64), torch.ones(2, 64)).save(tmp_path / "wrapper")
    reason, fix = only_reason(*encoded, "--strategy", f"kv_packet:wrapper={tmp_path / 'wrapper'}")
    assert re.search(r"other things around it \(plain stored, 2 before, 2 after kept [0-9a-f]{12} now\)", reason)
    assert "--strategy" in fix


def test_system_text_in_the_encoding(model_dir: Path, docs: list[Path], store: str) -> None:
    """Danger: nobody sees that a system text was changed, and every document is encoded again."""
    common = (*docs, "--model", model_dir, "--store", store, "--strategy", "block:sink=system")
    run("encode", *common, "--system", "Be brief.")
    reason, _ = only_reason("doctor", *common, "--system", "Be long.")
    assert "--system or the template changed" in reason


def test_template_drift(encoded: tuple[Any, ...], model_dir: Path, docs: list[Path], store: str) -> None:
    """Danger: a changed chat template goes unnoticed."""
    run("ask", "what?", "--docs", *docs, *encoded[len(docs) + 1 :], "--max-new-tokens", 1)
    assert not [f for f in data(*encoded)["findings"] if f["status"] == "note"]
    (note,) = (f for f in data(*encoded, "--system", "Another.")["findings"] if f["status"] == "note")
    assert "is not the one used before" in note["what"]


def test_changed_text_and_unknown_document(encoded: tuple[Any, ...], docs: list[Path], tmp_path: Path) -> None:
    """Danger: a changed document is taken for a new one, or the other way round."""
    docs[1].write_text("Something else.")
    (tmp_path / "new.txt").write_text("Nobody encoded this.")
    report = data(encoded[0], tmp_path / "new.txt", *encoded[1:], code=1)
    found = {d["id"]: d["reason"] for d in report["documents"] if not d["reused"]}
    assert "never encoded" in found[str(tmp_path / "new.txt")]
    assert "not the one stored under this name" in found[str(docs[1])]
    assert len(found) == 2


def test_damaged_files(encoded: tuple[Any, ...], store: str, tmp_path: Path) -> None:
    """Danger: damage is not named, or looking moves files."""
    rows, header = stored(tmp_path / "store")[:2]
    content = bytearray(rows.read_bytes())
    content[-5000] ^= 1
    rows.write_bytes(content)
    header.write_bytes(b"foreign")
    first = data(*encoded, code=1)
    assert any(
        "stored documents are not served" in f["what"] and "kvilt cache verify" in f["fix"] for f in first["findings"]
    )
    assert [d["reused"] for d in first["documents"]].count(False) == 2
    assert any("does not match its digest" in reason for reason, _ in reasons(first))
    assert data(*encoded, code=1)["documents"] == first["documents"]  # looking moves nothing
    assert len(data("cache", "verify", "--store", store, code=1)["damaged"]) == 2
    again = data(*encoded, code=1)
    assert any("set aside" in f["what"] for f in again["findings"])


def test_index_out_of_step(encoded: tuple[Any, ...], store: str, tmp_path: Path) -> None:
    """Danger: documents that are never evicted fill the disk."""
    disk = DiskStore(str(tmp_path / "store"))
    disk.last.forget([stored(tmp_path / "store")[0].stem])
    disk.close()
    (note,) = (f for f in data(*encoded)["findings"] if f["status"] == "note")
    assert "the catalogue does not know 1 stored documents" in note["what"]
    run("cache", "gc", "--store", store)
    assert not [f for f in data(*encoded)["findings"] if f["status"] == "note"]


def test_what_can_be_wrong_besides(encoded: tuple[Any, ...], store: str, tmp_path: Path) -> None:
    """Danger: a traceback where the set-up itself is at fault."""
    wrapper = tmp_path / "wrapper"
    Wrapper(torch.ones(2, 32), torch.ones(2, 32)).save(wrapper)
    report = data(*encoded, "--strategy", f"kv_packet:wrapper={wrapper}", code=1)
    assert any("trained for another model" in f["what"] for f in report["findings"])
    assert any("reuses nothing" in f["what"] for f in data(*encoded, "--strategy", "full", code=1)["findings"])
    assert "forgets everything" in run("doctor", "--store", "memory").stdout
    assert "is empty" in run("doctor", "--store", f"{store}2").stdout
    assert "the catalogue knows them all" in run("doctor", "--store", f"tiered:path={tmp_path / 'store'}").stdout
    (tmp_path / "file").write_text("")
    assert "cannot make the store" in run("doctor", "--store", f"disk:path={tmp_path / 'file'}", code=1).stdout
