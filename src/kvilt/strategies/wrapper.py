"""Learned vectors around documents, as files: `wrapper.safetensors`."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvilt.errors import WrapperError
from kvilt.types import Encoding, ModelInfo

FORMAT = "kvilt-wrapper-1"
ALIKE = 0.02  # of their standard deviation: how far apart the same embeddings' statistics may be
logger = logging.getLogger("kvilt")


@dataclass(frozen=True, eq=False)
class Wrapper:
    """Header and trailer (KV Packet) and soft link vectors (linked packet) in input-embedding space, float32.

    `model` is the digest of the weights they were trained for; empty for published wrappers that do not say."""

    header: Tensor  # (vectors, hidden)
    trailer: Tensor
    model: str = ""
    links: Tensor | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def encoding(self) -> Encoding:
        """Header and trailer around a document, their rows kept; link vectors follow in the same table of ids."""
        parts = [self.header, self.trailer, *([] if self.links is None else [self.links])]
        ids = [-1 - i for i in range(len(self.header) + len(self.trailer))]
        before, after = tuple(ids[: len(self.header)]), tuple(ids[len(self.header) :])
        return Encoding(before, after, keep=True, learned=torch.cat(parts))

    def link_ids(self) -> Tensor:
        """Ids of the link vectors in the encoding's table, (links,)."""
        first = len(self.header) + len(self.trailer)
        count = 0 if self.links is None else len(self.links)
        return -1 - torch.arange(first, first + count)

    def check(self, info: ModelInfo) -> Wrapper:
        """Raise WrapperError unless these vectors belong to the model."""
        if self.header.shape[-1] != info.hidden_size:
            widths = f"{self.header.shape[-1]} channels, the model has {info.hidden_size}"
            raise WrapperError(f"this wrapper was trained for another model: its vectors have {widths}.")
        if self.model and self.model != info.digest:
            weights = f"{self.model[:16]}, this model's are {info.digest[:16]}"
            raise WrapperError(f"this wrapper was trained for weights {weights}. Train one: kvilt train packet.")
        if "std" in self.metadata:  # published: the embeddings that its vectors were drawn like
            (mean, std), trained = info.embedding_stats, self.metadata.get("trained_on") or "another model"
            own = float(self.metadata["mean"]), float(self.metadata["std"])
            if max(abs(own[0] - mean), abs(own[1] - std)) > ALIKE * std:
                raise WrapperError(
                    f"this wrapper was trained for {trained}, whose embeddings have mean {own[0]:.4g} and standard deviation "
                    f"{own[1]:.4g}; this model's have {mean:.4g} and {std:.4g}."
                )
        elif "source" in self.metadata:
            logger.warning("kv_packet: this wrapper does not say which model it was trained for")
        return self

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; metadata holds the model's digest."""
        tensors = {n: t for n in ("header", "trailer", "links") if (t := getattr(self, n)) is not None}
        metadata = {**self.metadata, "format": FORMAT, "model": self.model}
        save_file({k: v.detach().float().contiguous().cpu() for k, v in tensors.items()}, str(path), metadata)

    @classmethod
    def load(cls, path: str | Path) -> Wrapper:
        """Read a wrapper; the authors' published `.pt` files load too (weights only, no code is run)."""
        path = Path(path)
        if not path.is_file():
            raise WrapperError(f"no wrapper file at {path}.")
        if path.suffix in (".pt", ".pth", ".bin"):
            return cls._published(path)
        try:
            with safe_open(str(path), "pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise WrapperError(f"{path} is not a readable wrapper: {error}.") from error
        if metadata.pop("format", None) != FORMAT or not {"header", "trailer"} <= set(tensors):
            raise WrapperError(f"{path} is not a wrapper of format {FORMAT}.")
        if len({t.shape[-1:] for t in tensors.values()}) > 1:
            raise WrapperError(f"{path}: its parts hold vectors of different width.")
        if any(t.dim() != 2 or not torch.isfinite(t).all() for t in tensors.values()):
            raise WrapperError(f"{path}: vectors must be finite and of shape (vectors, hidden).")
        return cls(tensors["header"], tensors["trailer"], metadata.pop("model", ""), tensors.get("links"), metadata)

    @classmethod
    def _published(cls, path: Path) -> Wrapper:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for foreign files
            raise WrapperError(f"{path} is not a readable wrapper: {str(error).partition('.')[0]}.") from error
        vectors = {k: v for k in ("header", "trailer") if isinstance(v := _entry(state, k), Tensor)}
        # shipped as (1, vectors, hidden)
        flat = {k: v.float().flatten(0, -2) for k, v in vectors.items() if v.dim() in (2, 3)}
        if len(flat) < 2:
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise WrapperError(f"{path} holds no header and trailer; found {json.dumps(found)}.")
        finite = all(torch.isfinite(v).all() for v in flat.values())
        if not finite or flat["header"].shape[1] != flat["trailer"].shape[1]:
            raise WrapperError(f"{path}: header and trailer must be finite and of the same width.")
        return cls(flat["header"], flat["trailer"], metadata={"source": path.name, **_origin(state)})


def _entry(state: object, name: str) -> object:
    return state.get(name) if isinstance(state, dict) else None


def _origin(state: object) -> dict[str, str]:
    """What a published file says of the model it was trained for: statistics of its embeddings, and its name."""
    config, fields = _entry(state, "train_config"), ("model_name", "model", "model_path", "base_model")
    names = [config[field] for field in fields if isinstance(config, dict) and field in config]
    given = [_entry(state, name) for name in ("mean", "std")]
    if not all(isinstance(v, int | float) or (isinstance(v, Tensor) and v.numel() > 0) for v in given):
        return {}
    mean, std = (torch.as_tensor(v, dtype=torch.float64) for v in given)
    spread = float((std.square().mean() + mean.var(correction=0)).sqrt())  # given for each channel, or for all
    return {"mean": repr(float(mean.mean())), "std": repr(spread), "trained_on": str(names[0]) if names else ""}
