"""Which architectures are served: real configurations of transformers, refused by the field that says why, or proved."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers as hf

import zoo
from core_kit import cache_of, ids, layout
from kvilt.errors import ModelError
from kvilt.model import attention, fit, proof
from kvilt.model.loading import wrap

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
        fit.check_config(make())
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
    "cohere": ("Cohere", {"logit_scale": 0.25, "use_qk_norm": True, "sharper": 3}),
    "olmo2": ("Olmo2", {}),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.25}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
    "nemotron": ("Nemotron", {}),
    "smollm3-all-rotary": ("SmolLM3", {"no_rope_layers": [1, 1, 1, 1], "use_sliding_window": False}),
}


def tiny(name: str, sharper: int = 6, **more: Any) -> Any:
    """A random model of an architecture, scaled so that its attention is far from uniform."""
    config = getattr(hf, f"{name}Config")
    known = set(inspect.signature(config).parameters)
    made = config(**{**{k: v for k, v in zoo.SHAPE.items() if k in known}, **more})
    torch.manual_seed(1)
    model = getattr(hf, f"{name}ForCausalLM")(made).eval()
    for part, p in model.named_parameters():
        if p.dim() > 1:
            p.data.mul_(sharper if "embed" not in part else 20)
        elif "bias" in part or "sink" in part:
            p.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SERVED)
def test_served_architectures_give_their_own_logits_over_a_cache(name: str, dtype: torch.dtype) -> None:
    """Danger: multipliers, norms, biases or experts are lost on the way through Kvilt's attention and cache (G2, G9)."""
    architecture, more = SERVED[name]
    raw = tiny(architecture, **more).to(dtype)
    document, other, question = ids(40, 1), ids(20, 2), ids(7, 3)
    wanted = proof.own(raw, torch.cat([document, question]))
    model = wrap(raw, zoo.tokenizer())
    cache = cache_of(model, document)
    plan = layout(question).reuse(cache).ask().plan()
    assert proof.deviation(model.score(plan), wanted.logits[-len(question) :]) < proof.tolerance(wanted.floor)
    plan = layout(question).reuse(cache).compute(ids(3, 4)).reuse(cache_of(model, other), at=90).ask().plan()
    dense = model.dense(plan.dense(), plan.learned)
    assert proof.deviation(model.score(plan), dense) < proof.tolerance(wanted.floor)


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
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ModelError, match="refused"):
            wrap(raw.to(dtype), zoo.tokenizer())


def test_scores_that_kvilt_cannot_shape_are_refused_where_they_arise() -> None:
    """Danger: an unknown argument of attention (capping, sinks) is swallowed and the answer is slightly wrong."""
    rows = torch.randn(1, 2, 3, 4)
    for extra in attention.UNSERVED:
        with pytest.raises(ModelError, match=extra):
            attention.attend(torch.nn.Identity(), rows, rows, rows, None, **{extra: torch.ones(1)})
        attention.attend(torch.nn.Identity(), rows, rows, rows, None, **{extra: None})


def test_linear_cost_is_matrices_over_one_key() -> None:
    """Danger: `charged` weighs attention against the wrong thing. A layer of Llama 3.2 1B in small."""
    raw = hf.LlamaForCausalLM(hf.LlamaConfig(**{**zoo.SHAPE, "num_hidden_layers": 2}))
    matrices = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96  # queries, keys, values, output; gate, up, down
    linear, projections = fit.costs(raw)
    assert linear == pytest.approx(2 * matrices / (4 * 4 * 16))
    assert projections == pytest.approx(64 * (64 + 32 + 32) / matrices)


@pytest.mark.parametrize(
    ("name", "more", "experts"),
    [
        ("Qwen3Moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, 2 * 3 * 64 * 32),
        ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, 2 * 3 * 64 * 96),
        (
            "Qwen2Moe",
            {
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 48,
            },
            2 * 3 * 64 * 32 + 3 * 64 * 48 + 64,
        ),
    ],
)
def test_experts_that_are_not_active_cost_nothing(name: str, more: dict[str, Any], experts: int) -> None:
    """Danger: a mixture of experts is charged for all of them, and attention looks free (W8)."""
    raw = tiny(name, **{"head_dim": 16, "sliding_window": None, **more})
    matrices = 64 * (64 + 32 + 32 + 64) + 8 * 64 + experts  # attention, router, experts of a token
    assert fit.costs(raw)[0] == pytest.approx(2 * matrices / (4 * 4 * 16))


def test_layers_that_differ_count_as_their_mean() -> None:
    """Danger: the first layer, which is dense in many mixtures of experts, stands for all (W8)."""
    more = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    costs = [fit.costs(tiny("Qwen3Moe", **more, mlp_only_layers=dense))[0] for dense in ([], [0, 1], [0, 1, 2, 3])]
    assert costs[1] == pytest.approx((costs[0] + costs[2]) / 2)
