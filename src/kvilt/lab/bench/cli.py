"""`kvilt bench`: results as JSON and Markdown, with what they were measured on."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Measure time to first token, decoding, encoding, memory and compression.")

STRATEGIES = ["full", "block", "kv_packet:wrapper=WRAPPER", "kvlink:links=5"]
Shape = Annotated[str, typer.Option(help="Shape of the randomly initialised model: llama-1b, llama-30m.")]
Repeats = Annotated[int, typer.Option(help="Rounds; medians are reported.")]
Documents = Annotated[int, typer.Option(help="Documents of 500 tokens in the prompt.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the JSON result (and plot).")]


@app.command()
def ttft(
    shape: Shape = "llama-1b",
    documents: Annotated[
        str, typer.Option(help="Documents of 500 tokens per prompt; a list gives a curve: 2,4,8.")
    ] = "2,4,10,16,32",
    strategies: Annotated[
        list[str] | None, typer.Option("--strategy", help="Strategies; WRAPPER stands for a random one.")
    ] = None,
    compress: Annotated[str, typer.Option(help="Compression of the documents: keydiff:keep=0.5+int8.")] = "",
    repeats: Repeats = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Out = None,
    keep: Annotated[Path | None, typer.Option(help="Folder that keeps the caches between runs.")] = None,
) -> None:
    """Time to first token per strategy, beside full prefill and beside the floor."""
    from kvilt.lab.bench import curve

    counts = [int(n) for n in documents.split(",")]
    result = curve.run(shape, counts, strategies or STRATEGIES, repeats, dtype, device, _note, keep, compress)
    _finish("ttft", result, out, curve.table(result))
    if out:
        curve.plot(result, out / "ttft.png")


@app.command()
def decode(
    shape: Shape = "llama-1b", documents: Documents = 10, tokens: int = 32, repeats: Repeats = 5, out: Out = None
) -> None:
    """Tokens per second after reuse, beside transformers' generate."""
    from kvilt.lab.bench import models, others

    with tempfile.TemporaryDirectory() as folder:
        result = others.decoding(models.random_model(shape), Path(folder), documents, tokens, repeats)
    _finish("decode", result, out)


@app.command()
def encode(shape: Shape = "llama-1b", batch: int = 4, repeats: Repeats = 5, out: Out = None) -> None:
    """Encoding speed, beside plain batched prefill."""
    from kvilt.lab.bench import models, others

    _finish("encode", others.encoding(models.random_model(shape), batch, repeats), out)


@app.command()
def memory(shape: Shape = "llama-1b", documents: Documents = 10, out: Out = None) -> None:
    """Peak memory of one answer in a fresh process."""
    from kvilt.lab.bench import others

    with tempfile.TemporaryDirectory() as folder:
        result = others.memory(shape, Path(folder), documents)
    _finish("memory", result, out)


@app.command()
def compression(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Folder or hub name; without one --shape.")] = None,
    docs: Annotated[list[str] | None, typer.Option("--docs", "-d", help="Documents, as for encode.")] = None,
    compress: Annotated[list[str] | None, typer.Option("--compress", help="What to measure, beside none.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    shape: Shape = "llama-1b",
    documents: Documents = 10,
    repeats: Repeats = 5,
    out: Out = None,
) -> None:
    """Bytes per token, relative errors of keys and values, and load time of each compression."""
    from kvilt.builtin import documents as shipped
    from kvilt.engine.documents import read_documents
    from kvilt.engine.text import TextFormat
    from kvilt.lab.bench import compression, models
    from kvilt.model.loading import DTYPES, load_model

    if model is None:
        loaded, tokenizer = models.random_model(shape, DTYPES[dtype]), models.word_tokenizer()
        texts = models.collection(documents, 499)
    else:
        loaded, tokenizer = load_model(model, dtype)
        texts = read_documents(docs) if docs else list(shipped().values())
    with tempfile.TemporaryDirectory() as folder:
        text, specs = TextFormat.of(tokenizer), compress or ["int8", "int4", "fp8"]
        result = compression.measure(loaded, text, texts[:documents], specs, Path(folder), repeats)
    _finish("compression", {"model": model or shape, **result}, out)


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _finish(name: str, result: dict[str, Any], out: Path | None, table: str | None = None) -> None:
    from kvilt.lab.bench.timing import machine

    text = json.dumps({"benchmark": name, "machine": machine(), **result}, indent=1)
    typer.echo(table or text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(text + "\n")
