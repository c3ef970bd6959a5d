"""Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kvilt.errors import TrainError


class MuonAdamW(torch.optim.Optimizer):
    """Both follow one learning rate: Muon's updates are scaled to the root mean square of AdamW's."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        """`model` is whole in this process. Raises TrainError where torch has no Muon (before 2.9)."""
        if not hasattr(torch.optim, "Muon"):
            raise TrainError(f"optimizer=muon needs torch 2.9 or newer, this is {torch.__version__}.")
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        inside = {id(p) for layer in layers for p in layer.parameters() if p.ndim == 2}
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if id(p) in inside]
        rest = [p for p in trained if id(p) not in inside]
        self.parts: list[torch.optim.Optimizer] = []
        if rest:  # LoRA may leave none
            self.parts.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0))
        self.parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from states of both; learning rates are theirs again."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
