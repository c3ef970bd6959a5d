"""Which rotary embedding a model has: read from its modules, refused where stored keys could not be rotated to their places."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from kvilt.errors import ModelError
from kvilt.rows.rows import Rotation

SAFE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies do not depend on the length of the prompt


def rotation_of(hf: nn.Module) -> Rotation:
    """The rotary embedding of a transformers model. Raises ModelError where one rotation cannot place its keys exactly."""
    frequencies = [f for m in hf.modules() if isinstance(f := getattr(m, "inv_freq", None), Tensor)]
    config: Any = hf.config
    check_rope_type(config)
    if not frequencies:
        raise ModelError(_no_rotary(hf))
    first = frequencies[0]
    if any(f.shape != first.shape or not torch.equal(f, first) for f in frequencies[1:]):
        raise ModelError(f"{config.model_type}: layers rotate with different frequencies, which Kvilt cannot move yet.")
    scalings = {float(s) for m in hf.modules() if isinstance(s := getattr(m, "attention_scaling", None), float | int)}
    return Rotation(first.detach().float().cpu(), _is_interleaved(hf, len(first)), max(scalings, default=1.0))


def _no_rotary(hf: nn.Module) -> str:
    config: Any = hf.config
    if any(hasattr(m, "full_attention_inv_freq") or hasattr(m, "sliding_attention_inv_freq") for m in hf.modules()):
        kinds = sorted(set(getattr(config, "layer_types", None) or ()))
        why = f"config field rope_parameters: a rotation for each kind of layer {kinds}"
    else:
        why = "no rotary position embedding was found in it; Kvilt serves decoders with standard RoPE"
    return f"config field model_type = {config.model_type!r} is refused: {why}."


def check_rope_type(config: Any) -> None:
    """Refuse rope types whose frequencies change with the length of the prompt."""
    for field in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, field, None)
        if not isinstance(parameters, dict):
            continue
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in SAFE_TYPES:
            why = f"its rotation depends on the length of the prompt. Served: {', '.join(SAFE_TYPES)}"
            raise ModelError(f"config field {field}.rope_type = {kind!r} is refused: {why}.")
        if "mrope_section" in parameters:
            raise ModelError(f"config field {field}.mrope_section is refused: multi-axis positions are not supported.")


def _is_interleaved(hf: nn.Module, half: int) -> bool:
    """Ask the model's own code which channels it pairs, by rotating a marked key."""
    for module in hf.modules():
        rotate = getattr(sys.modules.get(type(module).__module__), "rotate_half", None)
        if rotate is not None and hasattr(module, "layer_idx"):
            probe = torch.zeros(2 * half)
            probe[1] = 1.0
            return bool(rotate(probe)[0] == -1.0)
    return False
