"""GGUF files: the same model as its folder, called after the file, or refused in one line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

import zoo
from kvilt.errors import MissingExtra, ModelError
from kvilt.model import gguf, identity, proof
from kvilt.model.loading import load_model

writer = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOKENS = ["<s>", "</s>", "<pad>", *sorted(ByteLevel.alphabet()), "ab"]
CHAT = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def named(name: str) -> str:
    """A tensor's name in GGUF files."""
    if "layers." not in name:
        return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotated pairs side by side, as GGUF keeps them."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def save(hf: Any, at: Path, architecture: str = "llama", **fields: float) -> Path:
    """A zoo model as a GGUF file in float32."""
    c, file = hf.config, writer.GGUFWriter(str(at), architecture)
    for add, value in (
        (file.add_block_count, c.num_hidden_layers),
        (file.add_context_length, c.max_position_embeddings),
        (file.add_embedding_length, c.hidden_size),
        (file.add_feed_forward_length, c.intermediate_size),
        (file.add_head_count, c.num_attention_heads),
        (file.add_head_count_kv, c.num_key_value_heads),
        (file.add_layer_norm_rms_eps, c.rms_norm_eps),
        (file.add_rope_freq_base, c.rope_parameters["rope_theta"]),
        (file.add_vocab_size, c.vocab_size),
        (file.add_tokenizer_model, "gpt2"),
        (file.add_token_list, TOKENS + [f"<|{i}|>" for i in range(c.vocab_size - len(TOKENS))]),
        (file.add_token_merges, ["a b"]),
        (file.add_bos_token_id, 0),
        (file.add_eos_token_id, 1),
        (file.add_chat_template, CHAT),
    ):
        add(value)
    file.add_token_types([3] * 3 + [1] * (c.vocab_size - 3))
    for key, value in fields.items():
        file.add_float32(f"{architecture}.{key.replace('__', '.')}", value)
    for name, tensor in hf.state_dict().items():
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        data = paired(tensor, heads) if heads else tensor
        file.add_tensor(f"{named(name.removesuffix('.weight'))}.weight", data.float().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return at


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(zoo.hf_model("llama"), tmp_path / "tiny.gguf")


def test_a_gguf_file_is_the_model_that_was_written(file: Path) -> None:
    """Danger: pairs of keys in another order, a default in place of a setting, another tokenizer, no chat template."""
    model, tokenizer = load_model(str(file), dtype="float32")
    text = torch.arange(80, 100)
    wanted = copy.deepcopy(zoo.hf_model("llama"))
    for weight in wanted.parameters():
        weight.data = weight.data.bfloat16().float()
    torch.testing.assert_close(proof.logits(model.hf, text), proof.logits(wanted, text))
    assert tokenizer.encode("abc", add_special_tokens=False) == [TOKENS.index("ab"), TOKENS.index("c")]
    assert tokenizer.chat_template == CHAT


def test_file_folder_and_second_start_share_a_store(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: documents encoded anew at every start, or under a name that depends on where the file was unpacked."""
    first = load_model(str(file))[0]
    monkeypatch.setattr(gguf, "_write", lambda *_: pytest.fail("made twice"))
    again = load_model(str(file.parent))[0]
    assert first.digest == again.digest == identity.of_file(file)
    assert first.identity.dtype == "bfloat16"
    assert identity.of_files(str(first.directory)) == first.digest


def test_another_file_is_another_model(file: Path) -> None:
    """Danger: a file that was replaced is served from the folder of the old one."""
    old = gguf.unpacked(file)
    torch.manual_seed(5)
    other = zoo.FAMILIES["llama"]()
    assert gguf.unpacked(save(other, file)) != old


@pytest.mark.parametrize("kept", [0, 100, 3000, -5])
def test_a_file_that_was_cut_off_is_one_clear_line(kept: int, file: Path) -> None:
    """Danger: a traceback, or a model whose last layer is made up."""
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match="cut off") as error:
        load_model(str(file))
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)
    assert not list((identity.user_cache() / "models").glob(".making-*"))


def test_unknown_architectures_and_scaled_rotations_are_refused(tmp_path: Path) -> None:
    """Danger: transformers leaves out a GGUF file's rotation scaling in silence: long prompts would be wrong."""
    hf = zoo.hf_model("llama")
    with pytest.raises(ModelError, match=r"odd\.gguf: transformers cannot read it: .*martian"):
        load_model(str(save(hf, tmp_path / "odd.gguf", "martian")))
    with pytest.raises(ModelError, match=r"scales its rotation \(llama.rope.scaling.factor\)"):
        load_model(str(save(hf, tmp_path / "scaled.gguf", rope__scaling__factor=2.0)))
    assert not list((identity.user_cache() / "models").glob(".making-*"))


def test_a_file_without_one_of_its_tensors_is_refused(tmp_path: Path) -> None:
    """Danger: transformers draws what is missing at random, and the cache keeps it under the file's name."""
    hf = copy.deepcopy(zoo.hf_model("llama"))
    del hf.model.layers[1].self_attn.v_proj
    with pytest.raises(ModelError, match=r"lacks weights that the model has: model\.layers\.1\.self_attn\.v_proj"):
        load_model(str(save(hf, tmp_path / "holes.gguf")))
    assert not (identity.user_cache() / "models" / identity.of_file(tmp_path / "holes.gguf")).exists()


def test_an_architecture_that_cannot_be_served_is_refused_before_it_is_converted(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: minutes of conversion, a folder in the cache, and then the refusal."""

    def refuse(config: Any) -> None:
        raise ModelError("mamba is refused: a state is no row.")

    odd = save(zoo.hf_model("llama"), file.with_name("odd.gguf"), note=9.0)  # a file not seen before
    monkeypatch.setattr(gguf.fit, "check_config", refuse)
    with pytest.raises(ModelError, match="mamba is refused"):
        load_model(str(odd))
    assert not (identity.user_cache() / "models" / identity.of_file(odd)).exists()


def test_what_is_no_python_exception_is_one_line_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the tokenizers library panics over bad merges, past every `except Exception`."""

    class Panic(BaseException):
        pass

    def panic(*_: Any, **__: Any) -> None:
        raise Panic("range end index 2 out of range")

    odd = save(zoo.hf_model("llama"), file.with_name("odd.gguf"), note=10.0)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(ModelError, match="cannot read it: range end index 2"):
        load_model(str(odd))


def test_names_of_files_in_capitals_beside_a_config_and_missing_ones(file: Path) -> None:
    """Danger: a repository of GGUF files has a config.json, too; a mistyped name asks the hub."""
    (file.parent / "config.json").write_text("{}")
    shouted = file.rename(file.with_suffix(".GGUF"))
    assert gguf.file_of(str(file.parent)) == shouted == gguf.file_of(str(shouted))
    (file.parent / "model.safetensors").write_bytes(b"")
    assert gguf.file_of(str(file.parent)) is None
    with pytest.raises(ModelError, match="no such file"):
        load_model(str(file))


def test_a_folder_with_two_files_and_a_missing_wheel_are_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the first of two quantisations is taken in silence; an ImportError of another package."""
    (file.parent / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"2 GGUF files \(other\.gguf \.\.\.\): name one"):
        load_model(str(file.parent))
    monkeypatch.setattr(gguf, "WHEEL", "no_such_wheel")
    with pytest.raises(MissingExtra, match=r"kvilt\[smollm2\]"):
        load_model("smollm2")
