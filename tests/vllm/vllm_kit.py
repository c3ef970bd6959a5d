"""A tiny model, its documents, and one vLLM engine in this process that every test shares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zoo
from kvilt.engine.engine import Engine
from kvilt.types import Answer, Document

NEW = 12  # tokens of every answer
SHAPE = {**zoo.SHAPE, "hidden_size": 128, "num_hidden_layers": 3}  # heads of 32 channels: vLLM serves no smaller ones
WORDS = "Ada Lorn was born in Tavik near the river Sel and left it young for Orsa where Brint Labs makes clocks".split()  # noqa: SIM905


def document(number: int, length: int) -> Document:
    """A text of about `length` bytes, which are its tokens."""
    made = torch.Generator().manual_seed(number)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (length // 4,), generator=made)]
    return Document(f"{number} " + " ".join(words), title=f"Title {number}", id=str(number))


DOCUMENTS = [document(1, 53), document(2, 170), document(3, 301), document(4, 128)]  # lengths that no block divides
QUESTION = "Where was she born?"


def save(folder: Path) -> str:
    """A random model whose attention is far from uniform, as a checkpoint."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data.mul_(6 if "embed" not in name else 20)
    model.save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return str(folder)


@dataclass
class Reference:
    """Kvilt's own engine over the same checkpoint and store."""

    model: str
    store: str
    system: str = "Answer from the documents."

    def engine(self, strategy: str, compress: str = "") -> Engine:
        """An engine in float32."""
        return Engine.load(self.model, strategy, self.store, system=self.system, dtype="float32", compress=compress)

    def prompt(self, engine: Engine, documents: Sequence[Document], question: str = QUESTION) -> list[int]:
        """The ordinary prompt of a client that builds it by the template."""
        text = engine.text
        parts = [text.system_ids(), *(text.document_ids(d) for d in documents), text.question_ids(question)]
        return [int(i) for part in parts for i in part]


class Served:
    """vLLM in this process; strategies are changed under it."""

    def __init__(self, model: str, store: str, strategy: str = "naive", **options: Any) -> None:
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            TORCH_COMPILE_DISABLE="1",
        )
        from vllm.config import KVTransferConfig

        from vllm import LLM

        self.model, self.store = model, store
        transfer = KVTransferConfig(
            kv_connector="KviltConnector",
            kv_connector_module_path="kvilt.integrations.vllm.connector",
            kv_role="kv_consumer",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"store": store, "strategy": strategy, "refresh": 3600},
        )
        settings = {
            "dtype": "float32",
            "max_model_len": 2048,
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "scheduler_cls": "kvilt.integrations.vllm.scheduler.KviltScheduler",
            "max_num_batched_tokens": 2048,
            "max_num_seqs": 64,
            "block_size": 32,
            "seed": 0,
            "enable_prompt_embeds": True,
        }
        self.llm = LLM(model=model, kv_transfer_config=transfer, **{**settings, **options})
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.ends = self.scheduler.connector.ends

    def use(self, strategy: str, **settings: Any) -> None:
        """Serve another strategy from now on."""
        from kvilt.integrations.vllm.deployment import Deployment, Settings

        wanted = Settings(store=self.store, strategy=strategy, refresh=3600, **settings)
        self.ends.deployment = Deployment(self.model, zoo.tokenizer(), wanted)
        self.ends.documents.deployment = self.ends.deployment
        self.ends.watcher.deployment = self.ends.deployment
        self.look()
        self.llm.reset_prefix_cache()

    def look(self) -> None:
        """Take in what was stored meanwhile."""
        self.ends.look()

    def greedy(self, hint: Any = None, **options: Any) -> Any:
        """Settings of a greedy answer of NEW tokens."""
        from vllm import SamplingParams

        extra = {"kv_transfer_params": {"kvilt": hint}} if hint is not None else None
        return SamplingParams(
            temperature=0.0, max_tokens=NEW, detokenize=False, ignore_eos=True, extra_args=extra, **options
        )

    def ask(self, prompts: Sequence[list[int]], **options: Any) -> list[Any]:
        """Greedy answers of NEW tokens to prompts of ids, all at once."""
        hints = options.pop("hints", [None] * len(prompts))
        params = [self.greedy(hint, **options) for hint in hints]
        return self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def tokens(output: Any) -> tuple[int, ...]:
    """The tokens of vLLM's answer."""
    return tuple(output.outputs[0].token_ids)


def receipt(output: Any) -> dict[str, Any]:
    """What was reused for it."""
    return dict((output.kv_transfer_params or {}).get("kvilt") or {})


def same(output: Any, answer: Answer) -> bool:
    """Whether vLLM's answer is the engine's, which stops at the end-of-text token."""
    return tokens(output)[: len(answer.tokens)] == answer.tokens and len(answer.tokens) > 1
