"""`kvilt bench`: results as JSON and Markdown, with what they were measured on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from kvilt import registry
from kvilt.cli import talk
from kvilt.cli.options import Loaded, Output, group, verb
from kvilt.errors import UserError

if TYPE_CHECKING:
    from kvilt.lab.bench.subject import Subject

app = group("Measure time to first token, decoding, encoding, memory and compression.")
STRATEGIES = ["block", "kv_packet:wrapper=WRAPPER", "kvlink:links=5"]

Shape = Annotated[str, Option(help="Shape of a randomly initialised model: llama-1b, llama-8b, llama-30m.")]
Repeats = Annotated[int, Option(min=1, help="Rounds; medians are reported.")]
Counts = Annotated[str, Option("--documents", help="Documents of 500 tokens per prompt; a list gives a curve: 2,4,8.")]
Documents = Annotated[int, Option(min=1, help="Documents of 500 tokens in the prompt.")]
Docs = Annotated[list[str] | None, Option("--docs", "-d", help="Texts for the documents, as for encode.")]
Strategies = Annotated[
    list[str] | None, Option("--strategy", "-s", help="Strategies beside full; WRAPPER stands for a random one.")
]
Compress = Annotated[str, Option(help="Compression of the documents: keydiff:keep=0.5+int8.")]
Compressions = Annotated[list[str] | None, Option("--compress", help="What to measure, beside none.")]
Out = Annotated[Path | None, Option(help="Folder for the JSON result (and plot).")]
Keep = Annotated[Path | None, Option(help="Folder that keeps the caches between runs.")]
Memory = Annotated[bool, Option("--memory", help="Measure every strategy from this process's memory, too.")]


@verb(app)
def ttft(
    options: Loaded, shape: Shape = "llama-1b", docs: Docs = None, documents: Counts = "2,4,10,16,32",
    strategy: Strategies = None, compress: Compress = "", repeats: Repeats = 3, out: Out = None, keep: Keep = None,
    memory: Memory = False,
) -> None:  # fmt: skip
    """Time to first token per strategy, beside full prefill and beside the floor; of --model, or of a shape."""
    from kvilt.lab.bench import ttft as bench

    if not all(n.strip().isdigit() and int(n) for n in documents.split(",")):
        raise UserError(f"--documents {documents}: write numbers with commas, as 2,4,8.")
    chosen = strategy or ([registry.DEFAULT] if options.model else STRATEGIES)
    counts = [int(n) for n in documents.split(",")]
    result = bench.run(_subject(options, shape, docs), counts, chosen, repeats, talk.say, keep, compress, memory)
    _finish("ttft", result, out, "" if options.json else bench.table(result))
    if out:
        bench.plot(result, out / "ttft.png")


@verb(app)
def decode(
    options: Loaded, shape: Shape = "llama-1b", documents: Documents = 10, tokens: int = 32, repeats: Repeats = 5,
    out: Out = None,
) -> None:  # fmt: skip
    """Tokens per second after reuse, beside transformers' generate."""
    from kvilt.lab.bench import others

    subject = _subject(options, shape)
    _measured("decode", out, lambda folder: others.decoding(subject, folder, documents, tokens, repeats))


@verb(app)
def encode(options: Loaded, shape: Shape = "llama-1b", batch: int = 4, repeats: Repeats = 5, out: Out = None) -> None:
    """Encoding speed, beside plain batched prefill."""
    from kvilt.lab.bench import others

    _measured("encode", out, lambda _: others.encoding(_subject(options, shape), batch, repeats))


@verb(app)
def memory(options: Output, shape: Shape = "llama-1b", documents: Documents = 10, out: Out = None) -> None:
    """Peak memory of one answer in a fresh process."""
    from kvilt.lab.bench import others

    _measured("memory", out, lambda folder: others.memory(shape, folder, documents))


@verb(app)
def compression(
    options: Loaded, shape: Shape = "llama-1b", docs: Docs = None, compress: Compressions = None,
    documents: Documents = 10, repeats: Repeats = 5, out: Out = None,
) -> None:  # fmt: skip
    """Bytes per token, relative errors of keys and values, and load time of each compression."""
    from kvilt.lab.bench import others

    subject, specs = _subject(options, shape, docs), compress or ["int8", "int4", "fp8"]
    texts = subject.texts[:documents]
    _measured("compression", out, lambda folder: others.compression(subject, texts, specs, folder, repeats))


def _subject(options: Loaded, shape: str, docs: list[str] | None = None) -> Subject:
    from kvilt.lab.bench import subject

    talk.silence_libraries(options.verbose, options.quiet)
    if not options.model:
        return subject.random_subject(shape, options.dtype, options.device)
    return subject.named_subject(options.model, options.read(docs or []), options.dtype, options.device)


def _measured(name: str, out: Path | None, measure: Callable[[Path], dict[str, Any]]) -> None:
    """Show what is measured with a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        _finish(name, measure(Path(folder)), out)


def _finish(name: str, result: dict[str, Any], out: Path | None, table: str = "") -> None:
    """Print a result, as a table if there is one and else as JSON, and write it down."""
    from kvilt.lab.bench.timing import machine

    text = json.dumps({"benchmark": name, "machine": machine(), **result}, indent=1)
    print(table or text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(text + "\n")
