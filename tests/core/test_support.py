"""Which architectures are served: real configurations of transformers, refused by the field that says why, or proved."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import zoo
from core_kit import TOLERANCE, cache_of, ids, layout, off, off_dense
from kvilt.errors import ModelError
from kvilt.model import attention, support
from kvilt.model.model import Model

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 4096,
}
REFUSED = {  # what a real checkpoint's configuration looks like -> the field that the error names
    "deepseek-v2": (lambda: hf.DeepseekV2Config(), "kv_lora_rank"),
    "deepseek-v3": (lambda: hf.DeepseekV3Config(), "kv_lora_rank"),
    "mamba": (lambda: hf.MambaConfig(), "state_size"),
    "mamba2": (lambda: hf.Mamba2Config(), "state_size"),
    "jamba": (lambda: hf.JambaConfig(), "mamba_d_state"),
    "zamba2": (lambda: hf.Zamba2Config(), "mamba_d_state"),
    "falcon-h1": (lambda: hf.FalconH1Config(), "mamba_d_state"),
    "qwen3-next": (lambda: hf.Qwen3NextConfig(), "linear_num_value_heads"),
    "recurrent-gemma": (lambda: hf.RecurrentGemmaConfig(), "layers_block_type"),
    "minimax": (lambda: hf.MiniMaxConfig(), "layer_types"),
    "lfm2": (lambda: hf.Lfm2Config(layer_types=["conv", "full_attention"] * 2, num_hidden_layers=4), "layer_types"),
    "t5": (lambda: hf.T5Config(), "is_encoder_decoder"),
    "bart": (lambda: hf.BartConfig(), "is_encoder_decoder"),
    "bloom": (lambda: hf.BloomConfig(), "model_type = 'bloom'"),
    "mpt": (lambda: hf.MptConfig(), "model_type = 'mpt'"),
    "falcon-alibi": (lambda: hf.FalconConfig(alibi=True), "alibi"),
    "gpt2": (lambda: hf.GPT2Config(), "model_type = 'gpt2'"),
    "opt": (lambda: hf.OPTConfig(), "model_type = 'opt'"),
    "gemma2": (lambda: hf.Gemma2Config(), "attn_logit_softcapping"),
    "gemma3": (lambda: hf.Gemma3TextConfig(sliding_window=512, max_position_embeddings=32768), "sliding_window"),
    "gemma3-composite": (lambda: hf.Gemma3Config(), "sliding_window"),
    "gemma3n": (lambda: hf.Gemma3nTextConfig(), "num_kv_shared_layers"),
    "mistral-window": (lambda: hf.MistralConfig(sliding_window=4096, max_position_embeddings=32768), "sliding_window"),
    "qwen2-window": (
        lambda: hf.Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=2, num_hidden_layers=4),
        "sliding_window",
    ),
    "gpt-oss": (lambda: hf.GptOssConfig(), "sliding_window"),
    "cohere2": (lambda: hf.Cohere2Config(), "sliding_window"),
    "phi3-longrope": (lambda: hf.Phi3Config(rope_parameters=LONGROPE, pad_token_id=0), "rope_type = 'longrope'"),
    "llama-dynamic": (
        lambda: hf.LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type = 'dynamic'",
    ),
    "llama4": (lambda: hf.Llama4TextConfig(), "attention_chunk_size"),
    "llama4-composite": (lambda: hf.Llama4Config(), "attention_chunk_size"),
    "smollm3": (lambda: hf.SmolLM3Config(), "no_rope_layers"),
    "qwen2-vl": (lambda: hf.Qwen2VLConfig(), "text_config"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_reused_exactly_is_refused_by_the_field_that_says_so(name: str) -> None:
    """Danger: a model is served whose answers are silently wrong, or refused without a hint at the reason."""
    make, field = REFUSED[name]
    with pytest.raises(ModelError) as error:
        support.check_config(make())
    assert field in str(error.value)
    assert "config field" in str(error.value)


SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2": ("Llama", {"rope_parameters": zoo.LLAMA3, "tie_word_embeddings": True}),
    "smollm2": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2-window-off": ("Qwen2", {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 2}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-window-as-long-as-context": ("Mistral", {"sliding_window": 4096, "head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "gemma": ("Gemma", {"head_dim": 16}),
    "cohere": ("Cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "olmo2": ("Olmo2", {}),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.25}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
    "nemotron": ("Nemotron", {}),
    "smollm3-all-rotary": ("SmolLM3", {"no_rope_layers": [1, 1, 1, 1], "use_sliding_window": False}),
}


def tiny(name: str, **more: Any) -> Any:
    """A random model of an architecture, scaled so that its attention is far from uniform."""
    config = getattr(hf, f"{name}Config")
    known = set(inspect.signature(config).parameters)
    made = config(**{**{k: v for k, v in zoo.SHAPE.items() if k in known}, **more})
    torch.manual_seed(1)
    model = getattr(hf, f"{name}ForCausalLM")(made).eval()
    for part, p in model.named_parameters():
        if p.dim() > 1:
            p.data.mul_(6 if "embed" not in part else 20)
        elif "bias" in part or "sink" in part:
            p.data.normal_(0, 0.3)
    return model


@torch.no_grad()
def own_logits(model: Any, tokens: Tensor) -> Tensor:
    """What transformers says, before Kvilt has touched the model."""
    return torch.as_tensor(model(input_ids=tokens[None], use_cache=False).logits[0, -1]).float()


@pytest.mark.parametrize("name", SERVED)
def test_served_architectures_give_their_own_logits_over_a_cache(name: str) -> None:
    """Danger: multipliers, norms, biases or experts are lost on the way through Kvilt's attention and cache (G2, G9)."""
    architecture, more = SERVED[name]
    raw = tiny(architecture, **more)
    document, other, question = ids(40, 1), ids(20, 2), ids(7, 3)
    wanted = own_logits(raw, torch.cat([document, question]))
    model = Model(raw)
    cache = cache_of(model, document)
    assert off(model.run(layout(question).reuse(cache).ask().plan())[0], wanted) < TOLERANCE
    plan = layout(question).reuse(cache).compute(ids(3, 4)).reuse(cache_of(model, other), at=90).ask().plan()
    assert off_dense(model, plan) < TOLERANCE


UNFIT = {  # nothing in the configuration gives these away, or it was switched to something nobody has tried
    "layers without rotation": ("Cohere2", {"sliding_window": 4096, "head_dim": 16}),
    "rotation in some layers": ("Exaone4", {"sliding_window": 4096, "sliding_window_pattern": 2, "head_dim": 16}),
    "learned sinks": ("GptOss", {"layer_types": ["full_attention"] * 4, "head_dim": 16, "num_local_experts": 4}),
    "attention of its own": ("Doge", {}),
    "two rotations": ("Gemma3", {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNFIT)
def test_a_trial_at_loading_finds_what_no_field_gives_away(name: str) -> None:
    """Danger: the list of refused fields is never complete; an unknown architecture must prove itself."""
    architecture, more = UNFIT[name]
    if architecture == "Gemma3":
        torch.manual_seed(1)
        raw: Any = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**{**zoo.SHAPE, "max_position_embeddings": 512}))
    else:
        raw = tiny(architecture, **more)
    with pytest.raises(ModelError, match="refused"):
        Model(raw)


def test_scores_that_kvilt_cannot_shape_are_refused_where_they_arise() -> None:
    """Danger: an unknown argument of attention (capping, sinks) is swallowed and the answer is slightly wrong."""
    rows = torch.randn(1, 2, 3, 4)
    for extra in attention.UNSERVED:
        with pytest.raises(ModelError, match=extra):
            attention.attend(torch.nn.Identity(), rows, rows, rows, None, **{extra: torch.ones(1)})
        attention.attend(torch.nn.Identity(), rows, rows, rows, None, **{extra: None})


def test_linear_cost_is_matrices_over_one_key() -> None:
    """Danger: `charged` weighs attention against the wrong thing. Llama 3.2 1B: 60.8 M per layer, 32 heads of 64."""
    config = hf.LlamaConfig(hidden_size=2048, num_attention_heads=32, head_dim=64)
    assert support.linear_cost(config, 60_817_408) == pytest.approx(2 * 60_817_408 / (4 * 32 * 64))
