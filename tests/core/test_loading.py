"""Models and tokenizers from folders: loaded whole or refused, and named by what they are."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from kvilt.errors import ModelError, SpecError
from kvilt.model import identity, proof
from kvilt.model.loading import load_model
from kvilt.types import Encoding


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    """A model directory that the test may break."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_a_folder_gives_the_model_that_was_saved(model_dir: Path) -> None:
    """Danger: a model from disk is keyed otherwise than the same model in memory."""
    model, tokenizer = load_model(str(model_dir))
    assert model.digest == zoo.model_of("llama").digest
    ids = torch.tensor([7, 8])
    assert model.key(ids, Encoding()).digest == zoo.model_of("llama").key(ids, Encoding()).digest
    assert len(tokenizer) == zoo.VOCABULARY


@pytest.mark.filterwarnings("ignore")
def test_files_that_lack_weights_are_refused(folder: Path) -> None:
    """Danger: transformers fills what is missing with random numbers and goes on."""
    kept = {k: v for k, v in load_file(weights(folder)).items() if "layers.2.mlp" not in k}
    save_file(kept, weights(folder), {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack weights .*layers\.2\.mlp"):
        load_model(str(folder))


@pytest.mark.filterwarnings("ignore")
def test_broken_folders_are_a_clear_error(folder: Path, tmp_path: Path) -> None:
    """Danger: a traceback from a parser."""
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(str(tmp_path / "nowhere"))
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(str(folder))


def test_a_refused_architecture_is_refused_before_its_weights_are_read(folder: Path) -> None:
    """Danger: minutes of loading, then a refusal."""
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    weights(folder).unlink()
    with pytest.raises(ModelError, match="rope_type = 'dynamic'"):
        load_model(str(folder))


def test_dtypes_and_devices_are_named(model_dir: Path) -> None:
    """Danger: an unknown dtype falls back to another one in silence."""
    assert load_model(str(model_dir), dtype="bf16")[0].shape.dtype == torch.bfloat16
    assert load_model(str(model_dir), dtype="float16")[0].shape.dtype == torch.float16
    with pytest.raises(SpecError, match="unknown dtype 'int3'"):
        load_model(str(model_dir), dtype="int3")
    with pytest.raises(SpecError, match="unknown device"):
        load_model(str(model_dir), device="abacus")


def test_a_digest_is_remembered_only_for_the_files_it_was_made_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: weights are changed in place and the old digest, with its caches, still holds."""
    made = []
    digest = identity._digest_tensors
    monkeypatch.setattr(identity, "_digest_tensors", lambda hf: made.append(1) or digest(hf))
    first = load_model(str(folder))[0].digest
    assert load_model(str(folder))[0].digest == first
    assert len(made) == 1
    tensors = load_file(weights(folder))
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, weights(folder), {"format": "pt"})
    os.utime(weights(folder), ns=(1, 1))
    assert load_model(str(folder))[0].digest != first
    assert len(made) == 2


def test_a_trial_passed_is_not_repeated_for_the_same_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: every start pays for it again; or changed files, another dtype or other libraries never do."""
    tried: list[object] = []
    check = proof.check
    monkeypatch.setattr(proof, "check", lambda model, own: tried.append(model) or check(model, own))
    for expected in (1, 1):
        load_model(str(folder))
        assert len(tried) == expected
    load_model(str(folder), dtype="bf16")
    assert len(tried) == 2
    monkeypatch.setattr(proof.transformers, "__version__", "99")
    load_model(str(folder))
    assert len(tried) == 3
    os.utime(weights(folder), ns=(1, 1))
    load_model(str(folder))
    assert len(tried) == 4


def test_a_digest_that_cannot_be_remembered_is_made_again(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Danger: a read-only home, or a broken note in it, stops the model from loading."""
    (tmp_path / "kvilt").mkdir()
    (tmp_path / "kvilt" / "digests.json").write_text("[broken")
    for place in (tmp_path, Path(os.devnull)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        assert load_model(str(model_dir))[0].digest == zoo.model_of("llama").digest


def test_a_tokenizer_is_what_it_maps_texts_to_not_how_it_was_called_last() -> None:
    """Danger: padding left over from a trainer makes every cache foreign; or a changed vocabulary does not."""
    tokenizer = zoo.tokenizer()
    before = identity.tokenizer_digest(tokenizer)
    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=4)
    assert identity.tokenizer_digest(tokenizer) == before
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert identity.tokenizer_digest(tokenizer) != before
