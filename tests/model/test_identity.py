"""What a model is called: after its files, its tensors, its adapters, and nothing that does not shape keys and values."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from kvilt.errors import ModelError
from kvilt.model import identity
from kvilt.model.identity import Identity
from kvilt.model.loading import load_model
from kvilt.model.model import Model
from kvilt.types import Encoding

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by old names


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    """A model directory that the test may break."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def key_of(model: Model) -> str:
    return model.key(torch.tensor([7, 8]), Encoding()).digest


def lora(alpha: int = 4, **more: Any) -> Any:
    return peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **more)


def adapted(alpha: int = 4, seed: int = 3, **more: Any) -> Any:
    """A tiny model with a random adapter "one" in its layers."""
    hf = zoo.hf_model("llama")
    torch.manual_seed(seed)
    peft.get_peft_model(hf, lora(alpha, **more), "one")
    return hf


def test_an_adapters_scale_is_part_of_the_key() -> None:
    """Danger: the same LoRA tensors with another lora_alpha are served the first one's rows (W1)."""
    assert Identity(adapted()).digest == Identity(adapted()).digest
    different = [Identity(hf).digest for hf in (zoo.hf_model("llama"), adapted(), adapted(alpha=64), adapted(seed=4))]
    different += [Identity(adapted(use_rslora=True)).digest, Identity(adapted(modules_to_save=["up_proj"])).digest]
    assert len(set(different)) == len(different)


def test_the_key_follows_what_is_done_to_adapters_after_loading() -> None:
    """Danger: set_adapter, disable_adapters, a new scale or merging go unnoticed, and foreign rows are served (W1)."""
    hf = zoo.hf_model("llama")
    model = Model(hf)
    plain = key_of(model)
    torch.manual_seed(3)
    around = peft.get_peft_model(hf, lora(), "one")
    a = key_of(model)
    around.add_adapter("two", lora())
    assert key_of(model) == a
    around.set_adapter("two")
    b = key_of(model)
    around.base_model.set_adapter(["one", "two"])
    both = key_of(model)
    with around.disable_adapter():
        assert key_of(model) == plain
    around.set_adapter("one")
    assert key_of(model) == a
    layer = hf.model.layers[0].self_attn.q_proj
    layer.scaling["two"] *= 2  # of an adapter that sleeps
    assert key_of(model) == a
    layer.scaling["one"] *= 2
    scaled = key_of(model)
    layer.scaling["one"] /= 2
    layer.lora_B["one"].weight.data.mul_(1.5)
    changed = key_of(model)
    layer.merge()
    assert len({plain, a, b, both, scaled, changed, key_of(model)}) == 7


def test_adapters_of_peft_models_are_told_apart() -> None:
    """Danger: the same through peft's own wrapper, whose modules have other names (W1)."""
    torch.manual_seed(3)
    hf = peft.get_peft_model(zoo.hf_model("llama"), lora(), adapter_name="model")  # a name that modules have, too
    kept = Identity(hf)
    first = kept.digest
    with hf.disable_adapter():
        off = kept.digest
    assert kept.digest == first != off
    hf.add_adapter("two", lora())
    assert kept.digest == first
    hf.set_adapter("two")
    assert kept.digest not in (first, off)
    hf.set_adapter("model")
    hf.merge_adapter()
    assert kept.digest not in (first, off)


@pytest.mark.parametrize("where", ["file", "memory"])
def test_weights_changed_after_loading_change_the_key(where: str, model_dir: Path) -> None:
    """Danger: fine-tuned in place, and answered over the rows of the weights before (W1)."""
    model = load_model(str(model_dir))[0] if where == "file" else Model(zoo.hf_model("llama"))
    hf: Any = model.hf
    seen = [key_of(model)]
    assert key_of(model) == seen[0]
    changes = {
        "counted": lambda: hf.model.layers[2].mlp.up_proj.weight[5, 5].add_(1.0),
        "behind the counter": lambda: hf.model.layers[1].mlp.up_proj.weight.data.mul_(1.01),
        "replaced": lambda: setattr(hf.model.norm, "weight", torch.nn.Parameter(hf.model.norm.weight * 2)),
        "swapped data": lambda: setattr(hf.lm_head.weight, "data", hf.lm_head.weight.data * 2),
        "frequencies": lambda: hf.model.rotary_emb.inv_freq.mul_(0.5),
    }
    for name, change in changes.items():
        with torch.no_grad():
            change()
        seen.append(key_of(model))
        assert len(set(seen)) == len(seen), name
        assert key_of(model) == seen[-1]


def test_a_changed_model_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: every request after a change reads all weights again."""
    model, made = Model(zoo.hf_model("llama")), []
    hashed = Identity._of_tensors
    monkeypatch.setattr(Identity, "_of_tensors", lambda self, owner: made.append(owner) or hashed(self, owner))
    for _ in range(3):
        key_of(model)
    with torch.no_grad():
        model.hf.model.norm.weight.mul_(2)
    for _ in range(3):
        key_of(model)
    assert len(made) == 2


def test_the_dtype_of_the_computation_is_not_part_of_the_key(folder: Path) -> None:
    """Danger: a corpus encoded on a CPU is a miss on a GPU."""
    keys = {key_of(load_model(str(folder), dtype=d)[0]) for d in ("float32", "bfloat16", "float16")}
    assert len(keys) == 1
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    model = load_model(str(folder), dtype="float32")[0]
    assert model.key(torch.tensor([7]), Encoding()).dtype == "bfloat16"
    assert key_of(model) not in keys


def test_files_name_a_model_without_loading_it(folder: Path, tmp_path: Path) -> None:
    """Danger: another process, which holds other tensors, computes another key for the same checkpoint."""
    model = load_model(str(folder))[0]
    assert identity.of_files(folder) == model.digest
    fields = identity.config_of(folder)
    assert identity.of_rope(fields) == model.key(torch.tensor([7]), Encoding()).rope
    (tmp_path / "some.gguf").write_bytes(weights(folder).read_bytes())
    assert identity.of_files(tmp_path / "some.gguf") == identity.of_file(weights(folder))


def test_files_that_count_and_files_that_do_not(folder: Path) -> None:
    """Danger: a README changes the key, or another norm, shard or code file does not."""
    seen = [identity.of_files(folder)]
    for name, text in {"README.md": "x", "generation_config.json": "{}", "train.py": "x"}.items():
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    unrelated = {"transformers_version": "9", "eos_token_id": 7, "rope_theta": 5.0, "use_cache": False}
    (folder / "config.json").write_text(json.dumps({**config, **unrelated}))
    assert identity.of_files(folder) == seen[0]
    assert identity.of_rope({**config, "rope_theta": 5.0}) != identity.of_rope(config)
    assert identity.of_rope({**config, "max_position_embeddings": 9}) == identity.of_rope(config)
    for more in ({"rms_norm_eps": 0.5}, {"auto_map": {}}):
        (folder / "config.json").write_text(json.dumps({**config, **more}))
        seen.append(identity.of_files(folder))
    (folder / "train.py").write_text("y")  # beside `auto_map`, code is part of the model
    seen.append(identity.of_files(folder))
    assert len(set(seen)) == 4


def test_an_index_names_the_files_that_count(folder: Path) -> None:
    """Danger: a stray file is hashed instead of a shard, or weights that transformers would not load."""
    tensors = load_file(weights(folder))
    weights(folder).unlink()
    shards = {"a.safetensors": dict(list(tensors.items())[:5]), "b.safetensors": dict(list(tensors.items())[5:])}
    for name, part in shards.items():
        save_file(part, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: name for name, part in shards.items() for k in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "stray.safetensors").write_bytes(b"x")
    assert [f.name for f in identity.weight_files(folder)] == ["a.safetensors", "b.safetensors"]
    assert load_model(str(folder))[0].digest == identity.of_files(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        identity.of_files(folder)


def test_a_model_whose_files_are_nowhere_is_called_after_its_tensors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: weights that transformers fetched from another revision stop the model from loading."""
    wanted = Model(zoo.hf_model("llama")).digest
    monkeypatch.setattr(identity, "weight_files", lambda _: (_ for _ in ()).throw(ModelError("none")))
    assert load_model(str(folder))[0].digest == wanted


def test_a_digest_is_remembered_while_the_file_looks_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a large model is hashed at every start."""
    read = []
    monkeypatch.setattr(identity, "blake3", lambda *a: read.append(1) or blake3(*a))
    from blake3 import blake3

    first = identity.of_files(folder)
    hashed = len(read)
    assert identity.of_files(folder) == first
    assert len(read) == hashed + 1  # what the file looks like
    linked = folder.parent / "blobs"
    weights(folder).rename(linked)
    (folder / "model.safetensors").symlink_to(linked)  # as in the hub's cache
    assert identity.of_files(folder) == first


@pytest.mark.parametrize("how", ["in place", "another file", "times that nothing shows"])
def test_a_remembered_digest_does_not_outlive_the_file(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: weights rewritten with the old size and time (tar, rsync -t, image layers) keep their digest (W2)."""
    path, first = weights(folder), identity.of_files(folder)
    before = path.stat()
    if how == "times that nothing shows":  # a file system whose inodes and times tell nothing
        monkeypatch.setattr(identity.os, "fstat", lambda _: before)
        assert identity.of_files(folder) == (first := identity.of_files(folder))
    tensors = load_file(path)
    changed = folder / "changed.safetensors"
    save_file({k: t * 1.5 for k, t in tensors.items()}, changed, {"format": "pt"})
    if how == "another file":
        changed.rename(path)
    else:
        path.write_bytes(changed.read_bytes())
        changed.unlink()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert identity.of_files(folder) != first


@pytest.mark.parametrize("notes", ["5", "[]", '{"x": 5}', "[broken", "[" * 99999, "\udcff", None])
def test_broken_notes_are_ignored(notes: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a note that some other program has overwritten stops every model from loading (H6)."""
    wanted = identity.of_files(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    memo = folder / "kvilt" / "digests.json"
    memo.parent.mkdir()
    if notes is None:
        os.mkfifo(memo)
    else:
        memo.write_text(notes, errors="surrogateescape")
    assert identity.of_files(folder) == wanted
    assert identity.of_files(folder) == wanted
    assert len(json.loads(memo.read_text())) > 0


def test_notes_that_cannot_be_written_are_no_obstacle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a read-only home stops the model from loading."""
    wanted = identity.of_files(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert identity.of_files(folder) == wanted
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert identity.of_files(folder) == wanted


def test_a_tokenizer_is_what_it_maps_texts_to_not_how_it_was_called_last() -> None:
    """Danger: padding left over from a trainer makes every cache foreign; or a changed vocabulary does not."""
    tokenizer = zoo.tokenizer()
    before = identity.tokenizer_digest(tokenizer)
    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=4)
    assert identity.tokenizer_digest(tokenizer) == before
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert identity.tokenizer_digest(tokenizer) != before


def test_a_tokenizer_written_in_python_is_refused() -> None:
    """Danger: a tokenizer that cannot be taken apart ends in a traceback, or reads control tokens in users' texts."""
    with pytest.raises(ModelError, match="written in Python"):
        identity.tokenizer_digest(object())
