"""Which models Kvilt serves exactly, and what a model is called in a cache key."""

from __future__ import annotations

import textwrap
from typing import Any

from torch import nn

from kvilt.errors import ModelError
from kvilt.model.rope import check_rope_type

RUNNING = "a running state takes the place of keys and values"
REFUSED_FIELDS = {  # config field -> why its presence makes reuse inexact
    "is_encoder_decoder": "encoder-decoder models have no single causal cache",
    "kv_lora_rank": "multi-head latent attention (MLA) stores a latent, not keys and values per head",
    "alibi": "ALiBi adds a bias per distance instead of rotating keys",
    "attention_chunk_size": "chunked attention hides distant rows from a token",
    "attn_logit_softcapping": "capped attention scores need an attention kernel that Kvilt does not have",
    "num_kv_shared_layers": "layers share keys and values",
    "no_rope_layers": "some layers have no rotary embedding",
    **dict.fromkeys(("mamba_d_state", "ssm_cfg", "state_size", "linear_num_value_heads"), RUNNING),
    **dict.fromkeys(("layers_block_type", "block_types"), f"in some layers {RUNNING}"),
}
ABSOLUTE = ("gpt2", "gpt_bigcode", "gpt_neo", "opt", "openai-gpt", "biogpt", "xglm", "ctrl")
POSITIONS = {  # model type -> how it knows positions, where no config field says so
    **dict.fromkeys(("bloom", "mpt"), REFUSED_FIELDS["alibi"]),
    **dict.fromkeys(ABSOLUTE, "absolute positions"),
}

EXPERTS = (  # config fields that say how many experts a layer has, and how many of them compute a token
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "experts_per_token"),
)


def check_config(config: Any) -> None:
    """Raise ModelError, naming the config field, for a model whose document caches cannot be reused exactly."""
    kind, inner = config.model_type, getattr(config, "text_config", None)
    if kind in POSITIONS:
        why = f"{POSITIONS[kind]}; Kvilt serves decoders with rotary embedding"
        raise _refused(config, f"model_type = {kind!r}", why)
    if inner is not None:
        check_config(inner)
        if not hasattr(config, "num_hidden_layers"):
            raise _refused(config, "text_config", "a model of several modalities; load its language model alone")
    for field, why in REFUSED_FIELDS.items():
        value = _value(config, field)
        if value and not (field == "no_rope_layers" and all(value)):
            raise _refused(config, f"{field} = {textwrap.shorten(repr(value), 40, placeholder='...')}", why)
    if getattr(config, "position_embedding_type", "") == "alibi":
        raise _refused(config, "position_embedding_type = 'alibi'", REFUSED_FIELDS["alibi"])
    _check_windows(config)
    check_rope_type(config)


def _check_windows(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    if odd := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise _refused(config, f"layer_types holds {odd}", "only full attention is served")
    window = getattr(config, "sliding_window", None)
    active = window is not None and getattr(config, "use_sliding_window", True) is not False
    if active and window < config.max_position_embeddings and (not kinds or "sliding_attention" in kinds):
        why = "a document would be hidden from later tokens depending on where it stands"
        raise _refused(config, f"sliding_window = {window} is active", why)


def _value(config: Any, field: str) -> Any:
    try:
        return getattr(config, field, None)
    except Exception as error:  # transformers raises where layers differ in a field
        raise _refused(config, field, "it differs from layer to layer") from error


def _refused(config: Any, field: str, why: str) -> ModelError:
    return ModelError(f"{config.model_type} is refused: config field {field}: {why}.")


def costs(hf: Any) -> tuple[float, float]:
    """FLOPs of one token's matrices in a layer, in units of the FLOPs of attending to one key (4 * heads * head_dim); and
    the share of them that makes queries, keys and values. Mean over layers; of experts count those that a token is sent to."""
    config, layers = hf.config, _decoder_layers(hf)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    active = _active_experts(config)
    weighed = (
        p.numel() * (active if ".experts." in f".{name}" else 1.0)
        for name, p in layers.named_parameters()
        if p.dim() > 1  # (out, in), or (experts, out, in)
    )
    matrices = sum(weighed) / len(layers)
    projections = (config.num_attention_heads + 2 * kv_heads) * head_dim * config.hidden_size
    return 2 * matrices / (4 * config.num_attention_heads * head_dim), projections / matrices


def _active_experts(config: Any) -> float:
    """The share of a layer's experts that compute a token."""
    every, active = (next((n for f in fields if (n := getattr(config, f, None))), 1) for fields in EXPERTS)
    return min(1.0, active / every)


def _decoder_layers(hf: Any) -> nn.ModuleList:
    for module in hf.modules():
        if isinstance(module, nn.ModuleList) and len(module) == hf.config.num_hidden_layers:
            return module
    raise ModelError(f"{hf.config.model_type}: decoder layers not found.")
