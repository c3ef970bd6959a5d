"""Models and tokenizers from folders, the hub and adapters: loaded whole and proved, or refused in one line."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from kvilt.errors import MissingExtra, ModelError, SpecError
from kvilt.model import identity, loading, proof
from kvilt.model.loading import choose_dtype, load_model
from kvilt.types import Encoding

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    """A model directory that the test may break."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.fixture
def adapter(model_dir: Path, tmp_path: Path) -> Path:
    """A LoRA adapter over the model directory, as peft saves it."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    with warnings.catch_warnings(action="ignore"):  # peft looks for the base model on the hub
        peft.get_peft_model(zoo.hf_model("llama"), settings).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(model_dir))
    return tmp_path / "adapter"


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_folder_gives_a_proved_model_and_its_tokenizer(model_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Danger: other logits than the model that was saved; progress bars in a program's output (U18)."""
    model, tokenizer = load_model(str(model_dir))
    assert len(tokenizer) == zoo.VOCABULARY
    text = torch.arange(80, 100)
    assert torch.equal(proof.logits(model.hf, text), proof.logits(zoo.hf_model("llama"), text))
    assert model.info().directory == str(model_dir)
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore")
def test_files_that_lack_weights_are_refused(folder: Path) -> None:
    """Danger: transformers fills what is missing with random numbers and goes on."""
    kept = {k: v for k, v in load_file(weights(folder)).items() if "layers.2.mlp" not in k}
    save_file(kept, weights(folder), {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack weights .*layers\.2\.mlp"):
        load_model(str(folder))


@pytest.mark.parametrize("broken", ["weights", "config", "list", "index", "pickle", "empty pickle", "code in pickle"])
@pytest.mark.filterwarnings("ignore")
def test_broken_folders_are_one_clear_line(broken: str, folder: Path) -> None:
    """Danger: a traceback from whatever parser was reached first, or code from a pickle (H6)."""
    pickles = {"pickle": b"no pickle", "empty pickle": b"", "code in pickle": b"cos\nsystem\n(S'touch ran'\ntR."}
    if broken == "weights":
        weights(folder).write_bytes(weights(folder).read_bytes()[:5000])
    elif broken == "index":
        weights(folder).unlink()
        (folder / "model.safetensors.index.json").write_text("[]")
    elif broken in pickles:
        weights(folder).unlink()
        (folder / "pytorch_model.bin").write_bytes(pickles[broken])
    else:
        (folder / "config.json").write_text("{" if broken == "config" else "[]")
    with pytest.raises(ModelError, match="cannot load model") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)
    assert not Path("ran").exists()


def test_what_is_nowhere_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    """Danger: half a minute of waiting offline for a folder whose name was mistyped."""
    with pytest.raises(ModelError, match="no such folder"):
        load_model(str(tmp_path / "nowhere"))


def test_a_refused_architecture_is_refused_before_its_weights_are_read(folder: Path) -> None:
    """Danger: minutes of loading, then a refusal."""
    edit(folder / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    weights(folder).unlink()
    with pytest.raises(ModelError, match="rope_type = 'dynamic'"):
        load_model(str(folder))


def test_dtypes_and_devices_are_named(model_dir: Path) -> None:
    """Danger: an unknown dtype falls back to another one in silence."""
    assert load_model(str(model_dir), dtype="bf16")[0].shape.dtype == BRAIN
    assert load_model(str(model_dir), dtype="float16")[0].shape.dtype == HALF
    with pytest.raises(SpecError, match="unknown dtype 'int3'"):
        load_model(str(model_dir), dtype="int3")
    with pytest.raises(SpecError, match="unknown device"):
        load_model(str(model_dir), device="abacus")


@pytest.mark.parametrize(
    ("own", "device", "flags", "chosen", "why"),
    [
        (BRAIN, "cpu", {"avx2"}, FLOAT, "nothing of a bfloat16"),
        (BRAIN, "cpu", {"avx2", "avx512_bf16"}, BRAIN, "avx512_bf16"),
        (BRAIN, "cpu", {"avx512_bf16", "amx_bf16"}, BRAIN, "amx_bf16"),
        (HALF, "cpu", {"amx_bf16"}, FLOAT, "nothing of a float16"),
        (FLOAT, "cpu", {"amx_bf16"}, FLOAT, "nothing of a float32"),
        (HALF, "cuda", set[str](), HALF, "own, on cuda"),
        (BRAIN, "cuda", set[str](), BRAIN, "own, on cuda"),
    ],
)
def test_auto_computes_in_what_is_fastest_and_rounds_no_weight(
    own: torch.dtype, device: str, flags: set[str], chosen: torch.dtype, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: float32 where bfloat16 prefills twice as fast, or bfloat16 where it is emulated; and nobody is told."""
    monkeypatch.setattr(loading, "_cpu_flags", lambda: flags)
    dtype, reason = choose_dtype("auto", own, torch.device(device))
    assert dtype == chosen
    assert why in reason
    assert choose_dtype("fp16", own, torch.device(device))[0] == HALF


def test_the_dtype_and_its_reason_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Danger: two machines compute in different dtypes and nobody can see it."""
    monkeypatch.setattr(loading, "_cpu_flags", lambda: {"amx_bf16"})
    save_file({k: t.bfloat16() for k, t in load_file(weights(folder)).items()}, weights(folder), {"format": "pt"})
    edit(folder / "config.json", dtype="bfloat16")
    with caplog.at_level(logging.INFO, "kvilt"):
        model = load_model(str(folder))[0]
    assert "computing in bfloat16" in caplog.text
    assert (model.shape.dtype, model.stored) == (BRAIN, BRAIN)
    assert "amx_bf16" in model.dtype_reason
    wide = load_model(str(folder), dtype="float32")[0]
    assert (wide.shape.dtype, wide.stored) == (FLOAT, BRAIN)
    assert wide.key(torch.tensor([7]), Encoding()) == model.key(torch.tensor([7]), Encoding())


def test_a_trial_passed_is_not_repeated_for_the_same_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: every start pays for it again; or changed files, another dtype or other libraries never do."""
    tried: list[object] = []
    check = proof.check
    monkeypatch.setattr(proof, "check", lambda model, own: tried.append(model) or check(model, own))
    edit(folder / "config.json", rms_norm_eps=1e-7)  # no other test has tried this one
    for _ in range(2):
        load_model(str(folder))
        assert len(tried) == 1
    load_model(str(folder), dtype="bf16")
    assert len(tried) == 2
    monkeypatch.setattr(proof.transformers, "__version__", "99")
    load_model(str(folder))
    assert len(tried) == 3
    edit(folder / "config.json", rms_norm_eps=1e-8)
    load_model(str(folder))
    assert len(tried) == 4
    for _ in range(2):  # of a model in memory, nobody knows what was done to it
        loading.wrap(zoo.hf_model("llama"), zoo.tokenizer())
    assert len(tried) == 6


FORKED = """
import os, sys
from kvilt.model.loading import load_model
digest = load_model(sys.argv[1])[0].digest
os.environ["XDG_CACHE_HOME"] = sys.argv[2]  # nothing is remembered there
child = os.fork()
if child == 0:
    os._exit(0 if load_model(sys.argv[1])[0].digest == digest else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_was_forked_after_loading_can_load(model_dir: Path, tmp_path: Path) -> None:
    """Danger: a worker of gunicorn waits for ever for threads that only its parent has (H1)."""
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FORKED, str(model_dir), str(tmp_path)]
    subprocess.run(command, check=True, timeout=60, env=alone)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_is_loaded_over_its_base(adapter: Path, model_dir: Path) -> None:
    """Danger: a folder as peft saves it is "unrecognized", or its base answers alone (H3)."""
    peft = pytest.importorskip("peft")
    model, tokenizer = load_model(str(adapter))
    raw = peft.PeftModel.from_pretrained(zoo.hf_model("llama"), str(adapter))
    text = torch.arange(80, 100)
    assert torch.equal(proof.logits(model.hf, text), proof.logits(raw, text))
    base = load_model(str(model_dir))[0]
    assert not torch.equal(proof.logits(model.hf, text), proof.logits(base.hf, text))
    assert model.digest != base.digest
    assert model.digest == load_model(str(adapter))[0].digest
    assert len(tokenizer) == zoo.VOCABULARY
    assert model.info().directory == str(model_dir)
    (adapter / "tokenizer_config.json").write_text((model_dir / "tokenizer_config.json").read_text())
    (adapter / "tokenizer.json").write_text((model_dir / "tokenizer.json").read_text().replace("<|user|>", "<|me|>"))
    model, tokenizer = load_model(str(adapter))
    assert "<|me|>" in tokenizer.get_vocab()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_wrong_with_an_adapter_is_said(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the user is not told which base is missing, or half an adapter answers (H3)."""
    described = adapter / "adapter_config.json"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for base, said in (("/gone/base", "base model '/gone/base' is missing"), (None, "base model 'None'")):
        before = described.read_text()
        edit(described, base_model_name_or_path=base)
        with pytest.raises(ModelError, match=said):
            load_model(str(adapter))
        described.write_text(before)
    edit(described, base_model_name_or_path="some/base")
    with pytest.raises(ModelError, match=r"cannot load base model 'some/base' of adapter '.*adapter'"):
        load_model(str(adapter))
    described.write_text(before)
    path = adapter / "adapter_model.safetensors"
    save_file(dict(list(load_file(path).items())[:3]), path)
    with pytest.raises(ModelError, match="lack weights"):
        load_model(str(adapter))
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match="cannot load adapter"):
        load_model(str(adapter))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"kvilt\[train\]"):
        load_model(str(adapter))


def test_adapters_that_are_no_layers_are_refused(model_dir: Path, tmp_path: Path) -> None:
    """Danger: a prompt-tuned adapter is loaded, and the base answers without it (H3)."""
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with warnings.catch_warnings(action="ignore"):
        peft.get_peft_model(zoo.hf_model("llama"), settings).save_pretrained(tmp_path)
    edit(tmp_path / "adapter_config.json", base_model_name_or_path=str(model_dir))
    with pytest.raises(ModelError, match="PROMPT_TUNING puts tokens before every text"):
        load_model(str(tmp_path))


CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.filterwarnings("ignore")
def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: "y" on standard input, meant for something else, runs a stranger's program (H8)."""
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
    mark = folder.parent / "ran"
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(folder / "config.json", model_type="own", auto_map=names)
    with pytest.raises(ModelError, match=r"its own code: if you trust it, .*--trust-remote-code"):
        load_model(str(folder))
    assert not mark.exists()
    model = load_model(str(folder), trust_remote_code=True)[0]
    assert mark.exists()
    digest = identity.of_files(folder)
    assert model.digest == digest
    (folder / "own.py").write_text(CODE.format(mark=str(mark)) + "\n# another program\n")
    assert identity.of_files(folder) != digest


def test_a_known_architecture_never_runs_the_code_beside_it(folder: Path) -> None:
    """Danger: a Llama with `auto_map` asks on standard input whether its code may run (H8)."""
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.OwnModel", "AutoConfig": "own.OwnConfig"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", None]})
    assert load_model(str(folder))[0].hf.config.model_type == "llama"


def test_a_hub_name_is_known_by_the_files_in_the_hubs_cache(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: a KVLink checkpoint from the hub lacks its kvlink.json, and is hashed at every start (U16)."""
    repository = tmp_path / "models--some--kvlink"
    snapshot = repository / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    (repository / "blobs").mkdir()
    for file in model_dir.iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(repository / "blobs" / file.name)
    (snapshot / "kvlink.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, tokenizer = load_model("some/kvlink")
    assert model.info().directory == str(snapshot)
    assert model.digest == identity.of_files(snapshot) == identity.of_files(model_dir)
    hashed: list[object] = []
    monkeypatch.setattr(identity, "remember", lambda *note: hashed.append(note))
    load_model("some/kvlink")
    assert not hashed
    held = loading.wrap(type(model.hf).from_pretrained("some/kvlink"), tokenizer)
    assert held.info().directory == str(snapshot)
