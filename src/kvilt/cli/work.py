"""What `kvilt encode` and `kvilt ask` do, between reading and showing."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvilt.cli import USER, show, talk
from kvilt.cli.options import Answering, Run, Stored, utf8
from kvilt.engine.encoder import Encoder, Progress
from kvilt.engine.engine import Engine
from kvilt.errors import DocumentError, PromptError, UserError, did_you_mean
from kvilt.rows.files import name_of, replacing
from kvilt.types import Answer, Document

STDIN = "-"


def encode(options: Run, paths: Sequence[str], dry_run: bool, ttl: float | None) -> int:
    """Encode what can be encoded; every document that cannot is named, and the exit code says so."""
    if ttl is not None and not 0 < ttl < math.inf:
        raise UserError(f"--ttl {ttl:g}: a number of seconds above 0.")
    bad: list[str] = []
    documents = options.read(paths, lambda error: bad.append(str(error)))
    if bad and not documents:
        raise DocumentError(f"nothing to encode: {' '.join(bad)}")
    encoder = _encoder(options.engine(), ttl)
    with talk.meter("encoding") as meter:
        tell = functools.partial(_told, meter)
        report = encoder.dry_run(documents) if dry_run else encoder.encode(documents, tell, keep_going=True)
    report = dataclasses.replace(report, failed=(*bad, *report.failed))
    show.out(options.json, {**dataclasses.asdict(report), "dry_run": dry_run}, [show.encoded(report, dry_run)])
    for message in report.failed:
        talk.fail(message)
    return USER if report.failed else 0


def _encoder(engine: Engine, ttl: float | None) -> Encoder:
    if engine.strategy.encoding is None:
        talk.warn("this strategy reuses nothing: documents are encoded for the plain ones (block, naive, ...).")
    return engine.encoder if ttl is None else dataclasses.replace(engine.encoder, ttl=ttl)


def _told(meter: talk.Meter, p: Progress) -> None:
    speed = f"{p.tokens / max(p.seconds, 1e-9):,.0f} tokens/s"
    meter(p.tokens, p.total_tokens, f"{p.done:,} of {p.total:,} documents stored, {speed}")


def ask(options: Run, answering: Answering, question: str, paths: Sequence[str], ids: Sequence[str]) -> int:
    """Answer one question, or every line of standard input in order."""
    _check(question, paths, options.json, answering)
    documents = _choose(options.read(paths), ids)
    engine = options.engine(without_store=True)
    if question != STDIN:
        _answer(engine, question, documents, options.json, answering)
        return 0
    failed = 0
    for asked in _lines():
        try:
            _answer(engine, asked, documents, options.json, answering, many=True)
        except PromptError as error:  # the next one may be answered
            failed += 1
            talk.fail(f"{asked!r}: {error}")
            show.out(options.json, {"question": asked, "error": str(error)}, [""])
        sys.stdout.flush()
    return USER if failed else 0


def _check(question: str, paths: Sequence[str], as_json: bool, wanted: Answering) -> None:
    """Raise UserError for what can be seen to be wrong before a model is loaded."""
    if not utf8(question, "the question").strip():
        raise PromptError("the question is empty.")
    if as_json and wanted.stream:
        raise UserError("--stream prints text and --json one object at the end: give one of them.")
    if question == STDIN and (wanted.stream or wanted.logits or STDIN in paths):
        raise UserError("questions come from standard input: --stream, --logits and --docs - are for one question.")
    if question == STDIN and sys.stdin.isatty():
        talk.say("one question a line; Ctrl-D ends.")
    if wanted.logits is not None and (wanted.logits.is_dir() or not wanted.logits.absolute().parent.is_dir()):
        raise UserError(f"cannot write {wanted.logits}: it is a folder, or there is no such folder.")


def _lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise PromptError(f"line {number} of standard input is not UTF-8.") from error
        if text:
            yield text


def _choose(documents: list[Document], ids: Sequence[str]) -> list[Document]:
    """The documents with these ids or file names, in the order of the ids; all if none is given."""
    if not documents:
        raise PromptError("no documents: give some with --docs.")
    return [_named(documents, name_of(wanted)) for wanted in ids] if ids else documents


def _named(documents: list[Document], wanted: str) -> Document:
    named = [d for d in documents if d.id == wanted] or [d for d in documents if Path(d.id or "").name == wanted]
    if not named:
        known = {name for d in documents for name in (d.id or "", Path(d.id or "").name)}
        raise DocumentError(f"no document has the id {wanted!r}.{did_you_mean(wanted, known)}")
    if len(named) > 1:
        raise DocumentError(f"{len(named)} documents are called {wanted!r}: {', '.join(str(d.id) for d in named[:3])}.")
    return named[0]


def _answer(
    engine: Engine, question: str, documents: list[Document], as_json: bool, wanted: Answering, many: bool = False
) -> None:
    give = functools.partial(_streamed, engine) if wanted.stream else engine.answer
    answer = give(question, documents, **wanted.settings())
    if wanted.logits is not None:
        _write_logits(answer, wanted.logits)
    text = " ".join(answer.text.split()) if many else answer.text  # a line for a line
    if as_json:
        show.out(True, {"question": question, **answer.as_dict()}, ())
    elif not wanted.stream:
        print(_terminal(text))
    talk.say(show.usage(answer))
    if wanted.explain:  # by now every cache is there
        names = [d.id or d.title or "" for d in documents]
        for line in show.plan(engine.plan(question, documents), names, answer.strategy):
            talk.say(line)


def _streamed(engine: Engine, question: str, documents: list[Document], **settings: Any) -> Answer:
    """The answer, printed while it is generated."""
    for piece in engine.stream(question, documents, **settings):
        if isinstance(piece, Answer):
            print()
            return piece
        print(_terminal(piece), end="", flush=True)
    raise AssertionError("a stream ends with its answer")


def _terminal(text: str) -> str:
    """An answer as it is in a pipe, and without control characters on a terminal."""
    return talk.shown(text, keep="\n\t") if sys.stdout.isatty() else text


def _write_logits(answer: Answer, path: Path) -> None:
    from safetensors.torch import save

    assert answer.logits is not None
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(save({"logits": answer.logits.contiguous()}))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error


def serve(options: Stored, model: str, rest: Sequence[str], wanted: dict[str, Any], print_only: bool) -> int:
    """Print the `vllm serve` line for a checkpoint, and become it."""
    from kvilt.integrations.vllm import launch
    from kvilt.integrations.vllm.deployment import Settings

    settings = Settings(store=options.store, namespace=options.namespace or Settings.namespace, **wanted)
    line, environment = launch.command(model, settings, rest)
    show.out(options.json, {"command": line, "environment": environment}, [launch.shown(line, environment)])
    sys.stdout.flush()
    if not print_only:
        launch.run(line, environment)
    return 0
