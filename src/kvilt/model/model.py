"""A transformers model that encodes documents and runs plans. It knows nothing of text or stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from kvilt.errors import ModelError
from kvilt.model import attention, fit
from kvilt.model.adapters import acting
from kvilt.model.decoding import passing
from kvilt.model.identity import Identity
from kvilt.model.placing import BufferPool, PlacedCache, Run, Shape
from kvilt.model.rope import rotation_of
from kvilt.plan import Dense, Plan, encoding_mask
from kvilt.rows.rows import TensorRows
from kvilt.types import Adapter, CacheKey, DocumentCache, Encoding, ModelInfo, cached, digest_of

TUNED = ("active_adapters", "merged_adapters", "disable_adapters", "scaling")  # of a layer with adapters of peft


class Model:
    """Wraps a causal language model of transformers; `loading.wrap` also proves that it may be wrapped.

    Raises ModelError for architectures whose keys cannot be placed exactly. The model attends through Kvilt's own attention
    function from then on, which equals its ordinary one. `identity` says what it is called in cache keys (default: after its
    tensors)."""

    def __init__(self, hf: Any, tokenizer_digest: str = "", identity: Identity | None = None) -> None:
        fit.check_config(hf.config)
        self.hf = hf.eval()
        self.rotation = rotation_of(hf)
        attention.install(hf)
        config = hf.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.shape = Shape(config.num_hidden_layers, heads, head_dim, hf.dtype, hf.device)
        self.pool = BufferPool(self.shape)
        self.identity = identity or Identity(hf)
        self._named: tuple[object, str] = (None, "")
        self._look = attention.Look()
        self._tree, self._inside = list[nn.Module](), [0]
        self.stored: torch.dtype = getattr(torch, self.identity.dtype)  # of documents, whatever is computed in
        self.tokenizer_digest = tokenizer_digest
        self.directory = str(getattr(hf, "name_or_path", "")) or None  # of files that strategies look for
        self.dtype_reason = "as the model was given"

    @property
    def digest(self) -> str:
        """What the weights that run now are called in cache keys, adapters included; about a millisecond.

        Writes that PyTorch does not count (through `.data`) are noticed if they change one of a few numbers per tensor."""
        marks = self._marks()
        if marks != self._named[0]:
            self._named = (marks, self.identity.digest)
        return self._named[1]

    def _marks(self) -> tuple[object, ...]:
        """What shows that weights or adapters were changed."""
        modules = self.hf.modules() if getattr(self.hf, "peft_config", None) else ()
        states = [[getattr(m, what, None) for what in TUNED] for m in modules if hasattr(type(m), "merged_adapters")]
        return str(states), *self._look.at(self._tensors())

    def _tensors(self) -> list[Tensor]:
        """Every parameter and buffer; modules are looked for again where one was added or replaced, which takes milliseconds."""
        if self._inside != [id(child) for module in self._tree for child in module._modules.values()]:
            self._tree = [*self.hf.modules()]
            self._inside = [id(child) for module in self._tree for child in module._modules.values()]
        return [t for m in self._tree for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]

    @property
    def context_length(self) -> int:
        """Positions the model was made for."""
        return int(self.hf.config.max_position_embeddings)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values as they are stored."""
        s = self.shape
        return 2 * s.layers * s.heads * s.head_dim * self.stored.itemsize

    def info(self, **more: Any) -> ModelInfo:
        """What strategies may know of this model."""
        vocabulary, width = self.hf.get_input_embeddings().weight.shape
        linear, projections = fit.costs(self.hf)
        return ModelInfo(
            digest=self.digest,
            hidden_size=width,
            vocab_size=vocabulary,
            num_layers=self.shape.layers,
            linear_cost=linear,
            projection_share=projections,
            embedding_stats=self._embedding_stats,
            directory=self.directory,
            **more,
        )

    @cached
    def _embedding_stats(self) -> tuple[float, float]:
        weight = self.hf.get_input_embeddings().weight.detach().float()
        return float(weight.mean()), float(weight.std())

    def key(self, tokens: Tensor, encoding: Encoding, compression: str = "", namespace: str = "shared") -> CacheKey:
        """The content address of a document encoded by this model."""
        return CacheKey(
            model=self.digest,
            tokenizer=self.tokenizer_digest,
            rope=self.identity.rope,
            dtype=self.identity.dtype,
            encoding=encoding.label,
            compression=compression,
            tokens=digest_of(tokens),
            namespace=namespace,
        )

    def embed(self, tokens: Tensor, learned: Tensor | None = None) -> Tensor:
        """Input embeddings of ids; ids below zero name rows of `learned` (id -1: row 0). (..., hidden)."""
        table = self.hf.get_input_embeddings()
        if tokens.numel() and not tokens.is_cuda and int(tokens.max()) >= len(table.weight):
            raise ModelError(f"the tokenizer is another model's: id {int(tokens.max())} of {len(table.weight)}.")
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

        Padding stands on the right, where no earlier token can see it. With anchors a token sees its own chunk and earlier
        anchors, and only the anchors' rows stay. Rows have the dtype of the computation; keys lose their rotation."""
        frame = self.key(documents[0], encoding, compression)
        caches = [encoding.cache(ids, replace(frame, tokens=digest_of(ids))) for ids in documents]
        batch = nn.utils.rnn.pad_sequence([c.tokens for c in caches], batch_first=True)  # (documents, longest)
        chunks = [c.chunks for c in caches if c.chunks is not None]
        mask = encoding_mask(nn.utils.rnn.pad_sequence(chunks, batch_first=True))[:, None] if chunks else None
        captured = _Capture()
        positions = torch.arange(batch.shape[1], device=self.shape.device)
        with self._acting((encoding.adapter, None)):
            self.hf.base_model(  # without its head: encoding needs no logits
                inputs_embeds=self.embed(batch, encoding.learned),
                position_ids=positions[None],
                past_key_values=captured,
                attention_mask=None if mask is None else mask.to(self.shape.device),
            )
        return [replace(cache, rows=self._captured(captured, i, cache)) for i, cache in enumerate(caches)]

    def _captured(self, captured: _Capture, document: int, cache: DocumentCache) -> TensorRows:
        """The rows that one document of a batch keeps, in memory of their own."""
        at = (cache.dropped + cache.offsets).to(self.shape.device)
        states = [state[document].index_select(1, at) for state in captured.states]
        return TensorRows(self.rotation.plain(torch.stack(states).unflatten(0, (-1, 2)), at).data.cpu())

    @contextmanager
    def run(self, plan: Plan, room: int = 0, overlap: bool | None = None) -> Iterator[Run]:
        """Compute a plan in one pass; what it gives is there until the block ends.

        `room` rows are kept free for the answer. `overlap` loads layers from a second thread, ahead of the pass (default:
        on CUDA; a CPU has no core to spare for it, and takes longer for both together)."""
        with self.placed(plan, room) as placed:
            if placed.pieces and (self.shape.device.type == "cuda" if overlap is None else overlap):
                placed.load_ahead()
            logits = self.forward(plan, placed, 1)[-1]
            placed.finish()
            yield Run(placed, logits, self.after)

    @contextmanager
    def placed(
        self, plan: Plan, room: int = 0, stop: int | None = None, depth: int | None = None
    ) -> Iterator[PlacedCache]:
        """The one place where a plan's rows have a buffer; nothing loads into it any more when the block ends.

        A pass that ends early says how many layers it needs (`depth`), or raises StopAtLayer once layer `stop` is there."""
        with self.pool.lend(len(plan.positions) + room) as buffer:
            placed = PlacedCache(plan, buffer, self.rotation, stop, depth)
            try:
                yield placed
            finally:
                placed.finish()

    def score(self, plan: Plan, last: int | None = None) -> Tensor:
        """Logits of the plan's last `last` computed tokens (default: all), (last, vocab) float32."""
        with self.placed(plan) as placed:
            return self.forward(plan, placed, len(plan.computed_rows) if last is None else last)

    @torch.no_grad()
    def dense(self, dense: Dense, learned: Tensor | None = None) -> Tensor:
        """Logits of the computed rows in one ordinary pass without any cache: the definition of right. float32."""
        embeds, mask = self.embed(dense.tokens, learned), dense.mask[None, None].to(self.shape.device)
        with attention.using(attention.in_one(dense)), self._acting(*dense.adapters):
            return self._logits(embeds, dense.positions, attention_mask=mask, use_cache=False)[dense.computed].float()

    @torch.no_grad()
    def forward(self, plan: Plan, placed: PlacedCache, last: int) -> Tensor:
        """One pass over the plan's computed tokens into a placed cache: logits of the last ones, (last, vocab) float32."""
        mask = None if plan.is_suffix else plan.visible()[None, None].to(self.shape.device)
        positions, embeds = plan.positions[plan.computed_rows], self.embed(plan.computed_tokens, plan.learned)
        more = {"past_key_values": placed, "attention_mask": mask, "logits_to_keep": last}
        blocks = self._blocks(len(plan.computed_rows), len(plan.positions), mask)
        with attention.using(placed.attention or blocks), self._acting((plan.reader, plan.asking)):
            return self._logits(embeds, positions, **more).float()

    def _blocks(self, computed: int, rows: int, mask: Tensor | None = None) -> attention.Hook | None:
        """How the last tokens, or those of a mask, are attended on a CPU; None for ordinary attention."""
        if self.shape.device.type != "cpu" or (mask is None and computed in (1, rows)):
            return None
        group = self.hf.config.num_attention_heads // self.shape.heads
        if mask is None:
            return attention.Blocks.last(computed, rows, group, self.shape.dtype)
        return attention.Blocks.of(mask[0, 0], group, self.shape.dtype)

    @torch.no_grad()
    def after(self, tokens: Tensor, placed: PlacedCache, last: int = 0) -> Tensor:
        """Logits behind several tokens (tokens,) appended to a placed cache, of the `last` ones (0: of each),
        (last, vocab) float32.

        Their rows lie in the cache, but count only once `placed.advance` says so."""
        positions = placed.position + torch.arange(len(tokens))
        blocks = self._blocks(len(tokens), placed.length + len(tokens))
        with attention.using(placed.attention or blocks), self._acting((placed.reader, None)):
            return self._logits(self.embed(tokens), positions, past_key_values=placed, logits_to_keep=last).float()

    def _logits(self, embeds: Tensor, positions: Tensor, **more: Any) -> Tensor:
        """Logits of one pass over embeddings (tokens, hidden) at positions (tokens,), (tokens, vocab)."""
        positions = positions[None].to(self.shape.device)
        with passing(len(embeds), self.shape.dtype, self.shape.device):
            return torch.as_tensor(self.hf(inputs_embeds=embeds[None], position_ids=positions, **more).logits[0])

    def _acting(self, *adapters: tuple[Adapter | None, Tensor | None]) -> AbstractContextManager[None]:
        """Lets adapters act in the passes made inside, each on its tokens; nothing happens where there are none."""
        return acting(self.hf, *adapters) if any(adapter for adapter, _ in adapters) else nullcontext()


class _Capture(Cache):
    """Collects the keys and values of one pass without copying them."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[Tensor] = []  # keys and values of every layer, (documents, heads, tokens, head_dim) each

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.states += [key_states, value_states]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
