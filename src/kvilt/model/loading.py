"""Loading a model and its tokenizer from a folder or the hub, and proving that Kvilt may wrap it."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from kvilt.errors import MissingExtra, ModelError, SpecError, UserError
from kvilt.model import adapters, fit, gguf, identity, proof
from kvilt.model.identity import Identity
from kvilt.model.model import Model
from kvilt.rows import adapter
from kvilt.types import digest_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
UNITS = ("amx_bf16", "avx512_bf16")  # of x86 CPUs, where bfloat16 prefills 1.7 to 5 times as fast as float32
MERGED = "merged.safetensors"  # in a shipped model's folder: an adapter that is worked into the weights of its `base`
PROVED, DESCRIPTION = "proved", "kvlink.json"

logger = logging.getLogger("kvilt")


def load_model(
    name: str, dtype: str = "auto", device: str = "auto", *, trust_remote_code: bool = False
) -> tuple[Model, Any]:
    """A model ready to serve, and its tokenizer, from a folder, a hub name, a GGUF file, or a folder with an adapter of peft.

    `dtype` "auto" is the checkpoint's own on CUDA; on a CPU bfloat16 where checkpoint and CPU are made for it, else float32.
    Code that comes with a model runs only with `trust_remote_code`. Raises ModelError where something cannot be loaded, or
    not be served exactly."""
    place = choose_device(device)
    with _explained(f"model {name!r}", name):
        name = folder(name)
        described = beside(name, "adapter_config.json")
    merged = adapter.load(Path(name) / MERGED) if (Path(name) / MERGED).is_file() else None
    base = folder(merged.metadata["base"]) if merged else name if described is None else _base_of(described, name)
    what = f"model {name!r}" if base == name else f"base model {base!r} of adapter {name!r}"
    hf, tokenizer, known_as, reason = _load(base, what, dtype, place, trust_remote_code)
    if merged:
        both = digest_of(known_as.digest, merged.digest)
        adapters.merge(hf, merged)
        known_as, hf.name_or_path = Identity(hf, known_as.folder, both), name
    if described is not None:
        with _explained(f"adapter {name!r}", name):
            tokenizer = _adapted(hf, described.parent, trust_remote_code) or tokenizer
    model = _proved(hf, tokenizer, known_as)
    model.dtype_reason = reason
    logger.info("computing in %s: %s", str(hf.dtype).removeprefix("torch."), reason)
    return model, tokenizer


def wrap(hf: Any, tokenizer: Any) -> Model:
    """A model that you hold already, made ready to serve. Raises ModelError when it cannot be served exactly.

    Its caches are named after its tensors: they are other caches than those of the same checkpoint loaded by name."""
    return _proved(hf, tokenizer, Identity(hf))


def _proved(hf: Any, tokenizer: Any, known_as: Identity) -> Model:
    fit.check_config(hf.config)
    with suppress(OSError, ValueError):  # a model in memory may have any name
        if hf.name_or_path and (described := beside(hf.name_or_path, DESCRIPTION)):
            hf.name_or_path = str(described.parent)  # of a hub name: where strategies and trainers find it
    note = f"{known_as.digest} {proof.facts(hf)}" if known_as.folder is not None else None
    own = None if note and identity.recall(note) == PROVED else proof.own(hf)
    model = Model(hf, identity.tokenizer_digest(tokenizer), known_as)
    if own is not None:
        proof.check(model, own)
        if note:
            identity.remember(note, PROVED)
    return model


def _load(name: str, what: str, dtype: str, place: torch.device, trust: bool) -> tuple[Any, Any, Identity, str]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with _explained(what, name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
        fit.check_config(config)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        kind, reason = choose_dtype(dtype, getattr(config, "dtype", None) or torch.float32, place)
        hf, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=kind, output_loading_info=True, trust_remote_code=trust
        )
        if missing := sorted(report["missing_keys"]):  # transformers makes them up, differently every time
            raise ValueError(f"its files lack weights that the model has: {', '.join(missing[:3])} ...")
        at = beside(name, "config.json")
        try:
            return hf.to(place), tokenizer, Identity(hf, at and at.parent), reason
        except ModelError:  # its weights came from elsewhere
            return hf, tokenizer, Identity(hf), reason


def _base_of(described: Path, name: str) -> str:
    """What an adapter was trained on."""
    with _explained(f"adapter {name!r}", name):
        base = json.loads(described.read_text("utf-8"))["base_model_name_or_path"]
    try:
        return folder(str(base))
    except ModelError as error:
        hint = f"Change base_model_name_or_path in {described}, or put the base model there."
        raise ModelError(f"cannot load adapter {name!r}: its base model {base!r} is missing. {hint}") from error


def _adapted(hf: Any, at: Path, trust: bool) -> Any:
    """Put an adapter of peft into a model's layers; the tokenizer that came with it, if one did."""
    from transformers import AutoTokenizer

    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtra("peft", "train") from error
    with warnings.catch_warnings(record=True, action="always") as said:
        kind = PeftModel.from_pretrained(hf, str(at)).active_peft_config
    for lacking in (str(w.message) for w in said if "missing adapter keys" in str(w.message)):
        raise ValueError(f"its files lack weights: {lacking[:200]}")
    if kind.is_prompt_learning:
        raise ValueError(f"{kind.peft_type.value} puts tokens before every text it is given.")
    own = (at / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(str(at), trust_remote_code=trust) if own else None


def beside(name: str, file: str) -> Path | None:
    """A file beside a model's weights, in its folder or in the hub's cache (fetched if the hub can be reached)."""
    from transformers.utils import cached_file

    quietly = ("gated_repo", "missing_entries", "connection_errors")
    at = cached_file(name, file, **{f"_raise_exceptions_for_{what}": False for what in quietly})
    return None if at is None else Path(at)


def folder(name: str) -> str:
    """Where a model's files lie: `builtin`, `builtin-VARIANT` and `smollm2-VARIANT` ship with the package, `smollm2` is that of
    the installed wheel, a GGUF file (or a folder with one) is made into a folder; other names are left alone."""
    file = gguf.smollm2() if name == "smollm2" else gguf.file_of(name)
    if file is not None:
        return str(gguf.unpacked(file))
    if Path(name).exists():
        return name
    if name.startswith((".", "/", "~")):  # no hub name looks like this, and asking the hub takes half a minute offline
        raise ModelError(f"cannot load model {name!r}: no such folder.")
    if name.partition("-")[0] not in ("builtin", "smollm2"):
        return name
    shipped = Path(str(files("kvilt"))) / "builtin"
    at = shipped / name.replace("builtin", "model", 1)
    if not at.is_dir():
        there = [*shipped.glob("model*"), *shipped.glob("smollm2-*")]
        known = ", ".join(sorted(f.name.replace("model", "builtin", 1) for f in there))
        raise ModelError(f"no built-in model {name!r}. Known: {known or 'none'}.")
    return str(at)


def choose_dtype(asked: str, own: torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why. "auto" takes the fastest in which a checkpoint's weights lose nothing.

    Measured on a CPU with avx512_bf16 (Zen 4): bfloat16 matrices 2.2 times, prefill 1.4 to 1.9 times as fast as float32,
    decoding as fast; float16 4 times slower. With AMX prefill is 3 times as fast."""
    if asked != "auto":
        if SHORT.get(asked, asked) not in DTYPES:
            raise SpecError(f"unknown dtype {asked!r}: use auto, {', '.join(DTYPES)}.")
        return DTYPES[SHORT.get(asked, asked)], "as asked for"
    units = [flag for flag in UNITS if flag in _cpu_flags()]
    if device.type != "cpu" or (own == torch.bfloat16 and units):
        return own, f"the checkpoint's own, on {device.type if device.type != 'cpu' else f'a CPU with {units[0]}'}"
    kept = str(own).removeprefix("torch.")
    return torch.float32, f"the fastest on this CPU that loses nothing of a {kept} checkpoint"


def _cpu_flags() -> set[str]:
    known = Path("/proc/cpuinfo")
    return set(known.read_text().split()) if known.is_file() else set()


def choose_device(device: str) -> torch.device:
    """Where to compute; "auto" is CUDA where there is any. Raises SpecError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise SpecError(f"unknown device {device!r}: use auto, cpu or cuda.") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise SpecError(f"device {device!r} was asked for, but no CUDA device is available.")
    return place


@contextmanager
def _explained(what: str, name: str) -> Iterator[None]:
    """One line for whatever goes wrong in transformers, without its progress bars unless Kvilt logs in detail."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    if not logger.isEnabledFor(logging.INFO):
        bars.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # readers of weights raise whatever they like
        text = str(error).strip() or type(error).__name__
        hint = "" if Path(name).exists() else " No such folder here; names without a folder are looked up on the hub."
        if "trust_remote_code" in text:
            hint = " It wants to run its own code: if you trust it, pass trust_remote_code=True (--trust-remote-code)."
        raise ModelError(f"cannot load {what}: {text.splitlines()[0]}{hint}") from error
    finally:
        if shown:
            bars.enable_progress_bar()
