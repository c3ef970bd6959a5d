"""Moving keys: the same as having computed them at the other place."""

from __future__ import annotations

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

import zoo
from core_kit import cache_of, ids, off
from kvilt.errors import ModelError
from kvilt.model.model import Model
from kvilt.model.rope import Rope, check_rope_type, rope_of
from kvilt.types import Encoding


@pytest.mark.parametrize("by", [1, 37, 700])
def test_a_moved_key_equals_one_computed_there(model: Model, by: int) -> None:
    """Danger: scaling applied twice (YaRN), channels paired wrongly (GLM), unrotated channels touched (Phi)."""
    tokens = ids(12, 3)
    here = cache_of(model, tokens)
    there = cache_of(model, tokens, Encoding(before=(int(tokens[0]),) * by, keep=True))
    assert here.layers is not None
    assert there.layers is not None
    moved = model.rope.move(here.layers.fetch(0, "keys"), by)
    assert off(moved, there.layers.fetch(0, "keys")[:, by:]) < 2e-5
    assert off(here.layers.fetch(0, "keys"), there.layers.fetch(0, "keys")[:, by:]) > 1e-2  # moving is not nothing


def test_keys_of_every_layer_move_with_the_document(model: Model) -> None:
    """Danger: one layer has another rotation, or none."""
    tokens = ids(12, 4)
    here, shifted = cache_of(model, tokens), cache_of(model, tokens, Encoding(before=(5, 6, 7)))
    alone = cache_of(model, torch.cat([torch.tensor([5, 6, 7]), tokens]))  # the same, with the prefix's rows
    assert shifted.layers is not None
    assert alone.layers is not None
    for layer in range(here.layers.shape[0] if here.layers else 0):
        moved = model.rope.move(shifted.layers.fetch(layer, "keys"), 3)
        assert off(moved, alone.layers.fetch(layer, "keys")[:, 3:]) < 5e-5
        assert off(shifted.layers.fetch(layer, "values"), alone.layers.fetch(layer, "values")[:, 3:]) < 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_half_precision_is_rotated_in_float32_and_rounded_once(dtype: torch.dtype, interleaved: bool) -> None:
    """Danger: a rotation computed in bfloat16 loses three digits before it is rounded."""
    rope = Rope(1.0 / 10000 ** (torch.arange(0, 12, 2).double() / 12), interleaved)
    keys = torch.randn(3, 50, 16).to(dtype)
    exact = rope.move(keys.float(), 1234)
    assert torch.equal(rope.move(keys, 1234), exact.to(dtype))
    into = torch.empty(3, 50, 16)
    assert torch.equal(rope.move(keys, 1234, into), exact)  # into a float32 buffer: not rounded at all
    half = torch.empty(3, 50, 16, dtype=dtype)
    assert torch.equal(rope.move(keys.float(), 1234, half), exact.to(dtype))


def test_channels_beyond_the_rotary_ones_never_change() -> None:
    """Danger: partial rotary models get their position-free channels rotated, or left unwritten in a used buffer."""
    rope = Rope(torch.tensor([1.0, 0.1], dtype=torch.float64))
    keys, buffer = torch.randn(2, 5, 8), torch.full((2, 5, 8), torch.nan)
    assert torch.equal(rope.move(keys, 77, buffer)[..., 4:], keys[..., 4:])
    assert not torch.equal(buffer[..., :4], keys[..., :4])


def test_moving_by_nothing_is_a_copy() -> None:
    """Danger: the stored tensor itself is handed out, and the buffer's next user writes into the store."""
    rope, keys = Rope(torch.tensor([1.0, 0.1], dtype=torch.float64)), torch.randn(2, 5, 4)
    moved = rope.move(keys, 0)
    assert torch.equal(moved, keys)
    assert moved.data_ptr() != keys.data_ptr()


def test_moves_compose_and_go_back_over_long_distances() -> None:
    """Danger: angles computed in float32 drift at far positions."""
    rope = Rope(1.0 / 500000 ** (torch.arange(0, 64, 2).double() / 64))
    keys = torch.randn(2, 9, 64)
    assert off(rope.move(rope.move(keys, 100_003), -100_003), keys) < 1e-6
    assert off(rope.move(rope.move(keys, 70_000), 30_003), rope.move(keys, 100_003)) < 1e-6


def test_the_model_itself_says_which_channels_it_pairs() -> None:
    """Danger: Cohere and GLM pair neighbours, Llama pairs halves; a wrong guess still looks like a rotation."""
    kinds = {f: zoo.model_of(f).rope.interleaved for f in ("llama", "qwen3", "phi-partial-rotary", "glm-interleaved")}
    assert kinds == {"llama": False, "qwen3": False, "phi-partial-rotary": False, "glm-interleaved": True}
    assert rope_of(CohereForCausalLM(CohereConfig(**zoo.SHAPE))).interleaved


def test_keys_under_another_rotation_have_another_identity() -> None:
    """Danger: a cache made under other frequencies or another YaRN scaling is served."""
    base = torch.tensor([1.0, 0.1], dtype=torch.float64)
    ropes = [Rope(base), Rope(base * 0.5), Rope(base, interleaved=True), Rope(base, scaling=1.2)]
    assert len({r.identity for r in ropes}) == 4
    yarn = [{**zoo.YARN, "attention_factor": f} for f in (1.0, 1.3)]
    made = [rope_of(LlamaForCausalLM(LlamaConfig(**zoo.SHAPE, rope_parameters=y))) for y in yarn]
    assert [m.scaling for m in made] == [1.0, 1.3]
    assert made[0].identity != made[1].identity


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
