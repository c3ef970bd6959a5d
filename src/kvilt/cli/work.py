"""What the verbs do, between reading and showing."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvilt import registry
from kvilt.check.doctor import Diagnosis, Finding, examine_documents, examine_store
from kvilt.cli import show, talk
from kvilt.cli.options import Answering, Run
from kvilt.engine.encoder import Encoder
from kvilt.engine.engine import Engine
from kvilt.errors import DocumentError, PromptError, SpecError, StoreUnavailable, UserError, WrapperError
from kvilt.types import Answer, Document


def encoder(engine: Engine, ttl: float | None) -> Encoder:
    """The engine's encoder, with a time to live."""
    if engine.strategy.encoding is None:
        talk.warn("this strategy reuses nothing: documents are encoded for the plain ones (block, naive, ...).")
    return engine.encoder if ttl is None else dataclasses.replace(engine.encoder, ttl=ttl)


def check_request(question: str, json: bool, wanted: Answering) -> None:
    """Raise UserError for what can be seen to be wrong before a model is loaded."""
    if not question.strip():
        raise PromptError("the question is empty.")
    if any("\ud800" <= c <= "\udfff" for c in question):
        raise PromptError("the question is not UTF-8: check the terminal's encoding.")
    if json and wanted.stream:
        raise UserError("--stream prints text and --json one object at the end: give one of them.")
    if wanted.logits is not None and not wanted.logits.absolute().parent.is_dir():
        raise UserError(f"cannot write {wanted.logits}: there is no such folder.")


def choose(documents: list[Document], ids: Sequence[str]) -> list[Document]:
    """The documents with these ids or file names, in the order of the ids; all if none is given."""
    if not documents:
        raise PromptError("no documents: give some with --docs.")
    return [_named(documents, wanted) for wanted in ids] if ids else documents


def _named(documents: list[Document], wanted: str) -> Document:
    named = [d for d in documents if d.id == wanted] or [d for d in documents if Path(d.id or "").name == wanted]
    if not named:
        known = {name for d in documents for name in (d.id or "", Path(d.id or "").name)}
        near = difflib.get_close_matches(wanted, known, n=1)
        raise DocumentError(f"no document has the id {wanted!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
    if len(named) > 1:
        raise DocumentError(f"{len(named)} documents are called {wanted!r}: {', '.join(str(d.id) for d in named[:3])}.")
    return named[0]


def answer(engine: Engine, question: str, documents: list[Document], wanted: Answering) -> Answer:
    """The answer; if it is wanted as a stream, its text is printed while it is generated."""
    settings = wanted.settings()
    if wanted.stream:  # printed from this thread, which Ctrl-C reaches at once
        from transformers import TextStreamer

        settings["streamer"] = TextStreamer(engine.text.tokenizer, skip_special_tokens=True)
    return engine.answer(question, documents, **settings)


def deliver(answer: Answer, json: bool, wanted: Answering) -> None:
    """Write the logits, print the answer, and say what it took."""
    if wanted.logits is not None:
        _write_logits(answer, wanted.logits)
    if json:
        show.as_json(answer.as_dict())
    elif not wanted.stream:
        print(answer.text)
    talk.say(show.usage(answer))


def _write_logits(answer: Answer, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    assert answer.logits is not None
    try:
        save_file({"logits": answer.logits.contiguous()}, str(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}.") from error


def explain(engine: Engine, question: str, documents: list[Document]) -> None:
    """Show the plan of the prompt on stderr; by now every cache is there."""
    plan = engine.plan(question, documents)
    show.plan(plan, [d.id or d.title or "" for d in documents], repr(engine.strategy))


def diagnose(options: Run, docs: list[str]) -> Diagnosis:
    """What stands in the way of reuse, in the store and for these documents."""
    if docs and not options.model:
        raise UserError("documents are looked up for a model: give --model too.")
    documents = options.read(docs) if docs else []
    try:
        store = options.open_store()
    except StoreUnavailable as error:
        return Diagnosis([Finding("problem", str(error), "Give another path: --store disk:path=FOLDER.")])
    diagnosis = Diagnosis(examine_store(store))
    if not options.model:
        return diagnosis
    try:
        return diagnosis + examine_documents(options.engine(), documents)
    except WrapperError as error:
        return diagnosis + Diagnosis(
            [Finding("problem", str(error), f"Correct the wrapper in --strategy {options.strategy}.")]
        )


def catalogue(kind: str | None) -> dict[str, list[dict[str, Any]]]:
    """Names of each kind with their first line of documentation and their options."""
    if kind is not None and kind not in registry.TABLE:
        near = difflib.get_close_matches(kind, registry.TABLE, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SpecError(f"unknown kind {kind!r}.{hint} Known: {', '.join(registry.TABLE)}.")
    return {k: [_described(k, name) for name in registry.names(k)] for k in ([kind] if kind else registry.TABLE)}


def _described(kind: str, name: str) -> dict[str, Any]:
    """One name; a class that cannot be imported (an extra is missing) is listed with the reason."""
    try:
        cls = registry.load(kind, name)
    except (ImportError, AttributeError, UserError) as error:
        return {"name": name, "summary": f"not available: {error}", "options": {}}
    signature = inspect.signature(cls).parameters
    options = {o: signature[o].default for o in registry.parameters(cls)}
    summary = (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")
    return {"name": name, "summary": summary, "options": options}
