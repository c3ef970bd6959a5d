"""Which models Kvilt serves exactly, and what a model is called in a cache key."""

from __future__ import annotations

from typing import Any

from torch import nn

from kvilt.errors import ModelError
from kvilt.model.rope import check_rope_type

REFUSED_FIELDS = {  # config field -> why its presence makes reuse inexact
    "is_encoder_decoder": "encoder-decoder models have no single causal cache",
    "kv_lora_rank": "multi-head latent attention (MLA) stores a latent, not keys and values per head",
    "alibi": "ALiBi adds a bias per distance instead of rotating keys",
    "attention_chunk_size": "chunked attention hides distant rows from a token",
    "attn_logit_softcapping": "capped attention scores need an attention kernel that Kvilt does not have",
    "num_kv_shared_layers": "layers share keys and values",
    "no_rope_layers": "some layers have no rotary embedding",
    "mamba_d_state": "state-space layers keep a running state instead of keys and values",
    "ssm_cfg": "state-space layers keep a running state instead of keys and values",
    "state_size": "state-space layers keep a running state instead of keys and values",
    "layers_block_type": "hybrid models keep a running state in some layers",
    "block_types": "hybrid models keep a running state in some layers",
    "linear_num_value_heads": "linear-attention layers keep a running state instead of keys and values",
}
POSITIONS = {  # model type -> how it knows positions, where no config field says so
    "bloom": "ALiBi adds a bias per distance instead of rotating keys",
    "mpt": "ALiBi adds a bias per distance instead of rotating keys",
    **dict.fromkeys(
        ("gpt2", "gpt_bigcode", "gpt_neo", "opt", "openai-gpt", "biogpt", "xglm", "ctrl"), "absolute positions"
    ),
}

EXPERTS = (  # config fields that say how many experts a layer has, and how many of them compute a token
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "experts_per_token"),
)


def check_config(config: Any) -> None:
    """Raise ModelError, naming the config field, for a model whose document caches cannot be reused exactly."""
    if config.model_type in POSITIONS:
        raise ModelError(
            f"config field model_type = {config.model_type!r} is refused: {POSITIONS[config.model_type]}; "
            "Kvilt serves decoders with rotary position embedding."
        )
    inner = getattr(config, "text_config", None)
    if inner is not None:
        check_config(inner)
        if not hasattr(config, "num_hidden_layers"):
            raise ModelError(
                f"{config.model_type} is refused: config field text_config: a model of several modalities; "
                "load its language model alone."
            )
    _check_fields(config)
    _check_windows(config)
    check_rope_type(config)


def _check_fields(config: Any) -> None:
    for field, why in REFUSED_FIELDS.items():
        value = _value(config, field)
        if field == "no_rope_layers" and value is not None and all(value):
            continue
        if value:
            raise ModelError(f"{config.model_type} is refused: config field {field} = {_short(value)}: {why}.")
    if getattr(config, "position_embedding_type", "") == "alibi":
        raise ModelError(f"{config.model_type} is refused: config field position_embedding_type = 'alibi'.")


def _check_windows(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    odd = kinds - {"full_attention", "sliding_attention"}
    if odd:
        raise ModelError(
            f"{config.model_type} is refused: config field layer_types holds {sorted(odd)}; only full attention is served."
        )
    window = getattr(config, "sliding_window", None)
    active = window is not None and getattr(config, "use_sliding_window", True) is not False
    active = active and window < config.max_position_embeddings and (not kinds or "sliding_attention" in kinds)
    if active:
        raise ModelError(
            f"{config.model_type} is refused: config field sliding_window = {window} is active: a document would be hidden "
            "from later tokens depending on where it stands."
        )


def _value(config: Any, field: str) -> Any:
    try:
        return getattr(config, field, None)
    except Exception as error:  # transformers raises where layers differ in a field
        raise ModelError(
            f"{config.model_type} is refused: config field {field} differs from layer to layer."
        ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


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
