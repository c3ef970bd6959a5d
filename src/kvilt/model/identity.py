"""Digests of models and tokenizers: what a stored cache was made with."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from kvilt.types import digest_of

UNRELATED = {  # config fields that change no key and no value
    *("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "attn_implementation", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "tie_word_embeddings", "name_or_path"),
    *(
        "vocab_size",
        "initializer_range",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
    ),  # Rope.identity has the rotation
}


def weights_digest(hf: nn.Module) -> str:
    """Content digest of all weights, adapters included; remembered per file for models loaded unchanged from disk."""
    remembered = _remembered(hf)
    if remembered is not None:
        memo, tag = remembered
        known = _read(memo).get(tag)
        if known is not None:
            return known
    digest = _digest_tensors(hf)
    if remembered is not None:
        _write(memo, tag, digest)
    return digest


def was_proved(hf: nn.Module, facts: str) -> bool:
    """Whether these files have passed the trial at load under the same `facts`."""
    remembered = _remembered(hf)
    return remembered is not None and _read(remembered[0]).get(f"{remembered[1]} {facts}") == "proved"


def note_proof(hf: nn.Module, facts: str) -> None:
    """Remember that these files have passed the trial."""
    remembered = _remembered(hf)
    if remembered is not None:
        _write(remembered[0], f"{remembered[1]} {facts}", "proved")


def _digest_tensors(hf: nn.Module) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    for name, tensor in sorted(hf.state_dict().items()):
        exact = _narrowed(tensor.detach())
        hasher.update(f"{name} {exact.dtype} {tuple(exact.shape)}\n".encode())
        hasher.update(_bytes(exact))
    return hasher.hexdigest()


def _narrowed(tensor: Tensor) -> Tensor:
    """float32 as bfloat16 where nothing is lost: a bfloat16 checkpoint is the same model in both, and so are its wrappers."""
    if tensor.dtype != torch.float32 or not torch.equal((few := tensor.flatten()[:4096]).bfloat16().float(), few):
        return tensor
    narrow = tensor.bfloat16()
    return narrow if torch.equal(narrow.float(), tensor) else tensor


def config_digest(config: Any) -> str:
    """Digest of the settings that shape keys and values beside the weights (norm epsilons, multipliers, experts ...)."""
    own = {k: v for k, v in config.to_diff_dict().items() if k not in UNRELATED and not k.startswith("_")}
    return digest_of(json.dumps(own, sort_keys=True, default=str))


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of vocabulary and special tokens: two tokenizers that map text to ids alike share it.

    The padding and truncation that its last call has left in a fast tokenizer are none of its identity."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest_of(vocabulary, type(tokenizer).__name__)
    pipeline = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    return digest_of(vocabulary, json.dumps(pipeline, sort_keys=True))


def _remembered(hf: nn.Module) -> tuple[Path, str] | None:
    """Where the digest of a model on disk is remembered, and under which tag; None if it may differ from its files."""
    source = Path(str(getattr(hf, "name_or_path", "") or ""))
    files = _weight_files(source) if source.is_dir() and not getattr(hf, "_hf_peft_config_loaded", False) else []
    if not files or not getattr(hf, "kvilt_unchanged", False):
        return None
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    tag = hashlib.sha256(json.dumps(["weights-2", stats, str(hf.dtype), type(hf).__name__]).encode()).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "kvilt" / "digests.json", tag


def _weight_files(folder: Path) -> list[Path]:
    return sorted(f for pattern in ("*.safetensors", "*.bin", "*.json") for f in folder.glob(pattern))


def _read(memo: Path) -> dict[str, str]:
    try:
        return dict(json.loads(memo.read_text()))
    except (OSError, ValueError):
        return {}


def _write(memo: Path, tag: str, digest: str) -> None:
    """Best effort: a digest that cannot be remembered is computed again next time."""
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary = memo.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({**_read(memo), tag: digest}))
        temporary.replace(memo)
    except OSError:
        return
