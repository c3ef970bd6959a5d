"""`kvilt serve` over the wire: time to the first token of RAG requests by strategy, growth with the queue, cost of HTTP and JSON.

    python scripts/bench_serve.py                # about six minutes on two cores
    python scripts/bench_serve.py --requests 20 --full-requests 3 --documents 40 --clients 1 4   # a try
    python scripts/bench_serve.py --render       # benchmarks/serve.md again, from benchmarks/serve.json

200 documents of about 200 tokens, of which every request takes ten: skewed (the n-th is asked for 1/n as often as the first), in
any order, one token answered. Every strategy answers the same requests, one client after the other."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "benchmarks" / "serve.json", ROOT / "benchmarks" / "serve.md"
BLOCK = "block:sink=system"
SERVERS = {
    "smollm2-qa": [BLOCK, "kv_packet", "full"],
    "smollm2-kvlink5": ["kvlink:links=5"],
}  # the first is the default


def main() -> None:
    """Measure, write, render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--full-requests", type=int, default=30, help="fewer of the slow one")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--take", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=200, help="of a document, about")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--each", type=int, default=6, help="requests of every client")
    parser.add_argument("--builtin", action="store_true", help="the toy instead of SmolLM2: to try the script")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        servers = {"builtin": [BLOCK, "full"]} if options.builtin else SERVERS
        options.out.write_text(json.dumps(measured(options, servers), indent=1) + "\n")
    if options.out == RESULT:
        PAGE.write_text(page(json.loads(RESULT.read_text())))
    else:
        print(page(json.loads(options.out.read_text())))


def measured(options: argparse.Namespace, servers: dict[str, list[str]]) -> dict[str, Any]:
    """Everything that is measured."""
    texts, began = _texts(options.documents, options.tokens), time.time()
    made: dict[str, Any] = {"machine": _machine(), "setup": {k: v for k, v in vars(options).items() if k != "out"}}
    made["setup"].pop("render")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model, strategies in servers.items():
            with _serving(model, strategies, Path(folder)) as server:
                for strategy in strategies:
                    count = options.full_requests if strategy == "full" else options.requests
                    rows.append(_strategy(server, model, strategy, texts, _draws(options, count)))
                    print(rows[-1], file=sys.stderr)
                if strategies[0] == BLOCK:
                    made["queue"] = [_queue(server, n, texts, options) for n in options.clients]
                    made["overhead"] = _overhead(server, model, strategies[0], texts)
                    print(made["queue"], made["overhead"], file=sys.stderr)
    return {**made, "rows": rows, "minutes": round((time.time() - began) / 60, 1)}


def _strategy(server: Server, model: str, strategy: str, texts: list[str], draws: list[list[int]]) -> dict[str, Any]:
    """Encode, then ask."""
    seconds = 0.0
    if strategy != "full":
        began = time.perf_counter()
        status, told = server.post("/v1/documents", {"documents": texts, "wait": True, "kvilt": {"strategy": strategy}})
        assert status == 200, told
        seconds = time.perf_counter() - began
    server.ask(strategy, [texts[i] for i in reversed(draws[-1])])  # warm; in an order that nobody asks for
    asked = [server.ask(strategy, [texts[i] for i in draw]) for draw in draws]
    receipts = [receipt for _, receipt in asked]
    return {
        "model": model,
        "strategy": strategy,
        "requests": len(asked),
        **_quantiles([first for first, _ in asked]),
        "encode_s": round(seconds, 1),
        "document_tokens": round(statistics.mean(d["tokens"] for r in receipts for d in r["documents"])),
        "prompt_tokens": round(statistics.mean(r["reused_tokens"] + r["computed_tokens"] for r in receipts)),
        "computed_tokens": round(statistics.mean(r["computed_tokens"] for r in receipts), 1),
        "kept_tokens": round(statistics.mean(r["kept_tokens"] for r in receipts), 1),
        "charged": round(statistics.mean(r["charged"] for r in receipts), 4),
        "hits": sum(r["hits"] for r in receipts),
        "misses": sum(r["misses"] for r in receipts),
        "steps_ms": {
            s: round(1000 * statistics.median(r["steps"][s] for r in receipts), 2) for s in receipts[0]["steps"]
        },
    }


def _queue(server: Server, clients: int, texts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """So many clients, each of whom asks again as soon as it has an answer."""
    draws = iter(_draws(options, clients * options.each, seed=7))
    plans = [[next(draws) for _ in range(options.each)] for _ in range(clients)]
    firsts: list[float] = []

    def client(plan: list[list[int]]) -> None:
        own = Server(server.port)
        for draw in plan:
            firsts.append(own.ask(BLOCK, [texts[i] for i in draw])[0])

    threads = [threading.Thread(target=client, args=(plan,)) for plan in plans]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = clients * options.each / (time.perf_counter() - began)
    return {"clients": clients, **_quantiles(firsts), "requests_per_s": round(rate, 2)}


def _overhead(server: Server, model: str, strategy: str, texts: list[str]) -> dict[str, Any]:
    """What HTTP and JSON cost: beside the seconds that the receipt tells, and tokens/s beside the engine in this process.

    Both answer the same, in turn."""
    from kvilt.engine.engine import Engine

    documents = texts[:3]
    extra, written = [], []
    for _ in range(100):
        began = time.perf_counter()
        body = {"messages": [{"role": "user", "content": "Why?"}], "documents": documents, "max_tokens": 1}
        _, told = server.post("/v1/chat/completions", body)
        extra.append(time.perf_counter() - began - sum(told["kvilt"]["steps"].values()))
    engine = Engine.load(model, strategy, "memory")
    for _ in range(6):
        own = engine.answer("Why?", documents, max_new_tokens=64, eos_token_id=[])
        inside = own.usage.generated_tokens / own.usage.steps_s["decode"]
        began = time.perf_counter()
        first, receipt = server.ask(strategy, documents, max_tokens=64)
        outside = 63 / (time.perf_counter() - began - first)
        written.append((inside, 64 / receipt["steps"]["decode"], outside))
    inside, served, outside = (statistics.median(column) for column in zip(*written[1:], strict=True))
    return {
        "http_ms_p50": round(1000 * statistics.median(extra), 2),
        "http_ms_p95": round(1000 * sorted(extra)[94], 2),
        "tokens_per_s_in_process": round(inside, 2),
        "tokens_per_s_served": round(served, 2),
        "tokens_per_s_at_the_client": round(outside, 2),
        "lost_percent": round(100 * (1 - served / inside), 2),
    }


class Server:
    """A server that runs, and one connection to it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connection, self.used = http.client.HTTPConnection("127.0.0.1", port, timeout=600), 0.0

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON."""
        answer = self._send(path, body)
        return answer.status, json.loads(answer.read())

    def _send(self, path: str, body: Any) -> http.client.HTTPResponse:
        if time.monotonic() - self.used > 5:  # an idle connection is closed some time
            self.connection.close()
            self.connection.connect()
        self.connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = self.connection.getresponse()
        self.used = time.monotonic()
        return answer

    def ask(self, strategy: str, documents: Sequence[str], max_tokens: int = 1) -> tuple[float, dict[str, Any]]:
        """Seconds until the first byte of a streamed answer, and its receipt."""
        body = {"messages": [{"role": "user", "content": "What is told here?"}], "documents": documents}
        body |= {"max_tokens": max_tokens, "stream": True, "ignore_eos": True, "kvilt": {"strategy": strategy}}
        began = time.perf_counter()
        answer = self._send("/v1/chat/completions", body)
        start = answer.read(1)
        first = time.perf_counter() - began
        lines = (start + answer.read()).decode().splitlines()
        told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert answer.status == 200, told
        return first, next(chunk["kvilt"] for chunk in told if "kvilt" in chunk)


@contextlib.contextmanager
def _serving(model: str, strategies: list[str], folder: Path) -> Iterator[Server]:
    log = folder / f"{model}.log"
    line = [sys.executable, "-m", "kvilt", "serve", model, "--port", "0", "--strategy", strategies[0]]
    line += [part for strategy in strategies[1:] if strategy != "full" for part in ("--also", strategy)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    with log.open("wb") as out:
        process = subprocess.Popen([*line, "--store", f"disk:path={folder / 'store'}"], stderr=out, env=environment)
        try:
            while not (found := re.search(r" at http://[^:]+:(\d+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield Server(int(found[1]))
        finally:
            process.terminate()
            process.wait()


def _texts(count: int, tokens: int) -> list[str]:
    """Texts of about so many tokens, made of the sentences of the shipped Wikipedia paragraphs."""
    from kvilt import builtin

    draw = random.Random(0)
    sentences = [s for d in builtin.wikipedia().values() for s in re.split(r"(?<=\.) ", d.text)]
    made = []
    for number in range(count):
        text = f"Text {number}."
        while len(text) < 4.4 * tokens:
            text += " " + draw.choice(sentences)
        made.append(text[: round(4.4 * tokens)])
    return made


def _draws(options: argparse.Namespace, count: int, seed: int = 3) -> list[list[int]]:
    """Which documents each request takes, and in which order."""
    draw, weights = random.Random(seed), [1 / (n + 1) for n in range(options.documents)]
    made = []
    for _ in range(count):
        taken: list[int] = []
        while len(taken) < options.take:
            (one,) = draw.choices(range(options.documents), weights)
            taken += [one] if one not in taken else []
        made.append(taken)
    return made


def _quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {"p50": ordered[len(ordered) // 2], "p95": ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]}
    return {f"ttft_ms_{name}": round(1000 * value, 1) for name, value in at.items()}


def _machine() -> dict[str, Any]:
    import torch

    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return {
            "cpu": names[0] if names else platform.processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
    return {"cpu": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def page(made: dict[str, Any]) -> str:
    """The page about it."""
    setup, rows = made["setup"], made["rows"]
    full = next((r for r in rows if r["strategy"] == "full"), rows[0])
    machine = made["machine"]
    lines = [
        "# `kvilt serve` over the wire",
        "",
        f"Time to the first token of RAG requests, as a client sees it: {setup['documents']} documents of about {setup['tokens']}",
        f"tokens, of which every request takes {setup['take']}, skewed (the n-th is asked for 1/n as often as the first), in",
        f"any order; streamed, one client after the other. {machine['cpu']}, {machine['threads']} threads,",
        f"torch {machine['torch']}.",
        "Made by `scripts/bench_serve.py`, which also wrote this page ([serve.json](serve.json)).",
        "",
        "| model | strategy | requests | TTFT p50 | p95 | of full | computed | of tokens | the pass | misses | encoding all |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in sorted(rows, key=lambda r: -r["ttft_ms_p50"]):
        share = r["ttft_ms_p50"] / full["ttft_ms_p50"]
        times = f"{r['ttft_ms_p50']:,.0f} ms | {r['ttft_ms_p95']:,.0f} ms | {share:.3f}"
        tokens = (
            f"{r['computed_tokens']:,.0f} | {r['prompt_tokens']:,} | {r['steps_ms']['run']:,.0f} ms | {r['misses']}"
        )
        lines.append(
            f"| {r['model']} | {r['strategy']} | {r['requests']} | {times} | {tokens} | {r['encode_s']:.0f} s |"
        )
    lines += [
        "",
        f"## When many ask ({BLOCK})",
        "",
        "Every client asks again as soon as it has its answer; one request is answered after the other.",
    ]
    lines += ["", "| clients | TTFT p50 | p95 | requests/s |", "|---:|---:|---:|---:|"]
    for q in made.get("queue", []):
        lines.append(
            f"| {q['clients']} | {q['ttft_ms_p50']:,.0f} ms | {q['ttft_ms_p95']:,.0f} ms | {q['requests_per_s']:.2f} |"
        )
    if o := made.get("overhead"):
        lines += [
            "",
            "## What HTTP and JSON cost",
            "",
            f"A request takes {o['http_ms_p50']:.2f} ms (p95 {o['http_ms_p95']:.2f} ms) more at the client than the steps that its",
            f"receipt tells. The engine decodes {o['tokens_per_s_in_process']:.1f} tokens/s in process and",
            f"{o['tokens_per_s_served']:.1f} tokens/s behind the server, both in turn: {o['lost_percent']:.1f} % fewer;",
            f"{o['tokens_per_s_at_the_client']:.1f} tokens/s arrive at a client that reads the stream.",
        ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
