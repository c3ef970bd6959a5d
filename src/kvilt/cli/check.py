"""`kvilt verify` and `kvilt doctor`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from kvilt.cli import FAILED, show, talk
from kvilt.cli.options import DOCS, Run
from kvilt.errors import StoreUnavailable, UserError, WrapperError

if TYPE_CHECKING:
    from kvilt.check.comparison import Closeness, Target
    from kvilt.check.doctor import Diagnosis
    from kvilt.check.gates import GateResult
    from kvilt.types import Document

WIDEST = 60  # characters of an answer

Docs = Annotated[list[str] | None, Argument(metavar="[DOCS...]", help=DOCS)]
Ask = Annotated[list[str] | None, Option("--question", help="What to ask; may be given several times.")]
Limit = Annotated[int, Option(min=1, help="Use this many documents.")]
Tokens = Annotated[int, Option(min=1, help="Compare answers of up to this many tokens.")]
Server = Annotated[str | None, Option("--vllm", metavar="URL", help="Examine a vLLM server instead.")]


def verify(options: Run, docs: Docs = None, question: Ask = None, limit: Limit = 4, tokens: Tokens = 64) -> int:
    """Check that caches are exact on this model, and how close each strategy comes to full recompute."""
    from kvilt.check import comparison, gates

    documents = options.read(docs) if docs else comparison.SAMPLES
    if len(documents) > limit:
        talk.say(f"using the first {limit} of {len(documents):,} documents (--limit).")
    documents, engine = documents[:limit], options.engine(in_memory=True)
    with talk.meter("comparing strategies") as meter:
        asked = question or comparison.made_up(engine, documents)
        results = gates.run(engine, documents, asked[0])
        wanted = comparison.targets(engine, documents, asked, tokens)
        rows = [comparison.floor(engine, documents, wanted)]
        rows += comparison.compare(engine, options.strategy, documents, wanted, meter)
    passed = all(r.passed for r in results)
    dtype, why = str(engine.model.shape.dtype).removeprefix("torch."), engine.model.dtype_reason
    data: dict[str, object] = {"passed": passed, "dtype": dtype, "dtype_reason": why}
    data["gates"] = [{**asdict(r), "passed": r.passed} for r in results]
    data["questions"] = [{"question": t.question, "answer": t.text, "tokens": len(t.tokens)} for t in wanted]
    data["strategies"] = [asdict(r) for r in rows]
    show.out(options.json, data, _verified(f"Computed in {dtype}: {why}.", results, wanted, rows))
    return 0 if passed else FAILED


def _verified(
    computed: str, results: Sequence[GateResult], wanted: Sequence[Target], rows: Sequence[Closeness]
) -> Iterator[str]:
    checks = [
        (r.gate, "passed" if r.passed else "FAILED", *(f"{x:.1e}" for x in (r.worst, r.tolerance, r.floor)), r.title)
        for r in results
    ]
    yield from (computed, "")
    yield from show.table(("gate", "", "off by>", "allowed>", "own noise>", "what must hold"), checks)
    yield from ("", f"Answers of full recompute to {len(wanted)} questions:")
    yield from (f"  {target.question[:WIDEST]}  ->  {target.text[:WIDEST]}" for target in wanted)
    yield ""
    yield "Every strategy beside them; the first row is the noise of rounding. A method's distance is its own:"
    heads = ("strategy", "same answers>", "same tokens>", "KL nats/token>", "charged>", "answer to the first question")
    yield from show.table(heads, [(r.strategy, *_figures(r)) for r in rows])


def _figures(row: Closeness) -> tuple[str, ...]:
    if row.note:
        return "", "", "", "", row.note
    shares = (f"{share:.0%}" for share in (row.same_answers, row.agreement))
    return *shares, f"{row.kl:.1e}", f"{row.charged:.1%}", row.text[:WIDEST]


def doctor(options: Run, docs: Docs = None, vllm: Server = None) -> int:
    """Find out why documents are not reused, and what to do about it. Without a model only the store is examined."""
    from kvilt.check.server import examine_server

    if docs and not options.model and vllm is None:
        raise UserError("documents are looked up for a model: give --model too.")
    documents = options.read(docs or [])
    made = examine_server(vllm, documents, options.system, options.namespace) if vllm else _examined(options, documents)
    seen = asdict(made)
    data = {"healthy": made.healthy, "findings": seen["findings"], "documents": seen["verdicts"]}
    show.out(options.json, data, show.diagnosis(made))
    return 0 if made.healthy else FAILED


def _examined(options: Run, documents: Sequence[Document]) -> Diagnosis:
    from kvilt.check.doctor import Diagnosis, Finding, examine_documents, examine_store

    try:
        made = Diagnosis(examine_store(options.open_store()))
        if options.model:
            made += examine_documents(options.engine(), documents)
    except StoreUnavailable as error:
        made = Diagnosis([Finding("problem", str(error), "Give another path: --store disk:path=FOLDER.")])
    except WrapperError as error:
        made += Diagnosis([Finding("problem", str(error), f"Correct the wrapper in --strategy {options.strategy}.")])
    return made
