"""Adapters that act on documents alone, or on the question alone: exact, keyed where they shape rows, refused elsewhere."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import zoo
from core_kit import DOCUMENTS, QUESTION, cache_of, engine_of, ids, lora, off, off_dense, rows_of, wrapper_file
from kvilt.errors import SpecError, WrapperError
from kvilt.model import adapters
from kvilt.model.model import Model
from kvilt.rows import adapter as files
from kvilt.types import Adapter, Encoding

EVERY = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 96),
    "mlp.up_proj": (64, 96),
    "mlp.down_proj": (96, 64),
}
SPEC = "writer:adapter='{}'"


def file_of(at: Path, adapter: Adapter, **metadata: str) -> Path:
    files.save(adapter, at, **metadata)
    return at


def merged(adapter: Adapter) -> Model:
    """The tiny Llama with an adapter worked into its float32 weights by hand."""
    hf = copy.deepcopy(zoo.hf_model("llama"))
    for kind, (a, b) in adapter.matrices.items():
        for layer in range(len(a)):
            matrix: Any = hf.get_submodule(f"model.layers.{layer}.{kind}")
            matrix.weight.data += (a[layer] @ b[layer]).T
    return Model(hf)


def test_a_document_is_written_as_a_merged_model_writes_it(tmp_path: Path) -> None:
    """Danger: one of seven matrices is left out, or a factor transposed; another thread's or the next pass is changed too."""
    adapter, document = files.load(file_of(tmp_path / "a", lora(**EVERY))), ids(40)
    model = zoo.model_of("llama")
    plain = rows_of(cache_of(model, document))
    written = rows_of(cache_of(model, document, Encoding(adapter=adapter)))
    assert off(written, rows_of(cache_of(merged(adapter), document))) < 1e-4
    assert off(written, plain) > 0.05
    assert torch.equal(rows_of(cache_of(model, document)), plain)


def test_a_reader_acts_on_the_question_and_every_answer_token(tmp_path: Path) -> None:
    """Danger: the adapter stops at the first generated token, or acts on documents that are computed in the prompt."""
    model = zoo.model_of("llama")
    path = file_of(tmp_path / "a", lora(**EVERY))
    engine = engine_of(f"query_lora:adapter='{path}'")
    answer = engine.answer(QUESTION, DOCUMENTS, max_new_tokens=5)
    forced = engine.score(QUESTION, DOCUMENTS, answer.tokens)
    assert forced.argmax(-1).tolist() == list(answer.tokens)
    assert off_dense(model, engine.plan(QUESTION, DOCUMENTS)) < 1e-4
    plain = engine_of("block").score(QUESTION, DOCUMENTS, answer.tokens)
    assert off(forced, plain) > 0.05


def test_a_writer_is_part_of_the_key_and_a_reader_is_not(tmp_path: Path) -> None:
    """Danger: rows of another adapter are served; a new query adapter throws every stored document away."""
    paths = [file_of(tmp_path / str(seed), lora(seed=seed)) for seed in (1, 2)]
    (tmp_path / "around").mkdir()
    wrapper = wrapper_file(tmp_path / "around")
    specs = ["block", *(SPEC.format(p) for p in paths), f"writer:adapter='{paths[0]}',wrapper='{wrapper}'"]
    keys = [engine_of(spec).encoder.items(DOCUMENTS)[0].key for spec in specs]
    assert len({key.digest for key in keys}) == 4
    assert "adapted" in keys[1].encoding
    readers = [engine_of(f"query_lora:adapter='{p}'").encoder.items(DOCUMENTS)[0].key for p in paths]
    assert {key.digest for key in readers} == {keys[0].digest}


def test_vectors_beside_a_writer_belong_to_it(tmp_path: Path) -> None:
    """Danger: a writer that was trained with vectors around its documents is served without them, and worse."""
    path, wrapper = file_of(tmp_path / "adapter.safetensors", lora()), wrapper_file(tmp_path)
    found, named = (engine_of(f"{SPEC.format(path)}{more}").encoder.encoding for more in ("", f",wrapper='{wrapper}'"))
    assert found.digest == named.digest
    assert len(found.before) == len(found.after) == 8


@pytest.mark.parametrize(("role", "spec"), [("query", "writer"), ("writer", "query_lora"), ("model", "query_lora")])
def test_an_adapter_in_another_role_is_refused(role: str, spec: str, tmp_path: Path) -> None:
    """Danger: what was trained to write documents asks the questions, and nobody says so."""
    path = file_of(tmp_path / "a", lora(), role=role)
    with pytest.raises(WrapperError, match=f"was trained as {role} adapter"):
        engine_of(f"{spec}:adapter='{path}'")


def test_a_copied_model_is_changed_once(tmp_path: Path) -> None:
    """Danger: a copied model carries its hooks along and gets the adapter twice."""
    adapter, document = files.load(file_of(tmp_path / "a", lora())), ids(20)
    model = zoo.model_of("llama")
    wanted = rows_of(cache_of(model, document, Encoding(adapter=adapter)))
    other = Model(copy.deepcopy(model.hf))
    assert torch.equal(rows_of(cache_of(other, document, Encoding(adapter=adapter))), wanted)


def test_int8_files_keep_what_was_trained(tmp_path: Path) -> None:
    """Danger: one scale for a matrix whose ranks differ a hundredfold; a file that cannot be read back."""
    adapter = lora(**EVERY)
    for a, b in adapter.matrices.values():
        a[:, :, 0] *= 100
        b[:, 0] /= 100
    path = file_of(tmp_path / "a.safetensors", adapter, base="smollm2")
    back = files.load(path)
    assert back.metadata["base"] == "smollm2"
    assert path.stat().st_size < 1.5 * sum(t.numel() for pair in adapter.matrices.values() for t in pair) + 8000
    for kind, (a, b) in adapter.matrices.items():
        change, kept = a @ b, back.matrices[kind][0] @ back.matrices[kind][1]
        assert float((kept - change).norm() / change.norm()) < 0.01


def test_an_adapter_of_peft_is_read_as_peft_applies_it(tmp_path: Path) -> None:
    """Danger: the factor alpha / rank is left out, or the two matrices stand the wrong way round."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    with warnings.catch_warnings(action="ignore"):
        hf = peft.get_peft_model(copy.deepcopy(zoo.hf_model("llama")), settings)
        hf.save_pretrained(tmp_path / "adapter")
    document = ids(30)
    wanted = rows_of(cache_of(Model(hf.merge_and_unload()), document))
    adapter = files.load(tmp_path / "adapter")
    assert off(rows_of(cache_of(zoo.model_of("llama"), document, Encoding(adapter=adapter))), wanted) < 1e-4


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter("x", lora().matrices, model="0" * 64), "trained for weights 0000"),
        (lora(layers=3), "3 layers of width 64, the model has 4 of 64"),
        (lora(**{"self_attn.q_proj": (32, 64)}), "4 layers of width 32"),
        (lora(**{"self_attn.odd_proj": (64, 64)}), "lacks matrices"),
        (lora(**{"self_attn.k_proj": (64, 64)}), "does not fit model.layers.0.self_attn.k_proj"),
    ],
)
def test_an_adapter_of_another_model_is_one_clear_line(adapter: Adapter, message: str, tmp_path: Path) -> None:
    """Danger: a shape error from deep inside a pass, or noise added to every document in silence."""
    path = file_of(tmp_path / "a", adapter)
    with pytest.raises(WrapperError, match=message) as error:
        engine_of(SPEC.format(path)).encode(DOCUMENTS)
    assert "\n" not in str(error.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    """Danger: a wrapper or a cut-off file taken for an adapter."""
    with pytest.raises(SpecError, match="writer:adapter=FILE"):
        engine_of("writer")
    save_file({"header": torch.zeros(2, 64)}, tmp_path / "odd.safetensors")
    with pytest.raises(WrapperError, match="no adapter of format"):
        engine_of(SPEC.format(tmp_path / "odd.safetensors"))
    whole = file_of(tmp_path / "cut.safetensors", lora())
    whole.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(WrapperError, match="not a readable adapter"):
        engine_of(SPEC.format(whole))
    with pytest.raises(WrapperError, match="not a readable adapter"):
        files.load(tmp_path / "nowhere")


def test_files_beside_the_model_are_found_without_a_path(tmp_path: Path) -> None:
    """Danger: a user must know where the package lies to use what ships with it."""
    model = Model(copy.deepcopy(zoo.hf_model("llama")))
    model.directory = str(tmp_path)
    info = model.info()
    file_of(tmp_path / "writer.safetensors", lora())
    file_of(tmp_path / "query.safetensors", lora())
    wrapper_file(tmp_path, links=2).rename(tmp_path / "linked.safetensors")
    from kvilt.registry import build

    bound: list[Any] = [build("strategy", name) for name in ("writer", "query_lora", "linked_packet", "auto")]
    written, asked, linked, auto = (strategy.bind(info) for strategy in bound)
    assert written.encoding.adapter is not None
    assert asked.reader is not None
    assert asked.encoding.label == "plain"
    assert linked.encoding.keep
    assert auto.encoding.label == written.encoding.label


def test_merging_gives_the_same_model_in_every_dtype() -> None:
    """Danger: a float32 and a bfloat16 machine share a store and serve two models."""
    weights = []
    for dtype in (torch.float32, torch.bfloat16):
        hf = copy.deepcopy(zoo.hf_model("llama"))
        for parameter in hf.parameters():
            parameter.data = parameter.data.bfloat16().to(dtype)
        adapters.merge(hf, lora(**EVERY))
        weights.append({name: p.float() for name, p in hf.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
