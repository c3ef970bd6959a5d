"""Every mistake gets one clear message and its exit code, and never costs what is stored."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers

import zoo
from cli_kit import data, error, run, run_any, stored, write_documents
from kvilt.errors import UserError
from kvilt.strategies.wrapper import Wrapper

ASK = ("ask", "what?", "--max-new-tokens", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", "  ", "--docs", "DOCS"), "the question is empty"),
        (("ask", "bad \udcff byte", "--docs", "DOCS"), "not UTF-8"),
        (("ask", "what?"), "no documents"),
        (("ask", "what?", "--docs", "nowhere.txt"), "no such file or folder: nowhere.txt"),
        (
            ("ask", "what?", "--docs", "DOCS", "--pick", "9.txt"),
            r"no document has the id '9.txt'\. Did you mean '0\d.txt'",
        ),
        (("ask", "what?", "--docs", "DOCS", "--strategy", "blok"), "Did you mean 'block'"),
        (("ask", "what?", "--docs", "DOCS", "--strategy", "block:sink"), "bad option 'sink'"),
        (("ask", "what?", "--docs", "DOCS", "--strategy", "kvlink:link=5"), "Did you mean 'links'"),
        (("ask", "what?", "--docs", "DOCS", "--strategy", "kvlink:links=five"), "links of strategy 'kvlink' wants int"),
        (("ask", "what?", "--docs", "DOCS", "--model", "MODEL", "--store", "dsk"), "Did you mean 'disk'"),
        (("ask", "what?", "--docs", "DOCS", "--model", "MODEL", "--store", "disk:budget=lots"), "is not a size"),
        (("ask", "what?", "--docs", "DOCS", "--json", "--stream"), "give one of them"),
        (("ask", "what?", "--docs", "DOCS", "--logits", "nowhere/l.safetensors"), "no such folder"),
        (("ask", "what?", "--docs", "DOCS"), "no model"),
        (("encode", "DOCS", "--model", "nowhere/model"), "cannot load model 'nowhere/model'"),
        (("encode", "EMPTY", "--model", "MODEL"), "empty.txt is empty"),
        (("doctor", "DOCS"), "give --model"),
        (("list", "strategies"), "Did you mean 'strategy'"),
        (("cache", "show", "nothing", "--store", "memory"), "no stored document is called 'nothing'"),
        (("cache", "rm", "--store", "memory"), "say which documents"),
        (("encode", "DOCS", "--model", "MODEL", "--namespace", "\udcff"), "--namespace is not UTF-8"),
        (("cache", "ls", "--namespace", "\udcff"), "--namespace is not UTF-8"),
        (("ask", "what?", "--docs", "DOCS", "--system", "\udcff", "--model", "MODEL"), "--system is not UTF-8"),
        (("ask", "-", "--docs", "-"), "for one question"),
        (("ask", "--docs", "DOCS", "--stream"), "for one question"),
        (("encod",), "No such command 'encod'"),
        (("cache",), "Missing command. See: kvilt cache --help"),
        (("ask", "what?", "--dokcs", "x"), "No such option"),
        (("ask", "what?", "--docs", "x", "--top-p", "3"), "Invalid value for"),
        (("ask", "what?", "--docs", "x", "--max-new-tokens", "9" * 5000), "Invalid value for"),
        (("encode",), "Missing argument"),
        (("encode", "DOCS", "--ttl", "0"), "--ttl 0: a number of seconds above 0"),
        (("encode", "DOCS", "--ttl", "nan"), "--ttl nan"),
    ],
)
def test_before_a_model_is_loaded(
    arguments: tuple[str, ...], message: str, model_dir: Path, docs: list[Path], tmp_path: Path
) -> None:
    """Danger: a minute of loading, and then a typing error; or a mistake that is not told in one line."""
    (tmp_path / "empty.txt").write_text(" \n")
    names = {"DOCS": docs[0].parent, "MODEL": model_dir, "EMPTY": tmp_path / "empty.txt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert re.search(message, error(*(names.get(a, a) for a in arguments)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "fp8"), "unknown dtype 'fp8'"),
        (("--device", "abacus"), "unknown device 'abacus'"),
        (("--strategy", "kv_packet"), "needs"),
        (("--strategy", "kv_packet:wrapper=nowhere.safetensors"), "no wrapper file"),
        (("--strategy", "block:sink=yes"), "option sink wants"),
        (("--docs", "LONG"), r"has 5001 tokens, the model's context holds 4\d+"),
        (("--docs", "MANY"), r"the prompt takes \d+ positions, the model's context holds 4096"),
    ],
)
def test_with_a_model(
    arguments: tuple[str, ...], message: str, model_dir: Path, docs: list[Path], store: str, tmp_path: Path
) -> None:
    """Danger: a mistake that only the model can see ends in a traceback."""
    (tmp_path / "long.txt").write_text("x" * 5000)
    for i in range(3):
        (tmp_path / "many").mkdir(exist_ok=True)
        (tmp_path / "many" / f"{i}.txt").write_text(str(i) * 1500)
    names = {"LONG": tmp_path / "long.txt", "MANY": tmp_path / "many"}
    documents = () if "--docs" in arguments else ("--docs", docs[0])
    given = (*documents, *(names.get(a, a) for a in arguments))
    assert re.search(message, error(*ASK, *given, "--model", model_dir, "--store", store))


def test_a_wrapper_for_another_model(model_dir: Path, docs: list[Path], store: str, tmp_path: Path) -> None:
    """Danger: vectors of another model give nonsense without a word."""
    common = (*ASK, "--docs", docs[0], "--model", model_dir, "--store", store)
    Wrapper(torch.zeros(2, 32), torch.zeros(2, 32)).save(tmp_path / "small")
    Wrapper(torch.zeros(2, 64), torch.zeros(2, 64), "0" * 64).save(tmp_path / "other")
    assert "trained for another model" in error(*common, "--strategy", f"kv_packet:wrapper={tmp_path / 'small'}")
    assert "was trained for weights" in error(*common, "--strategy", f"kv_packet:wrapper={tmp_path / 'other'}")


def test_caches_of_another_model_or_tokenizer_are_never_served(
    model_dir: Path, docs: list[Path], store: str, tmp_path: Path
) -> None:
    """Danger: an answer from foreign rows."""
    run("encode", *docs, "--model", model_dir, "--store", store)
    zoo.save(tmp_path / "other", seed=2)
    shutil.copytree(model_dir, tmp_path / "retokenized")
    tokenizer = zoo.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "retokenized")
    for model in (tmp_path / "other", tmp_path / "retokenized"):
        files = [tmp_path / name for name in ("a", "b")]
        asked = (*ASK, "--docs", *docs, "--model", model)
        mixed = data(*asked, "--store", store, "--logits", files[0])
        alone = data(*asked, "--store", "memory", "--logits", files[1])
        assert mixed["usage"]["hits"] == 0
        assert alone["usage"]["misses"] == mixed["usage"]["misses"] == 5
        assert same_logits(*files)


def same_logits(a: Path, b: Path) -> bool:
    """Equal but for rounding, which differs with the documents that were encoded in one batch."""
    return torch.allclose(load_file(a)["logits"], load_file(b)["logits"], rtol=1e-4, atol=1e-4)


def damage(path: Path, how: str) -> None:
    """Spoil a stored file in place."""
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        save_file({"x": torch.zeros(3)}, path)
    elif how == "header":
        content[200] ^= 1
        path.write_bytes(content)
    else:
        content[-5000] ^= 16
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", "foreign", "header", "bit"])
def test_damaged_files_are_set_aside_and_encoded_again(
    how: str, model_dir: Path, docs: list[Path], store: str, tmp_path: Path
) -> None:
    """Danger: a flipped bit reaches an answer, or costs the answer."""
    common = (*ASK, "--docs", *docs, "--model", model_dir, "--store", store)
    data(*common, "--logits", tmp_path / "before")
    damage(stored(tmp_path / "store")[2], how)
    result = run(*common, "--json", "--logits", tmp_path / "after")
    assert "damaged" in result.stderr
    assert same_logits(tmp_path / "before", tmp_path / "after")
    assert list((tmp_path / "store" / "aside").glob("*.reason"))
    assert data(*common)["usage"]["hits"] == 5
    assert data("cache", "verify", "--store", store)["damaged"] == []


@contextlib.contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """A read-only folder; root, whom permissions do not stop, becomes nobody meanwhile."""
    folders = [path, *(p for p in path.rglob("*") if p.is_dir())]
    for file in path.rglob("*"):
        file.chmod(0o555)
    path.chmod(0o555)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
        for folder in folders:
            folder.chmod(0o755)


@contextlib.contextmanager
def no_space(path: Path) -> Iterator[None]:
    """A full disk: a mounted one, or where that is not allowed a limit on the size of files."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(path)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_read_only_store_still_answers(docs: list[Path]) -> None:
    """Danger: a store that cannot be written takes the answer with it, or nobody hears of it."""
    with tempfile.TemporaryDirectory() as name:  # one that nobody may enter, too
        folder = Path(name)
        folder.chmod(0o755)
        model = zoo.save(folder / "model")
        paths = write_documents(folder / "docs", 3)
        store = f"disk:path={folder / 'store'}"
        run("encode", paths[0], "--model", model, "--store", store)
        with unwritable(folder):
            result = run(*ASK, "--docs", *paths, "--model", model, "--store", store)
            assert "1 hits, 2 misses" in result.stderr
            assert "not stored: " in result.stderr
            assert (
                "cannot make the store" in run(*ASK, "--docs", *paths, "--model", model, "--store", f"{store}2").stderr
            )
            assert "Permission denied" in error("encode", *paths, "--model", model, "--store", store, code=3)
            found = data("doctor", *paths, "--model", model, "--store", store, code=1)["findings"]
            assert any(f["status"] == "problem" and "cannot be written" in f["what"] for f in found)
        assert data("encode", *paths, "--model", model, "--store", store)["encoded"] == 2


def test_a_full_disk_still_answers(model_dir: Path, docs: list[Path], tmp_path: Path) -> None:
    """Danger: a full disk takes the answer with it, or leaves half a document behind."""
    common = (*ASK, "--docs", *docs, "--model", model_dir)
    data(*common, "--store", "memory", "--logits", tmp_path / "before")
    with no_space(tmp_path / "full"):
        store = f"disk:path={tmp_path / 'full' / 'store'},budget=1GB"
        result = run(*common, "--store", store, "--json")
        assert "not stored: " in result.stderr
        assert error("encode", *docs, "--model", model_dir, "--store", store, code=3)


HOSTILE = "\x1b[31mred\x07\u202egnp\n0123456789ab  forged\x9b1A"


def controls(text: str) -> set[str]:
    """Characters that a terminal would obey."""
    return {c for c in text if c != "\n" and (not c.isprintable() or c in "\u202e")}


def test_names_of_others_are_data(model_dir: Path, store: str, tmp_path: Path) -> None:
    """Danger: a title in a shared store moves the cursor, forges rows, or turns what an error says around."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "A text.", "title": HOSTILE, "id": HOSTILE}))
    common = ("--model", model_dir, "--store", store)
    run("encode", tmp_path / "a.jsonl", *common)
    shows = [
        run("cache", "ls", "--store", store),
        run("cache", "show", HOSTILE, "--store", store),
        run("doctor", tmp_path / "a.jsonl", *common, "--strategy", "naive", code=1),
        run("ask", "What?", "--docs", tmp_path / "a.jsonl", *common, "--explain", "--max-new-tokens", 1),
        run("ask", "What?", "--docs", tmp_path / "a.jsonl", *common, "--pick", HOSTILE + "x", code=2),
        run("cache", "rm", HOSTILE + "x", "--store", store, code=2),
        run("list", HOSTILE, code=2),
        run("ask", "What?", "--docs", HOSTILE, code=2),
        run(HOSTILE, code=2),
    ]
    for result in shows:
        assert not controls(result.stdout + result.stderr), result
    assert len(shows[0].stdout.splitlines()) == 2
    assert data("cache", "show", HOSTILE, "--store", store)["title"] == HOSTILE


def test_file_names_that_are_not_utf_8(model_dir: Path, store: str, tmp_path: Path) -> None:
    """Danger: one old file name, and the whole store or run ends in a traceback."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(name).write_text("Coffee is served here.")
    common = ("--model", model_dir, "--store", store)
    assert data("encode", tmp_path / name, *common)["encoded"] == 1
    assert "caf\\xe9.txt" in run("cache", "ls", "--store", store).stdout
    assert data("ask", "What?", "--docs", name, "--pick", name, *common, "--max-new-tokens", 1)["usage"]["hits"] == 1
    assert data("cache", "rm", name, "--store", store)["removed"] == 1


def test_the_rest_of_a_folder_is_encoded(model_dir: Path, docs: list[Path], store: str, tmp_path: Path) -> None:
    """Danger: one long or empty file among thousands, and nothing is encoded; or nobody hears of the second."""
    for name, text in (("long.txt", "x" * 5000), ("longer.txt", "y" * 6000), ("void.txt", " ")):
        (tmp_path / "docs" / name).write_text(text)
    common = ("encode", tmp_path / "docs", "--model", model_dir, "--store", store)
    result = run(*common, "--json", code=2)
    report = json.loads(result.stdout)
    assert (report["encoded"], len(report["failed"])) == (5, 3)
    for name in ("long.txt", "longer.txt", "void.txt"):
        assert f"{name}" in result.stderr
    assert data(*common, code=2)["present"] == 5
    assert "nothing to encode" in error("encode", tmp_path / "docs" / "void.txt", *common[2:])
    both = [tmp_path / "docs" / name for name in ("long.txt", "longer.txt")]
    message = error("ask", "what?", "--docs", *both, *common[2:])
    assert all(str(path) in message for path in both)


def test_closed_streams_and_broken_pipes(tmp_path: Path) -> None:
    """Danger: a traceback where a script or a pager closes what it does not read, or a file that gets its number."""

    def ended(redirected: str) -> tuple[int, str, str]:
        command = f"{sys.executable} -m kvilt list store {redirected}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    code, out, said = ended("<&- 2>&-")
    assert (code, said) == (0, "")
    assert "disk" in out
    assert ended(">&-") == (2, "", "error: standard output is closed, so nothing could be shown.\n")
    assert ended("| true")[::2] == (141, "")
    assert ended(">/dev/full")[::2] == (2, "error: [Errno 28] No space left on device.\n")


@pytest.mark.parametrize("seconds", [0.02, 0.6])
def test_ctrl_c_while_starting(seconds: float, model_dir: Path, docs: list[Path], store: str) -> None:
    """Danger: a page of imports instead of one line."""
    verb = [str(part) for part in ("encode", *docs, "--model", model_dir, "--store", store)]
    code = f"import sys; from kvilt.cli import main; sys.argv[1:] = {verb!r}; print('up', flush=True); main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert said.startswith("error: stopped.")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_others_runs_only_when_it_is_trusted(trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the flag does not reach the loader, or is on without being given."""

    def load(*given: object, trust_remote_code: bool) -> None:
        raise UserError(f"trusted: {trust_remote_code}")

    monkeypatch.setattr("kvilt.engine.engine.load_model", load)
    flag = ("--trust-remote-code",) if trusted else ()
    assert error("verify", "--model", "any", *flag) == f"trusted: {trusted}"


def test_a_fault_of_our_own_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: whoever meets a bug gets a page that says nothing to him, or whoever looks for it gets no traceback."""
    monkeypatch.setattr("kvilt.cli.catalogue.listed", lambda *given: 1 / 0)
    assert "a fault of Kvilt's own: ZeroDivisionError" in error("list", code=70)
    with pytest.raises(ZeroDivisionError):
        run("list", "--verbose")


@pytest.mark.parametrize(
    "option",
    [
        ("--temperature", "1e-40"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--top-p", "nan"),
        ("--top-p", "1e-40"),
    ],
)
def test_odd_numbers(option: tuple[str, str], model_dir: Path, docs: list[Path]) -> None:
    """Danger: a number that no machine can divide by ends in a traceback."""
    streams = run_any("ask", "what?", "--docs", docs[0], "--model", model_dir, "--store", "memory", *option)
    assert streams.code in (0, 2)
