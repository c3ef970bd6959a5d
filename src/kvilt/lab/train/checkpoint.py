"""What a killed training needs to go on: one file with what is trained, the optimisers and the history; and the best step."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvilt.errors import TrainError
from kvilt.lab.train.losses import Fidelity
from kvilt.rows.files import replacing
from kvilt.types import digest_of

CHECKPOINT, NOTE = "checkpoint.safetensors", "run.json"
FREE = ("steps", "patience", "evaluate_every", "micro_batch", "checkpointing")  # may change when a run goes on


@dataclass
class State:
    """How far a training is; the data's order follows from the step and the seed."""

    step: int = 0
    losses: list[float] = field(default_factory=list)  # of every step
    held_out: list[tuple[int, Fidelity]] = field(default_factory=list)  # steps and their results

    @property
    def best(self) -> tuple[int, Fidelity]:
        """The step with the lowest held-out loss, and its result."""
        return min(self.held_out, key=lambda entry: entry[1].loss)

    @property
    def history(self) -> dict[str, Any]:
        """Losses and held-out results as plain data."""
        return {"losses": self.losses, "held_out": [[step, asdict(f)] for step, f in self.held_out]}

    @classmethod
    def read(cls, text: str) -> State:
        """The state that was written."""
        raw = json.loads(text)
        return cls(raw["step"], raw["losses"], [(step, Fidelity(**f)) for step, f in raw["held_out"]])


def claim(folder: Path, settings: Any, model: str, *data: str) -> None:
    """Note what this folder's run is; settings in FREE may change. Raises TrainError when it holds another run."""
    kept = json.loads(json.dumps({k: v for k, v in asdict(settings).items() if k not in FREE}))
    digest, note = digest_of(model, *data)[:32], folder / NOTE
    if note.is_file():
        other = json.loads(note.read_text())
        was = other.get("settings", {})
        changed = [f"{k} was {was.get(k)!r}, is {v!r}" for k, v in kept.items() if was.get(k) != v]
        if changed or other.get("data") != digest:
            what = "; ".join(changed) or "the model or the data has changed"
            raise TrainError(f"{folder.parent} belongs to another run: {what}. Choose another folder, or remove it.")
    if os.environ.get("RANK", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(note) as file:
            file.write_text(json.dumps({"model": model, "data": digest, "settings": kept}, indent=1))


def save(folder: Path, state: State, parameters: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    """Write a checkpoint; earlier best steps are removed once it is there."""
    tensors = {f"trained.{name}": value for name, value in parameters.items()}
    for k, optimizer in enumerate(optimizers):
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{k}.{i}.{name}": value for name, value in moments.items()}
    write(folder / CHECKPOINT, tensors, {"state": json.dumps({"step": state.step, **state.history})})
    for file in folder.glob("best-*.safetensors"):
        if file != best(folder, state.best[0]):
            file.unlink()


def load(folder: Path, parameters: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]) -> State:
    """Put a checkpoint into parameters and optimisers. Raises TrainError for a file that cannot be read."""
    tensors, metadata = read(folder / CHECKPOINT)
    fill(parameters, {n.removeprefix("trained."): v for n, v in tensors.items() if n.startswith("trained.")})
    for k, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        for name, value in tensors.items():
            kind, number, *place = name.split(".")
            if kind == "optimizer" and number == str(k):
                whole["state"].setdefault(int(place[0]), {})[place[1]] = value
        optimizer.load_state_dict(whole)
    return State.read(metadata["state"])


@torch.no_grad()
def fill(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Give parameters other values, in place."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def best(folder: Path, step: int) -> Path:
    """Where the parameters of a step that was the best are kept."""
    return folder / f"best-{step}.safetensors"


def steps_done(folder: Path) -> int:
    """The step that a run goes on from."""
    file = folder / CHECKPOINT
    return State.read(read(file, only=())[1]["state"]).step if file.is_file() else 0


def read(file: Path, only: Sequence[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (all, or `only` some) and metadata of a file of ours. Raises TrainError when it cannot be read."""
    try:
        with safe_open(str(file), "pt") as f:
            return {k: f.get_tensor(k) for k in (f.keys() if only is None else only)}, dict(f.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise TrainError(f"{file} is not readable: {error}. Remove it to begin anew.") from error


def write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is whole or not there, even if the process is killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(temporary), metadata)
