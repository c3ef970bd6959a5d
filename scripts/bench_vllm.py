"""vLLM with and without Kvilt on one machine: time to first token, throughput, many clients, and whether reuse stays.

Run in an environment with vLLM (make vllm makes one): python scripts/bench_vllm.py MODEL DOCUMENTS.jsonl STORE OUT.json
Everything runs in one process, in turns. Documents are encoded first, with Kvilt's own engine. DOCUMENTS are lines with
"text" and "title"; WRAPPER in a strategy stands for untrained vectors of the right size, which cost what trained ones do."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from transformers import AutoTokenizer

from kvilt.engine.engine import Engine
from kvilt.integrations.vllm.deployment import Deployment, Settings
from kvilt.integrations.vllm.index import Index
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import Document

STRATEGIES = (
    "block:sink=system",
    "kv_packet:wrapper=WRAPPER",
    "kvlink:links=5",
    "epic:tokens=16",
    "ranked:ratio=0.15",
)
SIZES = (2000, 5000)  # tokens of a prompt
REPEATS = 5
BATCH, TOGETHER, POOL, NEW, TOKENS = 16, 10, 50, 16, 65
CLIENTS, KNOWN, REQUESTS = 16, 200, 300
NOVEL, STOCK, ASKED = 1000, 500, 14


class Bench:
    """One vLLM engine; strategies are changed under it, and documents hidden from it for the plain rows."""

    def __init__(self, model: str, documents: Sequence[Document], store: str, strategies: Sequence[str]) -> None:
        self.documents, self.seconds_encoding = list(documents), {}
        self.deployments: dict[str, Deployment] = {}
        tokenizer = AutoTokenizer.from_pretrained(model)
        for spec in strategies:
            engine = Engine.load(model, spec, store, dtype="bfloat16")
            began = time.perf_counter()
            engine.encode(self.documents)
            self.seconds_encoding[spec] = time.perf_counter() - began
            self.deployments[spec] = Deployment(model, tokenizer, Settings(store, spec, refresh=3600))
        self.text = engine.text
        self.ids = {d.text: self.text.document_ids(d).tolist() for d in self.documents}
        self.llm = _llm(model, store, strategies[0])
        self.core = self.llm.llm_engine
        self.scheduler = self.core.engine_core.engine_core.scheduler
        self.ends, self.number = self.scheduler.connector.ends, 0
        self.block = self.scheduler.block_size
        self.index, self.nothing = self.ends.index, Index()
        self.ends.look()

    @contextlib.contextmanager
    def serving(self, spec: str | None) -> Iterator[None]:
        """Serve a strategy, or for None whatever vLLM does alone."""
        self.ends.documents.index = self.nothing if spec is None else self.index
        if spec is not None:
            self.ends.deployment = self.ends.documents.deployment = self.deployments[spec]
        yield

    def forget(self) -> None:
        """Empty vLLM's own cache."""
        self.llm.reset_prefix_cache()

    def prompt(self, documents: Sequence[Document], question: str) -> list[int]:
        """Token ids of a prompt."""
        parts = [self.text.system_ids().tolist(), *(self.ids[d.text] for d in documents)]
        return [i for part in [*parts, self.text.question_ids(question).tolist()] for i in part]

    def add(self, prompt: list[int], new: int) -> str:
        """Hand over a request."""
        from vllm import SamplingParams

        self.number += 1
        parameters = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        self.core.add_request(f"{self.number}", {"prompt_token_ids": prompt}, parameters)
        return f"{self.number}"  # as its outputs are called

    def first(self, prompt: list[int]) -> tuple[float, dict[str, Any]]:
        """Seconds to the first token of one request, and its receipt."""
        began = time.perf_counter()
        self.add(prompt, 1)
        while not (done := self.core.step()):
            pass
        return time.perf_counter() - began, _receipt(done[0])

    def all(self, prompts: Sequence[list[int]], new: int) -> float:
        """Seconds until all requests are through."""
        began = time.perf_counter()
        for prompt in prompts:
            self.add(prompt, new)
        while self.core.has_unfinished_requests():
            self.core.step()
        return time.perf_counter() - began


def _llm(model: str, store: str, strategy: str) -> Any:
    from vllm.config import KVTransferConfig

    from vllm import LLM

    transfer = KVTransferConfig(
        kv_connector="KviltConnector",
        kv_connector_module_path="kvilt.integrations.vllm.connector",
        kv_role="kv_consumer",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"store": store, "strategy": strategy, "refresh": 3600},
    )
    return LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=8192,
        max_num_batched_tokens=8192,
        enforce_eager=True,
        disable_log_stats=True,
        kv_transfer_config=transfer,
        scheduler_cls="kvilt.integrations.vllm.scheduler.KviltScheduler",
    )


def _receipt(output: Any) -> dict[str, Any]:
    return dict((output.kv_transfer_params or {}).get("kvilt") or {})


def ttft(bench: Bench, rng: random.Random) -> dict[str, Any]:
    """Medians of the time to first token; every row is measured once in each round."""
    results: dict[str, Any] = {}
    for size in SIZES:
        chosen, tokens = [], 0
        for document in rng.sample(bench.documents, len(bench.documents)):
            if tokens < size:
                chosen.append(document)
                tokens += len(bench.ids[document.text])
        rows: dict[str, list[float]] = {}
        loads: dict[str, list[float]] = {}
        computed: dict[str, int] = {}
        for round_ in range(REPEATS + 1):
            shuffled = rng.sample(chosen, len(chosen))
            measured = _round(bench, chosen, shuffled, f"What was it in round {round_}?", computed)
            for name, (seconds, receipt) in measured.items() if round_ else ():  # the first round warms up
                rows.setdefault(name, []).append(seconds)
                if "seconds" in receipt:
                    loads.setdefault(name, []).append(receipt["seconds"])
        medians = {name: statistics.median(values) for name, values in rows.items()}
        results[str(size)] = {
            "tokens": len(bench.prompt(chosen, "?")),
            "documents": len(chosen),
            "seconds": medians,
            "loading": {name: statistics.median(values) for name, values in loads.items()},
            "computed": computed,
            "floor": {n: statistics.median(loads[n]) + medians[f"step of {n}"] for n in loads},
        }
    return results


def _round(
    bench: Bench, chosen: Sequence[Document], shuffled: Sequence[Document], question: str, computed: dict[str, int]
) -> dict[str, tuple[float, dict[str, Any]]]:
    measured = {}
    with bench.serving(None):
        bench.forget()
        measured["vllm cold"] = bench.first(bench.prompt(chosen, f"Cold. {question}"))
        measured["vllm same order"] = bench.first(bench.prompt(chosen, question))
        prompt = bench.prompt(shuffled, question)
        measured["vllm shuffled"] = bench.first(prompt)
        for (
            spec,
            count,
        ) in computed.items():  # as many tokens as the strategy computes, behind what vLLM holds of the prompt
            cached = (len(prompt) - count) // bench.block * bench.block
            other = [i + 1 for i in prompt[cached : cached + count]]
            measured[f"step of {spec}"] = bench.first([*prompt[:cached], *other])
    for spec in bench.deployments:
        with bench.serving(spec):
            bench.forget()
            measured[spec] = bench.first(bench.prompt(shuffled, question))
            computed[spec] = measured[spec][1]["computed_tokens"]
    return measured


def throughput(bench: Bench, rng: random.Random) -> dict[str, float]:
    """Requests per second, BATCH at once, TOGETHER documents each out of a pool."""
    pool, results = bench.documents[:POOL], {}

    def prompts() -> list[list[int]]:
        return [bench.prompt(rng.sample(pool, TOGETHER), f"Which one is {n}?") for n in range(BATCH)]

    def measure(name: str, spec: str | None, make: Callable[[], list[list[int]]], keep: bool = False) -> None:
        with bench.serving(spec):
            seconds = []
            for _ in range(3):
                if not keep:
                    bench.forget()
                seconds.append(bench.all(make(), NEW))
        results[name] = BATCH / statistics.median(seconds)

    bench.forget()
    measure("vllm, new combinations", None, prompts)
    again = prompts()
    measure("vllm, the same prompts again", None, lambda: again, keep=True)
    for spec in bench.deployments:
        measure(f"{spec}, new combinations", spec, prompts)
    return results


def decode(bench: Bench, rng: random.Random) -> dict[str, float]:
    """Tokens per second of one request at 2,000 tokens, after reuse and without; medians of five."""
    chosen, results = rng.sample(bench.documents, 14), {}
    for name, spec in (("vllm", None), *((s, s) for s in bench.deployments)):
        with bench.serving(spec):
            rates = []
            for number in range(5):
                bench.forget()
                prompt = bench.prompt(chosen, f"How many of {number}?")
                first = bench.all([prompt], 1)
                bench.forget()
                rates.append((TOKENS - 1) / (bench.all([prompt], TOKENS) - first))
        results[name] = statistics.median(rates)
    return results


def clients(bench: Bench, rng: random.Random) -> dict[str, Any]:
    """TTFT of CLIENTS that ask one question after another about documents of skewed popularity."""
    known = bench.documents[:KNOWN]
    weights = [1 / (rank + 1) for rank in range(len(known))]
    results = {}
    for name, spec in (("vllm", None), *((s, s) for s in bench.deployments)):
        bench.forget()
        made = random.Random(7)
        with bench.serving(spec):
            waiting = [_popular(made, known, weights) for _ in range(REQUESTS)]
            prompts = [bench.prompt(d, f"Number {n}?") for n, d in enumerate(waiting)]
            began, firsts = time.perf_counter(), _closed_loop(bench, prompts)
            seconds = time.perf_counter() - began
        cuts = statistics.quantiles(firsts, n=20)
        results[name] = {"p50": cuts[9], "p95": cuts[18], "requests/s": REQUESTS / seconds}
    return results


def _popular(rng: random.Random, known: Sequence[Document], weights: Sequence[float]) -> list[Document]:
    chosen: dict[str, Document] = {}
    while len(chosen) < TOGETHER:
        document = rng.choices(known, weights)[0]
        chosen[document.text] = document
    return list(chosen.values())


def _closed_loop(bench: Bench, prompts: Sequence[list[int]]) -> list[float]:
    left, began, firsts = list(prompts), dict[str, float](), dict[str, float]()
    while left or bench.core.has_unfinished_requests():
        while left and bench.core.get_num_unfinished_requests() < CLIENTS:
            now = time.perf_counter()
            began[bench.add(left.pop(0), NEW)] = now
        for output in bench.core.step():
            firsts.setdefault(output.request_id, time.perf_counter() - began[output.request_id])
    return list(firsts.values())


def steady(bench: Bench, store: str, spec: str, rng: random.Random) -> list[dict[str, float]]:
    """Per hundred of NOVEL questions that all differ: hits, speed-up over plain vLLM (on some), documents stored."""
    stock, rows = bench.documents[:STOCK], []
    for hundred in range(NOVEL // 100):
        hits, reused, plain, again = 0, [], [], []
        for n in range(100):
            prompt = bench.prompt(rng.sample(stock, min(ASKED, len(stock))), f"Question {hundred} {n}?")
            with bench.serving(spec):
                seconds, receipt = bench.first(prompt)
            hits += receipt.get("hits", 0)
            reused.append(seconds)
            if n % 50 == 0:
                with bench.serving(None):
                    plain.append(bench.first(prompt)[0])
                again.append(seconds)
        entries = bench.deployments[spec].store.entries()
        rows.append(
            {
                "hit rate": hits / (100 * ASKED),
                "seconds": statistics.median(reused),
                "speed-up": statistics.median(plain) / statistics.median(again),
                "documents": len(entries),
                "bytes": sum(e.bytes for e in entries),
            }
        )
    return rows


def main() -> None:
    """Measure what was asked for, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "documents", "store", "out"):
        parser.add_argument(name)
    parser.add_argument("--part", action="append", choices=["ttft", "throughput", "decode", "clients", "steady"])
    parser.add_argument("--strategy", action="append")
    parser.add_argument("--limit", type=int, default=STOCK)
    options = parser.parse_args()
    rows = [json.loads(line) for line in Path(options.documents).read_text().splitlines()[: options.limit]]
    documents = [Document(row["text"], row.get("title")) for row in rows]
    wrapper = Path(options.out).with_suffix(".safetensors")
    size = json.loads((Path(options.model) / "config.json").read_text())["hidden_size"]
    made = torch.Generator().manual_seed(0)
    Wrapper(*(torch.randn(8, size, generator=made) * 0.05 for _ in range(2))).save(wrapper)
    specs = [s.replace("WRAPPER", str(wrapper)) for s in options.strategy or STRATEGIES]
    bench, rng = Bench(options.model, documents, options.store, specs), random.Random(0)
    parts: dict[str, Callable[[], Any]] = {
        "ttft": lambda: ttft(bench, rng),
        "throughput": lambda: throughput(bench, rng),
        "decode": lambda: decode(bench, rng),
        "clients": lambda: clients(bench, rng),
        "steady": lambda: steady(bench, options.store, specs[0], rng),
    }
    results = json.loads(Path(options.out).read_text()) if Path(options.out).is_file() else {}  # other parts stay
    results |= {"threads": torch.get_num_threads(), "documents": len(documents)}
    for name in options.part or parts:
        results[name] = parts[name]()
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        Path(options.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
