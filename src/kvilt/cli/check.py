"""What `kvilt verify` and `kvilt doctor` do, between reading and showing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from kvilt.check import comparison, gates
from kvilt.check.comparison import Closeness
from kvilt.check.doctor import Diagnosis, Finding, examine_documents, examine_store
from kvilt.check.gates import GateResult
from kvilt.check.server import examine_server
from kvilt.cli import show, talk
from kvilt.cli.options import Run
from kvilt.errors import StoreUnavailable, UserError, WrapperError
from kvilt.types import Document

WIDEST = 60  # characters of an answer


def verify(options: Run, paths: Sequence[str], questions: Sequence[str], limit: int, tokens: int) -> bool:
    """Run the gates, then compare every strategy with full recompute; whether all gates passed."""
    documents = options.read(paths) if paths else comparison.SAMPLES
    if len(documents) > limit:
        talk.say(f"using the first {limit} of {len(documents):,} documents (--limit).")
    documents, engine = documents[:limit], options.engine(in_memory=True)
    with talk.meter("comparing strategies") as meter:
        asked = list(questions) or comparison.made_up(engine, documents)
        results = gates.run(engine, documents, asked[0])
        wanted = comparison.targets(engine, documents, asked, tokens)
        rows = [comparison.floor(engine, documents, wanted)]
        rows += comparison.compare(engine, options.strategy, documents, wanted, meter)
    passed = all(r.passed for r in results)
    dtype, why = str(engine.model.shape.dtype).removeprefix("torch."), engine.model.dtype_reason
    data = {
        "passed": passed,
        "dtype": dtype,
        "dtype_reason": why,
        "gates": [{**asdict(r), "passed": r.passed} for r in results],
        "questions": [{"question": t.question, "answer": t.text, "tokens": len(t.tokens)} for t in wanted],
        "strategies": [asdict(r) for r in rows],
    }
    show.out(options.json, data, _verified(f"Computed in {dtype}: {why}.", results, wanted, rows))
    return passed


def _verified(
    computed: str, results: Sequence[GateResult], wanted: Sequence[comparison.Target], rows: Sequence[Closeness]
) -> Iterator[str]:
    checks = [
        (r.gate, "passed" if r.passed else "FAILED", *(f"{x:.1e}" for x in (r.worst, r.tolerance, r.floor)), r.title)
        for r in results
    ]
    yield from (computed, "")
    yield from show.table(("gate", "", "off by>", "allowed>", "own noise>", "what must hold"), checks)
    yield from ("", f"Answers of full recompute to {len(wanted)} questions:")
    yield from (f"  {target.question[:WIDEST]}  ->  {target.text[:WIDEST]}" for target in wanted)
    yield from (
        "",
        "Every strategy beside them; the first row is the noise of rounding. A method's distance is its own:",
    )
    heads = ("strategy", "same answers>", "same tokens>", "KL nats/token>", "charged>", "answer to the first question")
    yield from show.table(heads, [(r.strategy, *_figures(r)) for r in rows])


def _figures(row: Closeness) -> tuple[str, ...]:
    if row.note:
        return "", "", "", "", row.note
    shares = (f"{share:.0%}" for share in (row.same_answers, row.agreement))
    return *shares, f"{row.kl:.1e}", f"{row.charged:.1%}", row.text[:WIDEST]


def diagnose(options: Run, paths: Sequence[str], url: str | None = None) -> bool:
    """Say what stands in the way of reuse, in the store or server and for these documents; whether nothing does."""
    if paths and not options.model and url is None:
        raise UserError("documents are looked up for a model: give --model too.")
    documents = options.read(paths)
    made = examine_server(url, documents, options.system, options.namespace) if url else _examined(options, documents)
    data = {
        "healthy": made.healthy,
        "findings": [asdict(f) for f in made.findings],
        "documents": [asdict(v) for v in made.verdicts],
    }
    show.out(options.json, data, show.diagnosis(made))
    return made.healthy


def _examined(options: Run, documents: Sequence[Document]) -> Diagnosis:
    try:
        made = Diagnosis(examine_store(options.open_store()))
        if options.model:
            made += examine_documents(options.engine(), documents)
    except StoreUnavailable as error:
        made = Diagnosis([Finding("problem", str(error), "Give another path: --store disk:path=FOLDER.")])
    except WrapperError as error:
        fix = f"Correct the wrapper in --strategy {options.strategy}."
        made += Diagnosis([Finding("problem", str(error), fix)])
    return made
