"""Collections: what is exported is what is imported, and nothing that was altered, is odd or is somebody else's gets in."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus_kit import MOMENT, files

import zoo
from cli_kit import data, error, run, run_any, write_documents
from kvilt.corpora.collection import open_collection
from kvilt.engine.engine import Engine
from kvilt.errors import UserError
from kvilt.registry import build

QUESTION = "Where?"


@pytest.fixture
def filled(model_dir: Path, store: str, tmp_path: Path) -> str:
    """A store with four documents."""
    write_documents(tmp_path / "docs", 4)
    where = ("--model", model_dir, "--store", store, "--tables", tmp_path / "tables")
    run("encode", tmp_path / "docs", *where, SOURCE_DATE_EPOCH=MOMENT)  # long ago
    return store


@pytest.fixture(params=["made", "made.tar"])
def exported(request: pytest.FixtureRequest, filled: str, tmp_path: Path) -> Path:
    """A collection of them, as a folder and as a tar file."""
    path = tmp_path / str(request.param)
    table = tmp_path / "tables" / "documents.jsonl"
    run("collection", "export", path, "--store", filled, "--table", table, "--licence", "CC BY 4.0")
    return path


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private Ed25519 key as openssl makes it; its public half is beside it."""
    path = tmp_path_factory.mktemp("key") / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", path], check=True, capture_output=True)
    public = ["openssl", "pkey", "-in", path, "-pubout", "-out", path.with_name("public.pem")]
    subprocess.run(public, check=True, capture_output=True)
    return path


def changed(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Rewrite a collection with other files."""
    held = {n: read() for n, read in open_collection(path).box.items()}
    change(held)
    if path.is_dir():
        shutil.rmtree(path)
        path.mkdir()
        for name, content in held.items():
            (path / name).write_bytes(content)
        return
    with tarfile.open(path, "w") as tar:
        for name, content in held.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def manifest(path: Path, change: Callable[[dict], None]) -> None:
    """Rewrite a collection's manifest."""

    def within(held: dict[str, bytes]) -> None:
        fields = json.loads(held["manifest.json"])
        change(fields)
        held["manifest.json"] = json.dumps(fields).encode()

    changed(path, within)


def test_what_goes_out_comes_in(exported: Path, filled: str, model_dir: Path, tmp_path: Path) -> None:
    """Danger: a collection loses bytes, ids or documents on the way, or what came in is not found by an engine."""
    other = f"disk:path={tmp_path / 'other'}"
    told = data("collection", "import", exported, "--store", other)
    assert (told["whole"], told["stored"], told["problems"], told["licence"]) == (4, 4, [], "CC BY 4.0")
    assert files(tmp_path / "other") == files(tmp_path / "store")
    assert data("collection", "import", exported, "--store", other)["stored"] == 0
    assert data("cache", "verify", "--store", other)["damaged"] == []
    ids = {m.id for m in open_collection(exported).manifest.documents}
    assert ids == {str(p) for p in (tmp_path / "docs").iterdir()}
    asked = ("ask", QUESTION, "--docs", tmp_path / "docs", "--model", model_dir, "--max-new-tokens", 1)
    assert data(*asked, "--store", other)["usage"]["hits"] == 4
    assert data("collection", "verify", exported)["whole"] == 4
    assert "there already" in error("collection", "export", exported, "--store", filled)


def test_budgets_hold_for_what_comes_in(exported: Path, tmp_path: Path) -> None:
    """Danger: a collection fills a disk past its budget, because nobody entered what came in."""
    size = max(m.bytes for m in open_collection(exported).manifest.documents)
    small = build("store", f"disk:path={tmp_path / 'small'},budget={2 * size}")
    open_collection(exported).into(small)
    assert small.stats().bytes <= 2 * size
    assert small.stats().evictions >= 2
    assert min(e.used for e in small.entries()) > time.time() - 60  # old documents, but new here: not the first to go
    small.close()


def test_altered_documents_stay_outside(exported: Path, tmp_path: Path) -> None:
    """Danger: one byte of somebody's file is another, and its rows are served."""
    names = [m.key + ".safetensors" for m in open_collection(exported).manifest.documents]

    def alter(held: dict[str, bytes]) -> None:
        held[names[0]] = held[names[0]][:-1] + bytes([held[names[0]][-1] ^ 1])
        held[names[1]] = held[names[1]][:100]
        held[names[2]] = held[names[3]]

    changed(exported, alter)
    told = data("collection", "import", exported, "--store", f"disk:path={tmp_path / 'other'}", code=1)
    assert (told["whole"], told["stored"], len(told["problems"])) == (1, 1, 3)
    assert list(files(tmp_path / "other")) == [names[3]]
    changed(exported, lambda held: held.pop(names[3]))
    assert "is missing" in data("collection", "verify", exported, code=1)["problems"][-1]


def test_a_manifest_that_lies_is_found_out(exported: Path, tmp_path: Path) -> None:
    """Danger: digests are recomputed by whoever altered a document, and another text's rows come in under its key."""
    import blake3

    first, second, *_ = open_collection(exported).manifest.documents

    def swap(held: dict[str, bytes]) -> None:
        held[f"{first.key}.safetensors"] = other = held[f"{second.key}.safetensors"]
        fields = json.loads(held["manifest.json"])
        fields["documents"][0] |= {"bytes": len(other), "blake3": blake3.blake3(other).hexdigest()}
        held["manifest.json"] = json.dumps(fields).encode()

    changed(exported, swap)
    told = data("collection", "import", exported, "--store", f"disk:path={tmp_path / 'other'}", code=1)
    assert told["stored"] == 3
    assert "another document" in told["problems"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "version 2; this Kvilt reads 1"),
        (lambda m: m.update(format="other"), "malformed"),
        (lambda m: m["documents"][0].update(key="../../etc/passwd"), "malformed"),
        (lambda m: m["documents"][0].update(key="A" * 64), "malformed"),
        (lambda m: m["documents"][0].update(bytes=-1), "malformed"),
        (lambda m: m["documents"][0].update(kind=7), "malformed"),
        (lambda m: m["documents"].append(3), "malformed"),
        (lambda m: m["model"].pop("rope"), "malformed"),
        (lambda m: m.update(more=1), "malformed"),
        (lambda m: m["documents"].pop(), "which its manifest does not name"),
    ],
)
def test_odd_manifests_are_one_line(
    exported: Path, change: Callable[[dict], None], message: str, tmp_path: Path
) -> None:
    """Danger: a collection of another version, or one that was made to do harm, is half taken in, or ends in a traceback."""
    manifest(exported, change)
    other = tmp_path / "other"
    assert message in error("collection", "import", exported, "--store", f"disk:path={other}")
    assert not files(other)


def test_nothing_leaves_the_folder(exported: Path, tmp_path: Path) -> None:
    """Danger: a tar file writes into a home directory, or a link in a folder reads what is none of its business."""
    secret = tmp_path / "secret"
    secret.write_text("mine")
    name = open_collection(exported).manifest.documents[0].key + ".safetensors"
    if exported.is_dir():
        (exported / name).unlink()
        (exported / name).symlink_to(secret)
        assert "does not belong" in error("collection", "verify", exported)
        (exported / name).unlink()
        (exported / "below").mkdir()
        assert "does not belong" in error("collection", "verify", exported)
        return
    whole = exported.read_bytes()
    for odd, kind in (("../out", tarfile.REGTYPE), ("/out", tarfile.REGTYPE), ("in", tarfile.SYMTYPE), (name, b"0")):
        exported.write_bytes(whole)
        with tarfile.open(exported, "a") as tar:
            info = tarfile.TarInfo(odd)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info, io.BytesIO())
        assert "does not belong" in error("collection", "import", exported, "--store", f"disk:path={tmp_path / 'x'}")
        assert not (tmp_path / "out").exists()
    exported.write_bytes(whole[:300])
    assert "error" in run_any("collection", "verify", exported).stderr
    assert "no such file" in error("collection", "verify", tmp_path / "none")
    assert "no collection" in error("collection", "verify", tmp_path / "docs")


def test_signatures(filled: str, key: Path, tmp_path: Path) -> None:
    """Danger: an altered manifest is taken for the signer's, or anybody's signature for that of somebody who is trusted."""
    path, public = tmp_path / "signed", key.with_name("public.pem")
    run("collection", "export", path, "--store", filled, "--sign", key)
    signer = data("collection", "verify", path, "--trusted", public)["signer"]
    assert data("collection", "verify", path, "--trusted", signer)["whole"] == 4
    assert f"signed by {signer}" in run("collection", "verify", path).stdout
    assert "not by the key you trust" in error("collection", "verify", path, "--trusted", "ab" * 32)
    assert "no public Ed25519 key" in error("collection", "verify", path, "--trusted", "me")
    assert "no private Ed25519 key" in error(
        "collection", "export", tmp_path / "x", "--store", filled, "--sign", public
    )
    shutil.copytree(path, tmp_path / "other")
    manifest(tmp_path / "other", lambda m: m.update(licence="anything goes"))
    assert "was altered" in error("collection", "verify", tmp_path / "other")
    (path / "manifest.sig").write_text("{}")
    assert "was altered" in error("collection", "verify", path)
    (path / "manifest.sig").unlink()
    assert "not signed" in error("collection", "verify", path, "--trusted", public)
    assert "not signed" in run("collection", "verify", path).stdout


def test_diff_says_what_is_needed_again(exported: Path, model_dir: Path, tmp_path: Path) -> None:
    """Danger: everything is encoded again for a change that changes nothing, or nothing for one that changes all."""
    common = ("collection", "diff", exported, "--model", model_dir)
    assert data(*common)["again"] == 0
    assert data(*common, "--strategy", "block:sink=system")["documents"] == 4
    made = data(*common, "--strategy", "naive")
    assert (made["again"], made["reasons"]) == (4, {"encoding": 4})
    assert data(*common, "--compress", "int8")["reasons"] == {"compression": 4}
    other = data("collection", "diff", exported, "--model", zoo.save(tmp_path / "m2", seed=2))
    assert other["again"] == 4
    assert other["reasons"] == {"model": 4}
    engine = Engine.load(str(model_dir), store="memory")
    assert other["bytes"] == other["tokens"] * engine.model.bytes_per_token


def test_a_collection_is_one_models(filled: str, tmp_path: Path) -> None:
    """Danger: documents of two models are published as one's."""
    second = zoo.save(tmp_path / "m2", seed=2)
    run("encode", tmp_path / "docs", "--model", second, "--store", filled)
    assert "2 models'" in error("collection", "export", tmp_path / "both", "--store", filled)
    for held in data("cache", "du", "--store", filled):
        path = tmp_path / held["model"]
        assert data("collection", "export", path, "--store", filled, "--model", held["model"])["documents"] == 4
    with pytest.raises(UserError, match="no collection"):
        open_collection(tmp_path / "docs")
