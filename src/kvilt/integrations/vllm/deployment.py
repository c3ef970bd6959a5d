"""What one vLLM server serves: a checkpoint, a strategy and a store, known from files and configuration alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from kvilt import registry
from kvilt.compress.base import Compression
from kvilt.errors import ModelError, PromptError, SpecError
from kvilt.integrations.vllm.plans import place
from kvilt.model import fit, identity, loading
from kvilt.model.rope import rotation_of
from kvilt.plan import Plan
from kvilt.rows.rows import Rotation, TensorRows
from kvilt.stores.store import Store
from kvilt.strategies.base import Strategy
from kvilt.types import CacheKey, DocumentCache, Encoding, ModelInfo, Prompt, digest_of

TRIAL = 1024  # tokens of the documents that a strategy plans with when a server starts


@dataclass(frozen=True)
class Settings:
    """`kv_connector_extra_config`: what `kvilt vllm` hands to vLLM's processes."""

    store: str = "disk"
    strategy: str = registry.DEFAULT
    compress: str = ""
    namespace: str = "shared"
    system: str = ""  # of requests that bring none; the text that `kvilt encode --system` was given
    refresh: float = 5.0  # seconds between two looks at what is stored; 0: documents are not looked for in prompts
    encode: bool = False  # whether missing documents are encoded in the background

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """Read the options. Raises SpecError for one that is not known."""
        known = {f.name for f in fields(cls)}
        if unknown := set(options) - known:
            raise SpecError(f"kv_connector_extra_config: unknown {sorted(unknown)}. Known: {', '.join(sorted(known))}.")
        return cls(**options)


class NeedsProbe(SpecError):
    """The strategy runs the model before it decides; a scheduler has no model."""


class NoProbe:
    """The probe of a process that has no model."""

    def __getattr__(self, name: str) -> Any:
        raise NeedsProbe(
            "it runs the model before it decides what to compute, which vLLM's scheduler cannot. "
            "Use ranked:ratio=..., whose choice is made when documents are encoded."
        )


def skeleton(config: Any) -> nn.Module:
    """A model without weights, whose rotary embedding alone is real."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        hf: nn.Module = AutoModelForCausalLM.from_config(config)
    for path, module in list(hf.named_modules()):
        if isinstance(getattr(module, "inv_freq", None), Tensor):
            parent, _, name = path.rpartition(".")
            setattr(hf.get_submodule(parent), name, type(module)(config=config))
    return hf


class Checkpoint:
    """A model folder (or hub name that is cached) as Kvilt keys it."""

    def __init__(self, source: str) -> None:
        from transformers import AutoConfig

        source = loading.folder(source)
        at = loading.beside(source, "config.json")
        if at is None:
            what = (
                "an adapter, which vLLM serves merged" if loading.beside(source, "adapter_config.json") else "no model"
            )
            raise ModelError(
                f"{source!r} is {what}: give a folder (or a cached hub name) with config.json and weights."
            )
        self.folder = at.parent
        config, stated = AutoConfig.from_pretrained(self.folder), identity.config_of(self.folder)
        fit.check_config(config)
        hf = skeleton(config)
        self.rotation: Rotation = rotation_of(hf)
        self.digest, self.rope = identity.of_files(self.folder), identity.of_rope(stated)
        self.dtype = identity.stored_dtype(stated)
        self.info = ModelInfo(
            digest=self.digest,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            num_layers=config.num_hidden_layers,
            linear_cost=fit.costs(hf)[0],
            directory=str(self.folder),
        )


class Deployment:
    """A checkpoint with its tokenizer's identity, a strategy bound to it, and the store."""

    def __init__(self, source: str, tokenizer: Any, settings: Settings) -> None:
        self.settings, self.checkpoint = settings, Checkpoint(source)
        self.tokenizer = identity.tokenizer_digest(tokenizer)
        self.strategy = cast(Strategy, registry.build("strategy", settings.strategy))
        self.compression = Compression.of(settings.compress)
        self.store = cast(Store, registry.build("store", settings.store))
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        added = tokenizer.get_added_vocab()
        self.info = replace(
            self.checkpoint.info,
            sink=next((i for i in ids if i is not None), None),
            reserved=tuple(sorted(i for token, i in added.items() if "reserved" in token)),
        )
        self.needs_embeddings = False  # whether learned vectors are computed in prompts
        self._try()

    @functools.lru_cache(maxsize=64)  # noqa: B019 (lives as long as the process)
    def bound(self, system: tuple[int, ...]) -> Strategy:
        """The strategy made ready for prompts that begin with these tokens."""
        return self.strategy.bind(replace(self.info, system=system))

    def key(self, tokens: Tensor, encoding: Encoding, namespace: str, compression: str = "") -> CacheKey:
        """The content address of a document (ids, (tokens,)), as the transformers engine makes it."""
        c = self.checkpoint
        parts = (c.digest, self.tokenizer, c.rope, c.dtype, encoding.label, compression, digest_of(tokens), namespace)
        return CacheKey(*parts)

    def knows(self, fields: Mapping[str, str]) -> bool:
        """Whether a stored document's identity is this checkpoint's."""
        own = {"model": self.checkpoint.digest, "tokenizer": self.tokenizer, "rope": self.checkpoint.rope}
        return all(fields.get(name) == value for name, value in own.items())

    def tokens_of(self, cache: DocumentCache) -> Tensor:
        """The ids that a stored document has in a prompt, (tokens,): markers are ordinary tokens, and stand in none."""
        own, around = cache.own_tokens, self.bound(()).encoding or Encoding()
        if around.keep and cache.key.encoding == around.label and len(own) == cache.length:
            own = own[len(around.before) : len(own) - len(around.after)]
        return own

    def plan(self, prompt: Prompt, strategy: Strategy) -> Plan:
        """The strategy's plan. Raises PromptError or NeedsProbe."""
        plan = strategy.plan(prompt, cast(Any, NoProbe()))
        if plan.reader is not None:
            raise SpecError(f"strategy {self.settings.strategy!r} computes questions with an adapter: vLLM has none.")
        return plan

    def _try(self) -> None:
        """Refuse a strategy that no prompt could be served with, when the server starts."""
        strategy = self.bound((1, 2, 3))
        if strategy.encoding is None:
            raise SpecError(f"strategy {self.settings.strategy!r} reuses nothing: vLLM alone does that.")
        if strategy.encoding.adapter is not None and self.settings.encode:
            raise SpecError(
                f"strategy {self.settings.strategy!r}: vLLM cannot encode with its adapter; use kvilt encode."
            )
        documents = tuple(self._pretend(strategy, torch.arange(TRIAL) + i) for i in range(2))
        system = self._pretend(replace(strategy, encoding=Encoding()), torch.tensor([1, 2, 3]))
        try:
            placed = place(self.plan(Prompt(system, documents, torch.arange(5), ("", "")), strategy), 1.0)
            self.needs_embeddings = placed.soft is not None
        except NeedsProbe as error:
            raise NeedsProbe(f"strategy {self.settings.strategy!r} is not served by vLLM: {error}") from error
        except PromptError as error:
            if "vLLM" in str(error):
                raise SpecError(f"strategy {self.settings.strategy!r} is not served by vLLM: {error}") from error

    def _pretend(self, strategy: Strategy, ids: Tensor) -> DocumentCache:
        encoding = strategy.encoding or Encoding()
        cache = encoding.cache(ids, self.key(ids, encoding, ""))
        return replace(cache, rows=TensorRows(torch.empty(1, 2, 1, len(cache.offsets), 1)))
