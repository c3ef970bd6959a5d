"""Checkpoints of a wrapper's training: one safetensors file with vectors, optimiser, place in the data, history."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvilt.errors import TrainError
from kvilt.lab.train.losses import Fidelity
from kvilt.lab.train.teacher import write_atomically


@dataclass
class State:
    """Everything that a resumed training needs; the data's order follows from the step and the seed."""

    vectors: dict[str, Tensor]  # header, trailer, links: (vectors, hidden) float32, trained in place
    best: dict[str, Tensor]
    step: int = 0
    best_step: int = 0
    best_fidelity: Fidelity | None = None
    losses: list[float] = field(default_factory=list)  # of every step
    held_out: list[tuple[int, Fidelity]] = field(default_factory=list)
    finished: bool = False

    def keep_best(self, fidelity: Fidelity) -> None:
        """Note a held-out result and keep the vectors if they are the best so far."""
        self.held_out.append((self.step, fidelity))
        if self.best_fidelity is None or fidelity.kl < self.best_fidelity.kl:
            self.best_step, self.best_fidelity = self.step, fidelity
            self.best = {k: v.detach().clone() for k, v in self.vectors.items()}

    @property
    def history(self) -> dict[str, Any]:
        """Losses and held-out results as plain data."""
        return {"losses": self.losses, "held_out": [[step, asdict(f)] for step, f in self.held_out]}


def save(path: Path, state: State, optimizer: torch.optim.Optimizer, tag: str) -> None:
    """Write a checkpoint atomically; `tag` says which run it belongs to."""
    tensors = {f"vector.{k}": v for k, v in state.vectors.items()} | {f"best.{k}": v for k, v in state.best.items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
    scalars = {"step": state.step, "best_step": state.best_step, "finished": state.finished, **state.history}
    write_atomically(path, {k: v.clone() for k, v in tensors.items()}, {"tag": tag, "scalars": json.dumps(scalars)})


def load(path: Path, state: State, optimizer: torch.optim.Optimizer, tag: str) -> None:
    """Put a checkpoint's content into a fresh state and optimiser. Raises TrainError for one of another run."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata, tensors = dict(file.metadata() or {}), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TrainError(f"{path} is not a readable checkpoint: {error}. Remove it to begin anew.") from error
    if metadata.get("tag") != tag:
        raise TrainError(
            f"{path} belongs to a run with another model, data or settings. Remove it, or choose another folder."
        )
    _fill(state, tensors, json.loads(metadata["scalars"]))
    found = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, moment = name.split(".")
            found["state"].setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict(found)


def _fill(state: State, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, vectors in state.vectors.items():
            vectors.copy_(tensors[f"vector.{name}"])
    state.best = {name: tensors[f"best.{name}"] for name in state.vectors}
    state.step, state.best_step, state.finished = scalars["step"], scalars["best_step"], scalars["finished"]
    state.losses = scalars["losses"]
    state.held_out = [(step, Fidelity(**f)) for step, f in scalars["held_out"]]
    state.best_fidelity = dict(state.held_out).get(state.best_step)
