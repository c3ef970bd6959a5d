"""A transformers model that can encode documents, run plans, probe and decode. It knows nothing of text or stores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from kvilt.errors import ModelError
from kvilt.model import attention, identity, proof, support
from kvilt.model.begun import beginning, decoder_layers
from kvilt.model.pace import Pace
from kvilt.model.placed import BufferPool, PlacedCache, Shape
from kvilt.model.rope import rope_of
from kvilt.plan import Dense, Plan, encoding_mask
from kvilt.types import CacheKey, DocumentCache, Encoding, ModelInfo, TensorLayers, digest_of

OVERLAP_BYTES = 64 << 20  # on a CPU a second thread pays from about here on


class Model:
    """Wraps a causal language model of transformers.

    Raises ModelError for architectures whose caches cannot be moved exactly. The model attends through Kvilt's own
    attention function from then on, which equals its ordinary one."""

    def __init__(self, hf: Any, tokenizer_digest: str = "") -> None:
        support.check_config(hf.config)
        self.hf = hf.eval()
        self.rope = rope_of(hf)
        facts = proof.facts(hf)
        own = None if identity.was_proved(hf, facts) else proof.own_logits(hf)
        attention.install(hf)
        config = hf.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.shape = Shape(config.num_hidden_layers, heads, head_dim, hf.dtype, hf.device)
        self.pool, self.pace = BufferPool(self.shape), Pace()
        self.digest = identity.weights_digest(hf)
        self.tokenizer_digest = tokenizer_digest
        self._configuration = digest_of(self.rope.identity, identity.config_digest(config))
        if own is not None:
            proof.check(self, own)
            identity.note_proof(hf, facts)

    @property
    def context_length(self) -> int:
        """Positions the model was made for."""
        return int(self.hf.config.max_position_embeddings)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token."""
        s = self.shape
        return 2 * s.layers * s.heads * s.head_dim * s.dtype.itemsize

    def info(self, **more: Any) -> ModelInfo:
        """What strategies may know of this model."""
        config, layer = self.hf.config, decoder_layers(self.hf)[1][0]
        vocabulary, width = self.hf.get_input_embeddings().weight.shape
        matrices = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
        return ModelInfo(
            digest=self.digest,
            hidden_size=width,
            vocab_size=vocabulary,
            num_layers=config.num_hidden_layers,
            linear_cost=support.linear_cost(config, matrices),
            projection_share=support.projection_share(config, matrices),
            embedding_stats=self._embedding_stats,
            **more,
        )

    @functools.cached_property
    def _embedding_stats(self) -> tuple[float, float]:
        weight = self.hf.get_input_embeddings().weight.detach().float()
        return float(weight.mean()), float(weight.std())

    def key(self, tokens: Tensor, encoding: Encoding, compression: str = "") -> CacheKey:
        """The content address of a document encoded by this model."""
        identity = (
            self.digest,
            self.tokenizer_digest,
            self._configuration,
            str(self.shape.dtype).removeprefix("torch."),
        )
        return CacheKey(*identity, encoding.digest, compression, digest_of(tokens))

    def embed(self, tokens: Tensor, learned: Tensor | None = None) -> Tensor:
        """Input embeddings of ids; ids below zero name rows of `learned` (id -1: row 0). (..., hidden)."""
        table = self.hf.get_input_embeddings()
        if tokens.numel() and not tokens.is_cuda and int(tokens.max()) >= len(table.weight):
            raise ModelError(
                f"the tokenizer gives id {int(tokens.max())}, the model has {len(table.weight)} embeddings: "
                "it belongs to another model."
            )
        tokens = tokens.to(self.shape.device)
        out: Tensor = table(tokens.clamp(min=0))
        if learned is None:
            if tokens.numel() and not tokens.is_cuda and int(tokens.min()) < 0:
                raise ValueError("ids below zero name learned vectors, but none were given")
            return out
        soft = learned.to(device=out.device, dtype=out.dtype)[(-1 - tokens).clamp(min=0)]
        return torch.where((tokens < 0)[..., None], soft, out)

    @torch.no_grad()
    def encode(self, documents: Sequence[Tensor], encoding: Encoding, compression: str = "") -> list[DocumentCache]:
        """Encode documents (ids, (tokens,) each) alone, in one causal pass over before + document + after.

        Padding stands on the right, where no earlier token can see it. The pass runs at positions that put the document
        itself at 0, so stored keys need no second rotation. With anchors a token sees its own chunk and earlier anchors,
        and only the anchors' rows stay."""
        caches = [encoding.cache(ids, self.key(ids, encoding, compression)) for ids in documents]
        batch = nn.utils.rnn.pad_sequence([c.tokens for c in caches], batch_first=True)  # (documents, longest)
        chunks = [c.chunks for c in caches if c.chunks is not None]
        mask = encoding_mask(nn.utils.rnn.pad_sequence(chunks, batch_first=True))[:, None] if chunks else None
        store = _Capture()
        positions = torch.arange(batch.shape[1], device=self.shape.device) - caches[0].dropped
        self._base(
            inputs_embeds=self.embed(batch, encoding.learned),
            position_ids=positions[None],
            past_key_values=store,
            attention_mask=None if mask is None else mask.to(self.shape.device),
        )
        return [replace(cache, layers=store.rows(i, cache)) for i, cache in enumerate(caches)]

    @torch.no_grad()
    def run(self, plan: Plan, room: int = 0, overlap: bool | None = None) -> tuple[Tensor, PlacedCache]:
        """Compute a plan in one pass: logits of the last token (vocab,) float32, and the cache to decode with.

        `room` rows are kept free for the answer. `overlap` loads layers from a second thread, ahead of the pass
        (default: on CUDA, and where there is much to load)."""
        placed = self._placed(plan, room, overlap)
        try:
            logits = self.forward(plan, placed, logits_to_keep=1)[0, -1].float()
        except BaseException:
            self._drop(placed)
            raise
        placed.finish()
        return logits, placed

    @torch.no_grad()
    def score(self, plan: Plan, last: int) -> Tensor:
        """Logits of the plan's last `last` computed tokens, (last, vocab) float32."""
        placed = self._placed(plan, 0, None)
        try:
            return self.forward(plan, placed, logits_to_keep=last)[0].float()
        finally:
            self._drop(placed)

    @torch.no_grad()
    def dense(self, dense: Dense, learned: Tensor | None = None) -> Tensor:
        """Logits of the computed rows in one ordinary pass without any cache: the definition of right. float32."""
        mask = dense.mask[None, None].to(self.shape.device)
        positions = dense.positions[None].to(self.shape.device)
        with attention.using(attention.in_one(dense)):
            out = self.hf(
                inputs_embeds=self.embed(dense.tokens, learned)[None],
                position_ids=positions,
                attention_mask=mask,
                use_cache=False,
            )
        return torch.as_tensor(out.logits[0, dense.computed]).float()

    @torch.no_grad()
    def step(self, token: Tensor, placed: PlacedCache) -> Tensor:
        """Append one token (1, 1) to a placed cache; logits of the next, (1, vocab) float32."""
        position = torch.full((1, 1), placed.position, device=self.shape.device)
        with attention.using(placed.attention):
            out = self.hf(input_ids=token, position_ids=position, past_key_values=placed, use_cache=True)
        placed.advance(1)
        return torch.as_tensor(out.logits[:, -1]).float()

    @torch.no_grad()
    def ahead(self, tokens: Tensor, placed: PlacedCache) -> Tensor:
        """Logits after each of several tokens (tokens,) behind a placed cache, (tokens, vocab) float32.

        Their rows lie in the cache, but count only once `placed.advance` says so."""
        positions = placed.position + torch.arange(len(tokens), device=self.shape.device)
        with attention.using(placed.attention):
            out = self.hf(
                input_ids=tokens[None].to(self.shape.device),
                position_ids=positions[None],
                past_key_values=placed,
                use_cache=True,
            )
        return torch.as_tensor(out.logits[0]).float()

    def _placed(self, plan: Plan, room: int, overlap: bool | None) -> PlacedCache:
        placed = PlacedCache(plan, self.pool.take(len(plan.positions) + room), self.rope)
        worth = self.shape.device.type == "cuda" or placed.bytes_loaded >= OVERLAP_BYTES
        if placed.pieces and (worth if overlap is None else overlap):
            placed.load_ahead()
        return placed

    def _drop(self, placed: PlacedCache) -> None:
        """Hand the buffer back, but never while a thread still loads into it."""
        placed.finish()
        self.pool.give(placed.buffer)

    def forward(self, plan: Plan, placed: PlacedCache, logits_to_keep: int) -> Tensor:
        """One pass over the plan's computed tokens into a placed cache: logits of the last ones, (1, kept, vocab).

        Layers that the plan has begun with are not run again."""
        rows = plan.computed_rows
        mask = None if plan.is_suffix else plan.visible()[None, None].to(self.shape.device)
        with attention.using(placed.attention), beginning(self.hf, plan.begun) as hf:
            for layer, (keys, values) in enumerate(plan.begun.rows if plan.begun else ()):
                placed.update(keys[None], values[None], layer)
            out = hf(
                inputs_embeds=self.embed(plan.computed_tokens, plan.learned)[None],
                position_ids=plan.positions[rows][None].to(self.shape.device),
                past_key_values=placed,
                attention_mask=mask,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
        return torch.as_tensor(out.logits)

    @property
    def _base(self) -> Callable[..., Any]:
        """The model without its head: encoding needs no logits."""
        base: Callable[..., Any] = self.hf.base_model
        return base


class _Capture(Cache):
    """Collects the keys and values of one pass without copying them."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.append(key_states)
        self.values.append(value_states)
        return key_states, value_states

    def rows(self, i: int, cache: DocumentCache) -> TensorLayers:
        """The rows that stay of the batch's document `i`, in memory of their own."""
        at = cache.dropped + cache.offsets
        keys, values = (tuple(t[i][:, at].cpu().contiguous() for t in side) for side in (self.keys, self.values))
        return TensorLayers(keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
