"""What a document was computed with: digests of checkpoint files, of models in memory, of tokenizers.

`of_files` and `of_rope` read files alone, so that every process that serves a checkpoint names it alike, whatever tensors it
holds and in whatever dtype it computes."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from blake3 import blake3
from torch import Tensor, nn

from kvilt.errors import ModelError
from kvilt.model.attention import Look
from kvilt.rows.files import replacing
from kvilt.types import bytes_of, digest_of

UNRELATED = {  # config fields that change no key and no value
    *("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "attn_implementation", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "tie_word_embeddings", "name_or_path"),
    *("vocab_size", "initializer_range"),
}
KINDS = ("model.safetensors", "pytorch_model.bin")  # where transformers looks for weights, in its order
WEIGHTS = [name for kind in KINDS for name in (kind, f"{kind}.index.json")]  # an index names its files
ELSEWHERE = ("base_model_name_or_path", "revision", "inference_mode", "target_modules", "peft_version", "auto_mapping")
SOURCE = "made-from.txt"  # in a folder that was made from a file: the file's digest
READ, PAGE, PAGES = 4 << 20, 4096, 64  # bytes hashed at a time; what is looked at of a file to know it again


def of_files(source: str | Path) -> str:
    """Digest of a checkpoint: its weight files, and the settings in config.json that shape keys and values.

    Of a folder count the files that transformers would load: model.safetensors, or the shards that
    model.safetensors.index.json names, or pytorch_model.bin or its shards, else every *.safetensors; and the folder's *.py
    where config.json has `auto_map`. A file (GGUF) is its own identity, and that of the folder made from it. Raises OSError,
    ValueError or ModelError where they cannot be read."""
    source = Path(source)
    if source.is_file():
        return of_file(source)
    if (source / SOURCE).is_file():
        return (source / SOURCE).read_text().strip()
    config = config_of(source)
    code = sorted(source.glob("*.py")) if "auto_map" in config else []
    with ThreadPoolExecutor(4) as threads:  # gone when this returns: nothing that a forked process would wait for
        return digest_of(_shaping(config), *threads.map(of_file, [*weight_files(source), *code]))


def of_rope(config: Mapping[str, Any]) -> str:
    """Digest of the fields of config.json that say how keys are rotated."""
    own = json.dumps({k: v for k, v in config.items() if _is_rope(k) and v}, sort_keys=True, default=str)
    return digest_of(own, str(config.get("max_position_embeddings")) if "yarn" in own else "")


def config_of(folder: Path) -> dict[str, Any]:
    """The fields of a checkpoint's config.json, as they stand there."""
    return dict(json.loads((folder / "config.json").read_text("utf-8")))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights."""
    for path in (folder / name for name in WEIGHTS):
        if path.is_file():
            sharded = path.suffix == ".json"
            parts = json.loads(path.read_text("utf-8"))["weight_map"].values() if sharded else [path.name]
            return [folder / part for part in sorted(set(parts))]
    if rest := sorted(folder.glob("*.safetensors")):
        return rest
    raise ModelError(f"{folder} holds no weights (looked for {', '.join(WEIGHTS)}).")


def stored_dtype(config: Mapping[str, Any]) -> str:
    """The dtype in which a checkpoint's documents are stored unless somebody says otherwise: its own."""
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return name if name in ("float16", "bfloat16") else "float32"


def of_file(path: Path) -> str:
    """BLAKE3 digest of a file's bytes, remembered for as long as the file looks the same."""
    with path.open("rb", buffering=0) as file:
        looks = _looks(file, path)
        if (known := recall(looks)) is not None:
            return known
        hasher, buffer = blake3(), memoryview(bytearray(READ))  # one thread: BLAKE3's own pool does not survive a fork
        file.seek(0)
        while size := file.readinto(buffer):
            hasher.update(buffer[:size])
    return remember(looks, hasher.hexdigest())


def _looks(file: BinaryIO, path: Path) -> str:
    """Where a file lies, its inode, size and times, and pages from all over it: times alone are kept by `cp -p` and `tar`."""
    s = os.fstat(file.fileno())
    hasher = blake3(repr((str(path.resolve()), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)).encode())
    for at in {0, max(0, s.st_size - PAGE), *range(0, s.st_size, s.st_size // PAGES or 1)}:
        file.seek(at)
        hasher.update(file.read(PAGE))
    return hasher.hexdigest()


def recall(note: str) -> str | None:
    """What was remembered under a name, by this process or another one."""
    known = _notes().get(note)
    return known if isinstance(known, str) else None


def remember(note: str, value: str) -> str:
    """Remember a short text under a name, and return it; what cannot be written down is worked out again next time."""
    with suppress(OSError, RuntimeError):  # of a user without a home
        _memo().parent.mkdir(parents=True, exist_ok=True)
        with replacing(_memo()) as temporary:
            temporary.write_text(json.dumps({**_notes(), note: value}))
    return value


def user_cache() -> Path:
    """Where Kvilt keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvilt"


def _memo() -> Path:
    return user_cache() / "digests.json"


def _notes() -> dict[str, object]:
    with suppress(OSError, ValueError, RuntimeError):
        notes = json.loads(_memo().read_text("utf-8")) if _memo().is_file() else None
        return notes if isinstance(notes, dict) else {}
    return {}


class Identity:
    """What a model in memory is called in cache keys, whatever is done to it after it was loaded.

    `rope` is the digest of how keys are rotated, `dtype` the name of the dtype that documents are stored in: the checkpoint's
    own. A model loaded from `folder` is called after its files (`known`: something was merged into them, and what both
    are called) for as long as its tensors are those that were loaded; any other is called after its tensors. Adapters of
    peft that are active add their tensors and settings."""

    def __init__(self, hf: nn.Module, folder: Path | None = None, known: str = "") -> None:
        self.hf, self.folder = hf, folder
        config: Any = hf.config
        fields = config.to_diff_dict() if folder is None else config_of(folder)
        own = str(next(hf.parameters()).dtype).removeprefix("torch.")
        self.rope, self.dtype = of_rope(fields), own if folder is None else stored_dtype(fields)
        self._look = Look()
        self._base = (self._own(), "" if folder is None else known or of_files(folder))

    @property
    def digest(self) -> str:
        """The digest of what runs now, 64 hex digits; `Model.digest` asks for it only when something has changed."""
        adapters, base = _adapters(self.hf), self._own()
        if self._base[0] != base or not self._base[1]:
            self._base = (base, self._of_tensors(""))
        parts = [self._base[1], *(self._adapter(name, adapters) for name in sorted(adapters))]
        return digest_of(*parts) if adapters else parts[0]

    def _own(self) -> object:
        return self._look.at(tensor for _, tensor, owner in _tensors(self.hf) if not owner)

    def _adapter(self, name: str, layers: Mapping[str, object]) -> str:
        config: Any = getattr(self.hf, "peft_config", {})[name]
        own = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items() if k not in ELSEWHERE}
        return digest_of(json.dumps([own, layers[name]], sort_keys=True, default=str), self._of_tensors(name))

    def _of_tensors(self, owner: str) -> str:
        config: Any = self.hf.config
        hasher = blake3(b"" if owner else _shaping(config.to_diff_dict()).encode())
        for name, tensor, of in sorted(_tensors(self.hf), key=lambda item: item[0]):
            if of == owner:
                exact = _narrowed(tensor.detach())
                plain = f"{name}.".replace(f".{owner}.", ".")  # an adapter may have any name
                hasher.update(f"{plain} {exact.dtype} {tuple(exact.shape)}\n".encode())
                hasher.update(bytes_of(exact))
        return hasher.hexdigest()


def _tensors(hf: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Every parameter and buffer of a model: its path, itself, and the adapter of peft it belongs to ("" for none)."""
    names = set(getattr(hf, "peft_config", None) or ())
    stack: list[tuple[str, nn.Module, str, bool]] = [("", hf, "", False)]
    while stack:
        path, module, owner, inside = stack.pop()
        inside = inside or _is_tuner(module)
        for key, part in (*module._parameters.items(), *module._buffers.items(), *module._modules.items()):
            of = owner or (key if inside and key in names else "")
            if isinstance(part, nn.Module):
                stack.append((f"{path}{key}.", part, of, inside))
            elif part is not None:
                yield path + key, part, of


def _adapters(hf: nn.Module) -> dict[str, list[str]]:
    """The adapters that take part in a pass, and how in each layer: scaled, merged."""
    adapters: dict[str, list[str]] = defaultdict(list)
    tuners: Iterable[Any] = filter(_is_tuner, hf.modules()) if getattr(hf, "peft_config", None) else ()
    for tuner in tuners:
        scale = getattr(tuner, "scaling", None)
        for name in () if tuner.disable_adapters else tuner.active_adapters:
            own = scale.get(name) if isinstance(scale, dict) else scale
            adapters[name].append(f"{own} {name in tuner.merged_adapters}")
    return dict(adapters)


def _is_tuner(module: nn.Module) -> bool:
    return hasattr(type(module), "merged_adapters")  # peft's layers, without importing it


def _shaping(config: Mapping[str, Any]) -> str:
    """The settings that shape keys and values beside weights and rotation (norm epsilons, multipliers, experts ...)."""
    own = {k: v for k, v in config.items() if k not in UNRELATED and not _is_rope(k) and not k.startswith("_")}
    return json.dumps(own, sort_keys=True, default=str)


def _is_rope(field: str) -> bool:
    return field.startswith(("rope_", "rotary_", "partial_rotary"))


def _narrowed(tensor: Tensor) -> Tensor:
    """float32 as bfloat16 where nothing is lost: a bfloat16 checkpoint is the same model in both, and so are its wrappers."""
    if tensor.dtype != torch.float32 or not torch.equal((few := tensor.flatten()[:4096]).bfloat16().float(), few):
        return tensor
    narrow = tensor.bfloat16()
    return narrow if torch.equal(narrow.float(), tensor) else tensor


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of vocabulary and special tokens: two tokenizers that map text to ids alike share it.

    The padding and truncation that its last call has left in it are none of its identity. Raises ModelError for one that is
    written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(tokenizer).__name__} is written in Python: Kvilt needs one of the tokenizers library.")
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    pipeline = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    return digest_of(vocabulary, json.dumps(pipeline, sort_keys=True))
