"""The rotation that is read from a model: its frequencies, its pairs of channels, and what is refused."""

from __future__ import annotations

import pytest
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

import zoo
from kvilt.errors import ModelError
from kvilt.model.rope import check_rope_type, rotation_of


def test_the_model_itself_says_which_channels_it_pairs() -> None:
    """Danger: Cohere and GLM pair neighbours, Llama pairs halves; a wrong guess still looks like a rotation."""
    kinds = {f: zoo.model_of(f).rotation.interleaved for f in zoo.FAMILIES}
    assert kinds == {f: f == "glm-interleaved" for f in zoo.FAMILIES}
    assert rotation_of(CohereForCausalLM(CohereConfig(**zoo.SHAPE))).interleaved


def test_yarn_s_scaling_is_read() -> None:
    """Danger: keys are computed under YaRN's scaling and compared as if they were not."""
    yarn = [{**zoo.YARN, "attention_factor": f} for f in (1.0, 1.3, 0.8)]
    made = [rotation_of(LlamaForCausalLM(LlamaConfig(**zoo.SHAPE, rope_parameters=y))) for y in yarn]
    assert [m.scaling for m in made] == [1.0, 1.3, 0.8]


def test_layers_that_rotate_differently_are_refused() -> None:
    """Danger: one rotation for all layers, and those of another frequency are off by more with every position."""
    hf = zoo.hf_model("llama")
    hf.model.layers[2].self_attn.register_buffer("inv_freq", hf.model.rotary_emb.inv_freq * 2, persistent=False)
    with pytest.raises(ModelError, match="different frequencies"):
        rotation_of(hf)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "rope_type = 'dynamic'"),
        (
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 128,
            },
            "rope_type = 'longrope'",
        ),
        ({"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}, "mrope_section"),
    ],
)
def test_rotations_that_depend_on_the_prompt_are_refused_by_name(parameters: dict[str, object], named: str) -> None:
    """Danger: frequencies change with the length of the prompt, and a moved key is wrong only in long prompts."""
    with pytest.raises(ModelError, match="rope_parameters") as error:
        check_rope_type(LlamaConfig(**zoo.SHAPE, rope_parameters=parameters))
    assert named in str(error.value)
