"""Loading a model and its tokenizer from a folder or the hub."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from kvilt.errors import ModelError, SpecError
from kvilt.model import identity, proof, support
from kvilt.model.identity import tokenizer_digest
from kvilt.model.model import Model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> tuple[Model, Any]:
    """A model ready to serve, and its tokenizer. Raises ModelError when it cannot be loaded or served exactly."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place, name = _device(device), folder(name)
    try:
        config = AutoConfig.from_pretrained(name)
        support.check_config(config)
        tokenizer = AutoTokenizer.from_pretrained(name)
        kind = _dtype(dtype, config, place)
        hf, found = AutoModelForCausalLM.from_pretrained(name, dtype=kind, output_loading_info=True)
        hf = hf.to(place)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        hint = "" if Path(name).exists() else " No such folder here; names without a folder are looked up on the hub."
        raise ModelError(f"cannot load model {name!r}: {_first_line(error)}{hint}") from error
    if found["missing_keys"]:  # transformers makes them up, differently every time
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise ModelError(f"cannot load model {name!r}: its files lack weights that the model has: {missing} ...")
    hf.kvilt_unchanged = True  # weights are those of the files: their digest may be remembered
    return wrap(hf, tokenizer, getattr(config, "dtype", None)), tokenizer


def wrap(hf: Any, tokenizer: Any, stored: torch.dtype | None = None) -> Model:
    """A transformers model of one's own made ready to serve. Raises ModelError where it cannot be served exactly.

    `stored` is the dtype in which documents are kept (default: the model's)."""
    support.check_config(hf.config)
    facts = proof.facts(hf)
    own = None if identity.was_proved(hf, facts) else proof.own_logits(hf)  # with its own attention, so before wrapping
    model = Model(hf, tokenizer_digest(tokenizer), stored)
    if own is not None:
        proof.check(model, own)
        identity.note_proof(hf, facts)
    return model


def folder(name: str) -> str:
    """`builtin` and `builtin-VARIANT` are models that ship with the package; other names are left alone."""
    if Path(name).exists():
        return name
    if name.startswith((".", "/", "~")):  # no hub name looks like this, and asking the hub takes half a minute offline
        raise ModelError(f"cannot load model {name!r}: no such folder.")
    if name.partition("-")[0] != "builtin":
        return name
    shipped = Path(str(files("kvilt"))) / "builtin"
    found = shipped / name.replace("builtin", "model", 1)
    if not found.is_dir():
        known = ", ".join(sorted(f.name.replace("model", "builtin", 1) for f in shipped.glob("model*")))
        raise ModelError(f"no built-in model {name!r}. Known: {known or 'none'}.")
    return str(found)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SpecError(f"device {device!r} was asked for, but no CUDA device is available.")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise SpecError(f"unknown device {device!r}: use auto, cpu or cuda.") from error


def _dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        own = getattr(config, "dtype", None) or torch.float32
        return torch.float32 if device.type == "cpu" else own
    name = SHORT.get(dtype, dtype)
    if name not in DTYPES:
        raise SpecError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
