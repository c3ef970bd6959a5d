"""Low-rank adapters as files: Kvilt's own compact ones (int8 with scales, one for each rank), and those that peft saves."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvilt.errors import WrapperError
from kvilt.types import Adapter, ModelInfo, digest_of

FORMAT = "kvilt-adapter-1"
PEFT = re.compile(r"layers\.(\d+)\.(.+)\.lora_([AB])\.(?:\w+\.)?weight$")


def save(adapter: Adapter, path: str | Path, **metadata: str) -> None:
    """Write an adapter: int8 with a float16 scale for every rank of every layer, half the bytes of float16."""
    tensors = {}
    for kind, pair in adapter.matrices.items():
        for side, matrix in zip("ab", pair, strict=True):
            axis = 1 if side == "a" else 2  # what belongs to one rank
            scale = (matrix.float().abs().amax(axis, keepdim=True) / 127).clamp(min=1e-7).half()
            tensors[f"{kind}.{side}"] = (
                (matrix.float() / scale.float()).round().clamp(-127, 127).to(torch.int8).contiguous()
            )
            tensors[f"{kind}.{side}.scale"] = scale.contiguous()
    save_file(tensors, str(path), {**metadata, "format": FORMAT, "model": adapter.model})


def load(path: str | Path) -> Adapter:
    """Read an adapter, or the folder that peft saved one in. Raises WrapperError where there is none."""
    path = Path(path)
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    try:
        with safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise WrapperError(f"{path} is not a readable adapter: {error}.") from error
    own = metadata.get("format") == FORMAT
    matrices = _own(tensors) if own else _of_peft(tensors, path)
    whole = all(len(pair) == 2 and pair[0].shape[2] == pair[1].shape[1] for pair in matrices.values())
    if not matrices or not whole or not all(torch.isfinite(t).all() for pair in matrices.values() for t in pair):
        raise WrapperError(f"{path} holds no whole low-rank adapter.")
    parts = list[str | Tensor]()
    for kind in sorted(matrices):
        parts += [kind, *matrices[kind]]
    pairs = {kind: (a, b) for kind, (a, b) in matrices.items()}
    return Adapter(digest_of(*parts), pairs, metadata.get("model", ""), metadata)


def check(adapter: Adapter, path: str | Path, info: ModelInfo, role: str) -> Adapter:
    """Raise WrapperError unless an adapter was trained for this model, and to act where `role` ("writer", "query") does."""
    if (trained := adapter.metadata.get("role", role)) != role:
        raise WrapperError(f"{path} was trained as {trained} adapter: it cannot serve as {role} adapter.")
    if adapter.model and adapter.model != info.digest:
        weights = f"{adapter.model[:16]}, this model's are {info.digest[:16]}"
        raise WrapperError(f"{path} was trained for weights {weights}: use its own model.")
    for kind, (a, b) in adapter.matrices.items():
        inside = kind.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        width = a.shape[1] if inside else b.shape[2]
        if len(a) != info.num_layers or (width != info.hidden_size and "o_proj" not in kind):
            raise WrapperError(
                f"{path}: {kind} is made for {len(a)} layers of width {width}, the model has {info.num_layers} of "
                f"{info.hidden_size}: it was trained for another model."
            )
    return adapter


def _own(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    kinds = sorted({name.rpartition(".")[0] for name in tensors if name.endswith(".a")})
    plain = {
        name: t.float() * tensors[f"{name}.scale"].float() for name, t in tensors.items() if not name.endswith(".scale")
    }
    return {kind: tuple(plain[f"{kind}.{side}"] for side in "ab" if f"{kind}.{side}" in plain) for kind in kinds}


def _of_peft(tensors: dict[str, Tensor], path: Path) -> dict[str, tuple[Tensor, ...]]:
    """Matrices of peft's file, stacked over layers, multiplied by what its configuration says."""
    config = path.with_name("adapter_config.json")
    if not config.is_file():
        raise WrapperError(f"{path} is no adapter of format {FORMAT}, and no {config.name} of peft lies beside it.")
    told = json.loads(config.read_text("utf-8"))
    odd = [name for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if told.get(name)]
    if odd or told.get("peft_type") != "LORA" or told.get("bias", "none") != "none":
        raise WrapperError(f"{path}: only plain LoRA can act on some tokens alone, not {odd or told.get('peft_type')}.")
    scale = told["lora_alpha"] / (told["r"] ** 0.5 if told.get("use_rslora") else told["r"])
    found: dict[str, dict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        if (match := PEFT.search(name)) is None:
            raise WrapperError(f"{path}: {name} belongs to no layer.")
        found[match[2]][match[3]][int(match[1])] = tensor.float().T * (scale if match[3] == "B" else 1)
    return {kind: (_stacked(sides["A"]), _stacked(sides["B"])) for kind, sides in found.items() if len(sides) == 2}


def _stacked(layers: dict[int, Tensor]) -> Tensor:
    return torch.stack([layers[i] for i in sorted(layers)])
