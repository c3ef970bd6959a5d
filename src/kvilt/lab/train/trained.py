"""What a training changes, and how a masked pass uses it: learned vectors, low-rank additions, or all weights."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from kvilt.errors import TrainError
from kvilt.lab.train.dense import ASKED, ENCODED, Batch, logits_of
from kvilt.model.model import Model
from kvilt.types import Adapter, digest_of

Where = Literal["all", "encoded", "asked"]
ROLES = {"all": None, "encoded": ENCODED, "asked": ASKED}


class Trained:
    """Float32 parameters by name, trained in place, and the masked pass that uses them.

    `half` is the dtype of the pass's matrix products (autocast); None leaves the model's own."""

    def __init__(self, model: Model, parameters: dict[str, Tensor], half: torch.dtype | None = None) -> None:
        self.model, self.parameters, self.half = model, parameters, half

    def logits(self, batch: Batch) -> Tensor:
        """Float32 logits (batch, keep, vocab) of the batch's last rows, differentiable in the parameters."""
        device = self.model.shape.device.type
        with torch.autocast(device, self.half, enabled=self.half is not None):
            return logits_of(self.model, batch, self.table())

    def table(self) -> Tensor | None:
        """The learned vectors that ids below zero name, (vectors, hidden)."""
        return None

    def idle(self) -> None:
        """Stay out of the passes that follow, until `logits` is called again."""

    def values(self) -> dict[str, Tensor]:
        """A copy of what was learned."""
        return {name: value.detach().clone() for name, value in self.parameters.items()}


class Weights(Trained):
    """All weights of the model."""

    def __init__(self, model: Model, half: torch.dtype | None = None) -> None:
        super().__init__(model, dict(model.hf.named_parameters()), half)


class Vectors(Trained):
    """Learned vectors beside a frozen model; `parts` follow one another in the table, those `still` keep their values."""

    def __init__(self, model: Model, parts: dict[str, Tensor], still: Collection[str] = ()) -> None:
        self.parts = {name: part.clone() for name, part in parts.items()}
        super().__init__(model, {name: part for name, part in self.parts.items() if name not in still})

    def table(self) -> Tensor:
        """All parts, one after the other."""
        return torch.cat(list(self.parts.values()))

    def values(self) -> dict[str, Tensor]:
        """A copy of all parts."""
        return {name: part.detach().clone() for name, part in self.parts.items()}


class LowRank(Trained):
    """LoRA (arXiv 2106.09685) on the layers' projections, and rows of their own for the embeddings of `ids`.

    `where` says which rows of a pass feel it: all; those of documents encoded alone (a writer that a frozen reader
    reads); or those of question and answer. `only` names the projections, as ("q_proj",); empty: every one. `vectors`
    are learned beside it, as `Vectors` does; then there are no `ids`."""

    SCALE = 2.0  # lora_alpha / rank

    def __init__(
        self, model: Model, rank: int, ids: Sequence[int] = (), only: Sequence[str] = (), where: Where = "all",
        half: torch.dtype | None = None, seed: int = 0, vectors: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.vectors = {name: part.clone() for name, part in (vectors or {}).items()}
        super().__init__(model, dict(self.vectors), half)
        self.ids, self.where = list(ids), where
        self._felt: Tensor | None = None  # (batch, rows, 1) bool: where the additions act
        self._modules = {n: m for n, m in projections(model.hf).items() if not only or n.rpartition(".")[2] in only}
        self._hooks = [m.register_forward_hook(functools.partial(self._add, n)) for n, m in self._modules.items()]
        drawn, device = torch.Generator().manual_seed(seed), model.shape.device  # the same in every process
        for name, module in self._modules.items():
            bound = module.in_features**-0.5
            a = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=drawn)
            self.parameters[f"{name}.A"] = a.to(device)
            self.parameters[f"{name}.B"] = torch.zeros(module.out_features, rank, device=device)
        if self.ids:
            self.parameters["rows"] = model.hf.get_input_embeddings().weight.detach()[self.ids].float().clone()
            self._place = torch.zeros(model.hf.get_input_embeddings().weight.shape[0], dtype=torch.long)
            self._place[self.ids] = -1 - torch.arange(len(self.ids))

    def logits(self, batch: Batch) -> Tensor:
        """Float32 logits; only the rows that `where` names are changed."""
        role = ROLES[self.where]
        self._felt = None if role is None else (batch.roles == role)[..., None].to(self.model.shape.device)
        if self.ids:
            placed = self._place[batch.tokens.clamp(min=0)]
            batch = replace(batch, tokens=torch.where(placed < 0, placed, batch.tokens))
        return super().logits(batch)

    def idle(self) -> None:
        """Stay out of the passes that follow, until `logits` is called again."""
        self._felt = None

    def table(self) -> Tensor | None:
        """The rows of `ids`, or the vectors beside the adapter."""
        return torch.cat(list(self.vectors.values())) if self.vectors else self.parameters.get("rows")

    def _add(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.where != "all" and self._felt is None:  # a pass that is none of the training's
            return output
        x, a, b = inputs[0], self.parameters[f"{name}.A"], self.parameters[f"{name}.B"]
        low = self.SCALE * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        return output + (low if self._felt is None else low * self._felt)

    def adapter(self) -> Adapter:
        """What was learned, as strategies that serve it take it: `rows.adapter.save` writes it."""
        kinds: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name in self._modules:
            a, b = (self.parameters[f"{name}.{side}"].detach().float().cpu().T for side in "AB")
            kinds.setdefault(re.sub(r"^.*layers\.\d+\.", "", name), []).append((a, self.SCALE * b))
        stacked = {k: (torch.stack([a for a, _ in p]), torch.stack([b for _, b in p])) for k, p in kinds.items()}
        return Adapter(digest_of(*(t for pair in stacked.values() for t in pair)), stacked, self.model.digest)

    @torch.no_grad()
    def merge(self) -> None:
        """Put what was learned into the model's own weights, for good."""
        for name, module in self._modules.items():
            product = self.parameters[f"{name}.B"] @ self.parameters[f"{name}.A"]
            module.weight += (self.SCALE * product).to(module.weight.dtype)
        if self.ids:
            self.model.hf.get_input_embeddings().weight[self.ids] = self.parameters["rows"]
        self.release()

    def release(self) -> None:
        """Leave the model as it was found."""
        for hook in self._hooks:
            hook.remove()


def projections(hf: nn.Module) -> dict[str, nn.Linear]:
    """The linear projections inside the layers, by name."""
    layers = _layers(hf)
    return {n: m for n, m in hf.named_modules() if isinstance(m, nn.Linear) and n.startswith(layers)}


def _layers(hf: nn.Module) -> tuple[str, ...]:
    return tuple(f"{n}." for n, m in hf.named_modules() if isinstance(m, GradientCheckpointingLayer))


def optimizers(kind: str, trained: Trained, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon (Jordan et al. 2024) for the matrices of the layers and AdamW for the rest, at one learning rate.

    Muon's updates are scaled to the root mean square of AdamW's. Raises TrainError where torch has no Muon."""
    if kind == "muon" and not hasattr(torch.optim, "Muon"):
        raise TrainError(f"optimizer=muon needs torch 2.9 or newer, this is {torch.__version__}.")
    layers, muon = _layers(trained.model.hf), kind == "muon"
    matrices = [p for n, p in trained.parameters.items() if muon and p.ndim == 2 and n.startswith(layers)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained.parameters.values() if id(p) not in chosen]
    made: list[torch.optim.Optimizer] = []
    if rest:
        made.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95 if muon else 0.999), weight_decay=0.0))
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return made


@contextmanager
def training(trained: Trained, checkpointing: bool = False) -> Iterator[None]:
    """What is trained takes gradients inside, nothing else does; `checkpointing` recomputes layers in the backward pass.

    transformers' own switch acts in training mode only, where dropout acts too: layers are wrapped directly instead."""
    every: dict[int, Any] = {id(p): p for p in (*trained.model.hf.parameters(), *trained.parameters.values())}
    own, flags = {id(p) for p in trained.parameters.values()}, {i: p.requires_grad for i, p in every.items()}
    layers = [m for m in trained.model.hf.modules() if checkpointing and isinstance(m, GradientCheckpointingLayer)]
    for i, parameter in every.items():
        parameter.requires_grad_(i in own)
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for i, parameter in every.items():
            parameter.requires_grad_(flags[i])
            parameter.grad = None
        for layer in layers:
            del layer.forward
