"""Fine-tuning through transformers' Trainer: batches with masks of their own, checkpoints, best step, broken losses."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from kvilt.errors import TrainError
from kvilt.lab.train.dense import IGNORE, Row, additive, collate
from kvilt.lab.train.job import Progress, Report
from kvilt.lab.train.losses import cross_entropy
from kvilt.lab.train.muon import MuonAdamW
from kvilt.model.loading import SHORT
from kvilt.strategies.kvlink import DESCRIPTION, LinkTokens

_OPTIONS = {f.name for f in fields(TrainingArguments)}
CHECKPOINTS, LAST_GOOD = "checkpoints", "last-good"
GOOD = f"The weights of the last good step are in {LAST_GOOD}, earlier ones in {CHECKPOINTS}."
# transformers renamed the option
_CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in _OPTIONS)
STATE = "trainer_state.json"  # the last file of a complete checkpoint


@dataclass(frozen=True)
class Settings:
    """How weights are fine-tuned."""

    optimizer: str = "adamw"  # or muon: Muon for the matrices of the layers, AdamW for the rest
    lr: float = 5e-6
    schedule: str = "cosine"  # any schedule of transformers, after the warm-up
    warmup: float = 0.1  # share of the steps
    steps: int = 6000
    batch: int = 64  # samples of one step, over all processes
    micro_batch: int = 4  # samples of one pass of one process
    clip: float = 1.0
    dtype: str = "auto"  # of the passes: bfloat16 on CUDA, float32 on a CPU; weights stay float32
    checkpointing: bool = False  # recompute layers in the backward pass
    evaluate_every: int = 200  # steps between held-out evaluations and checkpoints
    patience: int = 5  # evaluations without a better one before the training stops
    workers: int = 0  # processes that prepare batches
    fsdp: bool = False  # split weights over processes; `accelerate launch` with an FSDP configuration needs it not
    seed: int = 42

    def check(self) -> None:
        """Raise TrainError for settings that make no sense."""
        wrong = {
            "steps, batch, micro_batch": min(self.steps, self.batch, self.micro_batch) < 1,
            "evaluate_every, patience": min(self.evaluate_every, self.patience) < 1,
            "lr, clip, warmup": not (0 <= self.lr < math.inf and self.clip >= 0 and 0 <= self.warmup <= 1),
            "optimizer": self.optimizer not in ("adamw", "muon") or (self.optimizer == "muon" and self.fsdp),
            "dtype": SHORT.get(self.dtype, self.dtype) not in ("auto", "float32", "bfloat16"),
        }
        found = [name for name, bad in wrong.items() if bad]
        if found:
            raise TrainError(f"bad setting: {found[0]} in {self}.")
        _ = self.accumulation

    @property
    def accumulation(self) -> int:
        """Passes of one process per step. Raises TrainError when `batch` cannot be divided so."""
        at_once = self.micro_batch * int(os.environ.get("WORLD_SIZE", "1"))
        if self.batch % at_once:
            raise TrainError(f"batch={self.batch} is not a multiple of micro_batch times processes ({at_once}).")
        return self.batch // at_once

    @property
    def half(self) -> bool:
        """Whether passes run in bfloat16."""
        return torch.cuda.is_available() if self.dtype == "auto" else SHORT.get(self.dtype, self.dtype) == "bfloat16"


def run(
    hf: Any,
    tokenizer: Any,
    rows: Dataset[Row],
    tests: Dataset[Row],
    settings: Settings,
    tokens: LinkTokens,
    out: Path,
    report: Report,
) -> None:
    """Train `hf` on `rows` in their order, and write the step that does best on `tests` to `out`."""
    trainer = Trainer(
        hf,
        _arguments(settings, out / CHECKPOINTS),
        train_dataset=rows,
        eval_dataset=tests,
        data_collator=functools.partial(inputs_of, numbers=not settings.half),
        processing_class=tokenizer,
        compute_loss_func=loss_of,
        callbacks=[_Watch(tokens, report), EarlyStoppingCallback(settings.patience)],
        optimizers=(MuonAdamW(hf, settings.lr) if settings.optimizer == "muon" else None, None),
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for data
    try:
        trainer.train(resume_from_checkpoint=_last(out / CHECKPOINTS))
    except TrainError:
        trainer.save_model(str(out / LAST_GOOD))  # no step is taken with such a loss: these weights are still good
        raise
    if hasattr(trainer.model, "merge_and_unload"):
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model(str(out))
    if trainer.args.should_save:
        (out / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs
        (out / DESCRIPTION).write_text(tokens.to_json())


def _arguments(s: Settings, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=s.steps,
        per_device_train_batch_size=s.micro_batch,
        per_device_eval_batch_size=s.micro_batch,
        gradient_accumulation_steps=s.accumulation,
        learning_rate=s.lr,
        lr_scheduler_type=s.schedule,
        warmup_steps=round(s.warmup * s.steps),
        weight_decay=0.0,
        max_grad_norm=s.clip,
        bf16=s.half,
        use_cpu=not torch.cuda.is_available(),
        **({_CHECKPOINTING: True} if s.checkpointing else {}),
        train_sampling_strategy="sequential",  # the schedule is already random, and the same after a restart
        remove_unused_columns=False,
        prediction_loss_only=True,
        eval_strategy="steps",
        eval_steps=s.evaluate_every,
        save_steps=s.evaluate_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=1,
        logging_nan_inf_filter=False,
        dataloader_num_workers=s.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        **({"fsdp": True} if s.fsdp else {}),
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
        seed=s.seed,
    )


def inputs_of(rows: Sequence[Row], numbers: bool = False) -> dict[str, Any]:
    """A batch as transformers' models take it; `logits_to_keep` spares the head all rows that predict nothing.

    One column more than needed is kept and ignored: transformers leaves the first out when it counts labels."""
    batch = collate(rows)
    return {
        "input_ids": batch.tokens,
        "position_ids": batch.positions,
        "attention_mask": additive(batch.mask, torch.float32) if numbers else batch.mask,
        "labels": F.pad(batch.labels, (1, 0), value=IGNORE),
        "logits_to_keep": batch.keep + 1,
        "use_cache": False,
    }


def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy over the labels of the whole step."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    labels = labels[:, -logits.shape[1] :]  # a plain text has a label in its very first row, and no column more
    count = (labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
    return cross_entropy(logits.float(), labels) / count


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Reports progress, stops at broken gradients, and puts the link description beside every checkpoint."""

    def __init__(self, tokens: LinkTokens, report: Report) -> None:
        self.tokens, self.report = tokens, report
        self.held_out: float | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Raise TrainError before a broken loss is carried into the weights; in all processes alike, for they share it."""
        sums = [p.grad.sum() for p in more["model"].parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(s)) for s in sums):
            raise TrainError(f"step {state.global_step + 1}: the loss or its gradient is not a number. {GOOD}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Raise TrainError when the held-out loss is not a number."""
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            raise TrainError(f"step {state.global_step}: the held-out loss is not a number. {GOOD}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Pass losses on."""
        self.held_out = (logs or {}).get("eval_loss", self.held_out)
        if "loss" in (logs or {}):
            best = state.best_global_step or 0
            self.report(Progress("train", state.global_step, state.max_steps, logs["loss"], self.held_out, best))  # type: ignore[index]

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint can be served as it is."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save:
            (folder / DESCRIPTION).write_text(self.tokens.to_json())


def _last(folder: Path) -> str | None:
    """The last complete checkpoint."""
    whole = [f.parent for f in folder.glob(f"checkpoint-*/{STATE}")]
    return str(max(whole, key=lambda f: int(f.name.rpartition("-")[2]))) if whole else None
